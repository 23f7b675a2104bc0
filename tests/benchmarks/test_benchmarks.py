"""Every benchmark runs, and ends with its figures in the form that programs read. How fast is not asked here.

What became of checkpoints in spite of kills is: that is no matter of the machine.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_hetero.testing import EmulatedAccelerator

RunForked = Callable[..., "subprocess.CompletedProcess[str]"]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED = {
    "cores.py",
    "elastic_training.py",
    "gpu_training.py",
    "launched.py",
    "lockstep.py",
    "placement_instances.py",
    "report.py",
    "scaling_worker.py",
    "sleeping.py",
    "torch_pipelining.py",
}
FIGURES = {
    "auto.py": {"mlp_ratio", "convnet_ratio", "transformer_ratio", "noise_ratio", "cpu_only_devices"},
    "checkpoints.py": {
        "kills",
        "lost",
        "damaged_loaded",
        "damaged_left",
        "left_behind",
        "lightning_kills",
        "lightning_lost",
        "lightning_damaged_left",
        "flips",
        "flips_loaded",
        "lightning_flips_loaded",
        "save_ratio",
        "save_noise_ratio",
        "load_ratio",
        "verify_s_per_gb",
    },
    "connected_overhead.py": {
        "plain_us",
        "noise_ratio",
        "default_ratio",
        "single_ratio",
        "two_stages_ratio",
        "border_us",
    },
    "elastic.py": {
        "recovered",
        "torchrun_failures",
        "restarts_most",
        "lost_steps_most",
        "resume_s_median",
        "resume_s_most",
        "sigterm_hangs",
        "sigterm_wrong_ends",
        "sigterm_exit_s_most",
    },
    "export.py": {
        "cores",
        *(
            f"{name}_{what}"
            for name in ("torch", "onnx")
            for what in ("pipelined_ratio", "stream_ratio", "noise_ratio", "rows_per_s")
        ),
    },
    "cuda_borders.py": set(),  # without a GPU
    "gpu.py": set(),
    "prediction.py": {
        "emulated_step_error",
        "emulated_rank",
        "emulated_noise",
        "accelerator_step_error",
        "accelerator_rank",
        "accelerator_noise",
        "memory_error",
        "memory_worst",
        "memory_too_bright",
    },
    "scale.py": {
        *(f"{what}_{size}" for what in ("scale", "exchange_ms") for size in (2, 4, 8)),
        "noise_ratio",
        "uneven_share",
        "uneven_to_even",
    },
    "shares.py": {"share_of_sum", "over_fast_alone", "over_equal_shares"},
    "overhead.py": {
        "us_per_call",
        "noise_us_per_call",
        "plain_us_per_call",
        "one_core_us_per_call",
        "one_core_plain_us_per_call",
        "mlp_ratio",
        "mlp_noise_ratio",
        "mlp_halves_ratio",
        "mlp_one_core_ratio",
        "transformer_ratio",
        "transformer_noise_ratio",
        "transformer_halves_ratio",
        "transformer_one_core_ratio",
        "convnet_ratio",
        "convnet_noise_ratio",
        "convnet_halves_ratio",
        "convnet_one_core_ratio",
    },
    "measure_devices.py": {
        "three_devices_s",
        "three_devices_longest_s",
        "again_s",
        "float32_ratio",
        "confident_share",
    },
    "pipeline.py": {
        f"{what}_{stages}_{micro_batches}"
        for what in ("forward", "step", "plain", "torch_ratio")
        for stages in ("40_40", "60_20", "20_60", "30_30_30", "20_60_20")
        for micro_batches in (4, 8)
        if what != "torch_ratio" or stages.count("_") == 1
    }
    | {f"one_core_{what}_{stages}_8" for what in ("forward", "step", "plain") for stages in ("40_40", "30_30_30")},
    "pipeline_memory.py": {
        f"{mode}_stage_{stage}"
        for mode in ("step_1f1b", "step_gpipe", "forward", "forward_rematerialize")
        for stage in range(4)
    },
    "planner.py": {"chain_50x64_s", "fixed_order_1000x64_s", "graph_10000x32_s", "noise_ratio"},
    "stress.py": {"steps", "hangs", "differing_placements"},
    "import_time.py": {
        "added_to_torch_ms",
        "importtime_ms",
        "importtime_noise_ms",
        "after_torch_ms",
        "added_to_lightning_ms",
    },
}


def test_every_benchmark_is_run_here_and_explained() -> None:
    files = {path.name for path in BENCHMARKS.glob("*.py")} - SHARED
    texts = [(BENCHMARKS / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md")]

    assert files == set(FIGURES)
    for name, figures in FIGURES.items():
        for text in texts:
            assert f"python benchmarks/{name}" in text
            assert [figure for figure in sorted(figures) if f"`{figure}`" not in text] == []


@pytest.fixture(scope="module")
def quick_runs(
    accelerator: EmulatedAccelerator, tmp_path_factory: pytest.TempPathFactory, run_forked: RunForked
) -> dict[str, subprocess.CompletedProcess[str]]:
    """A quick run of each, three at a time: nobody asks how fast they are, and many sleep most of the time."""

    # In this thread: pytest's factory makes its folder when it is first asked, and several if threads ask at once.
    folders = {name: tmp_path_factory.mktemp(name) for name in FIGURES}

    # `accelerator` compiles the emulated accelerator if need be, so that it is there when a benchmark asks for it.
    def run(name: str) -> subprocess.CompletedProcess[str]:
        return run_forked(str(BENCHMARKS / name), "--quick", folder=folders[name], OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(FIGURES, pool.map(run, FIGURES), strict=True))


def last_line(ran: subprocess.CompletedProcess[str]) -> dict[str, dict[str, float]]:
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one waits for all
@pytest.mark.parametrize("name", FIGURES)
def test_a_quick_run_ends_with_its_figures_as_json(
    name: str, quick_runs: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    last = last_line(quick_runs[name])

    assert last.keys() == {"figures"}
    assert last["figures"].keys() == FIGURES[name]
    assert all(type(value) is float and math.isfinite(value) for value in last["figures"].values())


@pytest.mark.slow
@pytest.mark.timeout(1200)  # alone, it waits for all
@pytest.mark.feature("checkpoints: kill -9 during a save")
def test_forty_kills_lose_no_checkpoint_and_damage_none(
    quick_runs: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    """`kill -9` at random times while checkpoints are written: what was acknowledged is there, and whole."""
    figures = last_line(quick_runs["checkpoints.py"])["figures"]

    assert figures["kills"] >= 40
    assert figures["lost"] == figures["damaged_loaded"] == figures["damaged_left"] == figures["left_behind"] == 0
    assert figures["flips"] >= 200
    assert figures["flips_loaded"] == 0
    # Without this, the other figures would say nothing: the same flips are there for plain Lightning to find.
    assert figures["lightning_flips_loaded"] > 0
