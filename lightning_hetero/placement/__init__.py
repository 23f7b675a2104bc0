"""Who decides: one file per policy, found by name."""

from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.even import EvenPolicy
from lightning_hetero.placement.manual import ManualPolicy
from lightning_hetero.placement.memory_first import MemoryFirstPolicy
from lightning_hetero.placement.policy import (
    Placement,
    PlacementPolicy,
    Problem,
    get_policy,
    make_plan,
    policy_names,
    register_policy,
)
from lightning_hetero.placement.single import SinglePolicy

__all__ = [
    "AutoPolicy",
    "EvenPolicy",
    "ManualPolicy",
    "MemoryFirstPolicy",
    "Placement",
    "PlacementPolicy",
    "Problem",
    "SinglePolicy",
    "get_policy",
    "make_plan",
    "policy_names",
    "register_policy",
]
