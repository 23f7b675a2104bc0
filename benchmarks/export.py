"""What the pipeline of an exported chain brings, for a batch in micro-batches and for a stream of batches.

    python benchmarks/export.py
    python benchmarks/export.py --quick

A perceptron of six wide layers, exported as two equal stages: once for torch, once for ONNX Runtime. The same chain,
stage by stage, takes turns with both within the run. Every stage has one thread, so two free cores allow a ratio of 2
at most, and one core allows none.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from report import is_quick, report
from torch import nn

from lightning_hetero.export import HeteroRuntime, export

WIDTH, ROWS, MICRO_BATCHES = 1024, 1024, 8
REPETITIONS, QUICK_REPETITIONS = 25, 3


def main() -> None:
    repetitions = QUICK_REPETITIONS if is_quick(__doc__) else REPETITIONS
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.rand(ROWS, WIDTH)
    halves = {str(2 * index): "first" if index < 3 else "second" for index in range(6)}
    figures = {"cores": float(os.cpu_count() or 1)}
    for target in ("torch:cpu", "onnx:CPUExecutionProvider"):
        name = target.partition(":")[0]
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "exported"
            export(model, where, example_inputs=x[:2], placement=halves, targets=target)
            with (
                HeteroRuntime(where, micro_batches=1) as whole,
                HeteroRuntime(where, micro_batches=MICRO_BATCHES) as piped,
            ):
                assert torch.allclose(whole(x), piped(x), atol=1e-5)
                rounds = [measured(whole, piped, x) for _ in range(repetitions)]
        figures[f"{name}_pipelined_ratio"] = statistics.median(before / piped_s for before, piped_s, *_ in rounds)
        figures[f"{name}_noise_ratio"] = statistics.median(before / after for before, _, after, *_ in rounds)
        figures[f"{name}_rows_per_s"] = ROWS / statistics.median(piped_s for _, piped_s, *_ in rounds)
        figures[f"{name}_stream_ratio"] = statistics.median(one_by_one / stream for *_, one_by_one, stream in rounds)
    report(figures)


def measured(whole: HeteroRuntime, piped: HeteroRuntime, x: torch.Tensor) -> tuple[float, ...]:
    """Seconds of a batch whole, in micro-batches, and whole again; of small batches one by one, and as a stream."""
    batches = x.chunk(MICRO_BATCHES)
    ways = (
        lambda: whole(x),
        lambda: piped(x),
        lambda: whole(x),
        lambda: [whole(batch) for batch in batches],
        lambda: list(whole.stream(batches)),
    )
    return tuple(map(seconds, ways))


def seconds(run: Callable[[], object]) -> float:
    begin = perf_counter()
    run()
    return perf_counter() - begin


if __name__ == "__main__":
    main()
