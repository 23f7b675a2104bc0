"""The console script `lightning-hetero`: finds the command, and leaves the rest of the line to it.

Every command is a module with `main(argv) -> exit code`, imported only when it is called: torch and
Lightning take seconds to import, and `--help` should not wait for them.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

PROGRAM = "lightning-hetero"
_CLOSED_PIPE = 141  # what a shell reports of a program that ended because nobody read on: 128 + SIGPIPE

COMMANDS = {
    "train": "train and test a model over the devices of this machine, configured by Hydra",
    "plan": "say which part of a model would run where, why, and what a step would take",
    "simulate": "predict what every device does when, for a plan, and what would change that",
    "report": "write one page of HTML about a plan, with pictures",
    "compare": "train a few steps with each of several policies, and show what was predicted and measured",
    "run": "run any Lightning program, with hetero as the strategy it did not choose",
    "devices": "show the devices that a model can be spread over",
    "export": "take a trained model away to other runtimes, as a chain of stages",
}
"""Name of each command, which is also the name of its module, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the name of the program; None takes those of the process.

    Returns:
        The exit code: 0 for success, 1 for a run that failed, 2 for a command line that makes no sense, and 141 if the
        reader of the output has gone, as in `... | head`. That of `run` is what its program ends with.

    Raises:
        SystemExit: For `--help`, `--version`, and whatever a command's own parser refuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"]:
        return _command(words)
    try:
        try:
            return _command(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would say there what nobody wants to know.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"{PROGRAM}: {error}; make room, or write to another place", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command(words: Sequence[str]) -> int:
    if not words or words[0].startswith("-"):
        parser = _parser()
        parser.parse_args([*words])
        parser.print_help()
        return 2
    command, *rest = words
    if command not in COMMANDS:
        print(_unknown(command), file=sys.stderr)
        return 2
    code: int = import_module(f"{__name__}.{command}").main(rest)
    return code


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Train any PyTorch Lightning project on every processor its owner has.",
        epilog=f"commands:\n{listing}\n\nMore about a command: {PROGRAM} COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    return parser


def _version() -> str:
    from lightning_hetero import __version__

    return f"{PROGRAM} {__version__}"


def _unknown(command: str) -> str:
    near = get_close_matches(command.lower(), COMMANDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{PROGRAM}: unknown command {command!r}.{hint} Commands are {', '.join(COMMANDS)}."
