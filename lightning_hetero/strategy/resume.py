"""The part of the strategy that saves and resumes: states on the CPU, and random numbers that go on where they were."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_hetero.plan import Plan
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.strategy._compat import remove_when_written
from lightning_hetero.strategy.checkpoint import on_cpu
from lightning_hetero.strategy.checkpoint_files import CheckpointFilesCore
from lightning_hetero.strategy.optimizers import keep_state_beside_parameters
from lightning_hetero.strategy.random_state import random_state, restore_random_state
from lightning_hetero.strategy.several import OneOfSeveralCore

log = logging.getLogger(__name__)

KEY = "lightning_hetero"
"""Under which a checkpoint holds what only this strategy reads; plain Lightning passes over it."""


class ResumingCore(OneOfSeveralCore):
    """Checkpoints of the strategy, which any Lightning opens, and from which this one goes on bit for bit."""

    checkpoint_io_class: ClassVar[type[CheckpointFilesCore]]
    _plan: Plan | None
    _placed: PlacedModel | None
    _of_checkpoint: dict[str, Any] | None = None  # what the checkpoint of this run holds under KEY
    _to_resume: dict[str, Any] | None = None  # this process's part of it, until training begins

    @property
    def checkpoint_io(self) -> Any:
        """What reads and writes files: the user's, or ours, which a wrapper such as `AsyncCheckpointIO` gets inside."""
        if self._checkpoint_io is None:
            self._checkpoint_io = self.checkpoint_io_class()
        elif hasattr(type(self._checkpoint_io), "checkpoint_io"):
            wrapper: Any = self._checkpoint_io
            wrapper.checkpoint_io = self.checkpoint_io_class()  # it keeps one that it has
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: Any) -> None:
        self._checkpoint_io = checkpoint_io

    # Saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's state, on the CPU."""
        state: dict[str, Any] = on_cpu(super().lightning_module_state_dict())
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, on the CPU."""
        state: dict[str, Any] = on_cpu(super().optimizer_state(optimizer))
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, in process 0, with the random states of all processes if it is one to resume from.

        Raises:
            CheckpointError: It cannot be written; a checkpoint that was there before stays as it is.
        """
        if "optimizer_states" in checkpoint:
            own = random_state(self._devices_that_draw())
            team = self._listening
            states = [own] if team is None else team.group.gather(own)
            # A new dict: the caller's belongs to user code, which has seen it already.
            checkpoint = {**checkpoint, KEY: {"random_states": states, "is_within_epoch": self._is_within_epoch()}}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a file, in process 0.

        Checkpoints that Lightning's `AsyncCheckpointIO` has yet to write are written first: one of them may be there to
        take the place of this one. If that fails, this one stays.
        """
        if not self.is_global_zero or not remove_when_written(self.checkpoint_io, filepath):
            super().remove_checkpoint(filepath)

    def _is_within_epoch(self) -> bool:
        """Whether the iteration over the training data that goes on now goes on after this moment."""
        module: Any = self.lightning_module
        return not module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def _devices_that_draw(self) -> Iterable[torch.device]:
        return () if self._plan is None else map(torch.device, self._plan.torch_devices)

    # Resuming

    def load_checkpoint(self, checkpoint_path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Verify a checkpoint and read it, in every process.

        Raises:
            CheckpointError: The file is damaged, or no checkpoint.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *arguments, **options)
        ours = checkpoint.get(KEY)
        if ours is not None:  # user code sees what Lightning saved
            checkpoint = {key: value for key, value in checkpoint.items() if key != KEY}
        if self._placed is None:  # else it is what a tuner goes back to in the middle of a run
            self._of_checkpoint = ours
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load states from a checkpoint, each beside its parameter."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
        keep_state_beside_parameters(self.optimizers)
        self._to_resume = self._own(self._of_checkpoint)

    def process_dataloader(self, dataloader: Any) -> Any:
        """The data loader of this process. It is about to be iterated, and may draw its order then."""
        dataloader = super().process_dataloader(dataloader)
        module: Any = self.lightning_module
        if self._to_resume is not None and module.trainer.training:
            restore_random_state(self._to_resume["random_state"], self._devices_that_draw())
        return dataloader

    def on_train_start(self) -> None:
        """The first batch comes next. Within an epoch, its order is drawn already, so numbers go on from there."""
        super().on_train_start()
        resumed, self._to_resume = self._to_resume, None
        if resumed is not None and resumed["is_within_epoch"]:
            restore_random_state(resumed["random_state"], self._devices_that_draw())

    def _own(self, saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What of a checkpoint concerns this process."""
        if saved is None:
            return None
        states = saved["random_states"]
        if len(states) != self.world_size:
            if self.is_global_zero:
                log.warning(
                    "the checkpoint holds random numbers for %s processes, and the run has %s: they begin anew",
                    len(states),
                    self.world_size,
                )
            return None
        return {"random_state": states[self.global_rank], "is_within_epoch": saved["is_within_epoch"]}

    def teardown(self) -> None:
        """The run is over, and so is what it resumed from."""
        self._to_resume = self._of_checkpoint = None
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_to_resume": None, "_of_checkpoint": None}
