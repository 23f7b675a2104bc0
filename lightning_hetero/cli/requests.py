"""`devices=2x24GiB+cpu`, `devices=my_cluster.yaml`: what people ask for where Hydra expects a file of a group."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[A-Za-z_]\w*")
_SWEEPS = ("-m", "--multirun")


def with_device_requests(argv: Sequence[str]) -> list[str]:
    """The arguments with `devices=REQUEST` written as Hydra reads it: `devices.request='REQUEST'`.

    What may be the name of a file of the group stays: a misspelt one is Hydra's to refuse. So do sweep functions and
    quoted texts. In a sweep each part between commas is a request, and else the whole text.

    Example:
        >>> with_device_requests(["devices=emulated", "devices=cuda:0,cpu", "devices=[2x24GiB,1xt4]"])
        ['devices=emulated', "devices.request='cuda:0,cpu'", 'devices.request=[2x24GiB,1xt4]']
    """
    sweeps = any(word in _SWEEPS for word in argv)
    return [_as_hydra_reads(word, sweeps) for word in argv]


def _as_hydra_reads(word: str, sweeps: bool) -> str:
    key, equals, value = word.partition("=")
    if key != "devices" or not equals or not value or "(" in value:
        return word
    if value[0] in "'\"[{$":
        return f"devices.request={value}"
    parts = [part.strip() for part in value.split(",")] if sweeps else [value.strip()]
    if all(_WORD.fullmatch(part) for part in parts):
        return word
    quoted = ",".join("'" + part.replace("'", r"\'") + "'" for part in parts)
    return f"devices.request={quoted}"
