"""What the units of a model do, read off shapes alone: operations and bytes, counted without memory or arithmetic.

This serves plans for models that fit nowhere yet and for devices that are not here; else measuring is better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_hetero.errors import ProfileError
from lightning_hetero.graph import ModelGraph
from lightning_hetero.profile.costs import OWN_CODE, Line
from lightning_hetero.profile.flows import TensorSpec
from lightning_hetero.profile.isolate import copy_of, undisturbed
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.sample import Sample
from lightning_hetero.profile.structure import all_tensors, map_tensors, tensors_in
from lightning_hetero.profile.workload import UnitWork, Workload


def count_work(
    module: nn.Module,
    graph: ModelGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    rows: int,
    training: bool,
) -> Workload:
    """Call the model once on shapes, then each sort of unit alone, and count.

    Args:
        module: The model, with real or meta tensors. It stays as it is.
        graph: Its units.
        args: Arguments of its `forward` for a batch of `rows` rows, real or meta.
        kwargs: Keyword arguments likewise.
        rows: Rows of the batch.
        training: Whether to count what autograd keeps.

    Raises:
        ProfileError: The model cannot be called on shapes, as where its code looks at values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:  # on the CPU, where attention has a kernel that keeps no matrix of weights
        with mode, torch.no_grad():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    with undisturbed(()), torch.set_grad_enabled(training):
        try:
            twin = copy_of(module, fake)
            if not training:
                twin.eval()  # as inference runs it: BatchNorm takes one row, too
            recording = Recording(twin, graph, rows=rows)
            with recording, mode:
                twin(*map_tensors(args, fake), **map_tensors(dict(kwargs or {}), fake))
            one_call = {
                sort: _one_call(recording, sample, mode, training) for sort, sample in recording.samples.items()
            }
        except Exception as error:  # whatever the user's code says to tensors without values
            raise ProfileError(
                f"{type(module).__name__} cannot be called on shapes alone: {type(error).__name__}: {error}".rstrip(".")
                + ". Give it an `example_input_array` whose values do not matter, or keep Python code that looks at "
                "values out of `forward`."
            ) from error
    calls = Counter(call.unit for call in recording.calls)
    units = tuple(one_call[recording.sort_of[name]].named(name, count) for name, count in calls.items())
    handed = [flow.size_bytes for flow in recording.flows if flow.target == OWN_CODE]
    return Workload(
        rows=rows,
        training=training,
        units=units,
        flows=recording.flows,
        sees_batch=recording.sees_batch,
        out_of_sight=recording.out_of_sight,
        # The loss keeps what it is handed, and makes something as large and its gradient; sums keep less.
        own_saved_bytes=sum(handed, Line()) if training else Line(),
        own_temporary_bytes=max(handed, key=lambda size: size(rows), default=Line()).scaled(2.0 if training else 1.0),
        dtype=_dtype(module),
        coupled=recording.coupled,
    )


def _one_call(recording: Recording, sample: Sample, mode: FakeTensorMode, training: bool) -> UnitWork:
    """Count what one call of a unit does, with the modules without parameters that follow it."""
    chain = [recording.module.get_submodule(sample.unit)]
    chain += [recording.module.get_submodule(name) for name in recording.followers.get(sample.unit, ())]
    args, kwargs = _as_it_was((sample.args, sample.kwargs), sample.inputs, training)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    counter, launches = FlopCounterMode(display=False), _Launches()  # type: ignore[no-untyped-call]
    with mode, counter, launches, saved_tensors_hooks(keep, lambda tensor: tensor):
        output = chain[0](*args, **kwargs)
        for follower in chain[1:]:
            output = follower(output)
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
    of_inputs = set(map(_storage, inputs))
    of_weights = {_storage(t) for inner in chain for t in (*inner.parameters(), *inner.buffers())}
    storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    saved = {key: size for key, size in storages.items() if key not in of_inputs | of_weights}
    returned = set(map(_storage, outputs))
    operations = counter.get_total_flops()
    # Tables that are looked up do no arithmetic, and of them only the rows that are asked for are read.
    weights_bytes = sum(p.nbytes for inner in chain for p in inner.parameters()) if operations else 0
    trained_bytes = sum(p.nbytes for inner in chain for p in inner.parameters() if p.requires_grad)
    rows = recording.rows
    outputs_bytes = _line(outputs, rows)
    gradients = [tensor for tensor in inputs if tensor.requires_grad]
    return UnitWork(
        name=sample.unit,
        operations_per_row=operations / rows,
        weights_bytes=weights_bytes,
        moved_bytes=_line(inputs, rows) + outputs_bytes,
        launches=launches.count,
        trains=trained_bytes > 0,
        passes_gradient=bool(gradients),
        saved_bytes=Line(0.0, sum(saved.values()) / rows),
        saved_output_bytes=Line(0.0, sum(size for key, size in saved.items() if key in returned) / rows),
        saved_input_bytes=Line(0.0, sum(size for key, size in storages.items() if key in of_inputs) / rows),
        temporary_bytes=outputs_bytes,
        backward_bytes=outputs_bytes + _line(gradients, rows) + Line(float(trained_bytes)) if training else Line(),
    )


class _Launches(TorchDispatchMode):
    """Counts operations that compute: views of tensors take no time on a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.namespace == "prim")
        return func(*args, **(kwargs or {}))


def _as_it_was(given: Any, specs: tuple[TensorSpec, ...], training: bool) -> Any:
    """The arguments with gradients where they had some."""
    for tensor, spec in zip(all_tensors(given), specs, strict=True):
        tensor.requires_grad_(training and spec.requires_grad)
    return given


def _line(tensors: list[Tensor], rows: int) -> Line:
    return sum((TensorSpec.of(tensor).line(rows) for tensor in tensors), Line())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _dtype(module: nn.Module) -> str:
    """The dtype of most parameters, by bytes."""
    sizes: Counter[str] = Counter()
    for parameter in module.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"
