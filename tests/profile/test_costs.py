from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import HeteroError, ProfileError
from lightning_hetero.profile import Curve, Flow, Line, ModelProfile, UnitCost

SECONDS = st.floats(0, 1e4, allow_nan=False)
BYTES = st.floats(0, 1e12, allow_nan=False)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    rows = sorted(draw(st.sets(st.integers(1, 4096), min_size=1, max_size=6)))
    return Curve(tuple((row, draw(SECONDS)) for row in rows))


@st.composite
def rising_curves(draw: st.DrawFn) -> Curve:
    rows = sorted(draw(st.sets(st.integers(1, 4096), min_size=2, max_size=6)))
    return Curve(tuple(zip(rows, sorted(draw(st.lists(SECONDS, min_size=len(rows), max_size=len(rows)))), strict=True)))


LINES = st.builds(Line, BYTES, BYTES)
UNITS = st.builds(
    UnitCost,
    name=NAMES,
    calls=st.integers(1, 9),
    forward_s=st.dictionaries(NAMES, curves(), max_size=3),
    backward_s=st.dictionaries(NAMES, curves(), max_size=3),
    saved_bytes=LINES,
    temporary_bytes=LINES,
)
FLOWS = st.builds(Flow, source=st.text(max_size=5), target=st.text(max_size=5), size_bytes=LINES, chained=st.booleans())
PROFILES = st.builds(
    ModelProfile,
    model=NAMES,
    rows=st.integers(1, 999),
    units=st.lists(UNITS, max_size=4).map(tuple),
    own_code=UNITS,
    flows=st.lists(FLOWS, max_size=4).map(tuple),
    optimizer_s_per_byte=st.dictionaries(NAMES, SECONDS, max_size=3),
    call_overhead_s=SECONDS,
    estimated=st.booleans(),
    notes=st.lists(st.text(max_size=9), max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(PROFILES)
def test_a_profile_survives_json(profile: ModelProfile) -> None:
    assert ModelProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@settings(deadline=None)
@given(curves())
def test_a_curve_goes_through_its_points(curve: Curve) -> None:
    for rows, seconds in curve.points:
        assert curve(rows) == pytest.approx(seconds, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(rising_curves(), st.integers(1, 5000), st.integers(1, 5000))
def test_a_curve_of_rising_points_rises(curve: Curve, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert 0 <= curve(low) <= curve(high) + 1e-6


@settings(deadline=None)
@given(curves(), st.integers(0, 5000), st.floats(0.01, 100))
def test_a_scaled_curve_is_scaled_everywhere(curve: Curve, rows: int, factor: float) -> None:
    assert curve.scaled(factor)(rows) == pytest.approx(curve(rows) * factor, rel=1e-6, abs=1e-6)


def test_nothing_takes_no_time_and_one_point_grows_with_the_rows() -> None:
    assert Curve(((4, 2.0), (8, 3.0)))(0) == 0.0
    assert Curve(((4, 2.0),))(8) == 4.0
    assert Curve(((4, 1.0), (8, 3.0)))(1) == 0.0  # the first line, which would lead below zero
    assert Curve(((4, 1.0), (8, 3.0)))(12) == 5.0


@settings(deadline=None)
@given(LINES, LINES, st.integers(0, 1000), st.floats(0, 10))
def test_lines_add_and_scale(one: Line, other: Line, rows: int, factor: float) -> None:
    assert (one + other)(rows) == pytest.approx(one(rows) + other(rows))
    assert one.scaled(factor)(rows) == pytest.approx(one(rows) * factor, rel=1e-9)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ((), r"a curve needs points with rising rows, at least 1; got rows \[\]"),
        (((2, 1.0), (2, 1.0)), r"a curve needs points with rising rows, at least 1; got rows \[2, 2\]"),
        (((0, 1.0),), r"a curve needs points with rising rows, at least 1; got rows \[0\]"),
        (((1, -1.0),), r"a curve needs finite seconds, at least 0; got \[-1.0\]"),
        (((1, float("nan")),), r"a curve needs finite seconds, at least 0; got \[nan\]"),
    ],
)
def test_what_is_no_curve(points: tuple[tuple[int, float], ...], text: str) -> None:
    with pytest.raises(ProfileError, match=text) as error:
        Curve(points)
    assert isinstance(error.value, HeteroError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("damage", ["units", "flows", "notes", "own_code"])
def test_what_is_no_profile(damage: str) -> None:
    data = ModelProfile(model="m", rows=1, units=()).to_dict()
    del data[damage]
    with pytest.raises(ProfileError, match=f"not a profile of this package: KeyError: '{damage}'"):
        ModelProfile.from_dict(data)


def test_an_unknown_field_is_no_profile() -> None:
    data = {**ModelProfile(model="m", rows=1, units=()).to_dict(), "colour": "red"}
    with pytest.raises(ProfileError, match=r"not a profile of this package: TypeError: .*colour"):
        ModelProfile.from_dict(data)


def test_devices_are_those_that_have_every_unit() -> None:
    line = Curve(((1, 1.0),))
    profile = ModelProfile(
        model="m",
        rows=1,
        units=(UnitCost(name="a", forward_s={"x": line, "y": line}), UnitCost(name="b", forward_s={"y": line})),
    )

    assert profile.devices == ("y",)
    assert "a" in profile
    assert "c" not in profile
    assert profile["b"].name == "b"
    assert profile[""] is profile.own_code
