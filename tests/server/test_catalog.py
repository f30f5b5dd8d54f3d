"""Pages of a catalog against a plain list that is filtered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sgld.params import SamplingParams
from sgld.server.catalog import EVERYBODY, Catalog
from sgld.server.jobs import Job

KINDS, OWNERS = ("image", "video"), ("alice", "bob")
jobs = st.builds(
    lambda number, kind, owner: Job(str(number), kind, owner, SamplingParams(seed=[1]), "mp4", 1.0),
    st.integers(),
    st.sampled_from(KINDS),
    st.sampled_from(OWNERS),
)


@given(st.lists(jobs, max_size=20), st.data())
def test_pages_are_slices_of_what_is_there(made: list[Job], data: st.DataObject) -> None:
    catalog = Catalog()
    for job in made:
        catalog.add(job)
    gone = data.draw(st.sets(st.sampled_from(made))) if made else set()
    for job in gone:
        catalog.remove(job)
    kind, owner = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from((EVERYBODY, *OWNERS)))
    newest_first, limit = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    mine = [job for job in made if job not in gone and job.kind == kind and owner in (EVERYBODY, job.owner)]
    rest = mine[::-1] if newest_first else mine
    seen: list[Job] = []
    more = True
    while more:
        after = seen[-1] if seen else None
        page, more = catalog.page(kind, owner, after=after, limit=limit, newest_first=newest_first)
        assert page == rest[len(seen) : len(seen) + limit]
        seen += page
    assert seen == rest
