"""What must hold with every supported Lightning, as a plain program that needs nothing but the package itself.

    python tests/versions/check.py lightning.pytorch
    python tests/versions/check.py pytorch_lightning 2.4.0

With a version it is a failure, too, if another one is installed. For each of `STEPS` it prints `name: ok`, or
`name: FAILED` and the error. It exits with the number of failures.

It is the conformance suite in small: plain Lightning on one CPU device against `strategy="hetero"` over three emulated
ones, under a policy that puts every layer on another device than the one before, equal in float64 within 1e-12.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PARITY = 1e-12
DEVICES = "cpu@speed=2,cpu@speed=1,cpu@speed=1"
FABRIC_OF = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


class Check:
    """The steps, for one copy of Lightning.

    Args:
        namespace: "lightning.pytorch" or "pytorch_lightning".
        folder: For checkpoints.
    """

    def __init__(self, namespace: str, folder: Path) -> None:
        self.namespace = namespace
        self.folder = folder
        self.pl: Any = importlib.import_module(namespace)
        self.strategies: Any = importlib.import_module(f"{namespace}.strategies")

    def module(self) -> Any:
        """A classifier of three layers whose weights are always the same."""

        class Classifier(self.pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                layers = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
                self.net = nn.Sequential(*layers).double()

            def loss(self, batch: Any, name: str) -> torch.Tensor:
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.log(name, loss)
                return loss

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                return self.loss(batch, "loss")

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch, "val_loss")

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch, "test_loss")

            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return self.net(batch[0])

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

        return Classifier()

    def trainer(self, strategy: Any = None, **options: Any) -> Any:
        """A quiet Trainer: plain Lightning's unless a strategy is given."""
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
        chosen = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 1}
        if strategy is not None:
            chosen["strategy"] = strategy
        return self.pl.Trainer(**{**quiet, **chosen, **options})

    def hostile(self, placement: Any = "round_robin") -> Any:
        """Our strategy over three emulated devices, of the class that the name "hetero" stands for."""
        hetero = type(self.strategies.StrategyRegistry.get("hetero"))
        return hetero(devices=DEVICES, placement=placement, micro_batches=2, hang_timeout_s=60.0, verbose=False)

    def registers(self) -> None:
        """`Trainer(strategy="hetero")` is ours, in this namespace and not in the other's classes."""
        strategy = self.trainer("hetero").strategy
        assert type(strategy).__name__ == "HeteroStrategy", type(strategy)
        assert isinstance(strategy, self.strategies.SingleDeviceStrategy), type(strategy).__mro__

    def fits(self) -> None:
        """By name with everything chosen by itself, and over three devices: the same weights as plain Lightning."""
        alone, by_name, spread = self.module(), self.module(), self.module()
        self.trainer().fit(alone, data(), data())
        self.trainer("hetero").fit(by_name, data(), data())
        trainer = self.trainer(self.hostile())
        trainer.fit(spread, data(), data())
        used = {*trainer.strategy.plan.used}
        assert len(used) > 1, f"the plan uses {used} only"
        equal(alone, by_name)
        equal(alone, spread)

    def resumes(self) -> None:
        """From our checkpoint under another placement and in plain Lightning, and from plain Lightning's in ours."""
        alone = self.module()
        self.trainer(max_epochs=4).fit(alone, data())
        ours, theirs = str(self.folder / "ours.ckpt"), str(self.folder / "theirs.ckpt")
        for path, strategy in ((ours, self.hostile()), (theirs, None)):
            trainer = self.trainer(strategy)
            trainer.fit(self.module(), data())
            trainer.save_checkpoint(path)
        torch.load(ours, weights_only=True)
        turned = {"net.0": "emulated:2", "net.2": "emulated:1", "": "emulated:0"}
        for path, strategy in ((ours, self.hostile(turned)), (ours, None), (theirs, self.hostile())):
            resumed = self.module()
            self.trainer(strategy, max_epochs=4).fit(resumed, data(), ckpt_path=path)
            equal(alone, resumed)

    def evaluates(self) -> None:
        """`validate`, `test` and `predict` give plain Lightning's numbers."""
        alone, spread = self.trainer(), self.trainer(self.hostile())
        for run in ("validate", "test"):
            theirs, ours = (getattr(trainer, run)(self.module(), data(), verbose=False) for trainer in (alone, spread))
            assert theirs[0].keys() == ours[0].keys(), (theirs, ours)
            assert all(abs(ours[0][name] - value) <= PARITY for name, value in theirs[0].items()), (theirs, ours)
        theirs, ours = (trainer.predict(self.module(), data()) for trainer in (alone, spread))
        assert len(theirs) == len(ours)
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=PARITY)

    def fabric(self) -> None:
        """`Fabric(strategy="hetero")` trains to the same weights as plain Fabric."""
        equal(self.fabric_run("auto"), self.fabric_run(self.fabric_strategy()))

    def fabric_strategy(self) -> Any:
        """Our strategy for Fabric, over three emulated devices."""
        registry = importlib.import_module(f"{FABRIC_OF[self.namespace]}.strategies").STRATEGY_REGISTRY
        return type(registry.get("hetero"))(devices=DEVICES, placement="round_robin", verbose=False)

    def fabric_run(self, strategy: Any) -> Any:
        """Three epochs of a loop of one's own."""
        fabric = importlib.import_module(FABRIC_OF[self.namespace]).Fabric(
            accelerator="cpu", devices=1, strategy=strategy
        )
        torch.manual_seed(0)
        raw = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        module, optimizer = fabric.setup(raw, torch.optim.AdamW(raw.parameters(), lr=1e-2))
        for _ in range(3):
            for x, y in fabric.setup_dataloaders(data()):
                optimizer.zero_grad()
                fabric.backward(F.cross_entropy(module(x), y))
                optimizer.step()
        return raw


STEPS: dict[str, Callable[[Check], None]] = {
    "register": Check.registers,
    "fit": Check.fits,
    "resume": Check.resumes,
    "evaluate": Check.evaluates,
    "fabric": Check.fabric,
}


def data() -> DataLoader[Any]:
    """Forty rows in batches of eight, always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(4, (40,), generator=generator)), batch_size=8)


def equal(expected: nn.Module, got: nn.Module) -> None:
    """The states of two modules are equal within `PARITY`.

    Raises:
        AssertionError: They are not.
    """
    theirs, ours = expected.state_dict(), got.state_dict()
    assert theirs.keys() == ours.keys(), (theirs.keys(), ours.keys())
    worst = max(float((ours[name].cpu() - value).abs().max()) for name, value in theirs.items())
    assert worst <= PARITY, f"weights differ by {worst}"


def main(namespace: str, version: str = "") -> int:
    """Run all steps; return how many failed."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        check = Check(namespace, Path(folder))
        if version not in ("", check.pl.__version__):
            print(f"import: FAILED\n{check.pl.__file__} is {check.pl.__version__}, not {version}")
            return 1
        print("import: ok", flush=True)
        logging.getLogger(namespace).setLevel(logging.ERROR)
        import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin; after Lightning, as users have it)

        for name, step in STEPS.items():
            try:
                step(check)
                print(f"{name}: ok", flush=True)
            except Exception:
                failures += 1
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
