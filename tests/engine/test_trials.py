"""What the content of tensors hides from a trial: values that are zero at first, that Python reads, that are small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.overlap import have_overlap
from lightning_hetero.testing.rows import rows, squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12


class Two(nn.Module):
    """Two layers, with something between them. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.between(self.a(x))))  # type: ignore[no-any-return]


class ScheduledBuffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.zeros(()))

    def between(self, h: Tensor) -> Tensor:
        return h - self.gate * h.mean(0)


class ScheduledAttribute(ScheduledBuffer):
    def __init__(self) -> None:
        Two.__init__(self)
        self.gate = torch.zeros((), dtype=torch.float64)


class FrozenGate(ScheduledBuffer):
    def __init__(self) -> None:
        Two.__init__(self)
        self.gate = nn.Parameter(torch.zeros(()), requires_grad=False)


class States(Two):
    """Has a state for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.zeros(16, 8))

    def between(self, h: Tensor) -> Tensor:
        return h + self.gate[: len(h)]


@pytest.mark.parametrize("kind", [ScheduledBuffer, ScheduledAttribute, FrozenGate, States])
def test_what_is_zero_at_first_and_not_trained(kind: type[Two], pair: MakePair) -> None:
    both = pair(kind().double())
    both.step(squares)
    for model in (both.model, both.alone):
        with torch.no_grad():
            model.gate += torch.arange(model.gate.numel(), dtype=torch.float64).add(1).sin().view_as(model.gate)
    both.step(squares)
    assert both.difference <= ROUNDING
    assert both.calls == 0
    assert not both.model.gate.requires_grad


class Normalised(Two):
    """Has buffers that rows share: running statistics, a mask with infinities, a root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.zeros(8).index_fill(0, torch.tensor([1]), -torch.inf))
        self.register_buffer("variance", torch.zeros(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def between(self, h: Tensor) -> Tensor:
        return torch.softmax(self.frozen(self.norm(h)) + self.mask, -1) + self.variance.sqrt()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_rows_share_is_no_sign_of_a_coupling(mode: Any, pair: MakePair) -> None:
    both = pair(Normalised().double().eval())
    with mode():
        assert torch.allclose(both.model(rows()).cpu(), both.alone(rows()), rtol=0, atol=ROUNDING)
    assert both.calls == 1
    assert [each.requires_grad for each in both.model.frozen.parameters()] == [False, False]
    if mode is torch.enable_grad:
        both.step(squares)
        assert both.difference <= ROUNDING


class Gated(Two):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def between(self, h: Tensor) -> Tensor:
        return h + self.gate * torch.softmax(h @ h.T, -1) @ h


class Centered(Two):
    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class Tokens(Centered):
    """Shape (rows, tokens) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 8))


class Pairs(Two):
    """Each row has another one as its partner."""

    def between(self, h: Tensor) -> Tensor:
        return h + h[(torch.arange(len(h), device="cpu") ^ 1).clamp(max=len(h) - 1).to(h.device)]


class Clipped(Two):
    def between(self, h: Tensor) -> Tensor:
        return h * (20 / h.norm()).clamp(max=1)


FIRST_BATCHES: dict[str, tuple[type[Two], Tensor, Tensor]] = {
    "a gate that is zero": (Gated, rows(), rows()),
    "zeros": (Centered, rows() * 0, rows()),
    "equal tokens": (Tokens, torch.zeros(16, 5, dtype=torch.long), torch.arange(80).reshape(16, 5) % 7),
    "pairs": (Pairs, rows(32), rows(30)),
    "small numbers": (Clipped, rows(), rows() * 20),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", FIRST_BATCHES)
def test_a_coupling_that_the_first_batch_does_not_show(first: str, mode: Any, pair: MakePair) -> None:
    kind, x, later = FIRST_BATCHES[first]
    both = pair(kind().double())
    with mode():
        both.model(x)
    if kind is Gated:
        for model in (both.model, both.alone):
            model.gate.data.fill_(0.7)
    with mode():
        assert torch.allclose(both.model(later).cpu(), both.alone(later), rtol=0, atol=ROUNDING)
    assert both.engine.reasons[0].startswith(f"{kind.__name__} is not cut into micro-batches")


class Indexed(Two):
    """Looks up a place that is made of a real number: one that is much larger would be outside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.table(x[:, 0].abs().long()))


def test_places_that_are_made_of_real_numbers_stay_inside(pair: MakePair) -> None:
    both = pair(Indexed().double())
    both.step(squares)
    assert both.difference <= ROUNDING
    assert both.calls == 1


class BufferFlag(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor([False, False]))

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.flag.any() else h

    def switch(self, value: bool) -> None:
        self.flag.fill_(value)


class OtherBufferFlag(BufferFlag):
    def switch(self, value: bool) -> None:
        self.flag = torch.tensor([value, value], device=self.flag.device)


class Learned(BufferFlag):
    def __init__(self) -> None:
        Two.__init__(self)
        self.alpha = nn.Parameter(torch.tensor(0.1))

    def between(self, h: Tensor) -> Tensor:
        return self.alpha * (h - h.mean(0) if (self.alpha * 2).item() > 1 else h)

    def switch(self, value: bool) -> None:
        self.alpha.data.fill_(0.7 if value else 0.1)


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("kind", [BufferFlag, OtherBufferFlag, Learned])
def test_a_tensor_of_the_module_that_python_reads(kind: type[BufferFlag], rematerialize: bool, pair: MakePair) -> None:
    both = pair(kind().double(), rematerialize=rematerialize)
    calls = []
    for value in (False, True, True, False, False):
        for model in (both.model, both.alone):
            model.switch(value)
        both.step(squares)
        assert both.difference <= ROUNDING
        calls.append(both.calls)
    assert calls == [1, 1, 1, 2, 3]  # what was found for one content holds whenever it comes back


def test_an_input_that_python_reads(pair: MakePair) -> None:
    class Whole(Two):
        def forward(self, x: Tensor, centered: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.tanh(h - h.mean(0) if centered else h))  # type: ignore[no-any-return]

    both = pair(Whole().double())
    for centered in (False, True, False):
        both.step(lambda model, centered=centered: model(rows(), torch.tensor(centered)).pow(2).mean())
        assert both.difference <= ROUNDING
    assert both.calls == 2


def test_content_that_keeps_changing_is_not_tried_out_for_ever(pair: MakePair) -> None:
    both = pair(Learned().double())
    for step in range(12):
        for model in (both.model, both.alone):
            model.alpha.data.fill_(0.1 + step / 100)
        both.step(squares)
        assert both.difference <= ROUNDING
    assert both.calls < 12
    assert "keeps changing" in both.engine.reasons[0]


class Encoder(Two):
    """Returns two tensors."""

    def __init__(self, how: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.how(self.a(x) * 2)


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        (lambda h: (h, h[:, :4]), 2),
        (lambda h: (h[:, 2::3], h), 2),
        (lambda h: (h.unflatten(1, (2, 4)), h.unflatten(1, (2, 4))[:, 0]), 2),
        (lambda h: (h, h.unflatten(1, (2, 4)).transpose(1, 2)), 2),
        (lambda h: (h, h[:, 1:3].detach()), 2),
        (lambda h: (h.detach(), h[:, 1:3]), 1),
        (lambda h: (h[:, 2:6], h[:, :4]), 0),
        (lambda h: (h.T.contiguous().T, h), 2),
        (lambda h: (h.T.contiguous().T,) * 2, 2),
        (lambda h: (h[:, :4], h[:, 4:]), 2),
    ],
    ids=[
        *("a part", "a part before", "first of several", "another order", "detached part", "part of a detached one"),
        *("parts that overlap", "another memory", "one", "parts that do not"),
    ],
)
@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"micro_batches": 16}, {"rematerialize": True}], ids=str)
@pytest.mark.parametrize("changed", [0, 1])
def test_outputs_that_share_memory_are_changed_together(
    how: Any, calls: int, options: dict[str, Any], changed: int, pair: MakePair
) -> None:
    both = pair(Encoder(how).double(), **options)

    def loss(model: nn.Module) -> Tensor:
        outputs = model(rows())
        with torch.no_grad() if not outputs[changed].requires_grad else torch.enable_grad():
            outputs[changed].mul_(3)
        return outputs[0].pow(2).mean() + outputs[1].pow(3).mean()  # type: ignore[no-any-return]

    for _ in range(2):
        both.step(loss)
        assert both.difference <= ROUNDING
    assert both.calls == calls  # 1: tried, and run whole since
    assert calls == 2 or "share memory" in both.engine.reasons[0]


def test_which_tensors_overlap() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    assert not have_overlap([*x.chunk(3, -1), *torch.zeros(8, 2).chunk(2)], [torch.zeros(4, 6)])
    assert not have_overlap([x[::2], x[1::2]], [x[1::2].clone()])
    assert not have_overlap([x], [x])
    assert have_overlap([x, x.T])
    assert have_overlap([x[:1].expand(3, 6), x])
    assert have_overlap([x.unfold(1, 3, 1), x])
    assert have_overlap([torch.zeros(2), x[1:]], [x[:2]])
