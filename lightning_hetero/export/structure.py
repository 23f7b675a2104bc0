"""How tensors are nested in arguments and results, as JSON: the same nesting comes back on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor

from lightning_hetero.errors import ArtifactError, UnsupportedError

Structure = dict[str, Any]
"""One of {"tensor": index}, {"constant": value}, {"tuple": [...]}, {"list": [...]}, {"dict": {name: ...}}."""

_CONSTANTS = (bool, int, float, str, type(None))


def describe(value: object, leaves: list[Tensor], where: str) -> Structure:
    """Say how the tensors of a value are nested.

    Args:
        value: Tensors and constants in tuples, lists and dicts with texts for keys.
        leaves: The tensors are added here, in order.
        where: What the value is, for the message.

    Raises:
        UnsupportedError: It holds something else.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    if type(value) in _CONSTANTS:
        return {"constant": value}
    if type(value) in (tuple, list):
        items: Any = value
        return {type(value).__name__: [describe(item, leaves, where) for item in items]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item, leaves, where) for key, item in value.items()}}
    if isinstance(value, SymInt):
        raise UnsupportedError(
            f"{where} holds a number that follows the size of the batch. Leave it out, make a tensor of it, or fix the "
            "batch with dynamic_batch=False."
        )
    raise UnsupportedError(
        f"{where} holds a {type(value).__name__}, which cannot be written down without code. "
        "Use tensors, numbers and texts in tuples, lists and dicts (with texts for keys)."
    )


def rebuild(structure: Structure, leaves: Sequence[Tensor]) -> Any:
    """Nest tensors as the structure says.

    Raises:
        ArtifactError: It is no structure, or has more tensors than there are.
    """
    try:
        ((kind, content),) = structure.items()
        if kind == "tensor" and type(content) is int and content >= 0:
            return leaves[content]
        if kind == "constant" and type(content) in _CONSTANTS:
            return content
        if kind in ("tuple", "list"):
            items = [rebuild(item, leaves) for item in content]
            return tuple(items) if kind == "tuple" else items
        if kind == "dict":
            return {key: rebuild(item, leaves) for key, item in content.items()}
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest nests tensors in a way that cannot be: {structure!r}") from error
    raise ArtifactError(f"the manifest nests tensors in a way that is unknown here: {structure!r}")
