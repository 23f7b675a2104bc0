"""Who does what: the plan, its checks and its explanation."""

from lightning_hetero.plan.build import build_plan
from lightning_hetero.plan.check import check_memory, check_plan
from lightning_hetero.plan.explain import explain
from lightning_hetero.plan.forecast import Alternative, DeviceForecast, Execution, Forecast, StageForecast
from lightning_hetero.plan.plan import MemoryNeed, Plan, Share, Stage

__all__ = [
    "Alternative",
    "DeviceForecast",
    "Execution",
    "Forecast",
    "MemoryNeed",
    "Plan",
    "Share",
    "Stage",
    "StageForecast",
    "build_plan",
    "check_memory",
    "check_plan",
    "explain",
]
