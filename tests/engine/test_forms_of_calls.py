"""A verdict holds for calls of one form, as long as what the code may decide by stays: else there is another trial."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_hetero.runtime.engine.batch import batch_rows, cut_rows, not_of_rows
from lightning_hetero.testing.cut_models import Between

EXACT = 1e-12
COUPLED = "its rows depend on each other"


@pytest.fixture
def devices() -> str:
    return "cpu@speed=1,cpu@speed=1,cpu@speed=1"


def rows(count: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layers(nn.Module):
    """Two layers, and something in between that looks at how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.b(self.between(self.a(x), *args, **kwargs))  # type: ignore[no-any-return]


@dataclass
class Mean:
    of: Tensor


@dataclass
class Rows:
    of: Tensor


class Form(Layers):
    """Depends on the batch for one form of its argument only."""

    def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (given,) = (*args, *kwargs.values())
        is_mean = "mean" in kwargs or isinstance(given, (Mean, tuple)) or (isinstance(given, dict) and "mean" in given)
        return h - h.mean(0) if is_mean else h


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize(
    ("apart", "coupled"),
    [
        (lambda model, x, e: model(x, rows=e), lambda model, x, e: model(x, mean=e)),
        (lambda model, x, e: model(x, {"rows": e}), lambda model, x, e: model(x, {"mean": e})),
        (lambda model, x, e: model(x, Rows(e)), lambda model, x, e: model(x, Mean(e))),
        (lambda model, x, e: model(x, [e]), lambda model, x, e: model(x, (e,))),
    ],
    ids=["names of arguments", "keys", "classes", "list and tuple"],
)  # fmt: skip
def test_the_same_tensors_in_another_structure(pair: Any, apart: Any, coupled: Any, after: int) -> None:
    both = pair(Form().double())
    for _ in range(after):
        both.step(lambda model: apart(model, rows(), rows(seed=5)).pow(2).mean())
    assert both.calls == after
    for _ in range(2):
        both.step(lambda model: coupled(model, rows(), rows(seed=5)).pow(2).mean())
        assert both.difference < EXACT
        both.step(lambda model: apart(model, rows(), rows(seed=5)).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == after + 2
    assert any(COUPLED in reason for reason in both.engine.reasons)


def keep(h: Tensor) -> Tensor:
    return h


def centre(h: Tensor) -> Tensor:
    return h - h.mean(0)


class Argument(Layers):
    def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (what,) = args
        if isinstance(what, nn.Module):
            return centre(h) if what.centred else h  # type: ignore[truthy-bool]
        if callable(what):
            return what(h)  # type: ignore[no-any-return]
        return centre(h) if what in (b"mean", 1j, slice(1, 2), range(2)) else h


class Switch(nn.Module):
    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred


@pytest.mark.parametrize(
    ("apart", "coupled"),
    [(keep, centre), (b"rows", b"mean"), (2j, 1j), (slice(3), slice(1, 2)), (range(3), range(2)),
     (Switch(False), Switch(True))],
    ids=["function", "bytes", "complex", "slice", "range", "module"],
)  # fmt: skip
def test_another_argument_that_is_no_tensor(pair: Any, apart: Any, coupled: Any) -> None:
    both = pair(Argument().double())
    for argument in (apart, apart, coupled, apart):
        both.step(lambda model, argument=argument: model(rows(), argument).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 3


def test_an_input_that_is_not_cut_gets_larger(pair: Any) -> None:
    def crowded(model: Any, h: Tensor, table: Tensor) -> Tensor:
        return h - h.mean(0) if len(table) > 20 else h + table.mean()

    both = pair(Between(crowded).double())
    for count in (15, 16, 25):
        both.step(lambda model, count=count: model(rows(), rows(count, seed=4)).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 2


def test_the_parts_of_a_trial_are_those_of_the_calls_too(pair: Any) -> None:
    """Two parts of the first batch have the same longest row, four have not."""
    lengths = torch.tensor([4.0, 1, 1, 4, 1, 1, 1, 1, 1, 4], dtype=torch.float64)

    def padded(model: Any, h: Tensor, length: Tensor) -> Tensor:
        with torch.no_grad():
            scale = length / length.max()
        return h * scale[:, None]

    both = pair(Between(padded).double())
    both.step(lambda model: model(rows(), lengths).pow(2).mean())
    assert both.difference < EXACT


HELPERS = """
import torch

CENTRED = False


class Settings:
    class Train:
        centred = False


def maybe(h, centred=None):
    return h - h.mean(0) if (CENTRED if centred is None else centred) else h


def nested(h):
    return h - h.mean(0) if Settings.Train.centred else h


def marked(h):
    return h - h.mean(0) if marked.centred else h


def ramp(h, amount):
    return h - h.mean(0) * (amount if amount > 0 else 0)


marked.centred = False
"""


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A file beside that of the model, as projects have that are no package."""
    (tmp_path / "own_helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_helpers")
    sys.modules.pop("own_helpers")


@pytest.mark.parametrize("name", ["maybe", "nested", "marked"])
def test_a_helper_in_another_file_decides_otherwise_later_on(pair: Any, helpers: Any, name: str) -> None:
    helper = getattr(helpers, name)

    class Helped(Layers):
        def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return helper(h) if name != "maybe" else helpers.maybe(h)  # type: ignore[no-any-return]

    both = pair(Helped().double())

    def step() -> None:
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT

    for _ in range(6):
        step()
    assert both.calls == 6
    helpers.CENTRED = helpers.Settings.Train.centred = helpers.marked.centred = True
    step()
    assert both.calls == 6


@pytest.mark.parametrize("name", ["np_bool", "np_int", "array", "imaginary", "keys"])
def test_settings_of_other_kinds(pair: Any, name: str) -> None:
    values: dict[str, tuple[Any, Any]] = {
        "np_bool": (np.bool_(False), np.bool_(True)),
        "np_int": (np.int64(0), np.int64(1)),
        "array": (np.zeros(2), np.ones(2)),
        "imaginary": (0j, 1j),
        "keys": ({1: True}, {2: True}),
    }
    before, after = values[name]

    class Decides(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.setting: Any = before

        def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            setting = self.setting
            is_centred = 2 in setting if isinstance(setting, dict) else bool(np.any(setting))
            return h - h.mean(0) if is_centred else h

    both = pair(Decides().double())
    for setting in (before, before, after, before):
        both.model.setting = both.alone.setting = setting
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 3


def test_a_number_that_grows_and_is_clamped(pair: Any) -> None:
    """Without a comparison, and nothing until it is large enough."""

    class Ramp(Layers):
        progress = 0.0

        def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return h - max(0.0, self.progress - 0.5) * h.mean(0)

    both = pair(Ramp().double())
    for step in range(14):
        both.model.progress = both.alone.progress = step / 14
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT


class Counts:
    calls = 0


def test_a_class_that_counts_calls_counts_one(pair: Any) -> None:
    def counting(model: Any, h: Tensor) -> Tensor:
        Counts.calls += 1
        return h

    both = pair(Between(counting).double())
    Counts.calls = 0
    for _ in range(3):
        both.model(rows())
    assert Counts.calls == 3
    assert both.calls == 0


class Counting(Layers):
    count = 0

    def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        type(self).count += 1
        return h


class Inherits(Counting):
    """Its count begins as that of its base."""


def test_a_count_that_a_class_inherits(pair: Any) -> None:
    both = pair(Inherits().double())
    for _ in range(3):
        both.model(rows())
    assert (Inherits.count, Counting.count) == (3, 0)
    assert both.calls == 0


@pytest.mark.parametrize("kind", ["RandomState", "default_rng"])
def test_generators_of_numpy_go_on_as_if_there_had_been_no_trial(pair: Any, kind: str) -> None:
    class Noisy(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.source = getattr(np.random, kind)(3)

        def between(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return h + torch.as_tensor(self.source.normal(size=tuple(h.shape)))

    both = pair(Noisy().double())
    for _ in range(3):
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT


def pictures(count: int, *sides: int, channels: int = 3) -> list[Tensor]:
    return [torch.zeros(channels, side, side) for side, _ in zip(sides * count, range(count), strict=False)]


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(8, 4), torch.zeros(8)), 8),
        ([torch.zeros(8, 4), torch.zeros(8, 2)], 8),
        ({"labelled": [torch.zeros(8, 4), torch.zeros(8)], "unlabelled": [torch.zeros(56, 4), torch.zeros(56, 4)]}, 8),
        (((torch.zeros(8, 4), torch.zeros(8, 1)), (torch.zeros(6, 4), torch.zeros(6, 1))), 8),
        (([torch.zeros(8, 3, 32, 32), torch.zeros(8, 3, 16, 16)], torch.zeros(8)), 8),
        ([[torch.zeros(8, 3, 32, 32), torch.zeros(8, 3, 16, 16)]], 8),
        ((pictures(5, 8, 9), [{"boxes": torch.zeros(n, 4)} for n in range(1, 6)]), 5),
        ((pictures(5, 8), [{"boxes": torch.zeros(n, 4)} for n in range(1, 6)]), 5),
        ({"texts": [torch.zeros(n) for n in (3, 5, 7, 2)], "labels": torch.zeros(4)}, 4),
        ({"texts": [torch.zeros(n) for n in (3, 4, 7, 2)], "labels": torch.zeros(4)}, None),
        ((pictures(3, 8, 9), [{"boxes": torch.zeros(n, 4)} for n in range(1, 4)]), None),
        ((["a", "b"], torch.zeros(2, 4)), 2),
        ([(torch.zeros(7, 4), torch.zeros(())), (torch.zeros(7, 4), torch.zeros(()))], None),
        ([(torch.zeros(7, 4), 3), (torch.zeros(7, 4), 1)], None),
        ([{"x": torch.zeros(7, 4), "y": torch.zeros(7)}] * 4, None),
        ({"s": [{"x": torch.zeros(n, 4), "y": torch.zeros(1)} for n in (5, 7)]}, None),
        ([Sample(torch.zeros(7, 4), torch.zeros(2))] * 2, None),
        ([torch.zeros(7)] * 8, None),
        ((torch.zeros(8, 4), torch.zeros(8, 4)), 8),
        ([torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(8, 4)], 8),
        (((torch.zeros(8, 4), torch.zeros(8, 4)), (torch.zeros(8, 4), torch.zeros(8, 4))), 8),
        (({"x": torch.zeros(8, 4)}, {"y": torch.zeros(8)}), 8),
        ({"x": torch.zeros(8, 4), "of": {n: {"y": torch.zeros(3)} for n in range(8)}}, None),
        ((pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)]), torch.zeros(2)), None),
        ((torch.zeros(8, 4), torch.eye(8).to_sparse()), None),
    ],
    ids=["tensors", "two tensors", "two loaders", "pairs of two loaders", "views", "views alone",
         "pictures of several sizes", "pictures of one size",
         "texts", "texts of as many words", "as many pictures as channels", "words",
         "samples", "samples with numbers", "samples as mappings", "samples in a mapping", "samples of a class",
         "samples of one tensor", "a pair", "a triplet", "pairs", "inputs and targets", "by number", "packed",
         "sparse"],
)  # fmt: skip
def test_rows_of_batches_of_lists(batch: Any, expected: int | None) -> None:
    assert batch_rows(batch) == expected


def test_what_once_had_other_rows_is_never_cut() -> None:
    def batch(count: int) -> dict[str, Any]:
        return {
            "x": torch.arange(count),
            "texts": [str(number) for number in range(count)],
            "names": ["cat", "dog"],
            "other loader": [torch.arange(5), torch.arange(5)],
            "weights": torch.arange(2),
            "samples": [torch.zeros(7) for _ in range(count)],
            "maybe": torch.zeros(0 if count > 2 else count),
        }

    seen = set(not_of_rows(batch(6), 6))
    last = batch(2)
    part = cut_rows(last, 2, 1, 2, seen)
    assert part["x"].tolist() == [1]
    assert part["texts"] == ["1"]
    assert len(part["samples"]) == len(part["maybe"]) == 1
    for name in ("names", "other loader", "weights"):
        assert len(part[name]) == 2
    assert len(cut_rows(last, 2, 1, 2)["names"]) == 1  # as far as this batch tells
