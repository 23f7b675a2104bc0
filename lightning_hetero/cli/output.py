"""What commands print: rich tables as text, to the standard output or into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_hetero.errors import UsageError
from lightning_hetero.plan import Plan

_WIDE = 160  # columns, where there is no terminal whose width would matter
_WIDEST = 500  # for tables, which are as wide as they have to be


def plan_text(plan: Plan) -> str:
    """The table of stages, the reasons, what is predicted, and what was rejected."""
    from lightning_hetero.strategy.report import print_plan

    console = _console()
    print_plan(plan, console)
    return _text_of(console)


def table_text(
    title: str | None, header: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str] = ()
) -> str:
    """A table.

    Args:
        title: Over it.
        header: Names of its columns.
        rows: Cells.
        left: Columns that hold words; the others hold numbers.
    """
    words = set(left)
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name in words else "right")
    for row in rows:
        table.add_row(*row)
    console = _console(_WIDEST)
    console.print(table)
    return _text_of(console)


def text_of(key: str, given: Any, example: str) -> str | None:
    """The text, such as a path, that a key of the configuration holds; None if it is null.

    Raises:
        UsageError: It is a number, a list, or something else that Hydra does not read as text.
    """
    if given is None or isinstance(given, str):
        return given
    raise UsageError(f"{key}={given!r} is not a text; write for example {key}={example}")


def output_of(key: str, given: Any, example: str) -> str | None:
    """The same for a file to write, asked before the work whose result it is to hold.

    Raises:
        UsageError: It is no path, or in a folder that does not exist.
    """
    path = text_of(key, given, example)
    if path is not None and not Path(path).parent.is_dir():
        raise UsageError(
            f"{path!r} cannot be written: there is no folder {str(Path(path).parent)!r}; make it, or choose another "
            f"{key}=..."
        )
    return path


def write_or_print(text: str, path: str | None) -> None:
    """Write a text to a file, or to the standard output if there is no path.

    Raises:
        UsageError: The file cannot be written.
    """
    if path is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error}; choose another output=...") from error
    print(f"wrote {path}", file=sys.stderr)


def _console(wide: int = _WIDE) -> Console:
    """One that writes to memory: rich would end the program by itself when nobody reads on."""
    shown = sys.stdout.isatty()
    width = Console().width if shown else wide
    return Console(file=StringIO(), width=width, force_terminal=shown)


def _text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()
