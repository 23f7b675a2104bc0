"""`lightning-hetero run train.py --lr 0.1`: any Lightning program, with hetero where it chooses no strategy itself."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from lightning_hetero._autoload import OFF_SWITCH
from lightning_hetero.cli import PROGRAM

STRATEGY_VARIABLE = "PL_TRAINER_STRATEGY"
"""Where Lightning's Trainer looks for a strategy that its caller did not name."""
_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended: 128 + SIGINT


def main(argv: Sequence[str]) -> int:
    """Run a program as `python` would: `train.py ARGUMENTS`, or `-m package.train ARGUMENTS`.

    Returns:
        0; 1 if the program raised, after its traceback; 2 if there is no such program; 130 after Ctrl-C.

    Raises:
        SystemExit: What the program left with, and `--help`.
    """
    words = list(argv)
    as_module = words[:1] == ["-m"]
    if as_module:
        del words[0]
    if not words or words[0].startswith("-"):
        _parser().parse_args(words)  # help, or what is wrong with the words
    if os.environ.get(OFF_SWITCH) == "0":
        return _refuse(f"{OFF_SWITCH}=0 hides the strategy 'hetero' from Lightning; unset it", 2)
    name, *arguments = words
    missing = _missing_module(name) if as_module else _missing_file(name)
    if missing is not None:
        return _refuse(missing, 1 if as_module else 2)  # the codes of python
    with _default_strategy(), _interpreter(name, arguments, as_module):
        return _run(name, as_module)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} run",
        usage=f"{PROGRAM} run SCRIPT [ARGUMENT ...]\n       {PROGRAM} run -m MODULE [ARGUMENT ...]",
        description="Run a program that uses Lightning's Trainer, over every device of this machine. Nothing of its "
        "code changes: the strategy is 'hetero' where the program names none. "
        f"HETERO_DEVICES=cuda:0,cpu chooses devices; {STRATEGY_VARIABLE}, if it is set, is obeyed.",
        allow_abbrev=False,
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file; everything after it is the program's own")
    parser.add_argument("-m", metavar="MODULE", dest="module", help="a module instead, found as `python -m` finds it")
    return parser


def _refuse(reason: str, code: int) -> int:
    print(f"{PROGRAM} run: {reason}", file=sys.stderr)
    return code


def _missing_file(script: str) -> str | None:
    """Why there is no such program; None if there is."""
    path = Path(script)
    if path.is_dir() and not (path / "__main__.py").is_file():
        return f"{script!r} is a folder without a __main__.py; name the file to run"
    if path.exists():
        return None
    from lightning_hetero.cli.explain import near

    beside = sorted(str(path.with_name(other.name)) for other in path.parent.glob("*.py"))
    hint = near(script, beside) or f" A module is run with `{PROGRAM} run -m MODULE`."
    return f"can't open file {str(path.absolute())!r}: no such file.{hint}"


def _missing_module(name: str) -> str | None:
    """The same for a module, looked for as `python -m` does: in the current folder first."""
    if name.endswith(".py") and Path(name).exists():
        return f"{name!r} is a file, which is run without -m: `{PROGRAM} run {name}`"
    with _first_on_path(os.getcwd()):  # noqa: PTH109 (sys.path holds strings)
        try:
            found = find_spec(name) is not None
        except (ImportError, ValueError) as error:  # a package on the way is missing or broken
            return f"no module named {name!r} can be run: {type(error).__name__}: {error}"
    return None if found else f"no module named {name!r}"


def _run(name: str, as_module: bool) -> int:
    try:
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(name).absolute()), run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        # The program may have a hook of its own for this, as `rich.traceback.install()` sets one.
        trace = _of_the_program(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _of_the_program(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this module and of `runpy`, which come first."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, runpy.__name__):
        trace = trace.tb_next
    return trace


@contextmanager
def _default_strategy() -> Iterator[None]:
    """Name hetero in the environment, unless another strategy is named there. Children of the program inherit it."""
    if os.environ.get(STRATEGY_VARIABLE):
        yield
        return
    before = os.environ.get(STRATEGY_VARIABLE)  # an empty one counts as none, but stays what it is
    os.environ[STRATEGY_VARIABLE] = "hetero"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(STRATEGY_VARIABLE, None)
        else:
            os.environ[STRATEGY_VARIABLE] = before


@contextmanager
def _interpreter(name: str, arguments: Sequence[str], as_module: bool) -> Iterator[None]:
    """Arguments and search path as `python` sets them for a program."""
    before = sys.argv
    sys.argv = [name, *arguments]
    folder = os.getcwd() if as_module else str(Path(name).resolve().parent)  # noqa: PTH109
    try:
        with _first_on_path(folder):
            yield
    finally:
        sys.argv = before


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Look for modules there first, unless Python was told not to (`-P`)."""
    before = list(sys.path)
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before
