"""Ledger: what the journal knows of the jobs. What it would not take is written again later."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import attrs

from sgld.errors import SgldError
from sgld.server.jobs.job import Job
from sgld.server.jobs.journal import Journal
from sgld.server.jobs.webhooks import DELIVERY, Delivery

log = logging.getLogger(__name__)


class Ledger:
    """Writes jobs to the journal; None: there is no journal, and nothing is written."""

    def __init__(self, journal: Journal | None = None):
        self._journal = journal
        self._owed: set[Job] = set()  # the journal has not taken what became of them

    @property
    def lasts(self) -> bool:
        """Whether what is written outlives the process."""
        return self._journal is not None

    async def restore(self) -> list[Job]:
        """The jobs of the process before this one, by age."""
        return await self._journal.restore("job", Job.restore) if self._journal is not None else []

    async def write(self, job: Job, due: Sequence[Delivery] = (), **changes: Any) -> None:
        """A job with these changes, and what webhooks are owed for it: both or neither."""
        if self._journal is not None:
            deliveries = {(DELIVERY, each.id): attrs.asdict(each) for each in due}
            await self._put({("job", job.id): job.record(**changes), **deliveries})

    async def write_down(self, job: Job, due: Sequence[Delivery] = (), **changes: Any) -> None:
        """Write what happens in any case: a journal that fails is logged, and hears of the job later."""
        try:
            await self.write(job, due, **changes)
        except Exception:  # whatever is wrong with the disk, the job must end
            log.exception("%s: the journal does not hear of it yet", job.id)
            if not job.parked and job.status != "deleted":
                self._owed.add(job)

    async def pay(self) -> None:
        """Write again what the journal did not take."""
        if self._owed:
            try:
                await self._put({})
            except Exception:  # the next time may fare better
                log.exception("the journal does not hear of %d jobs yet", len(self._owed))

    async def _put(self, documents: dict[tuple[str, str], dict[str, Any]]) -> None:
        """Write them, and what the journal did not take before."""
        assert self._journal is not None
        owed = set(self._owed)
        await self._journal.put_many({("job", job.id): job.record() for job in owed} | documents)
        self._owed -= owed

    async def condemn(self, jobs: Sequence[Job]) -> None:
        """They are deleted from now on, in the next process too; once their files have gone, `strike` them."""
        if self._journal is not None and jobs:
            await self._put({("job", job.id): job.record(status="deleted") for job in jobs})

    async def strike(self, jobs: Sequence[Job]) -> None:
        """Remove them; a journal that fails is logged, and the next start does it."""
        if self._journal is not None and jobs:
            try:
                await self._journal.delete("job", [job.id for job in jobs])
            except SgldError as error:
                log.error("the journal still holds %d deleted jobs: %s", len(jobs), error)

    def forget(self, job: Job) -> None:
        """Owe it nothing more."""
        self._owed.discard(job)
