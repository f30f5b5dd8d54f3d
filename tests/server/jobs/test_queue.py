"""Whose turn it is: classes, aging, and service shared between owners."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgld.params import PRIORITIES
from sgld.server.jobs.queue import AGING_S, FairQueue

OWNERS = ("ann", "bob", "cat")


def push(
    queue: FairQueue[str], *items: str, owner: str = "ann", priority: str = "normal", cost: float = 1, now: float = 0
) -> None:
    for item in items:
        queue.push(item, owner=owner, priority=priority, cost=cost, now=now)


def drain(queue: FairQueue[str], now: float = 0) -> list[str]:
    return [queue.pop(now) for _ in range(len(queue))]


@pytest.fixture
def queue() -> FairQueue[str]:
    return FairQueue()


def test_one_owner_is_served_first_in_first_out(queue: FairQueue[str]) -> None:
    push(queue, "a", "b", "c")
    assert len(queue) == 3
    assert drain(queue) == ["a", "b", "c"]


def test_an_empty_queue(queue: FairQueue[str]) -> None:
    assert (len(queue), queue.order(0), queue.remove("a")) == (0, [], False)
    with pytest.raises(IndexError, match="empty"):
        queue.pop(0)


def test_owners_alternate_although_one_pushed_fifty_first(queue: FairQueue[str]) -> None:
    push(queue, *(f"a{i}" for i in range(50)))
    push(queue, "b0", "b1", "b2", owner="bob")
    assert drain(queue)[:8] == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "a4"]


def test_costs_weigh(queue: FairQueue[str]) -> None:
    push(queue, "a0", "a1", cost=3)
    push(queue, *(f"b{i}" for i in range(6)), owner="bob", cost=1)
    assert drain(queue) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5"]


def test_a_costly_job_is_paid_for_by_an_owner_who_pushes_one_at_a_time(queue: FairQueue[str]) -> None:
    push(queue, "a0", cost=4)
    push(queue, *(f"b{i}" for i in range(6)), owner="bob", cost=1)
    assert queue.pop(0) == "a0"
    push(queue, "a1", cost=4)
    assert drain(queue) == ["b0", "b1", "b2", "b3", "b4", "a1", "b5"]


def test_idling_earns_nothing(queue: FairQueue[str]) -> None:
    push(queue, "b0", owner="bob")
    push(queue, *(f"a{i}" for i in range(40)))
    assert [queue.pop(0) for _ in range(31)] == ["b0", *(f"a{i}" for i in range(30))]
    push(queue, *(f"b{i}" for i in range(1, 6)), owner="bob")  # bob was away for 29 jobs, and takes turns again
    owners = "".join(item[0] for item in drain(queue)[:10])
    assert owners in ("ababababab", "bababababa")


def test_nor_does_idling_while_the_queue_is_empty(queue: FairQueue[str]) -> None:
    for i in range(30):
        push(queue, f"a{i}")
        queue.pop(0)
    push(queue, "a", "aa")
    push(queue, "b", "bb", owner="bob")
    assert drain(queue) == ["a", "b", "aa", "bb"]


def test_classes_go_before_fairness(queue: FairQueue[str]) -> None:
    push(queue, "low", owner="bob", priority="low")
    push(queue, "normal", owner="bob")
    push(queue, "high 1", "high 2", priority="high")
    assert drain(queue) == ["high 1", "high 2", "normal", "low"]


def test_service_in_one_class_counts_in_the_others(queue: FairQueue[str]) -> None:
    push(queue, "a high", priority="high", cost=5)
    push(queue, "a normal")
    push(queue, "b0", "b1", owner="bob")
    assert drain(queue) == ["a high", "b0", "b1", "a normal"]


def test_an_unknown_class(queue: FairQueue[str]) -> None:
    with pytest.raises(ValueError):
        push(queue, "a", priority="urgent")
    assert len(queue) == 0


@pytest.mark.parametrize(("other", "minutes"), [("normal", 1), ("high", 2)])
def test_a_job_rises_one_class_each_minute(queue: FairQueue[str], other: str, minutes: int) -> None:
    push(queue, "low", priority="low")
    push(queue, "other", priority=other, now=minutes * AGING_S)
    assert queue.order(minutes * AGING_S - 0.001) == ["other", "low"]
    assert queue.order(minutes * AGING_S) == ["low", "other"]


def test_nothing_rises_above_high(queue: FairQueue[str]) -> None:
    push(queue, "a0", "a1", priority="high")
    push(queue, "b0", "b1", owner="bob", priority="high", now=10 * AGING_S)
    assert drain(queue, now=10 * AGING_S) == ["a0", "b0", "a1", "b1"]


def test_low_is_not_starved_by_a_stream_of_high(queue: FairQueue[str]) -> None:
    push(queue, "low", priority="low", now=0)
    for now in range(1000):
        push(queue, f"high {now}", priority="high", now=now)
        if queue.pop(now) == "low":
            break
    assert now == 2 * AGING_S


def test_a_job_of_the_past_has_waited(queue: FairQueue[str]) -> None:
    push(queue, "new", owner="bob", now=1000)
    push(queue, "restored", now=1000 - AGING_S)
    assert queue.order(1000) == ["restored", "new"]


def test_a_clock_that_steps_back_changes_no_class(queue: FairQueue[str]) -> None:
    push(queue, "normal", now=0)
    push(queue, "high", priority="high", now=1000)
    assert drain(queue, now=AGING_S - 1) == ["high", "normal"]


def test_a_removed_item_costs_nothing(queue: FairQueue[str]) -> None:
    push(queue, "a0", "a1", "a2", cost=100)
    push(queue, "b0", "b1", owner="bob", cost=100)
    assert queue.remove("a0")
    assert not queue.remove("a0")
    assert "a0" not in queue.order(0)
    assert drain(queue) == ["a1", "b0", "a2", "b1"]


def test_an_item_may_come_back(queue: FairQueue[str]) -> None:
    push(queue, "a", "b")
    queue.remove("a")
    push(queue, "a")
    assert drain(queue) == ["b", "a"]


Step = tuple[str, str, str, float, float]
steps = st.lists(
    st.tuples(
        st.sampled_from(("push", "push", "push", "pop", "remove")),
        st.sampled_from(OWNERS),
        st.sampled_from(PRIORITIES),
        st.sampled_from((0.5, 1.0, 7.0)),
        st.floats(0, 50),
    ),
    max_size=60,
)


def play(script: list[Step]) -> tuple[FairQueue[str], float]:
    """A queue with any past, and the time of its last event."""
    queue: FairQueue[str] = FairQueue()
    now = 0.0
    for i, (what, owner, priority, cost, later) in enumerate(script):
        now += later
        if what == "push":
            push(queue, f"{owner} {priority} {i}", owner=owner, priority=priority, cost=cost, now=now)
        elif what == "pop" and queue:
            queue.pop(now)
        elif what == "remove" and queue:
            assert queue.remove(queue.order(now)[i % len(queue)])
    return queue, now


@given(steps, st.floats(0, 200))
def test_order_is_what_pops_give(script: list[Step], later: float) -> None:
    queue, now = play(script)
    order = queue.order(now + later)
    assert order == queue.order(now + later) and len(order) == len(queue)
    assert drain(copy.deepcopy(queue), now + later) == order


@given(steps)
def test_one_owners_items_of_a_class_keep_their_order(script: list[Step]) -> None:
    queue, now = play(script)
    for owner, priority in itertools.product(OWNERS, PRIORITIES):
        numbers = [int(item.split()[2]) for item in queue.order(now) if item.startswith(f"{owner} {priority} ")]
        assert numbers == sorted(numbers)


@given(st.integers(0, 9), st.lists(st.tuples(*[st.sampled_from((1.0, 2.0, 9.0))] * 2), min_size=1, max_size=40))
def test_two_busy_owners_never_differ_by_more_than_a_job_each(past: int, costs: list[tuple[float, float]]) -> None:
    """Theorem 1 of the paper, while a third owner is served before and beside them."""
    queue: FairQueue[str] = FairQueue()
    push(queue, *(f"cat {i}" for i in range(10)), owner="cat", cost=3)
    assert [queue.pop(0) for _ in range(past)] == [f"cat {i}" for i in range(past)]
    cost_of = {}
    for i, pair in enumerate(costs):
        for owner, cost in zip(("ann", "bob"), pair, strict=True):
            cost_of[f"{owner} {i}"] = cost
            push(queue, f"{owner} {i}", owner=owner, cost=cost)
    service, left = dict.fromkeys(OWNERS, 0.0), dict.fromkeys(("ann", "bob"), len(costs))
    bound = sum(max(column) for column in zip(*costs, strict=True))
    for item in drain(queue):
        if item in cost_of:
            owner = item.split()[0]
            service[owner] += cost_of[item]
            left[owner] -= 1
            assert not all(left.values()) or abs(service["ann"] - service["bob"]) <= bound
