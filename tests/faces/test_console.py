"""A program that configures no logging sees what the package has to say; one that does is left in charge."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

from lightning_hetero.strategy.console import NAME, Console, show_messages

ON_ONE_DEVICE = "hetero: The model fits on cpu, so it stays there."
IMPORTS = """
import warnings; warnings.simplefilter("ignore")
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
"""
PROGRAM = """
{before}
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
pl.Trainer(strategy="hetero", max_steps=1, **quiet).fit(BoringModel())
"""


CONFIGURES = {
    "nothing": "",
    "level": "import logging; logging.getLogger('lightning_hetero').setLevel(logging.WARNING)",
    "handler": "import logging; logging.getLogger('lightning_hetero').addHandler(logging.NullHandler())",
    "root": "import logging; logging.basicConfig(level=logging.WARNING, format='root: %(message)s')",
    "root for all": "import logging; logging.basicConfig(level=logging.INFO, format='root: %(message)s')",
}


@pytest.fixture(scope="module")
def stderr_of(run_forked: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What programs hear that differ in what they configure."""
    folder = tmp_path_factory.mktemp("console")
    done = {}
    for name, before in CONFIGURES.items():
        program = folder / "program.py"
        program.write_text(IMPORTS + PROGRAM.format(before=before))
        done[name] = run_forked(str(program), folder=folder, HETERO_DEVICES="cpu")
    assert {name: one.stderr for name, one in done.items() if one.returncode != 0} == {}
    return {name: one.stderr for name, one in done.items()}


def test_a_plain_program_is_told_why_the_plan_uses_one_device(stderr_of: dict[str, str]) -> None:
    assert stderr_of["nothing"].count(ON_ONE_DEVICE) == 1


@pytest.mark.parametrize("configured", ["level", "handler", "root"])
def test_what_the_program_configured_holds(configured: str, stderr_of: dict[str, str]) -> None:
    assert ON_ONE_DEVICE.removeprefix("hetero: ") not in stderr_of[configured]


def test_who_reads_the_root_logger_reads_it_once(stderr_of: dict[str, str]) -> None:
    assert stderr_of["root for all"].count(ON_ONE_DEVICE.removeprefix("hetero: ")) == 1
    assert ON_ONE_DEVICE.replace("hetero:", "root:") in stderr_of["root for all"]


def without_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program without pytest, which listens at the root."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(NAME), "handlers", [])


@pytest.mark.parametrize(("rank", "shown"), [(0, "hetero: one\nhetero: two\n"), (1, "hetero: two\n")])
def test_other_processes_only_warn(
    rank: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_handlers(monkeypatch)
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    console = Console()
    console.setFormatter(logging.Formatter("hetero: %(message)s"))
    for level, text in ((logging.INFO, "one"), (logging.WARNING, "two")):
        console.handle(logging.LogRecord(NAME, level, __file__, 1, text, (), None))
    assert capsys.readouterr().err == shown


def test_it_writes_to_the_stderr_of_the_moment_and_survives_a_closed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise ValueError("I/O operation on closed file")

    without_handlers(monkeypatch)
    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(logging, "raiseExceptions", False)
    Console().handle(logging.LogRecord(NAME, logging.WARNING, __file__, 1, "text", (), None))


def test_a_message_has_a_line_of_its_own_beside_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    without_handlers(monkeypatch)
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=sys.stdout) as bar:
        bar.update()
        Console().handle(logging.LogRecord(NAME, logging.WARNING, __file__, 1, "text", (), None))
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().splitlines()]
    assert "text" in lines


@pytest.mark.parametrize(("level", "expected"), [(logging.WARNING, logging.INFO), (logging.DEBUG, logging.DEBUG)])
def test_who_wants_every_message_gets_it(level: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_handlers(monkeypatch)
    logger = logging.getLogger(NAME)
    monkeypatch.setattr(logging.getLogger(), "level", level)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    show_messages()
    assert logger.getEffectiveLevel() == expected


def test_it_is_attached_once() -> None:
    logger = logging.getLogger(NAME)
    show_messages()
    before = list(logger.handlers)
    show_messages()
    assert logger.handlers == before
    assert sum(isinstance(handler, Console) for handler in before) == 1
