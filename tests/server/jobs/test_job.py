"""A job's log, and who follows it."""

from __future__ import annotations

import asyncio

from sgld.params import OutputParams
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord, Outcome


def make() -> Job:
    return Job(JobRecord("video_1", "video", "", (OutputParams(seed=1),), "mp4", 1.0))


async def test_a_slow_reader_misses_nothing() -> None:
    """Whatever was published before the end, though the end came while it was being sent."""
    job = make()
    job.events.publish("queued", {})
    seen: list[str] = []

    async def read() -> None:
        async for event in job.follow():
            seen.append(event.name)
            await asyncio.sleep(0.05)  # the client takes its time

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    for name in ("preview", "preview", "progress"):
        job.events.publish(name, {})
    job.record = job.record.end(Outcome("completed"), 0)
    job.events.publish("completed", {}, last=True)
    await reading
    assert seen == ["queued", "preview", "preview", "progress", "completed"]
    assert len(job.events) == 0, "what nobody reads any more is given up"


async def test_an_ended_job_tells_its_end_alone() -> None:
    job = make()
    job.events.publish("queued", {})
    job.record = job.record.end(Outcome("completed"), 0)
    job.events.publish("completed", {}, last=True)
    assert len(job.events) == 0
    (last,) = [event async for event in job.follow()]
    assert (last.number, last.name, last.data["progress"]) == (2, "completed", 100)
