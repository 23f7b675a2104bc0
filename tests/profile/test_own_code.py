"""What a recording reads off autograd's graph about the model's own code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile import Line
from lightning_hetero.profile.costs import Kept, OwnCode, Waiting
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording

ROWS, WIDTH = 8, 4
ROW_BYTES = WIDTH * 4


def recorded(model: nn.Module, x: Tensor, *, end: bool = True) -> Recording:
    with Recording(model, find_units(model)) as recording:
        loss = model(x)
        if end:
            recording.ends_in(loss)
    return recording


class Residual(nn.Module):
    """Blocks inside of which own code runs: `x + second(gelu(first(x)))`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(x)))  # type: ignore[no-any-return]


class Two(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x.square().sum()


def test_activations_belong_to_the_module_in_whose_code_they_are() -> None:
    code = recorded(Two(), torch.randn(ROWS, WIDTH)).own_code.code(ROWS)

    kept = {(each.around, each.after): each.kept for each in code if each.kept}
    assert kept == {
        ("blocks.0", "blocks.0.first"): (Kept(source="blocks.0.first", taken_by=(), size_bytes=Line(0, ROW_BYTES)),),
        ("blocks.1", "blocks.1.first"): (Kept(source="blocks.1.first", taken_by=(), size_bytes=Line(0, ROW_BYTES)),),
    }
    # The gradient that comes and the one that goes.
    assert next(each for each in code if each.kept).moment_bytes == Line(0, 2 * ROW_BYTES)


def test_the_loss_is_the_end() -> None:
    end = recorded(Two(), torch.randn(ROWS, WIDTH)).own_code.in_the_end(ROWS)

    assert isinstance(end, OwnCode)
    assert (end.around, end.after) == ("", "blocks.1.second")
    assert [(kept.source, kept.size_bytes) for kept in end.kept] == [("", Line(0, ROW_BYTES))]
    assert end.moment_bytes.per_row >= 3 * ROW_BYTES  # 2 x, x, and their product with the gradient


def test_the_gradient_of_a_skipping_tensor_waits() -> None:
    waiting = recorded(Two(), torch.randn(ROWS, WIDTH)).own_code.waiting(ROWS)

    # Nobody needs a gradient of the batch, so only the second block has something that waits.
    size = Line(0, ROW_BYTES)
    assert waiting == (
        Waiting(around="blocks.1", source="", first="blocks.1.first", last="blocks.1.second", size_bytes=size),
    )


def test_without_its_end_the_loss_is_estimated_by_what_it_is_handed() -> None:
    recording = recorded(Two(), torch.randn(ROWS, WIDTH), end=False)
    profile = measure_model(recording, resolve_devices("cpu"))

    assert recording.own_code.in_the_end(ROWS) is None
    assert profile.own_code.temporary_bytes == Line(0, 4 * ROW_BYTES)


def test_a_batch_of_classes_keeps_logarithms_and_labels() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(WIDTH, 10)

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), torch.zeros(len(x), dtype=torch.long))

    profile = measure_model(recorded(Classifier(), torch.randn(ROWS, WIDTH)), resolve_devices("cpu"))

    assert profile.own_code.saved_bytes(ROWS) == ROWS * (10 * 4 + 8) + 4  # and the sum of weights
    assert profile.own_code.temporary_bytes(ROWS) == ROWS * 2 * 10 * 4


def test_hooks_of_user_code_are_not_run() -> None:
    ran = 0

    def again(module: nn.Module, args: object) -> None:
        nonlocal ran
        ran += 1

    model = Two(again=True)
    model.blocks[0].register_forward_pre_hook(again)
    recording = recorded(model, torch.randn(ROWS, WIDTH, requires_grad=True))

    assert ran == 1
    assert not recording.own_code.is_known
    assert recording.own_code.code(ROWS) == ()


def test_modules_that_mix_rows_are_named() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    assert measure_model(recorded(model, torch.randn(ROWS, WIDTH)), resolve_devices("cpu")).coupled == ("1",)

    model.eval()
    assert measure_model(recorded(model, torch.randn(ROWS, WIDTH)), resolve_devices("cpu")).coupled == ()
