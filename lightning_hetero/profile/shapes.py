"""Records a model on shapes alone: nothing is computed, no memory of its size is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.profile.isolate import copy_of, undisturbed
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.structure import map_tensors


def shapes_only(module: nn.Module, graph: ModelGraph, args: tuple[Any, ...], *, rows: int | None = None) -> Recording:
    """Call `module(*args)` with fake tensors, which have shapes and no values, and record it.

    A copy of the module without memory is called, so the module itself does not change. Such a recording has calls,
    flows and rows for `estimate_profile`, and no seconds.

    Args:
        module: The model.
        graph: Its units.
        args: Arguments of its `forward`, with real tensors or meta tensors.
        rows: Rows of the batch; None guesses, as `Recording` does.

    Raises:
        ProfileError: The call fails, as it does where the model's code looks at values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return (
                mode.from_tensor(torch.empty_like(tensor, device="meta"))
                if tensor.is_meta
                else mode.from_tensor(tensor)
            )

    with undisturbed(()):
        try:
            twin = copy_of(module, fake)
            recording = Recording(twin, graph, rows=rows)
            with recording, mode:
                twin(*map_tensors(args, fake))
        except Exception as error:
            raise ProfileError(
                f"{type(module).__name__} cannot be called on shapes alone: {type(error).__name__}: {error}. Record a "
                "call on a real batch instead."
            ) from error
    return recording
