"""Runs commands in this process, in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_hetero.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, texts, and the folders of its jobs in the order in which they ran."""

    code: int
    out: str
    err: str
    folders: list[Path]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`command("train", "experiment=digits")` is `lightning-hetero train experiment=digits` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        before = {*tmp_path.rglob(".hydra")}
        code = main(words)
        out, err = capfd.readouterr()
        made = sorted({*tmp_path.rglob(".hydra")} - before)
        return Outcome(code, out, err, [folder.parent for folder in made])

    return run
