"""Each end of a job costs one transaction and tells one terminal event, over HTTP, real ranks and the real journal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import pytest

from sgld.server.jobs.job import Job
from sgld.server.jobs.record import ENDED
from sgld.server.jobs.sqlite import Journal
from sgld.server.service import SERVICE
from tests.server.jobs.test_jobs import SLOW, Client, Start, start

__all__ = ["start"]
ENDLESS = {"num_inference_steps": 1000}


class CountingJournal(Journal):
    """The journal, with a list of the transactions that concern jobs."""

    made: list[str]

    async def put_many(self, documents: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
        statuses = [str(body["status"]) for (kind, _), body in documents.items() if kind == "job"]
        self.made.extend(["+".join(statuses)] if statuses else [])
        await super().put_many(documents)

    async def delete(self, kind: str, ids: Iterable[str]) -> None:
        self.made.append(f"delete {kind}")
        await super().delete(kind, ids)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of transactions of the server that is started next: the status written, or the deletion."""
    CountingJournal.made = []
    monkeypatch.setattr("sgld.server.app.Journal", CountingJournal)
    return CountingJournal.made


async def reach(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def terminal_events(job: Job) -> list[str]:
    return [event.name async for event in job.follow() if event.name in ENDED]


def jobs_of(client: Client) -> list[Job]:
    return list(client.app[SERVICE].jobs.index)


async def cancel(client: Client, job: Job) -> None:
    assert (await client.call("POST", f"/v1/videos/{job.id}/cancel"))[0] == 200


async def delete(client: Client, job: Job) -> None:
    assert (await client.call("DELETE", f"/v1/videos/{job.id}"))[0] == 200


async def watch(_: Client, job: Job) -> None:
    await job.wait()


End = Callable[[Client, Job], Awaitable[None]]


@pytest.mark.parametrize(
    ("fault", "steps", "end", "wrote", "told"),
    [
        ({}, {}, watch, ["completed"], "completed"),
        ({"fault": "raise", "step": 1}, {}, watch, ["failed"], "failed"),
        (SLOW, ENDLESS, cancel, ["failed"], "failed"),
        (SLOW, ENDLESS, delete, ["deleted", "delete job"], "deleted"),
    ],
    ids=["completed", "failed", "cancelled", "deleted while running"],
)
async def test_a_video_ends_once(
    start: Start,
    transactions: list[str],
    fault: dict[str, Any],
    steps: dict[str, int],
    end: End,
    wrote: list[str],
    told: str,
) -> None:
    client = await start()
    await client.create(fault, **steps)
    (job,) = jobs_of(client)
    events = asyncio.create_task(terminal_events(job))
    await reach(lambda: len(transactions) >= 2)
    await end(client, job)
    assert await events == [told]
    await client.app[SERVICE].jobs.close()
    assert transactions == ["queued", "in_progress", *wrote]


async def test_a_client_that_goes_away_costs_one_transaction(start: Start, transactions: list[str]) -> None:
    client = await start()
    body = {"prompt": json.dumps(SLOW), **ENDLESS}
    request = asyncio.create_task(client.call("POST", "/v1/images/generations", json=body))
    await reach(lambda: any(job.status == "in_progress" for job in jobs_of(client)))
    (job,) = jobs_of(client)
    events = asyncio.create_task(terminal_events(job))
    request.cancel()
    assert await events == ["deleted"]
    await client.app[SERVICE].jobs.close()
    assert transactions == ["queued", "delete job"]


async def test_an_idempotent_repeat_costs_none(start: Start, transactions: list[str]) -> None:
    client = await start()
    headers = {"Idempotency-Key": "once"}
    first = await client.create(headers=headers, seed=1)
    (job,) = jobs_of(client)
    events = asyncio.create_task(terminal_events(job))
    again = await client.create(headers=headers, seed=1)
    await client.until(first, "completed")
    last = await client.create(headers=headers, seed=1)
    assert {first["id"], again["id"], last["id"]} == {job.id}
    assert await events == ["completed"]
    await client.app[SERVICE].jobs.close()
    assert transactions == ["queued", "in_progress", "completed"]
