"""`lightning-hetero train`: hands the command line to Hydra, and turns its failures into messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lightning_hetero._conf import conf_dir
from lightning_hetero.cli import PROGRAM
from lightning_hetero.cli.explain import explain
from lightning_hetero.cli.job import run
from lightning_hetero.config import store_schemas
from lightning_hetero.errors import HeteroError

_FULL_ERROR = "HYDRA_FULL_ERROR"


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say: `experiment=digits devices=emulated`, `-m` for sweeps, `--cfg job`, `--help`.

    Returns:
        0, or 1 after a failure that was explained on stderr.

    Raises:
        Exception: What the user's own code raised; and everything, if HYDRA_FULL_ERROR=1 is set.
    """
    store_schemas()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(run)
    want_traceback = os.environ.get(_FULL_ERROR) == "1"
    try:
        with _command_line(argv), _environment(), _importable_project(), _logging():
            os.environ[_FULL_ERROR] = "1"  # makes Hydra raise instead of printing and leaving the process
            application()
    except (HeteroError, HydraException, OmegaConfBaseException) as error:
        if want_traceback:
            raise
        print(f"{PROGRAM} train: {explain(error, argv)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Let Hydra, which reads `sys.argv`, see the arguments of this command alone."""
    before = sys.argv
    sys.argv = [f"{PROGRAM} train", *argv]
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
