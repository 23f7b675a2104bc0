"""The strategy for Fabric: what `fabric.setup`, `save`, `load` and so on do with models over several devices.

To Fabric, as to the Trainer, this is a strategy for one device, the root. Fabric sets up as many models as it likes and
never says that they are done with. So what was done to a model is kept with the model, and ends with it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.devices import Inventory
from lightning_hetero.devices.measured import measured_inventory
from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.placement import Constraints
from lightning_hetero.plan import Plan
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.engine.record import Recording
from lightning_hetero.runtime.guard import release
from lightning_hetero.strategy._compat import FabricHost
from lightning_hetero.strategy.arguments import known_arguments_only
from lightning_hetero.strategy.checkpoint import on_cpu
from lightning_hetero.strategy.checkpoint_files import CheckpointFilesCore
from lightning_hetero.strategy.optimizers import check_optimizers, keep_state_beside_parameters, state_factor
from lightning_hetero.strategy.precision import use_devices
from lightning_hetero.strategy.report import print_plan
from lightning_hetero.strategy.setups import Bridge, Setup, is_part_of_one, setup_of
from lightning_hetero.strategy.spreading import DevicesArgument, PlacementArgument, SpreadingCore

if TYPE_CHECKING:
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy as _Base
else:
    _Base = object

log = logging.getLogger(__name__)


class FabricStrategyCore(SpreadingCore, _Base):
    """Runs models whose parts stand on several devices of one machine: `Fabric(strategy="hetero")`.

    `fabric.setup(model, optimizer)` plans and places; `fabric.to_device(module)` does too. Planning goes by sizes, as
    the Trainer's does before its first batch; there is no later plan. A model stays placed as long as it lives, or
    until `fabric.strategy.teardown()` gathers all of them on the CPU.

    Args:
        devices: As for the Trainer's `HeteroStrategy`, see there; None takes what `Fabric(accelerator=, devices=)` or
            the environment variable HETERO_DEVICES say.
        placement: As there. A mapping has to fit each model that is set up.
        memory: As there. What the models before it keep on a device is taken off.
        plan: As there.
        no_split: As there.
        constraints: As there.
        objective: As there.
        micro_batches: As there. Calls of a model that was set up are cut where that changes nothing.
        micro_batching: "forward". There is no step that "step" could run in parts.
        rematerialize: As there.
        activation_checkpointing: As there.
        compile: As there.
        batch_norm: As there.
        profile: "auto" or "never"; without a Trainer nobody knows when a step begins, so none is measured.
        replan: "never", for the same reason.
        planning_limit_s: As there.
        device_profile: File with measured numbers of the devices, which the plan then goes by.
        hang_timeout_s: As there.
        verbose: Whether to print the plan of each model.
        checkpoint_io: As in every Fabric strategy; by default one that writes checkpoints whole or not at all.
        precision: As in every Fabric strategy.

    Raises:
        PlacementError: The placement is no policy.
        InventoryError: `device_profile` cannot be read.
        UnknownArgumentError: An argument does not exist; the nearest one is named.
        UnsupportedError: An option is for the Trainer only.
        UsageError: A number or word is not one of those that are allowed.
    """

    host: ClassVar[FabricHost]
    checkpoint_io_class: ClassVar[type[CheckpointFilesCore]]
    cluster_environment: Any = None

    @known_arguments_only
    def __init__(
        self,
        devices: DevicesArgument = None,
        placement: PlacementArgument = None,
        memory: dict[str, str | int] | None = None,
        plan: str | Path | None = None,
        no_split: str | list[str] | None = None,
        constraints: Constraints | dict[str, Any] | None = None,
        objective: str = "step_time",
        micro_batches: int | None = None,
        micro_batching: str = "forward",
        rematerialize: bool | str = False,
        activation_checkpointing: bool | list[str] | None = None,
        compile: str | Mapping[str, Any] | None = None,
        batch_norm: str = "whole",
        profile: str = "auto",
        replan: str = "never",
        planning_limit_s: float = 10.0,
        device_profile: str | Path | None = None,
        hang_timeout_s: float = 600.0,
        verbose: bool = True,
        checkpoint_io: Any = None,
        precision: Any = None,
    ) -> None:
        super().__init__(device="cpu", checkpoint_io=checkpoint_io, precision=precision)
        self.host.warn_if_untested()
        _check_words(micro_batching=micro_batching, profile=profile, replan=replan)
        self._take_options(
            devices=devices,
            placement=placement,
            memory=memory,
            plan=plan,
            no_split=no_split,
            constraints=constraints,
            objective=objective,
            micro_batches=micro_batches,
            schedules=(WHOLE, FORWARD),
            rematerialize=rematerialize,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            batch_norm=batch_norm,
            planning_limit_s=planning_limit_s,
            device_profile=device_profile,
            hang_timeout_s=hang_timeout_s,
            verbose=verbose,
        )
        self._num_nodes = 1
        self._setups: weakref.WeakSet[Setup] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._bridge: weakref.ReferenceType[Bridge] | None = None
        self._plan: Plan | None = None

    # What Fabric's connector sets

    @property
    def num_nodes(self) -> int:
        """What Fabric was told."""
        return self._num_nodes

    def _set_world_ranks(self) -> None:
        """Called by Fabric's connector once it knows the launcher.

        Raises:
            UnsupportedError: It started several processes.
        """
        environment = self.cluster_environment
        if self._num_nodes > 1 or (environment is not None and environment.world_size() > 1):
            raise UnsupportedError(
                "Fabric(strategy='hetero') drives the devices of one machine from one process, and several are meant "
                "here. Start it once, with num_nodes=1, or use Trainer(strategy='hetero'), which works with several."
            )

    def _settle_accelerator(self) -> None:
        given = self._accelerator
        super()._settle_accelerator()
        if given is not None and given is not self._accelerator:
            # Fabric keeps the accelerator that it chose, and has it prepare the root device, which is of another kind.
            given.setup_device = self._accelerator.setup_device

    @property
    def precision(self) -> Any:
        """The precision plugin; mixed precision is replaced by one for several kinds of devices."""
        return super().precision

    @precision.setter
    def precision(self, plugin: Any) -> None:
        self._precision = self.precision_class.of(plugin) if type(plugin) is self.host.mixed_precision else plugin

    @property
    def checkpoint_io(self) -> Any:
        """What reads and writes files."""
        if self._checkpoint_io is None:
            self._checkpoint_io = self.checkpoint_io_class()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: Any) -> None:
        self._checkpoint_io = checkpoint_io

    # What users may ask

    @property
    def plan(self) -> Plan | None:
        """The plan of the model that was set up last; None before the first."""
        return self._plan

    def plan_of(self, module: nn.Module) -> Plan:
        """The plan of a model.

        Raises:
            UsageError: It is not set up.
        """
        return self._setup_of(module).plan

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[Recording]:
        """Within the block, note which device does what for a model, and when; see `PlacedModel.recording`.

        Raises:
            UsageError: The model is not set up, or nothing of it runs in micro-batches.
        """
        with self._setup_of(module).placed.recording() as recording:
            yield recording

    def _setup_of(self, module: nn.Module) -> Setup:
        setup = setup_of(self.host.unwrap(module))
        if setup is None or setup not in self._setups:
            raise UsageError("this model is not set up here; call fabric.setup(model) first")
        return setup

    # Setting up

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """New modules are built on the CPU, never whole on the root: they may not fit there."""
        with ExitStack() as stack:
            stack.enter_context(self.host.empty_init(enabled=bool(empty_init)))
            stack.enter_context(self.precision.module_init_context())
            yield

    def module_to_device(self, module: nn.Module) -> None:
        """Place a model as a plan for it says; what has no parameters (a loss, a metric) moves to the root.

        Raises:
            PlacementError: The policy cannot be obeyed for this model.
            InfeasiblePlanError: The plan does not fit the devices, beside the models that are set up already.
            UnsupportedError: A part of it is set up already, or the precision cannot work over the devices.
        """
        module = self.host.unwrap(module)
        setup = setup_of(module)
        if setup is not None and setup in self._setups:
            return
        if setup is not None:  # of another Fabric
            setup.end(torch.device("cpu"))
        if is_part_of_one(module):
            raise UnsupportedError(
                f"a part of this {type(module).__name__} belongs to a model that is set up already. Set up the whole "
                "once and use its parts, or set up parts that have nothing in common."
            )
        release(module)  # what a copy of a model that is set up brings along
        parameters = list(module.parameters())
        if not parameters:
            module.to(self.root_device)
            return
        planning = self._planning_of(
            module, self._what_is_left(), training=any(parameter.requires_grad for parameter in parameters)
        )
        plan = self._completed(planning.before_optimizers())
        self._check_shared(module, plan)
        self._begin(Setup(module, planning, self._to_place(module, plan)))

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], *scheduler: Any
    ) -> Any:  # with the scheduler that Fabric passes, and wants back, since Lightning 2.6
        """Plan with the room that these optimizers take; see `setup_module` and `setup_optimizer`."""
        setup = setup_of(module)
        if setup is not None and setup in self._setups:
            factor = state_factor(optimizers)
            if factor != setup.plan.optimizer_factor:
                self._optimizers.update(optimizers)
                plan = self._completed(setup.planning.with_optimizer(factor))
                again = Setup(module, setup.planning, self._to_place(module, plan))
                again.replaced = setup.end()
                self._begin(again)
        module = self.setup_module(module)
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], *scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Show the plan. With `fabric.setup(..., move_to_device=False)` there is none, and the model stays as it is."""
        setup = setup_of(module)
        if setup is not None and setup in self._setups and self._verbose:
            if len(setup.plan.used) > 1:
                print_plan(setup.plan)
            else:
                log.info("%s", " ".join(setup.plan.notes))
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let an optimizer train the parameters where they are now.

        Raises:
            UnsupportedError: It cannot work over the devices of its parameters.
        """
        self._optimizers.add(optimizer)
        for setup in self._setups:
            setup.exchange(setup.replaced, [optimizer])
        check_optimizers([optimizer])
        keep_state_beside_parameters([optimizer])
        return optimizer

    def _begin(self, setup: Setup) -> None:
        self._setups.add(setup)
        devices = [device for other in self._setups for device in setup.plan.torch_devices + other.plan.torch_devices]
        try:
            use_devices(self._precision, map(torch.device, dict.fromkeys(devices)), self.host.mixed_precision)
            setup.place()
        except BaseException:
            self._setups.discard(setup)
            setup.end()
            raise
        setup.exchange(setup.replaced, self._optimizers)
        self._plan = setup.plan
        if setup.needs_bridge:
            bridge = None if self._bridge is None else self._bridge()
            setup.bridge = bridge or Bridge(self.root_device)
            self._bridge = weakref.ref(setup.bridge)

    def _what_is_left(self) -> Inventory:
        """The devices, without the memory that the models keep which are set up."""
        if self._inventory is None:
            raise UsageError("the strategy has no devices yet; hand it to Fabric(strategy=...)")
        if self._device_profile is not None:
            self._inventory = measured_inventory(self._inventory, profile=self._device_profile)
        plans = [setup.plan for setup in self._setups]
        taken = {name: sum(plan.need_of(name).total_bytes for plan in plans) for name in self._inventory.names}
        return self._inventory.with_memory(
            {d.name: max(1, d.memory_bytes - taken[d.name]) for d in self._inventory if taken[d.name]}
        )

    def _check_shared(self, module: nn.Module, plan: Plan) -> None:
        """Refuse to move parameters of one model as another one wants them."""
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        for other in self._setups:
            shared = next((own[id(p)] for p in other.module.parameters() if id(p) in own), None)
            if shared is not None and len({device.name for device in (*plan.used, *other.plan.used)}) > 1:
                raise UnsupportedError(
                    f"{shared!r} is also a parameter of a {type(other.module).__name__} that is set up already, and "
                    "the two would want it on different devices. Set up one module that holds both, such as an "
                    "nn.ModuleDict."
                )

    # Running

    def optimizer_step(self, optimizer: Any, **options: Any) -> Any:
        """The step. No forward is under way, and what one that was interrupted has left behind is cleared."""
        frames.cut_to(0)
        Bridge.clear()
        for setup in self._setups:
            setup.placed.return_buffers()
        return super().optimizer_step(optimizer, **options)

    # Saving

    def save_checkpoint(self, path: Any, state: dict[str, Any], *arguments: Any, **options: Any) -> None:
        """Write a checkpoint of CPU tensors.

        Raises:
            CheckpointError: It cannot be written; a checkpoint that was there before stays as it is.
        """
        # Modules, optimizers and others with a state are left alone here, and asked for it.
        super().save_checkpoint(path, {key: on_cpu(value) for key, value in state.items()}, *arguments, **options)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The model's state, on the CPU."""
        state: dict[str, Any] = on_cpu(super().get_module_state_dict(module))
        return state

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, on the CPU."""
        state: dict[str, Any] = on_cpu(super().get_optimizer_state(optimizer))
        return state

    def teardown(self) -> None:
        """Gather all models on the CPU, with their optimizers, and end what works for them."""
        for setup in list(self._setups):
            setup.exchange(setup.end(torch.device("cpu")), self._optimizers)
            self._setups.discard(setup)
        keep_state_beside_parameters(self._optimizers)
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        of_a_run: dict[str, Any] = {"_setups": weakref.WeakSet(), "_optimizers": weakref.WeakSet(), "_bridge": None}
        return {**self.__dict__, **of_a_run}


def _check_words(*, micro_batching: str, profile: str, replan: str) -> None:
    """Refuse what only a Trainer can do.

    Raises:
        UnsupportedError: One of the words is such.
        UsageError: One is not known at all.
    """
    for name, word, allowed, trainers, why in (
        ("micro_batching", micro_batching, ("forward",), ("step",), "Fabric has no training_step to run in parts"),
        ("profile", profile, ("auto", "never"), ("always",), "Fabric does not say when a step begins"),
        ("replan", replan, ("never",), ("auto",), "Fabric does not say when a step begins"),
    ):
        if word in trainers:
            raise UnsupportedError(
                f"{name}={word!r} is for the Trainer: {why}. Leave it out, or use Trainer(strategy='hetero')."
            )
        if word not in allowed:
            raise UsageError(f"{name}={word!r} is not known; it may be {' or '.join(map(repr, allowed))}")
