"""The runtime of an exported model: its arguments, its targets, its pipeline."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hetero.errors import UsageError
from lightning_hetero.export import HeteroRuntime, TargetError, export
from lightning_hetero.export.pipeline import Pipeline, Values
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.models import MLP


@pytest.fixture(scope="module")
def model() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture(scope="module")
def exported(model: MLP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "exported"
    export(model, folder, example_inputs=torch.rand(2, 8), placement={"first": "a", "second": "b", "third": "c"})
    return folder


@pytest.mark.parametrize("micro_batches", [None, 1, 2, 5, 100])
def test_the_result_does_not_depend_on_the_micro_batches(
    exported: Path, model: MLP, micro_batches: int | None, rng: Any
) -> None:
    x = torch.rand(13, 8, generator=rng)
    with HeteroRuntime(exported, micro_batches=micro_batches) as runtime:
        torch.testing.assert_close(runtime(x), model(x).detach())


def test_several_threads_may_call_it(exported: Path, model: MLP, rng: Any) -> None:
    batches = [torch.rand(6, 8, generator=rng) for _ in range(16)]
    with HeteroRuntime(exported) as runtime, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(runtime, batches))
    for batch, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, model(batch).detach())


def test_closing_ends_the_threads(exported: Path, rng: Any) -> None:
    runtime = HeteroRuntime(exported)
    runtime(torch.rand(6, 8, generator=rng))
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("hetero-export")]
    runtime.close()
    runtime.close()

    assert len(names) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hetero-export")]


def test_another_device_of_the_same_family_can_be_chosen_when_it_runs(
    exported: Path, model: MLP, rng: Any, accelerator: EmulatedAccelerator
) -> None:
    first, second = accelerator.devices[:2]
    x = torch.rand(6, 8, generator=rng)
    with HeteroRuntime(exported, {"stage0": f"torch:{first}", "stage1": f"torch:{second}"}) as runtime:
        before = [accelerator.stats(index) for index in range(2)]
        result = runtime(x)
        after = [accelerator.stats(index) for index in range(2)]

    assert result.device.type == "cpu"
    assert after[0].h2d_bytes - before[0].h2d_bytes == x.nbytes
    assert after[0].d2d_bytes - before[0].d2d_bytes == 6 * 16 * 4  # straight from stage to stage
    assert after[1].d2h_bytes > before[1].d2h_bytes
    torch.testing.assert_close(result, model(x).detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 7),), r"^input0 must have shape \(rows, 8\), got \(2, 7\)$"),
        ((torch.rand(8),), r"^input0 must have shape \(rows, 8\), got \(8,\)$"),
        ((torch.rand(2, 8).double(),), r"^input0 must have dtype float32, got float64$"),
        ((torch.rand(0, 8),), r"^the batch has no rows; give at least one$"),
        ((), r"^MLP was exported for arguments that nest as .*Pass them in the same way"),
    ],
    ids=["features", "dimensions", "dtype", "rows", "arguments"],
)
def test_arguments_of_another_kind_are_refused(exported: Path, arguments: tuple[Any, ...], message: str) -> None:
    with HeteroRuntime(exported) as runtime, pytest.raises(UsageError, match=message):
        runtime(*arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stage9": "torch:cpu"}, r"^overrides: there is no stage 'stage9'.* Stages are stage0, stage1, stage2\.$"),
        ({"stage0": "aoti:cpu"}, r"^overrides: stage0 was written for 'torch:cpu', which 'aoti:cpu' cannot open\."),
        ({"stage0": "torch:xpu:3"}, r"^stage0: target 'torch:xpu:3': this machine has no such device\. It has cpu"),
        ({"stage0": "torch:nothing"}, r"^stage0: target 'torch:nothing': torch knows no device of this name"),
    ],
)
def test_overrides_that_cannot_be_are_refused(exported: Path, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        HeteroRuntime(exported, overrides)


def test_no_micro_batches_are_refused(exported: Path) -> None:
    with pytest.raises(UsageError, match=r"^micro_batches=0 must be at least 1$"):
        HeteroRuntime(exported, micro_batches=0)


def test_a_stream_of_batches_comes_out_in_order(exported: Path, model: MLP, rng: Any) -> None:
    batches = [torch.rand(rows, 8, generator=rng) for rows in (6, 1, 7, 2, 5, 3, 4, 9)]
    sent = 0

    def source() -> Any:
        nonlocal sent
        for batch in batches:
            sent += 1
            yield batch

    with HeteroRuntime(exported) as runtime:
        assert list(runtime.stream([])) == []
        results = runtime.stream(source())
        first = next(results)
        assert sent == 4  # one for each of three stages, and one that waits
        found = [first, *results]
        with pytest.raises(UsageError, match=r"^input0 must have shape \(rows, 8\), got \(2, 7\)$"):
            list(runtime.stream([batches[0], torch.rand(2, 7)]))

    for batch, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, model(batch).detach())


def test_a_stream_takes_positional_and_keyword_arguments(take_away: Any, rng: Any) -> None:
    class Scaled(MLP):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    model = Scaled().eval()
    x, scale = torch.rand(4, 8, generator=rng), torch.rand(4, 1, generator=rng)
    _, by_position = take_away(model, (x, scale), placement={"": "a", "third": "b"})
    _, by_name = take_away(model, {"x": x, "scale": scale}, placement={"": "a", "third": "b"})
    wanted = model(x, scale).detach()

    for results in (by_position.stream([(x, scale)] * 3), by_name.stream([{"x": x, "scale": scale}] * 3)):
        for result in results:
            torch.testing.assert_close(result, wanted)


def test_stages_work_on_different_micro_batches_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def step(name: str, meets: float) -> Any:
        def run(values: Values) -> Values:
            if float(values["x"]) == meets:
                meeting.wait()  # breaks unless the other stage is at work on the other micro-batch now
            return {**values, name: values["x"] + 1}

        return run

    pipeline = Pipeline([step("first", 1.0), step("second", 0.0)])
    results = pipeline.run([{"x": torch.tensor(0.0)}, {"x": torch.tensor(1.0)}])
    pipeline.close()

    assert [float(result["second"]) for result in results] == [1.0, 2.0]


def test_an_error_in_a_stage_reaches_the_caller_and_the_next_call_works() -> None:
    def fragile(values: Values) -> Values:
        if float(values["x"]) < 0:
            raise ArithmeticError("below zero")
        return values

    pipeline = Pipeline([fragile, fragile])
    with pytest.raises(ArithmeticError, match="below zero"):
        pipeline.run([{"x": torch.tensor(1.0)}, {"x": torch.tensor(-1.0)}, {"x": torch.tensor(2.0)}])
    assert len(pipeline.run([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}])) == 2
    pipeline.close()
