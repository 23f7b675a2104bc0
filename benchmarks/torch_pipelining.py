"""The same sleeping stages under `torch.distributed.pipelining`: 1F1B, one process for each of two stages."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from sleeping import ROWS, Stage, timed
from torch import distributed
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

STAGES = 2
PATIENCE_S = 60.0


class TorchPipeline:
    """Two processes that wait for work.

    Args:
        pipes: To each of them.
    """

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def seconds(self, stages_s: list[float], micro_batches: int, repetitions: int) -> float:
        """Median time of a forward and backward.

        Raises:
            RuntimeError: A process has died, or answers no more.
        """
        for pipe in self._pipes:
            pipe.send((stages_s, micro_batches, repetitions))
        return self.answers()[0]

    def answers(self) -> list[float]:
        """What each of them sends next.

        Raises:
            RuntimeError: A process has died, or answers no more.
        """
        answers: list[float] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE_S):
                raise RuntimeError(f"process {rank} of torch's pipeline does not answer")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise RuntimeError(f"process {rank} of torch's pipeline has ended, see its traceback above") from None
        return answers


@contextmanager
def torch_pipeline() -> Iterator[TorchPipeline]:
    """Start the processes, and end them after the block. They talk over the loopback interface."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(STAGES)]
        processes = [
            context.Process(target=_serve, args=(rank, Path(folder, "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        for _, theirs in ends:
            theirs.close()  # so that a process which dies is noticed
        pipeline = TorchPipeline([ours for ours, _ in ends])
        try:
            pipeline.answers()  # what is measured first must not share the processor with their start
            yield pipeline
        finally:
            for ours, _ in ends:
                ours.close()
            for process in processes:
                process.join(PATIENCE_S)
                if process.is_alive():
                    process.kill()
                    process.join()


def _serve(rank: int, store: Path, pipe: Connection) -> None:
    """What a process does until its pipe is closed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # A file instead of a port, which another program might have taken.
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=STAGES, timeout=timedelta(seconds=PATIENCE_S)
    )
    try:
        pipe.send(0.0)  # it is there
        while True:
            stages_s, micro_batches, repetitions = pipe.recv()
            pipe.send(_measure(rank, stages_s[rank], micro_batches, repetitions))
    except EOFError:
        pass
    finally:
        distributed.destroy_process_group()


def _measure(rank: int, batch_s: float, micro_batches: int, repetitions: int) -> float:
    stage = PipelineStage(Stage(batch_s), rank, STAGES, torch.device("cpu"))
    schedule = Schedule1F1B(stage, micro_batches, loss_fn=lambda output, target: output.mean())
    batch = torch.randn(ROWS, 4)

    def step() -> None:
        if rank == 0:
            schedule.step(batch)
        else:
            schedule.step(target=batch)
        distributed.barrier()  # both are done

    def repetition() -> float:
        distributed.barrier()
        return timed(step)

    repetition()  # exchanges shapes
    return statistics.median(repetition() for _ in range(repetitions))
