"""Finds the units of a module: where it may be split, and what must stay together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import Compound, ModelGraph, Unit

# Containers of torch.nn whose `forward` only calls their children. All other modules of torch.nn stay whole:
# MultiheadAttention uses `out_proj.weight` without calling `out_proj`, TransformerEncoderLayer hands the
# weights of its children to one fused kernel, and so on.
_SPLITTABLE = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# They have no `forward`: the module above reads their parameters as its own.
_PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)
_METRICS = {"torchmetrics.metric.Metric", "torchmetrics.collections.MetricCollection"}
_ARE_METRICS: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # classes, as far as somebody has asked


def find_units(root: nn.Module, no_split: str | Iterable[str] = ()) -> ModelGraph:
    """Walk the module tree of `root` and list the units that a plan may place.

    A module is one unit, with all that it contains, when

    * none of the modules below it holds a parameter or buffer,
    * it comes from torch.nn (or derives from such a class) and is no plain container,
    * it owns parameters itself and holds no Sequential, ModuleList or ModuleDict of further modules
      (attention with a learned bias, a low-rank adapter around a Linear),
    * it is a TorchScript module or a compiled module,
    * its name or class is in `no_split`, or in a `_no_split_modules` attribute of a module above it.

    Every other module is split at its children. The root itself is always split. Metrics of torchmetrics belong to
    the root and are no units; neither are modules that Hugging Face accelerate has spread (`hf_device_map`).
    Nothing is run and nothing is changed.

    Args:
        root: The module, for example a LightningModule.
        no_split: Module names ("net.blocks.0") or class names ("Block") to keep whole; a single one may be a text.

    Raises:
        PlacementError: An entry of `no_split` fits no module of `root`.
    """
    no_split = (no_split,) if isinstance(no_split, str) else tuple(no_split)
    _check_no_split(root, no_split)
    found = list(_walk(root, "", frozenset(no_split) | _declared(root), {id(root)}))
    aliases = _aliases(root, {id(module): name for name, module, _ in found})
    owner: dict[int, str] = {}  # parameter -> first unit that holds it
    ties = _Ties()
    units: list[Unit] = []
    seen: set[int] = set()
    for name, module, _ in found:
        ties.add(name)
        for parameter in module.parameters():
            ties.join(owner.setdefault(id(parameter), name), name)
        own = [p for p in module.parameters() if id(p) not in seen]
        buffers = [b for b in module.buffers() if id(b) not in seen]
        seen.update(map(id, own), map(id, buffers))
        units.append(
            Unit(
                name=name,
                kind=type(module).__name__,
                parameters=sum(map(_numel, own)),
                parameter_bytes=sum(map(tensor_bytes, own)),
                trainable_bytes=sum(tensor_bytes(p) for p in own if p.requires_grad),
                buffer_bytes=sum(map(tensor_bytes, buffers)),
                tied_to=name,
                aliases=aliases.get(name, ()),
            )
        )
    seen.update(id(tensor) for module in root.modules() if is_placed_elsewhere(module) for tensor in _tensors(module))
    loose = [p for p in root.parameters() if id(p) not in seen]
    return ModelGraph(
        units=tuple(replace(unit, tied_to=ties.first(unit.name)) for unit in units),
        loose_parameter_bytes=sum(map(tensor_bytes, loose)),
        loose_trainable_bytes=sum(tensor_bytes(p) for p in loose if p.requires_grad),
        loose_buffer_bytes=sum(tensor_bytes(b) for b in root.buffers() if id(b) not in seen),
        whole=tuple((name, why) for name, module, why in found if why and any(module.children())),
        compounds=tuple(_compounds(root)),
    )


def _compounds(root: nn.Module) -> Iterator[Compound]:
    """As `lightning_hetero.runtime.layers` sees them; TorchScript does not run the same code twice."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in root.modules()):
        return
    for name, module in root.named_modules():
        if not name or not _is_compound(module):
            continue
        parent = root.get_submodule(name.rpartition(".")[0])
        alike = sum(type(child) is type(module) for child in parent._modules.values())
        has_forward = getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__
        yield Compound(
            name=name,
            is_layer=isinstance(parent, (nn.ModuleList, nn.Sequential)) and alike > 1,
            is_called=has_forward and not any(is_metric(m) or is_placed_elsewhere(m) for m in module.modules()),
        )


def _is_compound(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; 0 for one that has no shape yet (lazy modules)."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return 0
    return tensor.numel() * tensor.element_size()


def is_metric(module: nn.Module) -> bool:
    """Whether the module is a metric of torchmetrics, or a collection of some (recognised without importing it)."""
    kind = type(module)
    known = _ARE_METRICS.get(kind)
    if known is None:
        known = any(f"{cls.__module__}.{cls.__qualname__}" in _METRICS for cls in kind.__mro__)
        _ARE_METRICS[kind] = known
    return known


def is_placed_elsewhere(module: nn.Module) -> bool:
    """Whether Hugging Face accelerate spread this module and moves its inputs; it is left alone."""
    return bool(getattr(module, "hf_device_map", None))


def _walk(
    module: nn.Module, prefix: str, no_split: frozenset[str], visited: set[int]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, why it stays whole) of every unit below `module`, in order of definition."""
    for child_name, child in module.named_children():
        if id(child) in visited or is_metric(child) or isinstance(child, _PARAMETER_LISTS):
            continue
        if is_placed_elsewhere(child):
            continue
        visited.add(id(child))
        name = f"{prefix}.{child_name}" if prefix else child_name
        below = no_split | _declared(child)
        why = _why_whole(child, name, below)
        if why is None:
            yield from _walk(child, name, below, visited)
        elif _holds_tensors(child):
            visited.update(id(inner) for inner in child.modules())
            yield name, child, why


def _why_whole(module: nn.Module, name: str, no_split: frozenset[str]) -> str | None:
    """Why the module is not split, in words that fit after "because"; "" for a leaf, None to split it."""
    children = [child for child in module.children() if _holds_tensors(child)]
    inner = [child for child in children if not isinstance(child, _PARAMETER_LISTS)]
    if not inner:
        # A list that holds nothing is no unit; a module with tensors of its own is the smallest unit there is.
        return ""
    if name in no_split or type(module).__name__ in no_split:
        return "no_split names it"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if _is_compiled(module):
        return "it is compiled as a whole"
    if isinstance(module, _SPLITTABLE):
        return None
    if any(cls.__module__.startswith("torch.nn.") and cls is not nn.Module for cls in type(module).__mro__):
        return f"{type(module).__name__} of torch.nn may use the weights of its children directly"
    owns = len(children) > len(inner) or any(True for _ in module.parameters(recurse=False))
    if owns and not any(isinstance(child, _LISTS) for child in inner):
        return "it owns parameters next to those of its children"
    return None


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _declared(module: nn.Module) -> frozenset[str]:
    """Class names that the model's author declared unsplittable (a habit of Hugging Face models)."""
    names = getattr(module, "_no_split_modules", None)
    return frozenset(n for n in names if isinstance(n, str)) if isinstance(names, (list, tuple, set)) else frozenset()


def _holds_tensors(module: nn.Module) -> bool:
    if is_metric(module):
        return False
    return (
        any(True for _ in module.parameters(recurse=False))
        or any(True for _ in module.buffers(recurse=False))
        or any(_holds_tensors(child) for child in module.children())
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _numel(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _aliases(root: nn.Module, name_of: dict[int, str]) -> dict[str, tuple[str, ...]]:
    aliases: dict[str, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        first = name_of.get(id(module))
        if first is not None and name != first:
            aliases.setdefault(first, []).append(name)
    return {first: tuple(names) for first, names in aliases.items()}


def _check_no_split(root: nn.Module, no_split: tuple[str, ...]) -> None:
    known = {name for name, _ in root.named_modules() if name} | {type(m).__name__ for m in root.modules()}
    for entry in no_split:
        if entry not in known:
            near = get_close_matches(entry, sorted(known), n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise PlacementError(
                f"no_split={entry!r} is neither the name nor the class of a module of "
                f"{type(root).__name__}.{hint} Names are those of `named_modules()`."
            )


class _Ties:
    """Sets of names that share something; the name that was added first stands for its set."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._order: dict[str, int] = {}

    def add(self, name: str) -> None:
        self._parent.setdefault(name, name)
        self._order.setdefault(name, len(self._order))

    def first(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name

    def join(self, one: str, other: str) -> None:
        one, other = sorted((self.first(one), self.first(other)), key=self._order.__getitem__)
        self._parent[other] = one
