"""One torch.export of a whole module: in eval mode, on the CPU, with the batch left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.structure import Structure, describe, rebuild
from lightning_hetero.runtime.hooks import Hook

PREFIX = "model"
"""Under this name the module stands in the traced program."""


@dataclass(frozen=True)
class Trace:
    """A module as a graph without control flow.

    Attributes:
        program: Takes the tensors of the arguments in order, and gives those of the result.
        examples: The tensors that it was traced with.
        inputs: How the arguments nest: {"tuple": [positional, keyword]}.
        outputs: How the result nests.
        dims: Size of each dimension of the examples, a number or a symbol.
        batch: The size of the batch as a symbol, as the graph's shapes have it; None if it is fixed.
        rows: Rows of the example.
    """

    program: fx.GraphModule
    examples: tuple[Tensor, ...]
    inputs: Structure
    outputs: Structure
    dims: tuple[tuple[Any, ...], ...]
    batch: Any
    rows: int


def trace(module: nn.Module, example_inputs: object, *, dynamic_batch: bool = True) -> Trace:
    """Capture the `forward` of a module.

    Args:
        module: Stays as it is. Its parameters may be on any devices; on "meta", the program has shapes and no values.
        example_inputs: A tuple or list of positional arguments, a mapping of keyword arguments, or one tensor.
            Tensors have the batch as dimension 0; all whose first dimension has its size get an open one.
        dynamic_batch: False fixes the batch at the size of the example.

    Raises:
        UnsupportedError: A run holds the module, torch.export cannot capture it, the batch cannot stay open, a buffer
            changes in eval mode, or arguments or results are no nested tensors.
    """
    name = type(module).__name__
    _check_released(module, name)
    args, kwargs = arguments(example_inputs)
    leaves: list[Tensor] = []
    inputs = describe((args, kwargs), leaves, f"example_inputs of {name}")
    examples = tuple(leaf.detach() if leaf.is_meta else leaf.detach().cpu() for leaf in leaves)
    rows = _rows(examples, name, dynamic_batch)
    flat = _Flat(module, inputs, name)
    opened = tuple(
        {0: torch.export.Dim.DYNAMIC} if dynamic_batch and leaf.ndim and len(leaf) == rows else {} for leaf in examples
    )
    try:
        with _on_cpu_in_eval(module), _plain_attention(), without_chatter(), torch.no_grad():
            exported = torch.export.export(flat, examples, dynamic_shapes={"leaves": opened}, strict=False)
            exported = exported.run_decompositions({})  # no operation changes its arguments any more
    except UnsupportedError:
        raise
    except Exception as error:  # torch.export raises whatever it meets
        raise UnsupportedError(
            f"torch.export cannot capture {name} with these example inputs: {_short(error)}\n"
            "Control flow that depends on values, and code that needs a fixed batch (then pass dynamic_batch=False), "
            "are the usual reasons."
        ) from error
    changed = sorted(exported.graph_signature.buffers_to_mutate.values())
    if changed:
        raise UnsupportedError(
            f"{name} changes its buffer {changed[0].removeprefix(PREFIX + '.')!r} in eval mode. "
            "An exported stage keeps no state; return the value instead, or take it as an argument."
        )
    program: Any = exported.module(check_guards=False)
    assert flat.seen.outputs is not None
    dims = _dims(program)
    batch = next((sizes[0] for sizes, opening in zip(dims, opened, strict=True) if opening), None)
    return Trace(program, examples, inputs, flat.seen.outputs, dims, batch, rows)


class _Seen:
    """How the result nested when the module was traced. torch.export takes back what is assigned to a module itself."""

    outputs: Structure | None = None


class _Flat(nn.Module):
    """The module with tensors in a row for arguments and result."""

    def __init__(self, module: nn.Module, inputs: Structure, name: str) -> None:
        super().__init__()
        self.add_module(PREFIX, module)
        self._inputs, self._name = inputs, name
        self.seen = _Seen()

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = rebuild(self._inputs, leaves)
        results: list[Tensor] = []
        self.seen.outputs = describe(
            self.get_submodule(PREFIX)(*args, **kwargs), results, f"the result of {self._name}"
        )
        return tuple(results)


def _check_released(module: nn.Module, name: str) -> None:
    hooks = (hook for inner in module.modules() for hook in inner._forward_pre_hooks.values())
    if any(isinstance(hook, Hook) for hook in hooks):
        raise UnsupportedError(
            f"{name} is spread over devices by a run at the moment, whose transfers would be captured too. "
            "Export it when trainer.fit has returned, or after ModelParallel.close(); or export its checkpoint."
        )


def arguments(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from what `trace` takes."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def _rows(examples: tuple[Tensor, ...], name: str, dynamic_batch: bool) -> int:
    rows = next((len(example) for example in examples if example.ndim), 0)
    if dynamic_batch and rows < 2:
        raise UnsupportedError(
            f"example_inputs of {name} have {rows} rows, and torch.export takes a size of 0 or 1 for fixed. "
            "Give at least 2 rows, or pass dynamic_batch=False."
        )
    return rows


@contextmanager
def _on_cpu_in_eval(module: nn.Module) -> Iterator[None]:
    """Let the module hold copies on the CPU of what it has elsewhere, and be in eval mode, for a while."""
    modes = [(inner, inner.training) for inner in module.modules()]
    copies: dict[int, Tensor] = {}
    elsewhere = [
        (inner, name, tensor)
        for inner in module.modules()
        for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]
        if tensor is not None and tensor.device.type not in ("cpu", "meta")
    ]
    try:
        module.eval()
        for inner, name, tensor in elsewhere:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor)
            setattr(inner, name, copies[id(tensor)])  # recurrent layers of torch.nn keep a second list, and look here
        yield
    finally:
        for inner, name, tensor in elsewhere:
            setattr(inner, name, tensor)
        for inner, mode in modes:
            inner.training = mode


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch's fused kernels for whole encoder layers out of the graph: no other runtime knows them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _dims(program: fx.GraphModule) -> tuple[tuple[Any, ...], ...]:
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    return tuple(tuple(map(size_of, shape)) for shape in shapes)


def size_of(size: int | torch.SymInt) -> Any:
    """A size as a number, or as the symbol that it is in a program whose batch is open."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _short(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
