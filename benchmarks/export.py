"""What the pipeline of an exported chain brings: a batch in micro-batches against the same chain stage by stage.

    python benchmarks/export.py
    python benchmarks/export.py --quick

A perceptron of six wide layers, exported as two equal stages: once for torch, once for ONNX Runtime. Both ways through
the chain take turns within the run. Every stage has one thread, so two free cores allow a ratio of 2 at most, and one
core allows none.
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
                rounds = [(seconds(whole, x), seconds(piped, x), seconds(whole, x)) for _ in range(repetitions)]
        figures[f"{name}_pipelined_ratio"] = statistics.median(before / piped_s for before, piped_s, _ in rounds)
        figures[f"{name}_noise_ratio"] = statistics.median(before / after for before, _, after in rounds)
        figures[f"{name}_rows_per_s"] = ROWS / statistics.median(piped_s for _, piped_s, _ in rounds)
    report(figures)


def seconds(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    begin = perf_counter()
    run(x)
    return perf_counter() - begin


if __name__ == "__main__":
    main()
