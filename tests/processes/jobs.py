"""The trainings that the tests run in one process and in several. Run as a program, it is one of the processes.

python jobs.py FOLDER NAME[,NAME...]     writes FOLDER/NAME-RANK.pt for each job
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import device_backend
import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing import install_accelerator

ROWS = 53


class Numbers(Dataset[tuple[Tensor, Tensor, int]]):
    """Rows of random numbers, each with its index."""

    def __init__(self, rows: int = ROWS, shape: tuple[int, ...] = (8,)) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


class Net(L.LightningModule):
    """Three layers; records which rows it saw."""

    again = False  # whether the backward runs the forward again
    counts = True  # whether a buffer counts training steps

    def __init__(self, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
        self.net = nn.Sequential(
            nn.Linear(8, 16), *middle, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
        ).double()
        self.unused = nn.Linear(2, 2).double()
        self.forgotten = nn.Parameter(torch.ones(8, dtype=torch.float64))  # in no optimizer: its gradients add up
        self.register_buffer("kinds", torch.tensor([seed, 2], dtype=torch.int16))
        self.register_buffer("flag", torch.tensor(seed == 0))
        self.register_buffer("expanded", torch.full((1, 2), float(seed)).expand(3, 2))
        self.register_buffer("steps", torch.tensor(0))
        self.seen: dict[str, list[int]] = {}

    def loss(self, batch: Any, name: str) -> Tensor:
        x, y, index = batch
        self.seen.setdefault(name, []).extend(index.tolist())
        if self.counts and self.training:
            self.steps.add_(1)
        x = x * self.forgotten
        out = checkpoint(self.net, x, use_reentrant=False) if self.again and self.training else self.net(x)
        return functional.cross_entropy(out, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch, f"train{self.current_epoch}")
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        name = "sanity" if self.trainer.sanity_checking else f"val{self.current_epoch}"
        self.log("val", self.loss(batch, name), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch, "test"), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss(batch, "predict")
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p is not self.forgotten]
        return torch.optim.Adam(trained, lr=0.01, weight_decay=0.1)


class Manual(Net):
    """Two backwards for each step."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, f"train{self.current_epoch}"))
        self.manual_backward(self.net(batch[0]).square().mean())
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()


class Steps(L.Callback):
    """Losses as a logger sees them, and gradients that no optimizer clears."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient: Tensor | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, Net)
        if module.forgotten.grad is not None:
            self.gradient = module.forgotten.grad.clone()
        if "loss_step" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["loss_step"]))


OWN_PARTS = [range(12), range(12, 48)]  # dealt out by the user, in batches of 4 and 12 rows


def own_part(rank: int, size: int) -> DataLoader[Any]:
    """The rows that the user gives this process, or all of them in the same batches."""
    data = Numbers()
    if size > 1:
        return DataLoader(Subset(data, OWN_PARTS[rank]), batch_size=(4, 12)[rank])
    first, second = OWN_PARTS
    batches = [[*first[4 * k : 4 * k + 4], *second[12 * k : 12 * k + 12]] for k in range(3)]
    return DataLoader(data, batch_sampler=batches)


def loader(batch_size: int = 10, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=batch_size, **arguments)


def run(name: str, size: int = 1, **strategy: Any) -> dict[str, Any]:
    """One of the jobs, in this process and the others of the launcher."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))  # processes begin with different numbers, and process 0 decides
    model = Manual(rank) if "manual" in name else Net("norm" in name, rank)
    shares = {"even": [1.0] * size, "third": [1.0, 3.0], "five": [2.0, 3.0, 5.0]}
    model.again = "again" in name
    given = next((value for word, value in shares.items() if word in name and size > 1), None)
    steps = Steps()
    devices = "cpu"
    if "pipeline" in name and size > 1:  # each process drives several devices of its own, and not the same ones
        devices = ",".join(["cpu@speed=1"] * (2 + rank))
        strategy = {"placement": "even", "micro_batches": 2, **strategy}
    if "devices" in name and size > 1:  # one accelerator each, which exchange gradients by themselves if they can
        device_backend.register(broken="broken" in name)
        devices = "cpu" if "mixed" in name and rank else install_accelerator().devices[rank]
        strategy = {"placement": "single", **strategy}
    if "accelerator" in name and size > 1:
        devices = f"cpu,{install_accelerator().devices[rank]}"
        strategy = {"placement": "round_robin", **strategy}
    if "measured" in name:  # each tries plans of its own with real steps, at its own times
        strategy |= {"profile": "always", "placement": "auto", "micro_batches": None}
    if "in-parts" in name:
        strategy |= {"micro_batching": "step", "micro_batches": 2}
        model.counts = False  # it would count micro-batches
    trainer = L.Trainer(
        strategy=HeteroStrategy(devices=devices, shares=given, hang_timeout_s=60, verbose=False, **strategy),
        accelerator="cpu",
        use_distributed_sampler="own-part" not in name,
        max_epochs=4,
        accumulate_grad_batches=2 if "accumulate" in name else 1,
        gradient_clip_val=0.7 if "clip" in name else None,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[steps],
    )
    torch.manual_seed(3 + rank)
    batch_size = 1 if "single" in name else 10
    own = "own-part" in name
    device_backend.sums.clear()
    trainer.fit(model, own_part(rank, size) if own else loader(batch_size, shuffle=True), None if own else loader(7))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    state = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    assert steps.gradient is not None
    state["gradients without an optimizer"] = steps.gradient.cpu()
    if own:
        return {"state": state, "seen": model.seen, "metrics": metrics, "losses": steps.losses, "predictions": []}
    trainer.test(model, loader(9), verbose=False)
    metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    predictions = trainer.predict(model, loader(9))
    return {
        "state": state,
        "seen": model.seen,
        "metrics": metrics,
        "losses": steps.losses,
        "predictions": [None if rows is None else rows.cpu() for rows in predictions],
        "sums": list(device_backend.sums),
    }


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        torch.save(run(name, size), folder / f"{name}-{rank}.pt")
