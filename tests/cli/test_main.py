"""The console script finds commands, and is quick where no work is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_hetero
from lightning_hetero.cli import COMMANDS, main


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"lightning-hetero: unknown command 'trian'. Did you mean 'train'? Commands are {', '.join(COMMANDS)}.\n"
    )


def test_a_command_like_no_other_is_answered_with_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err == f"lightning-hetero: unknown command 'xyz'. Commands are {', '.join(COMMANDS)}.\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"lightning-hetero {lightning_hetero.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and purpose in text for name, purpose in COMMANDS.items())


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lightning-hetero COMMAND" in capsys.readouterr().out


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--verison"])
    assert leaving.value.code == 2
    assert "unrecognized arguments: --verison" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--cfg", "job", "experiment=digits"]])
def test_nothing_heavy_is_imported_where_nothing_is_trained(
    words: list[str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = f"""
import sys
from lightning_hetero.cli import main
try:
    main({words!r})
except SystemExit as leaving:
    assert leaving.code == 0, leaving.code
heavy = {{"torch", "lightning", "torchmetrics", "numpy", "sklearn"}} & {{*sys.modules}}
assert not heavy, heavy
"""
    ran = run_python("-c", code)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_package_runs_as_a_module_and_hands_on_the_exit_code(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    ran = run_python("-m", "lightning_hetero.cli", "devices", "--devices", "cpu@speed=0")
    assert ran.returncode == 1
    assert ran.stderr.startswith("lightning-hetero devices: 'cpu@speed=0': ")


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("devices --devices cpu", {141}),
        ("devices --devices cpu --json", {141}),
        ("plan --help", {141}),
        ("train --cfg job", {141}),
        ("--help", {0, 141}),  # argparse keeps it to itself that nobody read its help
        ("devices --help", {0, 141}),
    ],
)
def test_a_reader_that_has_gone_is_no_error(line: str, codes: set[int]) -> None:
    # As with `... | head`, only that nobody reads at all: the end to read from is closed before there is a word.
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as nobody:
        ran = subprocess.run(
            [sys.executable, "-m", "lightning_hetero.cli", *line.split()],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.stderr == ""
    assert ran.returncode in codes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full, of Linux")
@pytest.mark.parametrize("line", ["devices --devices cpu", "train --cfg job"])
def test_a_full_disk_is_said_without_a_traceback(line: str) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "lightning_hetero.cli", *line.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.returncode == 1
    assert "No space left on device; make room, or write to another place" in ran.stderr
    assert "Traceback" not in ran.stderr
