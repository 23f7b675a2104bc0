"""A real GPU and the CPU: what the package costs there, what it gains, and how near its predictions come.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick --device cuda:0

All figures are ratios within one run. Runs that are compared take turns (A B A B); each is a training of its own, of
which some steps (or those of a second) after a warm-up are timed together, from one synchronisation of the devices to
another. The fastest turn counts. Plans that are the same in effect are timed once. Without a GPU it says so, and has no
figures; `--device dev:0` lets the emulated accelerator take its place, which shows that this program runs and no more.

- `<model>_overhead`: a step with `strategy="hetero"` as it is, by one of plain Lightning on the GPU, after the first
  60 steps, in which a run measures and looks for a better plan. Its noise is plain Lightning by plain Lightning.
- `<model>_auto`: a step of the plan of `auto`, by one of the faster of GPU and CPU alone. Aim: at most 1.02.
- `<model>_<plan>_step`, `<model>_<plan>_peak`: predicted by measured seconds of a step, and peak on the GPU, of the GPU
  alone ("single") and of the plans of two policies. Left out where a plan was made before the model was measured.
- `limited`: steps of the CPU alone, by those with a GPU whose memory is too small for the model.
- `replicas`: a step of the GPU alone, by one in which GPU and CPU share the rows.

A part that fails prints its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_training import Bench, Model
from report import report

from lightning_hetero import HeteroStrategy
from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.strategy.trial import name_of

POLICIES = ("even", "auto")
MIB = 1 << 20


class Results:
    """The figures, and whether a part has failed."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.failed = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Say what begins, and go on if it fails."""
        say(f"== {name}")
        begun_s = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            say(f"FAILED {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        say(f"   {time.perf_counter() - begun_s:.1f} s")

    def put(self, name: str, value: float) -> None:
        """Keep a figure."""
        self.figures[name] = value
        say(f"   {name:<28}{value:10.4f}")


def say(text: str) -> None:
    print(text, flush=True)


def overhead(bench: Bench, results: Results, name: str, model: Model) -> None:
    """Ours as it is against plain Lightning, and that against itself."""

    def ours() -> tuple[Any, dict[str, Any]]:
        return HeteroStrategy(devices=None if bench.is_real else bench.places, verbose=False), {}

    found = bench.compare(model, {"plain": bench.plain, "ours": ours, "again": bench.plain}, settled=True)
    say(f"   plain {found['plain'].step_s * 1e3:.3f} ms, ours {found['ours'].step_s * 1e3:.3f} ms")
    results.put(f"{name}_overhead", found["ours"].step_s / found["plain"].step_s)
    results.put(f"{name}_noise", found["again"].step_s / found["plain"].step_s)


def plans(bench: Bench, results: Results, name: str, model: Model, folder: Path) -> None:
    """Plans of some policies: predicted and measured, and `auto` against the best single device."""
    alone = {place: bench.settle(model, {"": place}) for place in bench.places}
    chosen = {policy: bench.settle(model, policy) for policy in POLICIES}
    ways = {**alone, **chosen}
    found = bench.compare_plans(model, ways, folder)
    for key, plan in ways.items():
        say(f"   {key:<8}{found[key].step_s * 1e3:9.3f} ms  {name_of(plan)}")
    for note in chosen["auto"].notes:
        say(f"      {note}")
    for key, plan in {"single": alone[bench.gpu], **chosen}.items():
        timed = found[bench.gpu if key == "single" else key]
        if plan.forecast is None:
            say(f"   {key}: the first plan has stayed, which was made before anything was measured")
            continue
        results.put(f"{name}_{key}_step", plan.forecast.step_s / timed.step_s)
        predicted = {device.device: device.memory_bytes for device in plan.forecast.devices}.get(bench.gpu, 0)
        peak = max(timed.peaks_bytes)
        say(f"   {key} on {bench.gpu}: predicted {predicted / MIB:.1f} MiB, measured {peak / MIB:.1f} MiB")
        if peak and bench.gpu in plan.torch_devices:
            results.put(f"{name}_{key}_peak", predicted / peak)
    results.put(f"{name}_auto", found["auto"].step_s / min(found[place].step_s for place in bench.places))


def limited(bench: Bench, results: Results, model: Model, folder: Path) -> None:
    """A GPU that has room for half of what the model keeps: weights, gradients, and two moments of Adam."""
    needed = 4 * sum(parameter.nbytes for parameter in model.make().parameters())
    memory = {bench.gpu: f"{needed // 2}B"}
    try:
        bench.train(model, 1, HeteroStrategy(devices=[bench.gpu], memory=memory, verbose=False))
    except InfeasiblePlanError as error:
        say(f"   alone: {str(error).partition(chr(10))[0]}")
    else:
        raise RuntimeError(f"{needed} bytes were trained in {memory}")
    plan = bench.settle(model, "auto", memory=memory)
    host = bench.settle(model, {"": "cpu"})
    say(f"   {name_of(plan)}")
    ways = {"both": plan, "cpu": host}
    found = bench.compare_plans(model, ways, folder)
    say(f"   both {found['both'].step_s * 1e3:.3f} ms, CPU {found['cpu'].step_s * 1e3:.3f} ms")
    results.put("limited", found["cpu"].step_s / found["both"].step_s)


def replicas(bench: Bench, results: Results, model: Model, folder: Path) -> None:
    """GPU and CPU share the rows as they are fast, against the GPU alone."""
    ways = {"both": bench.settle(model, "replicate"), "alone": bench.settle(model, {"": bench.gpu})}
    say(f"   {name_of(ways['both'])}  {next(iter(ways['both'].shares_of.values()), 'no shares')}")
    found = bench.compare_plans(model, ways, folder)
    results.put("replicas", found["alone"].step_s / found["both"].step_s)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run, not how fast")
    parser.add_argument("--device", help="cuda:0 if there is one; dev:0, an emulated one, shows that this program runs")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.device is None and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        print(json.dumps({"figures": {}}))
        return 0
    given.device = given.device or "cuda:0"
    if given.device.startswith("dev"):
        from lightning_hetero.testing import install_accelerator

        install_accelerator()
        torch.set_num_threads(1)
    bench, results = Bench(given.device, given.quick), Results()
    say(f"{bench.module.get_device_name(0)}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for name, model in bench.models.items():
            with results.part(f"overhead on {name}"):
                overhead(bench, results, name, model)
        for name, model in bench.planned.items():
            with results.part(f"plans for {name}"):
                plans(bench, results, name, model, Path(folder))
        with results.part("a model that is too large for the GPU"):
            limited(bench, results, bench.models["mlp"], Path(folder))
        with results.part("replicas on GPU and CPU"):
            replicas(bench, results, bench.models["mlp"], Path(folder))
    report(results.figures or {"none": float("nan")})
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
