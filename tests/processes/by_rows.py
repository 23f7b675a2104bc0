"""Runs that count rows, and runs that are refused because they would not. Run as a program, it is one of the processes.

python by_rows.py FOLDER     writes FOLDER/RANK.pt: of each case, the result or the error
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, random_split
from torchmetrics import MeanMetric

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
X = torch.arange(17.0, dtype=torch.float64).view(17, 1)


def loader(rows: int = 17, batch_size: int = 8, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X[:rows]), batch_size, **arguments)


def trainer(**arguments: Any) -> L.Trainer:
    strategy = HeteroStrategy(devices="cpu", shares=[1, 3] if SIZE > 1 else None, hang_timeout_s=30, verbose=False)
    options: dict[str, Any] = {
        "strategy": strategy,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**options, **arguments})


class Net(L.LightningModule):
    """One weight that goes to the mean of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def loss(self, batch: Any) -> Tensor:
        return (batch[0] - self.w).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Logs(Net):
    """Logs from everywhere; of three batches, the last has one row."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.steps: list[dict[str, float]] = []
        self.train_mean, self.mean = MeanMetric(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.train_mean(loss)
        self.log("of numbers", self.train_mean, on_step=False, on_epoch=True)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        self.log("before", loss, sync_dist=True)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("norm", torch.zeros(()) if self.w.grad is None else self.w.grad.norm(), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("after", outputs["loss"], sync_dist=True)
        self.steps.append({key: float(self.trainer.callback_metrics[key]) for key in ("before", "norm", "after")})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.mean.update(float(loss))
        self.log("val of numbers", self.mean)
        self.log("val", loss, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val of outputs", torch.stack(self.outputs).mean(), sync_dist=True)
        self.log("val with a weight", float(RANK + 1), batch_size=1, sync_dist=True)
        self.outputs.clear()


def logs(folder: Path) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of metrics, and of the loss of a process without rows
    try:
        model, run = Logs(), trainer()
        own = model.train_mean.update
        run.fit(model, loader(), loader(16))
    finally:
        torch.set_default_dtype(before)
    assert model.train_mean.update is own
    return model.steps, {key: float(value) for key, value in run.callback_metrics.items()}


class Stateful(DataLoader[Any]):
    """Goes on where its state says, as torchdata's StatefulDataLoader does."""

    start = position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start = state["position"]

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.position = number + 1
                yield batch


class Seen(Net):
    """Keeps the rows of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows.append(batch[0].flatten().tolist())
        return self.loss(batch)


def resumed(folder: Path) -> Any:
    """In the middle of the second of two epochs: rows of these steps, and the weight; of the whole run and of that."""
    found = []
    saves = ModelCheckpoint(folder / f"resumed-{SIZE}", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    for path in (None, folder / f"resumed-{SIZE}" / "step=4.ckpt"):
        torch.manual_seed(RANK if path is None else 7)
        arguments = {"enable_checkpointing": True, "callbacks": [saves]} if path is None else {}
        model, run = Seen(), trainer(max_epochs=2, **arguments)
        run.fit(model, Stateful(TensorDataset(X), 6, shuffle=True), ckpt_path=path)
        found.append((model.rows[-2:], model.w.detach().clone()))
    return found


def data_in_setup(folder: Path) -> Any:
    class Early(Seen):
        def setup(self, stage: str) -> None:
            self.total = self.trainer.estimated_stepping_batches

    model = Early()
    trainer().fit(model, loader())
    return model.total, model.w.detach().clone()


class Manual(Net):
    """Gradients from somewhere else than `manual_backward`."""

    automatic_optimization = False
    way = ""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=self.way != "raw")

        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))

        if self.way == "closure":
            optimizer.step(closure=closure)
            return
        optimizer.zero_grad()
        if self.way == "raw":
            self.loss(batch).backward()
        else:
            (gradient,) = torch.autograd.grad(self.loss(batch), [self.w])
            if self.way == "by hand":
                self.w.grad = gradient
            else:
                self.manual_backward((self.w * gradient).sum())
        optimizer.step()


def manual(way: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        model = Manual()
        model.way = way
        trainer(max_epochs=2).fit(model, loader(16))
        return model.w.detach().clone()

    return run


class Batches:
    """Gives batches, and is no data loader of torch."""

    def __iter__(self) -> Iterator[Any]:
        return iter([[X[:8]], [X[8:]]])


def not_a_loader(folder: Path) -> Any:
    trainer().fit(Net(), Batches())


def other_split(folder: Path) -> Any:
    torch.manual_seed(RANK)
    data: Dataset[Any] = random_split(TensorDataset(X), [9, 8])[0]
    trainer().fit(Net(), DataLoader(random_split(data, [5, 4])[0], 4))


def same_split(folder: Path) -> Any:
    torch.manual_seed(1)
    model = Net()
    trainer().fit(model, DataLoader(random_split(TensorDataset(X), [9, 8])[0], 4))
    return model.w.detach().clone()


def copied_metrics(folder: Path) -> Any:
    class Copies(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric().double()
            self.copies: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.mean(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.copies = [self.mean.clone(), copy.deepcopy(self).mean, pickle.loads(pickle.dumps(self.mean))]

    net = Copies()
    trainer().fit(net, loader())
    return torch.tensor([type(each) is MeanMetric for each in net.copies])


def other_names(folder: Path) -> Any:
    class Named(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for name in "AB" if RANK == 0 else "BA":
                self.log(name, self.loss(batch), sync_dist=True)

    trainer().validate(Named(), loader(), verbose=False)


def second_loader_without_rows(folder: Path) -> Any:
    class Means(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", self.loss(batch), sync_dist=True)

    trainer(limit_val_batches=1).validate(Means(), [loader(), loader(batch_size=1)], verbose=False)


def by_the_clock(folder: Path) -> Any:
    trainer(val_check_interval=timedelta(seconds=5)).fit(Logs(), loader(), loader())


def hook_without_rows(folder: Path) -> Any:
    class Looks(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            (x,) = batch
            return [x / 2]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch), sync_dist=True)

    trainer().validate(Looks(), loader(batch_size=1), verbose=False)


class Chooses(Net):
    """Each batch trains one of two weights, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        draws = (float(torch.rand(())), random.random(), float(np.random.rand()))
        return sum((batch[0] - self.w[int(draw < 0.5)]).square().mean() for draw in draws)


class ByNumPy(Sampler[int]):
    """Another order in each epoch, from the generators that user code has at hand."""

    def __len__(self) -> int:
        return 17

    def __iter__(self) -> Iterator[int]:
        order = np.random.permutation(17).tolist()
        random.shuffle(order)
        yield from order


def choices(folder: Path) -> Tensor:
    """Processes choose alike, although process 0 alone draws the order."""
    weights = []
    for arguments in ({"shuffle": True}, {"sampler": ByNumPy()}):
        L.seed_everything(1, verbose=False)
        module = Chooses()
        trainer(max_epochs=3).fit(module, loader(**arguments))
        weights.append(module.w.detach())
    return torch.cat(weights)


class Pairs(Net):
    """A batch of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"]) + 2 * self.loss(batch["b"])


def cycled(folder: Path) -> Tensor:
    """Two loaders of one batch size without incomplete batches, of which the shorter one begins anew."""
    module = Pairs()
    loaders = {"b": loader(10, 5, drop_last=True), "a": loader(17, 5, drop_last=True)}
    trainer(max_epochs=2).fit(module, loaders)
    return module.w.detach()


SAME: dict[str, Callable[[Path], Any]] = {
    "logs": logs,
    "resumed": resumed,
    "data in setup": data_in_setup,
    "closure": manual("closure"),
    "product": manual("product"),
    "same split": same_split,
    "copied metrics": copied_metrics,
    "choices": choices,
    "cycled": cycled,
}
REFUSED: dict[str, Callable[[Path], Any]] = {
    "not a loader": not_a_loader,
    "other split": other_split,
    "by hand": manual("by hand"),
    "raw": manual("raw"),
    "other names": other_names,
    "by the clock": by_the_clock,
    "hook without rows": hook_without_rows,
    "second loader": second_loader_without_rows,  # the last: one process ends by it alone
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: case(folder) for name, case in SAME.items()}
    for name, case in REFUSED.items():
        try:
            case(folder)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
