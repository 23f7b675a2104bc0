"""A plan under other circumstances: more micro-batches, other devices, faster links. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lightning_hetero.devices import Inventory, Link, resolve_devices
from lightning_hetero.devices.presets import describes_hardware, with_assumptions
from lightning_hetero.errors import PlacementError, UsageError
from lightning_hetero.plan import Execution, Plan
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.plan.forecast import FORWARD, WHOLE, DeviceForecast
from lightning_hetero.schedule.rows import split_rows
from lightning_hetero.simulate import Costs, Prediction, predict
from lightning_hetero.simulate.predict import as_run as as_run_by
from lightning_hetero.simulate.route import route
from lightning_hetero.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_hetero.cli.planner import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One combination.

    Attributes:
        execution: How the batch was to run.
        as_run: How it does: whole, where rows depend on each other, and in no more micro-batches than there are rows.
        devices: What was asked for; None: those of the plan.
        links: Likewise.
        prediction: What it would take.
    """

    execution: Execution
    as_run: Execution
    devices: str | None
    links: str | None
    prediction: Prediction

    @property
    def title(self) -> str:
        """The combination in words."""
        parts = [f"{self.as_run.schedule}, {_counted(self.as_run.micro_batches)}"]
        asked = self.execution.micro_batches
        parts += [f"not {asked}"] if asked != self.as_run.micro_batches else []
        parts += [f"devices {self.devices}"] if self.devices else []
        parts += [f"links {self.links}"] if self.links else []
        return ", ".join(parts)

    @property
    def fullest(self) -> DeviceForecast:
        """The device whose memory is used most."""
        return max(self.prediction.forecast.devices, key=lambda device: device.memory_bytes / device.limit_bytes)

    def row(self) -> tuple[str, ...]:
        """Cells for people, under `simulate.HEADER`."""
        forecast, full = self.prediction.forecast, self.fullest
        fit = "" if self.prediction.fits else ", does not fit"
        asked, run = self.execution.micro_batches, self.as_run.micro_batches
        return (
            str(asked) if asked == run else f"{asked}, runs as {run}",
            self.devices or "as planned",
            self.links or "as planned",
            format_seconds(forecast.step_s),
            f"{100 * self.prediction.timeline.bubble_share:.0f} %",
            f"{full.device}: {format_bytes(full.memory_bytes)} of {format_bytes(full.limit_bytes)}{fit}",
            forecast.bottleneck,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types, with the timeline."""
        return {
            "execution": asdict(self.execution),
            "as_run": asdict(self.as_run),
            "devices": self.devices,
            "links": self.links,
            "fits": self.prediction.fits,
            "forecast": asdict(self.prediction.forecast),
            "timeline": self.prediction.timeline.to_dict(),
        }


def outcomes(planned: Planned, cfg: DictConfig) -> list[Outcome]:
    """A prediction for every combination of the values in `micro_batches`, `devices` and `links`.

    Raises:
        UsageError: A value makes no sense.
        InventoryError: A device request means nothing.
        PlacementError: The plan uses a device that the other hardware lacks.
    """
    counts, rates = _listed(cfg.micro_batches), _listed(cfg.links)
    requests = _requests(cfg.devices.request)
    return [_outcome(planned, *each) for each in product(requests, rates, counts)]


def _outcome(planned: Planned, request: Any, rate: Any, count: Any) -> Outcome:
    plan = planned.plans[0]
    inventory = planned.inventory if request is None else _other(plan, request)
    if rate is not None:
        inventory = _with_links(inventory, rate)
    execution = plan.execution if count is None else _cut(plan, count)
    costs = Costs(
        planned.graph,
        inventory,
        planned.workload.profile(planned.graph, inventory),
        plan.training,
        plan.optimizer_factor,
    )
    prediction = predict(costs, plan.device_of, execution, plan.shares_of, plan.checkpointed)
    as_run = as_run_by(costs, route(costs, plan.device_of), execution, plan.shares_of)[0]
    count = len(split_rows(costs.profile.rows, as_run.micro_batches, as_run.weights))
    return Outcome(
        execution=execution,
        as_run=replace(as_run, micro_batches=count),
        devices=_in_words(request, inventory),
        links=None if rate is None else str(rate),
        prediction=prediction,
    )


def _counted(micro_batches: int) -> str:
    return f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"


def _in_words(request: Any, inventory: Inventory) -> str | None:
    """A request as it was written, or the names of the devices that a file of the group describes."""
    return request if request is None or isinstance(request, str) else ", ".join(inventory.names)


def _cut(plan: Plan, count: Any) -> Execution:
    """The plan's way to run with another number of micro-batches."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"micro_batches={count!r} must be a whole number from 1 on, or a list of them")
    execution = replace(plan.execution, weights=())
    if execution.schedule == WHOLE and count > 1:
        return replace(execution, schedule=FORWARD, micro_batches=count)
    return replace(execution, micro_batches=count)


def _other(plan: Plan, request: Any) -> Inventory:
    found = resolve_devices(request, must_exist=not describes_hardware(request))
    absent = [device.name for device in plan.used if device.name not in found]
    if absent:
        raise PlacementError(
            f"the plan uses {', '.join(absent)}, which devices={request!r} does not have: it has "
            f"{', '.join(found.names)}. Make a plan for these devices with `lightning-hetero plan`"
        )
    return with_assumptions(found)[0]


def _with_links(inventory: Inventory, rate: Any) -> Inventory:
    """All links between different places of torch at one rate."""
    text = str(rate).removesuffix("/s")
    try:
        bytes_per_s = parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise UsageError(f"links={rate!r}: {error}; a rate is for example 16GB/s") from error
    if not bytes_per_s:
        raise UsageError(f"links={rate!r} must be above 0, for example 16GB/s")
    known = {(link.source, link.target): link for link in inventory.links}
    links = []
    for source, target in product(inventory.trainable, repeat=2):
        if source.torch_device != target.torch_device:
            pair = (source.name, target.name)
            link = known.pop(pair, Link(source=source.name, target=target.name))
            links.append(replace(link, bandwidth_bytes_per_s=float(bytes_per_s), measured=""))
    return replace(inventory, links=(*links, *known.values()))


def _listed(value: Any) -> Sequence[Any]:
    if OmegaConf.is_list(value):
        return list(value) or [None]
    return [value]


def _requests(value: Any) -> Sequence[Any]:
    """Several texts that each describe hardware are several requests; any other list is one."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(plain, list) and all(map(describes_hardware, plain)):
        return plain or [None]
    return [plain]
