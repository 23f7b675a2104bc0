"""Reads what users say about torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_hetero.errors import UsageError

_OPTIONS = ("backend", "mode", "dynamic", "fullgraph", "options")


def compiler_options(given: Any) -> dict[str, Any] | None:
    """Arguments of `torch.compile` for the parts of a model.

    Args:
        given: "stage" for torch's defaults, a mapping of `torch.compile`'s arguments, or None not to compile.

    Raises:
        UsageError: It is none of these.
    """
    if given is None:
        return None
    if given == "stage":
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(
            f"compile={given!r} is not known; it may be 'stage', a mapping of torch.compile's arguments such as "
            "{'mode': 'reduce-overhead'}, or None"
        )
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise UsageError(f"compile: {unknown[0]!r} is no argument of torch.compile; those are {', '.join(_OPTIONS)}")
    return dict(given)
