"""Kills processes while they write checkpoints, flips bits of files, and measures what the safety costs.

A process writes checkpoints in turn, over `last.ckpt` and under names of their own, of which it removes all but two,
as `ModelCheckpoint` does. It says when it begins and when it has been told that a checkpoint is saved. It gets
`kill -9` at a random time, and only kills in the middle of a save count. Then everything in the folder is loaded, and
compared with what was written. The same with Lightning's `TorchCheckpointIO`, its temporary files on another file
system (TMPDIR).
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from report import is_quick, report

from lightning_hetero.strategy.lightning_pytorch import HeteroCheckpointIO

KILLS, QUICK_KILLS = 500, 40
LIGHTNING_KILLS, QUICK_LIGHTNING_KILLS = 100, 10
FLIPS, QUICK_FLIPS = 1000, 200
NUMBERS = 1_000_000  # of a checkpoint that is written while somebody kills: 4 MB
TIMED_NUMBERS, QUICK_TIMED_NUMBERS = 50_000_000, 2_000_000
ROUNDS, QUICK_ROUNDS = 9, 2
KEPT = 2


def state_of(step: int, numbers: int = NUMBERS) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((numbers,), float(step))}}


def is_right(state: Any) -> bool:
    """Whether it is one that was written, and all of it."""
    weight = state["state_dict"]["weight"]
    return bool((weight == float(state["global_step"])).all()) and len(weight) == NUMBERS


def write_for_ever(checkpoint_io: Any, folder: Path, first: int, pipe: int) -> None:
    """Save steps in turn; a line for each begin and each end."""
    kept = sorted(folder.glob("step=*.ckpt"))
    step = first
    while True:
        state = state_of(step)
        for path in (folder / f"step={step:08}.ckpt", folder / "last.ckpt"):
            os.write(pipe, f"begin {path.name} {step}\n".encode())
            checkpoint_io.save_checkpoint(state, path)
            os.write(pipe, f"end {path.name} {step}\n".encode())
        kept.append(folder / f"step={step:08}.ckpt")
        while len(kept) > KEPT:
            os.write(pipe, f"begin remove {step}\n".encode())
            checkpoint_io.remove_checkpoint(kept.pop(0))
            os.write(pipe, f"end remove {step}\n".encode())
        step += 1


def said_before_kill(checkpoint_io: Any, folder: Path, first: int, delay_s: float) -> list[list[str]]:
    """Start a process that writes, kill it so long after its first line, and return its lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(checkpoint_io, folder, first, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first_line = lines.readline()
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        text = first_line + lines.read()
    os.waitpid(child, 0)
    return [line.split() for line in text.splitlines()]


@dataclass
class Toll:
    """What became of checkpoints.

    Attributes:
        kills: In the middle of a save.
        lost: Kills after which the newest acknowledged one was gone, or was there no more.
        damaged_loaded: Files that were loaded with wrong contents.
        damaged_left: Files that could not be loaded.
        left_behind: Files of other names in the folder after one more save.
    """

    kills: int = 0
    lost: int = 0
    damaged_loaded: int = 0
    damaged_left: int = 0
    left_behind: int = 0


def kill(checkpoint_io: Any, kills: int, chance: random.Random) -> Toll:
    toll = Toll()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        step = 1
        acknowledged: dict[str, int] = {}
        span_s = 6 * seconds_of(lambda: checkpoint_io.save_checkpoint(state_of(0), folder / "last.ckpt"))
        while toll.kills < kills:
            said = said_before_kill(checkpoint_io, folder, step, chance.uniform(0.0, span_s))
            acknowledged.update({path: int(number) for what, path, number in said if what == "end"})
            step = max(int(number) for _, _, number in said) + 1
            if said[-1][0] != "begin" or said[-1][1] == "remove":
                continue
            toll.kills += 1
            loaded: dict[str, int] = {}
            for path in sorted(folder.glob("*.ckpt")):
                try:
                    state = checkpoint_io.load_checkpoint(path)
                except Exception:
                    toll.damaged_left += 1
                    path.unlink()
                    continue
                toll.damaged_loaded += not is_right(state)
                loaded[path.name] = state["global_step"]
            toll.lost += loaded.get("last.ckpt", -1) < acknowledged.get("last.ckpt", -1)
            newest = max((number for path, number in acknowledged.items() if path.startswith("step=")), default=-1)
            toll.lost += newest >= 0 and f"step={newest:08}.ckpt" not in loaded
        checkpoint_io.save_checkpoint(state_of(step), folder / "last.ckpt")
        toll.left_behind = sum(path.suffix != ".ckpt" for path in folder.iterdir())
    return toll


@contextmanager
def elsewhere() -> Iterator[None]:
    """Temporary files on another file system, as on many clusters."""
    before = tempfile.tempdir
    tempfile.tempdir = "/dev/shm" if Path("/dev/shm").is_dir() else before
    try:
        yield
    finally:
        tempfile.tempdir = before


def flip(flips: int, chance: random.Random) -> dict[str, float]:
    """One bit at a time; what loads in spite of it."""
    ours, lightning = HeteroCheckpointIO(), TorchCheckpointIO()
    loaded = {"hetero": 0, "lightning": 0}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        path = Path(name) / "last.ckpt"
        tensors = {f"layer.{number}": torch.randn(64, 64) for number in range(8)}
        ours.save_checkpoint({"global_step": 1, "state_dict": tensors}, path)
        whole = path.read_bytes()
        for _ in range(flips):
            bit = chance.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(data))
            for who, checkpoint_io in (("hetero", ours), ("lightning", lightning)):
                try:
                    checkpoint_io.load_checkpoint(path)
                except Exception:
                    continue
                loaded[who] += 1
    return {
        "flips": float(flips),
        "flips_loaded": float(loaded["hetero"]),
        "lightning_flips_loaded": float(loaded["lightning"]),
    }


def seconds_of(work: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def costs(numbers: int, rounds: int) -> dict[str, float]:
    """Of safety, as ratios of times within one run, each round measuring all in turn."""
    state = state_of(1, numbers)
    ours, lightning = HeteroCheckpointIO(), TorchCheckpointIO()
    save: dict[str, list[float]] = {"ours": [], "lightning": [], "again": []}
    load: dict[str, list[float]] = {"ours": [], "lightning": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        path = Path(name) / "last.ckpt"

        def flushed(checkpoint_io: Any) -> None:  # both until the bytes are on the disk
            checkpoint_io.save_checkpoint(state, path)
            os.sync()

        for _ in range(rounds):
            save["lightning"].append(seconds_of(lambda: flushed(lightning)))
            save["ours"].append(seconds_of(lambda: flushed(ours)))
            save["again"].append(seconds_of(lambda: flushed(lightning)))
        ours.save_checkpoint(state, path)
        for _ in range(rounds):
            load["lightning"].append(seconds_of(lambda: lightning.load_checkpoint(path)))
            load["ours"].append(seconds_of(lambda: ours.load_checkpoint(path)))
    megabytes = 4 * numbers / 1e6
    return {
        "save_ratio": median(a / b for a, b in zip(save["ours"], save["lightning"], strict=True)),
        "save_noise_ratio": median(a / b for a, b in zip(save["again"], save["lightning"], strict=True)),
        "load_ratio": median(a / b for a, b in zip(load["ours"], load["lightning"], strict=True)),
        "verify_s_per_gb": (median(load["ours"]) - median(load["lightning"])) / megabytes * 1e3,
    }


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    chance = random.Random(0)
    ours = kill(HeteroCheckpointIO(), QUICK_KILLS if quick else KILLS, chance)
    with elsewhere():
        lightning = kill(TorchCheckpointIO(), QUICK_LIGHTNING_KILLS if quick else LIGHTNING_KILLS, chance)
    report(
        {
            "kills": float(ours.kills),
            "lost": float(ours.lost),
            "damaged_loaded": float(ours.damaged_loaded),
            "damaged_left": float(ours.damaged_left),
            "left_behind": float(ours.left_behind),
            "lightning_kills": float(lightning.kills),
            "lightning_lost": float(lightning.lost),
            "lightning_damaged_left": float(lightning.damaged_left),
            **flip(QUICK_FLIPS if quick else FLIPS, chance),
            **(costs(QUICK_TIMED_NUMBERS, QUICK_ROUNDS) if quick else costs(TIMED_NUMBERS, ROUNDS)),
        }
    )


if __name__ == "__main__":
    main()
