"""Pages of the index against a plain list that is filtered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgld.params import OutputParams
from sgld.server.jobs import index as index_module
from sgld.server.jobs.index import EVERYBODY, JobIndex
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord

KINDS, OWNERS = ("image", "video"), ("alice", "bob")
jobs = st.builds(
    lambda number, kind, owner: Job(JobRecord(str(number), kind, owner, (OutputParams(seed=1),), "mp4", 1.0)),
    st.uuids(),
    st.sampled_from(KINDS),
    st.sampled_from(OWNERS),
)


@given(st.lists(jobs, max_size=20), st.data())
def test_pages_are_slices_of_what_is_there(made: list[Job], data: st.DataObject) -> None:
    index = JobIndex()
    for job in made:
        index.add(job)
    gone = data.draw(st.sets(st.sampled_from(made))) if made else set()
    for job in gone:
        index.remove(job)
    kind, owner = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from((EVERYBODY, *OWNERS)))
    newest_first, limit = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    mine = [job for job in made if job not in gone and job.kind == kind and owner in (EVERYBODY, job.owner)]
    rest = mine[::-1] if newest_first else mine
    seen: list[Job] = []
    more = True
    while more:
        after = seen[-1].id if seen else None
        page, more = index.page(kind, owner, after=after, limit=limit, newest_first=newest_first)
        assert page == rest[len(seen) : len(seen) + limit]
        seen += page
    assert seen == rest


@given(st.lists(jobs, max_size=20), st.data())
def test_a_page_behind_a_removed_job_goes_on(made: list[Job], data: st.DataObject) -> None:
    """Who removes every job of a page before asking for the next one removes them all."""
    index = JobIndex()
    for job in made:
        index.add(job)
    owner, newest_first = data.draw(st.sampled_from((EVERYBODY, *OWNERS))), data.draw(st.booleans())
    limit, after, more, removed = data.draw(st.integers(1, 5)), None, True, []
    while more:
        page, more = index.page("video", owner, after=after, limit=limit, newest_first=newest_first)
        for job in page:
            index.remove(job)
            removed.append(job)
            after = job.id
    mine = [job for job in made if job.kind == "video" and owner in (EVERYBODY, job.owner)]
    assert removed == (mine[::-1] if newest_first else mine)


def test_ids_that_are_not_known_are_followed_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "REMEMBERED", 1)
    index = JobIndex()
    output = (OutputParams(seed=1),)
    made = [Job(JobRecord(f"video_{i}", "video", OWNERS[i % 2], output, "mp4", 1.0)) for i in range(6)]
    for job in made:
        index.add(job)
    for job in made[:3]:
        index.remove(job)

    def ids(owner: str | None, after: str) -> list[str]:
        page, more = index.page("video", owner, after=after, limit=9, newest_first=False)
        assert not more
        return [job.id for job in page]

    assert ids(EVERYBODY, "video_2") == ["video_3", "video_4", "video_5"]
    assert ids("alice", "video_2") == ["video_4"]
    assert ids("bob", "video_2") == [], "another's job"
    assert ids(EVERYBODY, "video_0") == [], "forgotten"
    assert ids(EVERYBODY, "no") == []
