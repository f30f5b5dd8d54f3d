"""JobRepository: where the records of jobs outlive the process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import attrs

from sgld.errors import SgldError
from sgld.server.jobs.record import JobRecord, from_document, to_document
from sgld.server.jobs.sqlite import Journal
from sgld.server.jobs.webhooks import DELIVERY, Delivery

log = logging.getLogger(__name__)
KIND = "job"


class JobRepository(Protocol):
    """Records of jobs. Each call is one transaction, and calls take effect in their order."""

    @property
    def durable(self) -> bool:
        """Return whether a restarted server finds the records."""

    async def load(self) -> list[JobRecord]:
        """Return the records of the process before this one, the oldest first. Raises SgldError for a damaged one."""

    async def insert(self, record: JobRecord) -> None:
        """Add a record. Raises OutputError if it cannot be written."""

    async def update(self, record: JobRecord, deliveries: Sequence[Delivery] = ()) -> None:
        """Replace a record and add webhook deliveries. A failure is logged, and the record is written again later."""

    async def mark_deleted(self, records: Sequence[JobRecord], deliveries: Sequence[Delivery] = ()) -> None:
        """Mark records as deleted before their files are. Raises OutputError; nothing has changed then."""

    async def delete(self, ids: Sequence[str]) -> None:
        """Delete records. A failure is logged: the next start deletes marked ones."""

    async def flush(self) -> None:
        """Write again the records that could not be written."""


class MemoryJobRepository:
    """No records outlive the process."""

    durable = False

    async def load(self) -> list[JobRecord]:
        return []

    async def insert(self, record: JobRecord) -> None: ...

    async def update(self, record: JobRecord, deliveries: Sequence[Delivery] = ()) -> None: ...

    async def mark_deleted(self, records: Sequence[JobRecord], deliveries: Sequence[Delivery] = ()) -> None: ...

    async def delete(self, ids: Sequence[str]) -> None: ...

    async def flush(self) -> None: ...


class SqliteJobRepository:
    """Records as documents of the journal. Each write brings along the records that failed before."""

    durable = True

    def __init__(self, journal: Journal):
        self.journal = journal
        self._unwritten: dict[str, JobRecord] = {}

    async def load(self) -> list[JobRecord]:
        return await self.journal.restore(KIND, from_document)

    async def insert(self, record: JobRecord) -> None:
        await self._write([record])

    async def update(self, record: JobRecord, deliveries: Sequence[Delivery] = ()) -> None:
        try:
            await self._write([record], deliveries)
        except Exception:  # a job must end, whatever is wrong with the disk
            log.exception("%s: it is not in the journal yet", record.id)
            self._unwritten[record.id] = record

    async def mark_deleted(self, records: Sequence[JobRecord], deliveries: Sequence[Delivery] = ()) -> None:
        await self._write([attrs.evolve(record, status="deleted") for record in records], deliveries)

    async def delete(self, ids: Sequence[str]) -> None:
        try:
            await self.journal.delete(KIND, ids)
        except SgldError as error:
            log.error("the journal still holds %d deleted jobs: %s", len(ids), error)
        for id in ids:
            self._unwritten.pop(id, None)

    async def flush(self) -> None:
        if self._unwritten:
            try:
                await self._write([])
            except Exception:  # the next time may fare better
                log.exception("%d jobs are not in the journal yet", len(self._unwritten))

    async def _write(self, records: Sequence[JobRecord], deliveries: Sequence[Delivery] = ()) -> None:
        """Write records, deliveries and all unwritten records in one transaction."""
        written = self._unwritten | {record.id: record for record in records}
        documents = {(KIND, record.id): to_document(record) for record in written.values()}
        await self.journal.put_many(documents | {(DELIVERY, each.id): attrs.asdict(each) for each in deliveries})
        for id in written:  # calls end in their order: an unwritten record is older than a written one
            self._unwritten.pop(id, None)
