"""Runs a command as a Hydra application, and turns its failures into messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_hetero._conf import conf_dir
from lightning_hetero.cli import PROGRAM
from lightning_hetero.cli.explain import explain, not_begun
from lightning_hetero.cli.requests import with_device_requests
from lightning_hetero.config import store_schemas
from lightning_hetero.errors import HeteroError

_FULL_ERROR = "HYDRA_FULL_ERROR"
EXPECTED = (HeteroError, HydraException, OmegaConfBaseException)
"""Failures that are explained, without a traceback."""


def run_application(command: str, task: Callable[[DictConfig], object], argv: Sequence[str]) -> int:
    """Compose the configuration of a command, the file of its name in `conf/`, and do its task.

    Args:
        command: Name of the command.
        task: What it does with the configuration.
        argv: Its arguments: `GROUP=FILE`, `KEY=VALUE`, and Hydra's own flags (`-m`, `--cfg job`, `--help`).

    Returns:
        0, or 1 after a failure that was explained on stderr.

    Raises:
        Exception: What the user's own code raised; and everything, if HYDRA_FULL_ERROR=1 is set.
    """
    store_schemas()
    want_traceback = os.environ.get(_FULL_ERROR) == "1"
    ended = _Ended()
    wrapped = task if want_traceback else ended.by(task)
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(wrapped)
    words = with_device_requests(argv)
    try:
        with _command_line(command, words), _environment(), _importable_project(), _logging():
            os.environ[_FULL_ERROR] = "1"  # makes Hydra raise instead of printing and leaving the process
            application()
            ended.check()
    except EXPECTED as error:
        if want_traceback:
            raise
        return _refuse(command, explain(error, words, command))
    except (OSError, ValueError) as error:
        # After the task began it may be a defect of the user's code; without a file name it is about the output.
        if want_traceback or ended.began or (isinstance(error, OSError) and error.filename is None):
            raise
        return _refuse(command, not_begun(error, words))
    return 0


def _refuse(command: str, why: str) -> int:
    print(f"{PROGRAM} {command}: {why}", file=sys.stderr)
    return 1


class _Ended:
    """Carries an expected failure of a single job past Hydra, which would print where it happened.

    Attributes:
        began: Whether a task began in this process; until then, Hydra was at work.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self.began = False

    def by(self, task: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
        """The task, ending normally where it fails as expected. In a sweep Hydra has to know."""

        @wraps(task)
        def wrapped(cfg: DictConfig) -> object:
            self.began = True
            try:
                return task(cfg)
            except EXPECTED as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                self._error = error
                return None

        return wrapped

    def check(self) -> None:
        """Raise what happened, if anything did."""
        if self._error is not None:
            raise self._error


@contextmanager
def _command_line(command: str, argv: Sequence[str]) -> Iterator[None]:
    """Let Hydra, which reads `sys.argv`, see the arguments of this command alone."""
    before = sys.argv
    sys.argv = [f"{PROGRAM} {command}", *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _environment() -> Iterator[None]:
    """Undo what a run leaves in the environment: Lightning keeps the seed there, for its next caller."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _importable_project() -> Iterator[None]:
    """Let `_target_: my_module.MyModel` find a file in the current directory, as `python train.py` would."""
    here = str(os.getcwd())  # noqa: PTH109 (sys.path holds strings)
    before = list(sys.path)
    if here not in sys.path:
        sys.path.append(here)
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _logging() -> Iterator[None]:
    """Take down the log file and the handlers that Hydra set up for the last job."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
