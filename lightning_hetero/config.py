"""Structured configs of the groups `devices`, `placement` and `schedule`: names, types and defaults, in one place.

Hydra merges every file of these groups into the dataclass of the group, so a misspelt name or a wrong type is
refused before anything runs. Structured configs know no unions, and a field that is typed as a mapping takes
new keys only from overrides with a "+". Such fields have the type Any, and `check_groups` looks at them.
"""

# No `from __future__ import annotations`: omegaconf reads the types of the fields, not their spelling.

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, List, Optional  # noqa: UP035

from hydra.core.config_store import ConfigStore

from lightning_hetero.errors import HeteroError, InventoryError, PlacementError, UsageError

SCHEMA_GROUP = "lightning_hetero_schema"
"""Where the dataclasses are stored: apart from the groups themselves, so that nobody is offered them."""


@dataclass
class DevicesConf:
    """What to run on.

    Attributes:
        request: As `resolve_devices` takes it: "auto", "cuda:0,cpu", a list of such names, or of mappings.
        memory: Tighter limits by device name, such as `{"cuda:0": "10GiB"}`.
    """

    request: Any = "auto"
    memory: Any = None


@dataclass
class PlacementConf:
    """Who decides which unit stands where.

    Attributes:
        policy: Name of a policy, a device map, or a policy object (`{_target_: ...}`).
        device_map: Module name to device, for `placement=manual`.
        no_split: Names or classes of modules that have to stay whole.
        constraints: Rules for every policy, such as `{trusted: [cuda:0], private: [embedding]}`.
        objective: "step_time", "throughput", "latency" or "peak_memory".
        plan: Path of a plan file to obey instead of deciding anew.
        profile: "auto", "always" or "never": whether to measure the model in the first steps, and plan anew.
        replan: "never" or "auto": whether to plan anew where steps stay slower or faster than they were.
        time_limit_s: Seconds that a policy may search.
        device_profile: Path of a file with measured numbers of the devices.
    """

    policy: Any = "auto"
    device_map: Any = None
    no_split: Optional[List[str]] = None  # noqa: UP006, UP045
    constraints: Any = None
    objective: str = "step_time"
    plan: Optional[str] = None  # noqa: UP045
    profile: str = "auto"
    replan: str = "never"
    time_limit_s: float = 10.0
    device_profile: Optional[str] = None  # noqa: UP045


@dataclass
class ScheduleConf:
    """How batches flow through the devices.

    Attributes:
        micro_batches: How many parts a batch is cut into; null leaves it to the environment, and else to the plan.
        micro_batching: "forward" cuts calls of modules, "step" the whole training step.
        rule: Name of the schedule for "step".
        rematerialize: Whether the backward runs forwards again instead of keeping activations, with "forward"; or
            "auto", which leaves it to the plan.
        activation_checkpointing: True, false, or a list of devices whose layers keep their inputs only and run again
            in the backward; null does what a plan file says.
        compile: "stage" compiles each part that is on one device; a mapping has arguments of torch.compile.
        batch_norm: "whole", or "defer" for statistics of micro-batches, with "forward".
    """

    micro_batches: Optional[int] = None  # noqa: UP045
    micro_batching: str = "forward"
    rule: Optional[str] = None  # noqa: UP045
    rematerialize: Any = False
    activation_checkpointing: Any = None
    compile: Any = None
    batch_norm: str = "whole"


SCHEMAS = {"devices": DevicesConf, "placement": PlacementConf, "schedule": ScheduleConf}
"""Group of files -> the dataclass that all of them are merged into."""

_MAPPINGS: dict[str, tuple[type[HeteroError], str]] = {
    "devices.memory": (InventoryError, r"'devices.memory={cuda\:0: 10GiB}'"),
    "placement.constraints": (PlacementError, r"'placement.constraints={trusted: [cpu]}'"),
    "placement.device_map": (PlacementError, r"'placement.device_map={backbone: cuda\:0, *: auto}'"),
}


def store_schemas() -> None:
    """Make the dataclasses known to Hydra. Calling it again changes nothing."""
    for name, node in SCHEMAS.items():
        ConfigStore.instance().store(group=SCHEMA_GROUP, name=name, node=node, provider="lightning-hetero")


def check_groups(cfg: Mapping[str, Any]) -> None:
    """Refuse what Hydra lets pass: fields added by force with a "+", and mappings that are none.

    Args:
        cfg: A composed configuration; a group that it lacks is not looked at.

    Raises:
        UsageError: A group has a field that nobody reads.
        InventoryError: The memory limits are no mapping.
        PlacementError: The device map is no mapping, or is needed and missing.
    """
    for group in SCHEMAS.keys() & cfg.keys():
        _check_fields(group, cfg[group])
    for path, (error, example) in _MAPPINGS.items():
        group, _, name = path.partition(".")
        value = cfg[group][name] if group in cfg else None
        if not isinstance(value, (Mapping, type(None))):
            raise error(f"{path}={value!r} is not a mapping; write for example {example}")
    if "placement" in cfg and cfg["placement"]["policy"] is None:
        example = _MAPPINGS["placement.device_map"][1]
        raise PlacementError(f"placement 'manual' needs a device map; write for example {example}")


def _check_fields(group: str, given: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(SCHEMAS[group])]
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean '{group}.{near[0]}'?" if near else ""
            raise UsageError(f"nothing reads '{group}.{name}'; known are {', '.join(known)}.{hint}")


store_schemas()
