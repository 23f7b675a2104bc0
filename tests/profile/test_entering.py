"""What a recording knows of the tensors that modules with units are called with, which checkpointing has to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.profile import Line
from lightning_hetero.profile.recording import Recording

ROWS = 6
ROW_BYTES = 8 * 4
Record = Callable[..., Recording]


class Inner(nn.Module):
    """Takes a tensor that only its own code looks at, and one that its unit takes as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Any, memory: Tensor) -> Tensor:
        x = x if isinstance(x, Tensor) else x.tensor
        result: Tensor = self.layer(x * 2) + self.other(memory)
        return result


class Outer(nn.Module):
    """Hands one memory to all parts. Args: wrap: What becomes of the other tensor on its way to them."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.parts = nn.ModuleList(Inner() for _ in range(2))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        memory = self.first(x)
        for part in self.parts:
            x = part(self.wrap(x), memory)
        return x


class Closed:
    """Nobody looks into objects of user code."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class Open:
    tensor: Tensor


def entering(recording: Recording, module: str) -> list[tuple[str, str | None, bool]]:
    return [
        (each.source, each.taken_before_by, each.taken_inside) for each in recording.entering if each.module == module
    ]


def test_maker_taker_and_size_of_what_modules_are_called_with(record: Record) -> None:
    recording = record(Outer(), torch.ones(ROWS, 8))
    assert entering(recording, "parts.0") == [("", "first", False), ("first", None, True)]
    assert entering(recording, "parts.1") == [("", None, False), ("first", "parts.0.other", True)]
    assert {each.size_bytes for each in recording.entering} == {Line(0.0, ROW_BYTES)}


def test_a_tensor_that_several_modules_are_called_with_has_one_number(record: Record) -> None:
    recording = record(Outer(), torch.ones(ROWS, 8))
    memories = {each.tensor for each in recording.entering if each.source == "first"}
    batches = {each.tensor for each in recording.entering if each.module in ("", "parts.0") and not each.source}
    assert len(memories) == len(batches) == 1
    assert len({each.tensor for each in recording.entering}) == 3


def test_dataclasses_are_looked_into(record: Record) -> None:
    plain, wrapped = (record(Outer(wrap), torch.ones(ROWS, 8)) for wrap in (lambda x: x, Open))
    assert wrapped.entering == plain.entering


def test_nothing_is_said_of_a_module_that_is_called_with_what_nobody_sees(record: Record) -> None:
    recording = record(Outer(Closed), torch.ones(ROWS, 8))
    assert {each.module for each in recording.entering} == {""}


class Padded(nn.Module):
    """Takes a tensor without a shape, and a mapping that must not be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        result: Tensor = self.layer(torch.stack(rows.unbind())) * options["factor"]
        return result


class ReadOnly(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read only")


def test_what_only_own_code_looks_at_does_not_disturb_a_recording(record: Record) -> None:
    rows = torch.nested.nested_tensor([torch.ones(8), torch.ones(8)], layout=torch.jagged)
    recording = record(Padded(), rows, ReadOnly(factor=2.0))
    assert [call.unit for call in recording.calls] == ["layer"]
    assert recording.entering == ()
    assert record(Padded(), torch.ones(2, 8), ReadOnly(factor=2.0)).entering != ()
