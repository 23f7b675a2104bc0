"""Sums of gradients over real processes. This file is also the program that they run: `main` at its end."""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import launch
import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from launch import Ended
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.errors import HeteroError, ProcessError, UnsupportedError, UsageError
from lightning_hetero.runtime.processes.buckets import compose
from lightning_hetero.runtime.processes.reducer import GradientReducer
from lightning_hetero.testing import install_accelerator

WIDTH = 3
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex128": torch.complex128,
}
JOBS: dict[str, Callable[[], None]] = {}


def job(function: Callable[[], None]) -> Callable[[], None]:
    """Something that all processes run."""
    JOBS[function.__name__] = function
    return function


# What the processes have in common


def layers(count: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(count)))


def inputs(rank: int, step: int = 0, rows: int = 2) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().cpu() for p in model.parameters()]


def total(each: list[list[Tensor | None]]) -> list[Tensor | None]:
    """The sums of lists of gradients."""
    sums: list[Tensor | None] = []
    for theirs in zip(*each, strict=True):
        there = [grad for grad in theirs if grad is not None]
        sums.append(torch.stack(there).sum(0) if there else None)
    return sums


def expected(model: nn.Module, run: Callable[[nn.Module, int], object]) -> list[Tensor | None]:
    """What one process computes: `run(model, rank)` for all ranks, on a copy, summed."""
    each = []
    for rank in range(dist.get_world_size()):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        run(twin, rank)
        each.append(grads(twin))
    return total(each)


def assert_same(found: list[Tensor | None], wanted: list[Tensor | None], relative: float = 1e-15) -> None:
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None), f"number {index}: {one} instead of {other}"
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
            eps = max(
                relative, 4 * torch.finfo(one.dtype).eps if one.dtype not in (torch.float64, torch.complex128) else 0
            )
            torch.testing.assert_close(one, other, rtol=0, atol=eps * scale, msg=lambda m, i=index: f"number {i}: {m}")


def run_once(model: nn.Module, rank: int, step: int = 0) -> None:
    model(inputs(rank, step)).square().sum().backward()


@contextmanager
def reducing(model: nn.Module, bucket_bytes: int = 1, **options: Any) -> Iterator[GradientReducer]:
    """A reducer with a bucket for each parameter."""
    reducer = GradientReducer(model.parameters(), bucket_bytes=bucket_bytes, **options)
    try:
        yield reducer
    finally:
        reducer.close()


@contextmanager
def recording() -> Iterator[list[Any]]:
    """The sizes of sums, as they are started."""
    events: list[Any] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        events.append(tensor.numel())
        return real(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        yield events
    finally:
        dist.all_reduce = real


def train(model: nn.Module, reducer: GradientReducer, step: int, run: Callable[[nn.Module, int], object]) -> None:
    """One step, compared with that of one process."""
    wanted = expected(model, run)
    model.zero_grad()
    reducer.begin()
    run(model, dist.get_rank())
    reducer.finish()
    assert_same(grads(model), wanted)


def raised(kind: type[HeteroError], action: Callable[[], object]) -> HeteroError:
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


# Random models


@st.composite
def scenarios(draw: st.DrawFn, size: int) -> dict[str, Any]:
    """A model with layers of several dtypes and devices, and what happens in some steps, by rank."""
    count = draw(st.integers(1, 5))
    devices = st.sampled_from(["cpu", "dev:0", "dev:1"])
    uses = st.lists(st.integers(0, 2), min_size=count, max_size=count)
    step = st.fixed_dictionaries(
        {
            "backwards": st.lists(st.integers(0, 3), min_size=size, max_size=size),
            "uses": st.lists(uses, min_size=size, max_size=size),
            "trained": st.lists(st.booleans(), min_size=count, max_size=count),
            "begins": st.booleans(),
            "begins_idle": st.booleans(),
        }
    )
    return {
        "dtypes": draw(st.lists(st.sampled_from(sorted(DTYPES)), min_size=count, max_size=count)),
        "devices": [draw(st.lists(devices, min_size=count, max_size=count)) for _ in range(size)],
        "steps": draw(st.lists(step, min_size=2, max_size=4)),
        "bucket_bytes": draw(st.sampled_from([1, 100, 300, 10_000])),
    }


class Chain(nn.Module):
    """Layers of several dtypes and devices, each used a number of times."""

    def __init__(self, dtypes: list[str], devices: list[str]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=DTYPES[name]) for name in dtypes)
        for layer, device in zip(self.layers, devices, strict=True):
            layer.to(device)

    def forward(self, value: Tensor, uses: list[int]) -> Tensor:
        for layer, times in zip(self.layers, uses, strict=True):
            for _ in range(times):
                weight = layer.weight
                out = layer(value.to(weight.dtype).to(weight.device)).cpu()
                value = torch.tanh((out.real if out.is_complex() else out).to(torch.float64)) + value
        return value


def play(model: Chain, scenario: dict[str, Any], number: int, rank: int, before_last: Callable[[], None]) -> None:
    """The backwards of a rank in a step."""
    step = scenario["steps"][number]
    for layer, trained in zip(model.layers, step["trained"], strict=True):
        layer.requires_grad_(trained)
    model.zero_grad()
    times = step["backwards"][rank]
    for index in range(times):
        if index == times - 1:
            before_last()
        out = model(inputs(rank, 10 * number + index), step["uses"][rank])
        if out.requires_grad:
            out.square().sum().backward()


def perform(scenario: dict[str, Any]) -> list[list[Tensor | None]]:
    """All steps, on this rank: the gradients after each."""
    rank = dist.get_rank()
    model = Chain(scenario["dtypes"], scenario["devices"][rank])
    after = []
    with reducing(model, scenario["bucket_bytes"]) as reducer:
        for number, step in enumerate(scenario["steps"]):
            begin = reducer.begin if step["begins"] else lambda: None
            play(model, scenario, number, rank, begin)
            held = [p.grad for p in model.parameters()]
            if step["backwards"][rank] == 0 and step["begins_idle"]:
                begin()
            reducer.finish()
            assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True) if grad is not None)
            assert all(p.grad.device == p.device for p in model.parameters() if p.grad is not None)
            after.append(grads(model))
            model.zero_grad()
    return after


@job
def random_models() -> None:
    """Rank 0 draws models and judges what all ranks got."""
    size = dist.get_world_size()

    def tell(scenario: dict[str, Any] | None) -> dict[str, Any] | None:
        told = [scenario]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def answer(mine: list[list[Tensor | None]]) -> list[Any]:
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, mine)
        return everyone

    @settings(
        max_examples=30,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(scenarios(size))
    def judge(scenario: dict[str, Any]) -> None:
        tell(scenario)
        everyone = answer(perform(scenario))
        for number in range(len(scenario["steps"])):
            each = []
            for rank in range(size):
                model = Chain(scenario["dtypes"], ["cpu"] * len(scenario["dtypes"]))
                play(model, scenario, number, rank, lambda: None)
                each.append(grads(model))
            for theirs in everyone:
                assert_same(theirs[number], total(each))
            for theirs in everyone[1:]:
                assert all(
                    (a is None and b is None) or torch.equal(a, b)
                    for a, b in zip(theirs[number], everyone[0][number], strict=True)
                )

    if dist.get_rank() == 0:
        judge()
        tell(None)
    else:
        while (scenario := tell(None)) is not None:
            answer(perform(scenario))


# Single cases


@job
def a_bucket_goes_out_while_backward_runs() -> None:
    model = layers()
    with reducing(model) as reducer, recording() as events:
        handle = model[0].weight.register_hook(lambda grad: events.append("first layer"))
        train(model, reducer, 0, run_once)
        assert events.index("first layer") < events.index(WIDTH + 1), "the first step knows nothing yet"
        del events[:]
        model.zero_grad()
        reducer.begin()
        run_once(model, dist.get_rank())
        early = events[: events.index("first layer")]
        assert early[:6] == [WIDTH + 1, WIDTH * WIDTH + 1] * 3, "bias and weight of three layers, with flags"
        reducer.finish()
        assert len(events) == 9
        assert reducer.resent == 0
        handle.remove()


@job
def what_comes_after_its_bucket_is_summed_again() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1

    def run_twice_on_the_last(model: nn.Module, rank: int) -> None:
        run_once(model, rank)
        if rank == last:
            run_once(model, rank, step=7)

    def change_in_backward(model: Any, rank: int) -> None:
        def double(grad: Tensor) -> None:
            model[3].weight.grad.mul_(2)

        hook = model[0].weight.register_hook(double)
        run_once(model, rank)
        hook.remove()

    def replace_in_backward(model: Any, rank: int) -> None:
        def replace(grad: Tensor) -> None:
            if rank == 0:
                model[3].weight.grad = torch.ones_like(grad)

        hook = model[0].weight.register_hook(replace)
        run_once(model, rank)
        hook.remove()

    model = layers()
    with reducing(model) as reducer:
        train(model, reducer, 0, run_once)
        train(model, reducer, 1, run_twice_on_the_last)
        assert reducer.resent == 7, "all buckets but the last, on every rank"
    with reducing(model) as reducer:
        train(model, reducer, 0, run_once)
        train(model, reducer, 1, change_in_backward)
        assert reducer.resent == 1
        train(model, reducer, 2, replace_in_backward)
        assert reducer.resent == 2
        train(model, reducer, 3, run_once)
        assert reducer.resent == 2
    assert rank <= last


@job
def a_checkpointed_module_used_twice_goes_out_once() -> None:
    def run(model: Any, rank: int) -> None:
        value = inputs(rank).requires_grad_()
        for layer in (model[0], model[1], model[2], model[2], model[3]):
            value = checkpoint(layer, value, use_reentrant=True)
        value.square().sum().backward()

    model = layers()
    counts: list[int] = []
    handle = model[2].weight.register_post_accumulate_grad_hook(lambda p: counts.append(1))
    with reducing(model) as reducer, recording() as events:
        for step in range(3):
            train(model, reducer, step, run)
            if step == 0:
                assert len(counts) == 2, "a module that is recomputed twice accumulates twice"
            del events[:]
            train(model, reducer, step, run)
            assert len(events) == 8
        assert reducer.resent == 0
    handle.remove()


@job
def gradients_may_have_a_graph() -> None:
    def run(model: nn.Module, rank: int) -> None:
        model(inputs(rank)).pow(3).sum().backward(create_graph=True)

    model = layers()
    with reducing(model) as reducer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        for step in range(3):
            train(model, reducer, step, run)
            assert all(bucket.flat is None or not bucket.flat.requires_grad for bucket in reducer._buckets)
        model.zero_grad()


@job
def a_rank_without_rows_takes_part() -> None:
    model, last = layers(), dist.get_world_size() - 1

    def run(model: nn.Module, rank: int) -> None:
        if rank != last:
            run_once(model, rank)

    with reducing(model) as reducer:
        train(model, reducer, 0, run)
        train(model, reducer, 1, run_once)
        train(model, reducer, 2, run)
        wanted = expected(model, run)
        model.zero_grad()
        if dist.get_rank() != last:  # the others need not even begin
            reducer.begin()
            run_once(model, dist.get_rank())
        reducer.finish()
        assert_same(grads(model), wanted)
        train(model, reducer, 3, lambda model, rank: None)
        assert grads(model) == [None] * 8
        train(model, reducer, 4, run_once)
        assert reducer.resent == 0, "a step without rows teaches nothing wrong"


@job
def what_is_left_out_now_and_then_is_waited_for() -> None:
    def run(model: Any, rank: int) -> None:
        run_once(model[:3] if rank else model, rank)

    model = layers()
    with reducing(model) as reducer:
        for step in range(3):
            train(model, reducer, step, run_once)
            train(model, reducer, step, run)
        assert reducer.resent == 0


@job
def frozen_buckets_stay_at_home() -> None:
    model = layers()
    model[1].requires_grad_(False)
    with reducing(model) as reducer, recording() as events:
        train(model, reducer, 0, run_once)
        assert len(events) == 6
        del events[:]
        train(model, reducer, 1, run_once)
        assert len(events) == 6
        model[1].requires_grad_(True)
        for step in (2, 3):
            del events[:]
            train(model, reducer, step, run_once)
            assert len(events) == 8
        model[:3].requires_grad_(False)
        for step, sums in ((4, 8), (5, 3)):  # the last bucket goes always: it has something to say
            del events[:]
            train(model, reducer, step, run_once)
            assert len(events) == sums
        assert reducer.resent == 0


@job
def several_threads_accumulate() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(layers(6) for _ in range(4))

    def run(model: Any, rank: int) -> None:
        threads = [threading.Thread(target=run_once, args=(part, rank, i)) for i, part in enumerate(model)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with reducing(model) as reducer:
        for step in range(10):
            train(model, reducer, step, run)
        assert reducer.resent == 0


class Words(nn.Module):
    """An embedding and a layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(5, WIDTH, sparse=sparse, dtype=torch.float64)
        self.out = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


@job
def all_refuse_a_sparse_gradient() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for sparse_rank, early in ((last, True), (0, False)):
        model = Words(sparse=rank == sparse_rank)
        names = [name for name, _ in model.named_parameters()]
        with reducing(model, names=names) as reducer:
            if early:
                model.words.sparse = False
                reducer.begin()
                model.out(model.words(torch.tensor([1, 2]))).sum().backward()
                reducer.finish()
                model.words.sparse = rank == sparse_rank
                model.zero_grad()
                reducer.begin()
            model.out(model.words(torch.tensor([1, 2]))).sum().backward()
            before = grads(model)
            error = raised(UnsupportedError, reducer.finish)
            assert f"in process {sparse_rank}, the gradient of words.weight is sparse" in str(error)
            assert "nn.Embedding(..., sparse=False)" in str(error)
            assert all(
                a is not None and torch.equal(a.to_dense(), b.to_dense())
                for a, b in zip(grads(model), before, strict=True)
            )
            model.words.sparse = False  # all are in step still

            def run(model: Any, rank: int) -> None:
                model.out(model.words(torch.tensor([rank, rank]))).sum().backward()

            train(model, reducer, 1, run)


class Uncopied(Tensor):
    """A gradient that cannot be copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            raise MemoryError("no room")
        return super().__torch_function__(func, types, args, kwargs or {})


@job
def all_fail_when_one_cannot_send() -> None:
    model, last = layers(), dist.get_world_size() - 1
    with reducing(model) as reducer:
        run_once(model, dist.get_rank())
        weight = model[1].weight
        if dist.get_rank() == last:
            assert weight.grad is not None
            weight.grad = weight.grad.as_subclass(Uncopied)
        error = raised(ProcessError, reducer.finish)
        assert f"in process {last}, the gradient of parameter 2 cannot be sent: no room" in str(error)
        train(model, reducer, 1, run_once)


@job
def all_refuse_different_models() -> None:
    rank = dist.get_rank()
    model = layers(2 + rank)
    with reducing(model) as reducer:
        error = raised(UsageError, reducer.finish)
        assert "parameter 4, torch.float64 of shape (3, 3) in process 1" in str(error), error
        assert "number 4 is nothing in process 0" in str(error), error
    model = layers()
    error = raised(UsageError, lambda: GradientReducer(model.parameters(), names=["one"]))
    assert "1 names for 8 different parameters" in str(error)
    error = raised(UsageError, lambda: GradientReducer(nn.LazyLinear(2).parameters()))
    assert "parameter 0 has no shape yet. Run one batch through the lazy module first" in str(error)
    with reducing(model, bucket_bytes=1 if rank else 1000) as reducer:
        assert "the same bucket_bytes" in str(raised(UsageError, reducer.finish))
    with reducing(model) as reducer:
        train(model, reducer, 0, run_once)
        model.zero_grad()
        if rank == 0:
            model[2].float()
        error = raised(UsageError, reducer.finish)
        assert "in process 0, parameter 4 was torch.float64 of shape (3, 3)" in str(error), error


@job
def nothing_is_left() -> None:
    model = layers()
    reducer = GradientReducer(model.parameters(), bucket_bytes=1)
    train(model, reducer, 0, run_once)
    threads = psutil.Process().num_threads()  # those of gloo and autograd are there now
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    buffers = [weakref.ref(bucket.flat) for bucket in reducer._buckets]
    model.zero_grad()
    reducer.begin()
    run_once(model, dist.get_rank())
    reducer.finish()
    reducer.begin()
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    reducer.close()
    reducer.close()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert "closed" in str(raised(UsageError, reducer.begin))
    assert "closed" in str(raised(UsageError, reducer.finish))
    assert psutil.Process().num_threads() == threads
    deadline = time.monotonic() + 20  # a thread of gloo lets go of a sum a moment after it has told that it is done
    while any(buffer() is not None for buffer in buffers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [buffer() for buffer in buffers] == [None] * 8
    gc.collect()
    gc.disable()
    dropped = GradientReducer(model.parameters())
    dropped.begin()
    watch, parameter = weakref.ref(dropped), weakref.ref(model[0].weight)
    del dropped, reducer, model
    assert watch() is None, "a reducer that is dropped is gone at once"
    assert parameter() is None, "and so are its parameters: hooks make no cycle"
    gc.enable()


def _a_peer_dies(when: str) -> None:
    model = layers()
    # At its end, gloo waits for the sums that still run, so the timeout is the longest time that this takes.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=10))
    reducer = GradientReducer(model.parameters(), group, bucket_bytes=1)
    train(model, reducer, 0, run_once)
    model.zero_grad()
    if dist.get_rank() == 1:
        if when == "in backward":
            model[1].weight.register_hook(lambda grad: os._exit(0))
            reducer.begin()
            run_once(model, 1)
        os._exit(0)
    reducer.begin()
    run_once(model, dist.get_rank())
    before = grads(model)
    error = raised(ProcessError, reducer.finish)
    assert f"process {dist.get_rank()} of {dist.get_world_size()} got no answer during the sum of gradients" in str(
        error
    )
    assert "start all of them again" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    assert not isinstance(error.__cause__, HeteroError)
    assert_same(grads(model), before)
    reducer.begin()
    assert raised(ProcessError, reducer.finish) is error, "what is broken stays broken, and nobody waits again"
    reducer.close()


@job
def a_peer_dies_before_its_backward() -> None:
    _a_peer_dies("before")


@job
def a_peer_dies_in_its_backward() -> None:
    _a_peer_dies("in backward")


# The tests


def launched(names: list[str], size: int, folder: Path) -> list[Ended]:
    """Run jobs in processes of their own, all in one set of processes."""
    rest = str(size), str(folder / "store")
    return launch.wait(
        [launch.Forked([__file__, ",".join(names), str(rank), *rest], {"OMP_NUM_THREADS": "1"}) for rank in range(size)]
    )


ALIVE = [name for name in JOBS if "dies" not in name]
DYING = [name for name in JOBS if "dies" in name]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("names", [["random_models"], ALIVE[1:]], ids=["random models", "single cases"])
def test_sums_of_gradients(names: list[str], size: int, tmp_path: Path, accelerator: object) -> None:
    for rank, process in enumerate(launched(names, size, tmp_path)):
        assert process.code == 0, f"process {rank}:\n{process.text}"
        assert done(process) == names


@pytest.mark.parametrize("name", DYING)
def test_a_peer_that_dies_is_an_error_on_all_others(name: str, tmp_path: Path, accelerator: object) -> None:
    for rank, process in enumerate(launched([name], 3, tmp_path)):
        assert process.code == 0, f"process {rank}:\n{process.text}"
        assert done(process) == ([] if rank == 1 else [name])


def done(process: Ended) -> list[str]:
    """The jobs that a process has done; other lines are warnings of gloo."""
    return [line for line in process.text.splitlines() if line in JOBS]


def test_every_job_is_run() -> None:
    assert ALIVE[0] == "random_models"
    assert len(ALIVE) + len(DYING) == len(JOBS)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 40))), st.integers(1, 400))
def test_buckets_hold_every_parameter_once_in_reverse_order(
    described: list[tuple[str, int]], bucket_bytes: int
) -> None:
    parameters = [torch.empty(size, dtype=DTYPES[name]) for name, size in described]
    buckets = compose(parameters, bucket_bytes)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(parameters)))
    assert [bucket[-1] for bucket in buckets] == sorted((bucket[-1] for bucket in buckets), reverse=True)
    for bucket in buckets:
        assert bucket == sorted(bucket, reverse=True)
        assert len({parameters[index].dtype for index in bucket}) == 1
        assert sum(parameters[index].nbytes for index in bucket[:-1]) < bucket_bytes


def test_without_processes_there_is_no_reducer() -> None:
    with pytest.raises(UsageError, match=r"no process group .* Open torch\.distributed before"):
        GradientReducer(nn.Linear(2, 2).parameters())


def main(names: str, rank: str, size: str, path: str) -> None:
    torch.set_num_threads(1)
    install_accelerator("auto")
    store = dist.FileStore(path, int(size))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60))
    try:
        for name in names.split(","):
            JOBS[name]()
            print(name, flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
