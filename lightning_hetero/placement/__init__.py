"""Who decides: one file per policy, found by name."""

from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.constraints import Constraints, check_constraints
from lightning_hetero.placement.dag import DagPolicy
from lightning_hetero.placement.even import EvenPolicy
from lightning_hetero.placement.exact import ExactPolicy
from lightning_hetero.placement.heft import HeftPolicy
from lightning_hetero.placement.hybrid import HybridPolicy
from lightning_hetero.placement.interleaved import InterleavedPolicy
from lightning_hetero.placement.make import make_plan, make_plans
from lightning_hetero.placement.manual import ManualPolicy
from lightning_hetero.placement.measured import MeasuredPolicy
from lightning_hetero.placement.memory_first import MemoryFirstPolicy
from lightning_hetero.placement.policy import Placement, PlacementPolicy, get_policy, policy_names, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.proportional import ProportionalPolicy
from lightning_hetero.placement.replicate import ReplicatePolicy
from lightning_hetero.placement.single import SinglePolicy

__all__ = [
    "AutoPolicy",
    "Constraints",
    "DagPolicy",
    "EvenPolicy",
    "ExactPolicy",
    "HeftPolicy",
    "HybridPolicy",
    "InterleavedPolicy",
    "ManualPolicy",
    "MeasuredPolicy",
    "MemoryFirstPolicy",
    "Placement",
    "PlacementPolicy",
    "Problem",
    "ProportionalPolicy",
    "ReplicatePolicy",
    "SinglePolicy",
    "check_constraints",
    "get_policy",
    "make_plan",
    "make_plans",
    "policy_names",
    "register_policy",
]
