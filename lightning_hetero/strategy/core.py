"""The strategy: what Lightning calls, in terms of plan and runtime. Knows no Lightning namespace.

To Lightning this is a strategy for one device, the root: batches, outputs, metrics and `self.device` are there. Where
the parts of the model are is the runtime's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_hetero.errors import CheckpointError, UnsupportedError, UsageError
from lightning_hetero.placement import Constraints
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.engine.stepper import AroundFirst, look_away
from lightning_hetero.strategy._compat import Host
from lightning_hetero.strategy.arguments import known_arguments_only
from lightning_hetero.strategy.averaging import warn_of_copies
from lightning_hetero.strategy.first_steps import (
    PROFILE,
    FirstSteps,
    can_gain,
    steps_left,
)
from lightning_hetero.strategy.guests import MeansByRows
from lightning_hetero.strategy.memory import readable_out_of_memory
from lightning_hetero.strategy.mocks import Replaceable, replaced
from lightning_hetero.strategy.online import REPLAN
from lightning_hetero.strategy.optimizers import (
    state_factor,
)
from lightning_hetero.strategy.options import one_of, schedule_for, shares_of_processes
from lightning_hetero.strategy.placing import PlacingCore
from lightning_hetero.strategy.sights import Sights
from lightning_hetero.strategy.spreading import DevicesArgument, PlacementArgument
from lightning_hetero.strategy.steps import merged_output, replay
from lightning_hetero.strategy.watchdog import Watchdog

log = logging.getLogger(__name__)


class HeteroStrategyCore(PlacingCore):
    """Trains a model whose parts stand on several devices of one machine, in one process or in several.

    If a launcher such as torchrun started several processes, each drives devices of its own, and they share the rows of
    every batch: the batch size of a data loader is that of all of them together.

    Args:
        devices: The devices to use; the first that can train is the root. "auto" takes all of this machine. Also
            "cuda:0,cuda:1,cpu", a list, a number, a mapping of device to memory limit, or the path of an inventory
            file; see `lightning_hetero.resolve_devices`. None takes what `Trainer(accelerator=, devices=)` or the
            environment variable HETERO_DEVICES say.
        placement: Name of a placement policy, a mapping of module name to device (Hugging Face's `device_map`
            spelling; "" for the rest, "auto" to leave it to the policy), or a policy object. None takes the
            environment variable HETERO_PLACEMENT, else "auto".
        memory: Memory limits by device, such as {"cuda:1": "10GiB"}.
        plan: Path of a plan that was saved as JSON; it takes the place of the policy.
        no_split: Names or classes of modules that have to stay whole.
        constraints: Rules for every policy, as `lightning_hetero.Constraints` or a mapping of its fields: `pins`
            (module to device), `together`, `forbidden` devices, and `trusted` devices, which alone may hold the batch
            and `private` modules.
        objective: What the plan minimises: "step_time", "throughput", "latency" (of the forward) or "peak_memory".
        micro_batches: How many parts a batch is cut into, so that the devices work on different parts at the same
            time. Modules are cut only where that changes nothing; `training_step` runs once, on the whole batch.
            None takes the environment variable HETERO_MICRO_BATCHES, else leaves it to the plan; 1 does not cut.
        micro_batching: "forward" cuts calls of modules; `training_step` runs once, on the whole batch. "step" runs the
            whole `training_step` for each micro-batch and accumulates gradients, each loss weighted by its rows: less
            memory, and the meaning of gradient accumulation (batch statistics and losses that are no means over rows
            are those of micro-batches). Steps with manual optimization are cut by "forward" in any case.
        schedule: Order of micro-batches with `micro_batching="step"`: "1f1b" (each backward as early as can be, few
            micro-batches alive; the default), "gpipe" (all forwards first), "interleaved_1f1b" or "sequential".
        rematerialize: Whether the backward runs the forward of each micro-batch again instead of keeping what it needs
            of all of them: less memory, one forward more. Only with micro-batches. "auto" leaves it to the plan.
        activation_checkpointing: True lets the layers on all devices keep their inputs only and run again in the
            backward, with the same random numbers; a list of names of devices, those on these devices. With and without
            micro-batches, in every schedule; results stay the same bit for bit. Hooks of user code on modules inside
            of layers, and attributes that a forward counts up, see both runs. None does what the plan says, which
            may take to it where nothing else fits, and False nothing. Not together with `rematerialize`.
        compile: "stage" lets torch.compile make one piece of each part of the model that is on one device; a mapping
            does so with these arguments of torch.compile, such as {"mode": "max-autotune"}. Names of modules stay as
            they are. The plan counts seconds of uncompiled parts.
        batch_norm: "whole" runs modules with batch normalisation in training on whole batches, as one device does.
            "defer" cuts them: each micro-batch is normalised by its own mean and variance, and the running statistics
            are those of the whole batch. Results then differ from those of one device.
        profile: Whether the first steps of training are watched, the model measured on every device, and the plan made
            anew with what that says. "auto" does so if the run is long enough to gain from it, "always" and "never" do
            what they say.
        replan: "auto" watches the seconds of steps through the whole run once the model is measured. If they stay more
            than a fifth away from what they were, one step is recorded, the plan is made anew, and the model moves if
            that pays for the rest of the run. "never" keeps the plan of the first steps.
        planning_limit_s: Seconds that a policy may search for a plan; the best one so far is taken then.
        device_profile: File with measured numbers of the devices, as `lightning-hetero devices --measure --json` prints
            them; None measures them, and keeps them in the user's cache.
        shares: With several processes, how much of every batch each gets, in proportion to the others and in order of
            their ranks. None begins with the same for all, and changes that in the first steps if some turn out to be
            faster. Fixed shares give the same results bit for bit each time.
        hang_timeout_s: Seconds after which a cut call that has not ended is given up, with the stacks of all threads,
            and after which another process that does not answer counts as gone.
        verbose: Whether to print the plan once.
        checkpoint_io: As in every Lightning strategy; by default one that writes checkpoints whole or not at all, and
            verifies their sha256 on loading.
        precision_plugin: As in every Lightning strategy.

    Raises:
        PlacementError: The placement is no policy.
        InventoryError: `device_profile` cannot be read.
        UsageError: `micro_batches`, `planning_limit_s` or `hang_timeout_s` is no number above 0, or a word is not
            known.
    """

    strategy_name = "hetero"
    host: ClassVar[Host]
    _has_refused = False

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
        schedule: str | None = None,
        rematerialize: bool | str = False,
        activation_checkpointing: bool | list[str] | None = None,
        compile: str | Mapping[str, Any] | None = None,
        batch_norm: str = "whole",
        profile: str = "auto",
        replan: str = "never",
        planning_limit_s: float = 10.0,
        device_profile: str | Path | None = None,
        shares: Sequence[float] | None = None,
        hang_timeout_s: float = 600.0,
        verbose: bool = True,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(device="cpu", checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.host.warn_if_untested()
        in_parts = one_of("micro_batching", micro_batching, ("forward", "step")) == "step"
        rule = schedule_for(schedule, micro_batching)
        self._take_options(
            devices=devices,
            placement=placement,
            memory=memory,
            plan=plan,
            no_split=no_split,
            constraints=constraints,
            objective=objective,
            micro_batches=micro_batches,
            schedules=(rule.name,) if in_parts else (WHOLE, FORWARD),
            rematerialize=rematerialize,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            batch_norm=batch_norm,
            planning_limit_s=planning_limit_s,
            device_profile=device_profile,
            hang_timeout_s=hang_timeout_s,
            verbose=verbose,
            around=self._moment,
        )
        self._shares = shares_of_processes(shares)
        self._profile = one_of("profile", profile, PROFILE)
        self._replan = one_of("replan", replan, REPLAN)
        self._sights: Sights | None = None

    # What Lightning's connector sets

    @property
    def precision_plugin(self) -> Any:
        """The precision plugin; mixed precision is replaced by one for several kinds of devices."""
        plugin = self._precision_plugin  # asked seven times a step, so without a second call
        return super().precision_plugin if plugin is None else plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._check_it_is_free()  # every Trainer that takes this strategy sets it
        if type(plugin) is self.host.mixed_precision:
            plugin = self.precision_class.of(plugin)
        self._precision_plugin = plugin

    def connect(self, model: Any) -> None:
        """Take the module of a run.

        Raises:
            UsageError: Another run is going on with this strategy.
        """
        if model is not self.model:
            self._has_refused = True  # until it is known: of a Trainer that is refused, `teardown` comes next
            self._check_it_is_free()
            self._has_refused = False
        super().connect(model)

    def _check_it_is_free(self) -> None:
        if getattr(self, "_placed", None) is not None:
            raise UsageError(
                f"this HeteroStrategy has placed the {type(self.model).__name__} of a run that is still going on. Make "
                "a HeteroStrategy for each Trainer that runs at the same time, or write strategy='hetero'."
            )

    def _moment(self) -> tuple[int, int]:
        """Epoch and step: user code may do something else from some epoch on."""
        module: Any = self.lightning_module
        return (0, 0) if module is None else (module.current_epoch, module.global_step)

    # Setup and teardown

    def setup_environment(self) -> None:
        """Prepare the root device, and meet the other processes of the run.

        Raises:
            ProcessError: Some of them did not come.
            UsageError: No Trainer has taken this strategy, or the processes differ in what they are to do.
        """
        if self._inventory is None:
            raise UsageError("the strategy has no devices yet; hand it to Trainer(strategy=...)")
        super().setup_environment()
        if self._address is not None:
            self._join(self._address, self._facts(), self._pipelining.hang_timeout_s)

    def _facts(self) -> dict[str, object]:
        """What has to be the same in all processes.

        Raises:
            UnsupportedError: Something that is for one process only.
        """
        if self._pipelining.defers_batch_norm:
            raise UnsupportedError(
                "batch_norm='defer' is for one process; with several, modules with batch normalisation normalise over "
                "the rows of all processes, as one device would. Leave out batch_norm."
            )
        module: Any = self.lightning_module
        return {
            "micro_batching": "forward" if FORWARD in self._terms.schedules else "step",
            "gradient accumulation": 1 if module is None else module.trainer.accumulate_grad_batches,
        }

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """New modules are built on the CPU, never whole on the root: they may not fit there."""
        with self.host.empty_init(enabled=bool(empty_init)), self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: Any) -> None:
        """Plan, place, make the optimizers, and show the plan.

        Raises:
            PlacementError: The policy cannot be obeyed for this model.
            InfeasiblePlanError: The plan does not fit the devices.
            UnsupportedError: A callback, optimizer or precision cannot work over the devices of the plan.
        """
        assert self.accelerator is not None
        assert self.model is not None
        assert self._inventory is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        fitting = trainer.state.fn == "fit"
        if self._team is not None:
            devices = [torch.device(str(device.torch_device)) for device in self._inventory.trainable]
            self._begin_together(self._team, trainer, self.model, devices)
        planning = self._planning(fitting)
        self._place(planning.before_optimizers())
        self.model = self._setup_model(self.model)
        if fitting:
            self.setup_optimizers(trainer)
            factor = state_factor(self.optimizers)
            assert self._plan is not None
            if factor != self._plan.optimizer_factor:
                self._place(planning.with_optimizer(factor))
            self._measured = None
            if can_gain(planning, self._profile) and not trainer.fast_dev_run:
                self._watch = FirstSteps(
                    planning,
                    self._plan,
                    factor,
                    always=self._profile == "always",
                    steps_left=partial(steps_left, trainer),
                    device_profile=self._device_profile,
                    confinement=self._pipelining.confinement,
                )
                self._watchdog = Watchdog(self._pipelining.hang_timeout_s)
            if self._team is None and FORWARD not in self._terms.schedules:
                self._guests = (*self._guests, MeansByRows(trainer, self.model, None))
        self._check()
        assert self._plan is not None
        warn_of_copies(trainer.callbacks, self._plan)
        self.setup_precision_plugin()
        # Asked here, as all processes have to ask at the same time.
        self._log_dir = trainer.log_dir if trainer.loggers and not trainer.fast_dev_run else None
        self._begin(fitting)
        self._sights = Sights(trainer, self)
        self._show(trainer)

    def model_to_device(self) -> None:
        """Place the model for inference, as Lightning's base class would move it."""
        self._place(self._planning(fitting=False).before_optimizers())

    def teardown(self) -> None:
        """Gather everything on the CPU and leave nothing behind. Never raises over the placement.

        Lightning calls this while another exception is on its way to the user; that one must not be hidden.
        """
        if self._has_refused:
            running: Any = self.model  # which has placed its module; the Trainer that is refused has put its own here
            self._has_refused, self._lightning_module = False, running
            return
        try:
            watch, sights, self._watch, self._sights = self._watch, self._sights, None, None
            if watch is not None:
                watch.close()
            self._dismiss_watchdog()
            if sights is not None:
                sights.close()
            self._dismiss_guests()
            self._release(torch.device("cpu"))
            self._part()
            super().teardown()
        except CheckpointError:  # of one that was written in the background; Lightning asks for it at the very end
            raise
        except Exception:
            self._placed = None
            log.warning("the model could not be gathered on the CPU; parts of it may still be elsewhere", exc_info=True)
            for part in (self.precision_plugin, self._accelerator, self.checkpoint_io):
                if part is not None:
                    part.teardown()

    # During a run

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put buffers that somebody replaced back to their devices; change the plan if the steps so far say so."""
        if self._team is not None:
            self._team.data.training_begins(is_first=batch_idx == 0)
            self._meet(self._team, batch)
        if self._placed is not None:
            self._placed.return_buffers()
        if self._watch is not None:
            self._go_on(self._watch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step, on the rows of this process."""
        team = self._team
        if team is None:
            return self._watched_step(*args, **kwargs)
        with self._training_together(team, in_parts=self._stepper is not None) as is_idle:
            return team.no_loss() if is_idle else self._watched_step(*args, **kwargs)

    def _watched_step(self, *args: Any, **kwargs: Any) -> Any:
        with readable_out_of_memory(), frames.balanced(), self._confining(args):
            watch = self._watch
            if watch is None:
                return self._training_step(args, kwargs)
            with self._guarded("the forward of one of the first steps"):
                if not watch.needs_whole_step:
                    with watch.around_step():
                        return self._training_step(args, kwargs)
                engine = None if self._placed is None else self._placed.engine
                with engine.inline() if engine is not None else nullcontext():
                    return self._training_step(args, kwargs, watch.around_step)

    def _training_step(self, args: Any, kwargs: Any, recorded: AroundFirst | None = None) -> Any:
        """The user's step, in micro-batches if it may be. The first of them runs in what `recorded` gives, or all."""
        if self._stepper is not None and not kwargs:
            with self.precision_plugin.train_step_context(), self._step_values.of_step() as values:
                result = self._stepper.run(args, self._loss_scale(), recorded)
                if result is not None:
                    replay(self.lightning_module, result, values)
            if result is not None:
                return merged_output(result)
        with nullcontext(look_away) if recorded is None else recorded(1.0) as look:
            output = super().training_step(*args, **kwargs)
            look(output)
            return output

    def _loss_scale(self) -> float:
        """What Lightning multiplies the loss with before its backward."""
        module: Any = self.lightning_module
        scaler = getattr(self.precision_plugin, "scaler", None)
        scale: float = scaler.get_scale() if scaler is not None else 1.0
        weight = 1.0 if self._team is None else self._team.data.weight
        return weight * scale / float(module.trainer.accumulate_grad_batches)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step, on the rows of this process."""
        with readable_out_of_memory(), frames.balanced(), self._confining(args), self._evaluating_together() as is_idle:
            return None if is_idle else super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step, on the rows of this process."""
        with readable_out_of_memory(), frames.balanced(), self._confining(args), self._evaluating_together() as is_idle:
            return None if is_idle else super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step, on the rows of this process."""
        with readable_out_of_memory(), frames.balanced(), self._confining(args), self._evaluating_together() as is_idle:
            return None if is_idle else super().predict_step(*args, **kwargs)

    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        """The batch on the root device."""
        with readable_out_of_memory():
            batch = super().batch_to_device(*args, **kwargs)
        if self._pipelining.confinement is not None:
            self._pipelining.confinement.watch(batch)
        return batch

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's closure, and the step."""
        if self._team is not None:
            self._team.gradients.check_sums()
        with readable_out_of_memory():
            return super().optimizer_step(*args, **kwargs)

    @Replaceable
    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Backward over all devices, and sums of gradients over all processes."""
        with readable_out_of_memory(), frames.balanced(), self._guarded("the backward of one of the first steps"):
            if self._team is not None:
                return self._weighted_backward(self._team, closure_loss, *args, **kwargs)
            return replaced(HeteroStrategyCore, self, "backward", self.host.backward)(closure_loss, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        of_a_run = ("_sights", "_team", "_sigterm", "_balance")
        return {**super().__getstate__(), **dict.fromkeys(of_a_run), "_guests": ()}
