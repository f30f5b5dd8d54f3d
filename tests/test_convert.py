"""Strictness: what a plain value may become, and how a refusal reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from sgld.convert import (
    default_of,
    describe_range,
    fields_of,
    knob,
    knob_of,
    refuse_unbuilt,
    shorten,
    structure,
    type_name,
    unbuilt,
    unstructure,
)
from sgld.errors import BadRequest, NotBuilt, UnknownField, nearest


@attrs.frozen
class Inner:
    side: int = knob(8, "side", min=8)
    later: bool = knob(False, "later", pending="later things")


@attrs.frozen
class Knobs:
    count: int = knob(1, "count", min=1, max=10)
    share: float = knob(0.5, "share", above=0)
    switch: bool = knob(False, "switch")
    name: str | None = knob(None, "name")
    colour: str = knob("red", "colour", choices=("red", "green"), pending="colours", built=("red",))
    shape: str = knob("round", "shape", choices=("round", "square"), synonyms={"box": "square"})
    sizes: list[int] = knob([], "sizes", max=5)
    seed: int | list[int] | None = knob(None, "seed")
    extra: dict[str, Any] | None = knob(None, "extra")
    paths: dict[str, str] = knob({}, "paths")
    inner: Inner = knob(Inner(), "inner")
    secret: str | None = knob(None, "secret", secret=True)


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"count": 3}, "count", 3),
        ({"share": 1}, "share", 1.0),
        ({"switch": True}, "switch", True),
        ({"name": "浣熊"}, "name", "浣熊"),
        ({"count": None}, "count", 1),
        ({"shape": "box"}, "shape", "square"),
        ({"sizes": (1, 2)}, "sizes", [1, 2]),
        ({"seed": 3}, "seed", 3),
        ({"seed": [3, 4]}, "seed", [3, 4]),
        ({"extra": {"a": [1, None]}}, "extra", {"a": [1, None]}),
        ({"inner": {"side": 9}}, "inner", Inner(9)),
        ({"inner": {"side": None}}, "inner", Inner(8)),
    ],
)
def test_values_that_fit(values: dict[str, Any], field: str, value: Any) -> None:
    made = getattr(structure(values, Knobs), field)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": 12.7}, "count: 12.7 is not a valid int"),
        ({"count": 3.0}, "count: 3.0 is not a valid int"),
        ({"count": "3"}, "count: '3' is not a valid int"),
        ({"count": True}, "count: True is not a valid int"),
        ({"count": 0}, "count: 0 is out of range; allowed is 1 to 10"),
        ({"count": 11}, "count: 11 is out of range; allowed is 1 to 10"),
        ({"shape": "boxes"}, "shape: 'boxes' is not one of round, square"),
        ({"share": 0}, "share: 0.0 is out of range; allowed is more than 0"),
        ({"share": float("nan")}, "share: nan is not a finite number"),
        ({"share": float("inf")}, "share: inf is not a finite number"),
        ({"share": 10**400}, f"share: 1{'0' * 116}... is not a valid number"),
        ({"share": True}, "share: True is not a valid number"),
        ({"switch": "false"}, "switch: 'false' is not true or false"),
        ({"switch": 1}, "switch: 1 is not true or false"),
        ({"name": 3}, "name: 3 is not a valid text"),
        ({"name": "a\ud800"}, "name: 'a\\ud800' is not a valid text"),
        ({"colour": "gren"}, "colour: 'gren' is not one of red, green; did you mean green?"),
        ({"sizes": "12"}, "sizes: '12' is not a valid list of int"),
        ({"sizes": [1, "2"]}, "sizes: '2' is not a valid int"),
        ({"sizes": [1, 6]}, "sizes: 6 is out of range; allowed is at most 5"),
        ({"seed": [1, "x"]}, "seed: [1, 'x'] is not a valid int or list of int"),
        ({"extra": [1]}, "extra: [1] is not a valid map of names to values"),
        ({"paths": {"vae": 3}}, "paths: 3 is not a valid text"),
        ({"paths": "vae"}, "paths: 'vae' is not a valid map of names to values"),
        ({"inner": 3}, "inner: 3 is not a valid map of names to values"),
        ({"inner": {"side": 7}}, "inner.side: 7 is out of range; allowed is at least 8"),
        ({"inner": {"side": "x"}}, "inner.side: 'x' is not a valid int"),
        ({"secret": 31337}, "secret: its value is not a valid text"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRequest) as caught:
        structure(values, Knobs)
    assert caught.value.message == line
    assert caught.value.param == line.split(":")[0]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"cuont": 1}, "unknown key 'cuont'; did you mean count?"),
        ({"inner": {"sied": 1}}, "unknown key 'inner.sied'; did you mean side?"),
        ({"inner": {"zzz": 1}}, "unknown key 'inner.zzz'"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UnknownField) as caught:
        structure(values, Knobs)
    assert caught.value.message == line


def test_defaults_are_not_shared() -> None:
    structure({}, Knobs).sizes.append(1)
    assert structure({}, Knobs).sizes == default_of(fields_of(Knobs)["sizes"]) == []


def test_what_is_not_built_is_refused_by_name_with_the_rest() -> None:
    asked = structure({"colour": "green", "inner": {"later": True}}, Knobs)
    assert [knob.name for knob in unbuilt(asked)] == ["colour", "inner.later"]
    told = "not built yet in this version of sgld"
    with pytest.raises(NotBuilt) as caught:
        refuse_unbuilt(asked, spell=lambda name: f"<{name}>")
    assert caught.value.message == f"<colour>: 'green' is {told} (colours); use red; nor are <inner.later>"
    assert caught.value.param == "colour"
    with pytest.raises(NotBuilt, match=re.escape(f"inner.later: {told} (later things); leave it out")):
        refuse_unbuilt(structure({"inner": {"later": True}}, Knobs))
    refuse_unbuilt(structure({"colour": "red", "inner": {"later": False}}, Knobs))


def test_a_secret_is_in_no_repr() -> None:
    assert "hunter2" not in repr(Knobs(secret="hunter2"))


@pytest.mark.parametrize(
    ("name", "type_told", "range_told"),
    [("count", "int", "1 to 10"), ("share", "number", "more than 0"), ("sizes", "list of int", "at most 5")],
)
def test_types_and_ranges_in_words(name: str, type_told: str, range_told: str) -> None:
    field = fields_of(Knobs)[name]
    assert (type_name(field.type), describe_range(knob_of(field))) == (type_told, range_told)


def test_plain_values_survive_the_way_there_and_back() -> None:
    made = structure({"inner": {"side": 9}, "seed": [1], "extra": {"a": (1,)}}, Knobs)
    assert structure(unstructure(made), Knobs) == attrs.evolve(made, extra={"a": [1]})


class Barely(list[Any]):
    """A list, or the keys of a map, of which only the beginning may be read."""

    def __iter__(self) -> Iterator[Any]:
        for i, item in enumerate(super().__iter__()):
            assert i < 200, "the beginning is enough"
            yield item


class BarelyMap(dict[str, Any]):
    def __iter__(self) -> Iterator[str]:
        return iter(Barely(super().__iter__()))


def many(count: int) -> BarelyMap:
    return BarelyMap({f"k{i}": i for i in range(count)})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"sizes": Barely([1] * 1001)}, "sizes: 1001 entries are too many; at most 1000 are allowed"),
        ({"seed": Barely([1] * 1001)}, "seed: 1001 entries are too many; at most 1000 are allowed"),
        ({"extra": many(1001)}, "extra: 1001 entries are too many; at most 1000 are allowed"),
        ({"paths": many(1001)}, "paths: 1001 entries are too many; at most 1000 are allowed"),
        ({"name": "x" * 32769}, "name: 32769 characters are too many; at most 32768 are allowed"),
        ({"count": Barely([1] * 1001)}, f"count: [{'1, ' * 38}1,... is not a valid int"),
        ({"inner": many(1001)}, "unknown key 'inner.k0'"),
        (many(1001), "unknown key 'k0'"),
    ],
)
def test_what_is_too_long_is_not_walked(values: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRequest) as caught:
        structure(values, Knobs)
    assert caught.value.message == line


def test_what_is_just_short_enough() -> None:
    made = structure({"sizes": [1] * 1000, "extra": dict(many(1000)), "name": "x" * 32768}, Knobs)
    assert (len(made.sizes), len(made.extra or {}), len(made.name or "")) == (1000, 1000, 32768)


def test_only_short_names_get_a_hint() -> None:
    assert nearest("k" * 63 + "x", ["k" * 64]) == f"; did you mean {'k' * 64}?"
    assert nearest("k" * 64 + "x", ["k" * 64]) == ""


@pytest.mark.parametrize("value", [{"a": [1, None, "x"], "b": {}, "c": [[], True]}, [], (1, 2), 1.5, "it's"])
def test_a_short_value_is_shown_as_it_is(value: Any) -> None:
    assert shorten(value) == repr(value)


@pytest.mark.parametrize("value", ["x" * 1000, Barely(["x"] * 1000), many(1000), [[["x" * 1000]]], {"x" * 1000: 1}])
def test_a_shown_value_is_one_short_line(value: Any) -> None:
    assert shorten(value) == f"{repr(value)[:117]}..."
    assert shorten("a\nb") == "'a\\nb'"
