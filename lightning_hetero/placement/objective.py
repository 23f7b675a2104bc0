"""Predicts placements and makes one number of each prediction: the lower the better."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import Execution, Forecast
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.predict import Prediction, predict
from lightning_hetero.simulate.replicas import SharesOf


class Objective:
    """The objective of a problem.

    Attributes:
        costs: What the simulator is given.
    """

    def __init__(self, problem: Problem, profile: ModelProfile) -> None:
        self._word = problem.objective
        self._is_stream = problem.is_stream
        self.costs = Costs(
            problem.graph,
            problem.inventory,
            profile,
            problem.training,
            problem.optimizer_factor,
            problem.defers_batch_norm,
        )
        self._forward = Costs(problem.graph, problem.inventory, profile, False, 0.0)

    def __call__(
        self,
        device_of: Mapping[str, str],
        execution: Execution,
        shares_of: SharesOf | None = None,
        checkpointed: Collection[str] = (),
    ) -> tuple[Prediction, float]:
        """The prediction of a placement and its value; see `predict`."""
        prediction = predict(self.costs, device_of, execution, shares_of, checkpointed)
        if self._word == "peak_memory":
            return prediction, fullest(prediction.forecast)
        if self._is_stream:
            return prediction, stream_s(prediction.forecast)
        if self._word == "latency":
            alone = predict(self._forward, device_of, replace(execution, rematerialize=False), shares_of)
            return prediction, alone.forecast.step_s
        return prediction, prediction.forecast.step_s


def fullest(forecast: Forecast) -> float:
    """The share of its memory that the fullest device uses; above 1 it does not fit."""
    return max((device.memory_bytes / device.limit_bytes for device in forecast.devices), default=0.0)


def stream_s(forecast: Forecast) -> float:
    """Seconds from one batch of a stream to the next: what the busiest device receives and computes for each.

    Every device works on another batch at the same time, and fetches what it needs itself.
    """
    return max((device.busy_s + device.transfer_s for device in forecast.devices), default=0.0)
