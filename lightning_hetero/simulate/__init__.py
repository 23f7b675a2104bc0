"""How long it will take: one step through stages of any speed, event by event, and what it keeps in memory."""

from lightning_hetero.simulate.cost import StageCost
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.memory import MemoryCurve, memory_curves, peak_alive
from lightning_hetero.simulate.predict import Prediction, predict
from lightning_hetero.simulate.recalibrate import recalibrated
from lightning_hetero.simulate.step import simulate

__all__ = [
    "Costs",
    "MemoryCurve",
    "Prediction",
    "StageCost",
    "memory_curves",
    "peak_alive",
    "predict",
    "recalibrated",
    "simulate",
]
