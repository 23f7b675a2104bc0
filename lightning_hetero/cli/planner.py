"""Makes plans from a configuration: the model without memory, the devices by their rates, the policy as asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_hetero.cli.example import Example, example_of
from lightning_hetero.cli.explain import near
from lightning_hetero.devices import Inventory, measured_inventory, resolve_devices
from lightning_hetero.devices.presets import describes_hardware, with_assumptions
from lightning_hetero.errors import ProfileError, UsageError
from lightning_hetero.export.deploy import as_deployment, converted
from lightning_hetero.graph import ModelGraph
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import PlacementPolicy, Problem, make_plans
from lightning_hetero.placement.problem import OBJECTIVES
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.profile.count import count_work
from lightning_hetero.profile.workload import Workload
from lightning_hetero.strategy.options import (
    BATCH_NORMS,
    as_constraints,
    as_policy,
    may_checkpoint,
    number_of_micro_batches,
    one_of,
    positive_seconds,
    schedule_for,
    yes_no_or_auto,
)
from lightning_hetero.strategy.planning import FromFilePolicy, Terms, read_plan

OPTIMIZERS = {"adam": 2.0, "adamw": 2.0, "momentum": 1.0, "sgd": 0.0}
"""Bytes of state that optimizers keep for each byte of trained parameter."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_HOPELESS_S = 1.0  # for a search that cannot find anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Under which a plan is made, besides the model, the devices and the policy.

    Attributes:
        rows: Rows of a batch; None: those of the example.
        training: Whether there are gradients and an optimizer.
        optimizer_factor: Bytes of its state for each byte of trained parameter.
        dtype: Of the parameters.
        terms: What the user has laid down, and what is left to the plan.
        deployment: Whether the model is exported, and may stand on devices that only run exported models.
        convert_precision: Whether it may stand there in another dtype.
    """

    rows: int | None
    training: bool
    optimizer_factor: float
    dtype: str
    terms: Terms
    deployment: bool = False
    convert_precision: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What came out.

    Attributes:
        plans: The chosen plan, then other finalists.
        graph: The units of the model.
        inventory: The devices, with rates that were assumed.
        workload: What a step has to do.
    """

    plans: tuple[Plan, ...]
    graph: ModelGraph
    inventory: Inventory
    workload: Workload


class Planner:
    """Plans one configuration, under its own circumstances or others.

    Args:
        cfg: The configuration `plan`.
        policy: Who decides, instead of what the configuration says.
        example: What the model is called with, instead of what the model or its data say.

    Attributes:
        inventory: The devices.
        circumstances: What the configuration asks for.

    Raises:
        HeteroError: A key has a value that makes no sense, or a device does not exist.
    """

    def __init__(
        self, cfg: DictConfig, *, policy: PlacementPolicy | None = None, example: Example | None = None
    ) -> None:
        self._cfg = cfg
        self.circumstances = _circumstances(cfg)
        self._policy = policy or _policy(cfg, self.circumstances)
        self._given = example
        self.inventory, self._assumptions = _inventory(cfg)
        self._models: dict[str, nn.Module] = {}

    def plan(self, circumstances: Circumstances | None = None) -> Planned:
        """Make the plan.

        Raises:
            PlacementError: The policy cannot be obeyed.
            InfeasiblePlanError: Nothing fits.
        """
        now = circumstances or self.circumstances
        module = self._model(now.dtype)
        graph = find_units(module, tuple(self._cfg.placement.no_split or ()))
        workload, notes = self._workload(module, graph, now)
        end_s = time.monotonic() + now.terms.time_limit_s
        problem = Problem(
            graph=graph,
            inventory=self.inventory,
            training=now.training,
            optimizer_factor=now.optimizer_factor if now.training else 0.0,
            profile=workload.profile(graph, self.inventory),
            micro_batches=now.terms.micro_batches,
            schedules=now.terms.schedules,
            rematerialize=now.terms.rematerialize,
            constraints=now.terms.constraints,
            objective=now.terms.objective,
            may_checkpoint=now.terms.may_checkpoint,
            defers_batch_norm=now.terms.defers_batch_norm,
            time_limit_s=now.terms.time_limit_s,
            out_of_time=lambda: time.monotonic() > end_s,
        )
        if now.deployment:
            problem = self._deployed(problem, module, now)
        if exceeds_all_memory(problem):  # then nothing is to be found, only something to be shown
            end_s = min(end_s, time.monotonic() + _HOPELESS_S)
        plans = make_plans(self._policy, problem)
        check_plan(plans[0], graph)
        notes += tuple(converted(plans[0], now.dtype)) if now.deployment else ()
        first = replace(plans[0], notes=(*plans[0].notes, *notes, *self._assumptions))
        return Planned(plans=(first, *plans[1:]), graph=graph, inventory=self.inventory, workload=workload)

    def _deployed(self, problem: Problem, module: nn.Module, now: Circumstances) -> Problem:
        example = self._example.with_rows(now.rows, now.dtype)
        call = dict(example.kwargs) if example.kwargs else example.args
        return as_deployment(problem, module, call, convert_precision=now.convert_precision)

    def is_hopeless(self, circumstances: Circumstances) -> bool:
        """Whether parameters, gradients and optimizer state alone are more than all devices hold together."""
        module = self._model(circumstances.dtype)
        graph = find_units(module, tuple(self._cfg.placement.no_split or ()))
        factor = circumstances.optimizer_factor if circumstances.training else 0.0
        training = circumstances.training
        return exceeds_all_memory(
            Problem(graph=graph, inventory=self.inventory, training=training, optimizer_factor=factor)
        )

    def _workload(self, module: nn.Module, graph: ModelGraph, now: Circumstances) -> tuple[Workload, tuple[str, ...]]:
        example = self._example.with_rows(now.rows, now.dtype)
        basis = f"Seconds are estimates for {example.rows} rows: operations and bytes by shapes, rates by "
        basis += "measurement." if all(device.measured == "measured" for device in self.inventory) else "data sheets."
        try:
            work = count_work(module, graph, example.args, example.kwargs, rows=example.rows, training=now.training)
        except ProfileError as error:
            sizes = Workload.of_sizes(graph, rows=example.rows, training=now.training, dtype=now.dtype)
            why = str(error).splitlines()[0]
            return sizes, (f"Activations are not counted, and seconds follow from sizes of parameters alone: {why}",)
        return work, (basis,)

    @cached_property
    def _example(self) -> Example:
        return self._given or example_of(self._model(self.circumstances.dtype), self._cfg.get("data"))

    def _model(self, dtype: str) -> nn.Module:
        """The model without memory, or with it if its code needs values to build it."""
        if dtype not in self._models:
            self._models.clear()  # one at a time: those that need memory may need much
            with _default_dtype(dtype):
                try:
                    with torch.device("meta"):
                        module = instantiate(self._cfg.model, _convert_="all")
                except (NotImplementedError, RuntimeError):
                    module = instantiate(self._cfg.model, _convert_="all")
            if not isinstance(module, nn.Module):
                raise UsageError(f"model={self._cfg.model!r} makes a {type(module).__name__}, which is no nn.Module")
            self._models[dtype] = module
        return self._models[dtype]


@contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _circumstances(cfg: DictConfig) -> Circumstances:
    rows = cfg.rows
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise UsageError(f"rows={rows!r} must be a whole number from 1 on: the rows of a batch")
    if not isinstance(cfg.training, bool):
        raise UsageError(f"training={cfg.training!r} must be true or false")
    deployment = {key: cfg.get(key, False) for key in ("deployment", "convert_precision")}
    for key, value in {**deployment, "measure": cfg.measure}.items():
        if not isinstance(value, bool):
            raise UsageError(f"{key}={value!r} must be true or false")
    schedule = cfg.schedule
    in_parts = one_of("schedule.micro_batching", schedule.micro_batching, ("forward", "step")) == "step"
    rule = schedule_for(schedule.rule, schedule.micro_batching)
    rematerialize = yes_no_or_auto("schedule.rematerialize", schedule.rematerialize)
    return Circumstances(
        rows=rows,
        training=cfg.training and not deployment["deployment"],
        **deployment,
        optimizer_factor=_optimizer_factor(cfg.optimizer),
        dtype=one_of("dtype", cfg.dtype, DTYPES),
        terms=Terms(
            micro_batches=number_of_micro_batches(schedule.micro_batches),
            schedules=(rule.name,) if in_parts else (WHOLE, FORWARD),
            rematerialize=rematerialize,
            may_checkpoint=may_checkpoint(_plain(schedule.activation_checkpointing), schedule.compile, rematerialize),
            defers_batch_norm=one_of("schedule.batch_norm", schedule.batch_norm, BATCH_NORMS) == "defer",
            constraints=as_constraints(_plain(cfg.placement.constraints)),
            objective=one_of("placement.objective", cfg.placement.objective, OBJECTIVES),
            time_limit_s=positive_seconds("placement.time_limit_s", cfg.placement.time_limit_s),
        ),
    )


def _optimizer_factor(given: Any) -> float:
    if isinstance(given, (int, float)) and not isinstance(given, bool) and given >= 0:
        return float(given)
    if given not in OPTIMIZERS:
        raise UsageError(
            f"optimizer={given!r} is not known.{near(str(given), OPTIMIZERS)} Write {', '.join(OPTIMIZERS)}, or the "
            "bytes of state that yours keeps for each byte of trained parameter (Adam: 2)"
        )
    return OPTIMIZERS[given]


def _policy(cfg: DictConfig, now: Circumstances) -> PlacementPolicy:
    if cfg.placement.plan is not None:
        return FromFilePolicy(read_plan(Path(cfg.placement.plan)), keeps_execution=now.terms.micro_batches is None)
    given = cfg.placement.policy
    if isinstance(given, DictConfig) and "_target_" in given:
        return as_policy(instantiate(given, _convert_="all"))
    return as_policy(_plain(given))


def _inventory(cfg: DictConfig) -> tuple[Inventory, tuple[str, ...]]:
    request, memory = _plain(cfg.devices.request), _plain(cfg.devices.memory)
    inventory = resolve_devices(request, memory=memory, must_exist=not describes_hardware(request))
    if cfg.measure or cfg.placement.device_profile:
        inventory = measured_inventory(inventory, profile=cfg.placement.device_profile)
    return with_assumptions(inventory)


def exceeds_all_memory(problem: Problem) -> bool:
    """Whether what stays through a run is more than all devices hold together."""
    need_bytes = problem.need_bytes(problem.graph.units) + problem.loose_bytes
    return need_bytes > sum(device.memory_bytes for device in problem.candidates)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def variants(now: Circumstances) -> Mapping[str, Circumstances]:
    """Other circumstances that need less memory, by what to write for them, the ones that change least first."""
    again = replace(now, terms=replace(now.terms, rematerialize=True, may_checkpoint=False, schedules=(FORWARD,)))
    in_steps = replace(now, terms=replace(now.terms, schedules=("1f1b",), rematerialize=False))
    short: dict[str, Any] = {"dtype": "bfloat16"}
    plain: dict[str, Any] = {"optimizer_factor": 0.0}
    found: dict[str, Circumstances] = {}
    if now.training:
        found["schedule=forward schedule.rematerialize=true"] = again
        found["schedule=1f1b"] = in_steps
        found["rows=1"] = replace(now, rows=1)
        found["optimizer=sgd"] = replace(now, **plain)
        found["optimizer=sgd schedule=forward schedule.rematerialize=true"] = replace(again, **plain)
        found["dtype=bfloat16"] = replace(now, **short)
        found["dtype=bfloat16 schedule=forward schedule.rematerialize=true"] = replace(again, **short)
        found["dtype=bfloat16 optimizer=sgd"] = replace(now, **short, **plain)
        found["dtype=bfloat16 optimizer=sgd schedule=forward schedule.rematerialize=true"] = replace(
            again, **short, **plain
        )
        found["dtype=bfloat16 optimizer=sgd rows=1"] = replace(now, **short, **plain, rows=1)
        found["training=false"] = replace(now, training=False)
    found["training=false dtype=bfloat16"] = replace(now, training=False, **short)
    return {words: other for words, other in found.items() if other != now}
