"""Which parts of a batch whole steps in micro-batches are given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hetero.testing.lightning_module import Classifier, data, difference

STEPS = {"strategy": {"micro_batches": 2, "micro_batching": "step"}}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """With what does not belong to rows, and has two items, as the last batch has rows."""
    x, y = map(torch.stack, zip(*rows, strict=True))
    return {"x": x, "y": y, "names": ["cat", "dog"], "weights": torch.tensor([1.0, 2.0]), "pair": [torch.ones(5)] * 2}


class Takes(Classifier):
    """Needs all of what does not belong to rows."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        (a, b), (low, high), names = batch["pair"], batch["weights"], batch["names"]
        assert len(names) == 2
        scale = (a.sum() + b.sum()) / 10 * (low + high) / 3
        return F.cross_entropy(self(batch["x"]), batch["y"]) * scale


class Samples(Classifier):
    """Puts samples together itself, of which one dimension is as long as the batch."""

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        x = torch.stack([x.mean(0) for x, _ in batch])
        return F.cross_entropy(self(x), torch.stack([y for _, y in batch]))


def test_samples_that_are_not_put_together_run_once(plain: Any, hetero: Any, caplog: Any) -> None:
    rows = data(rows=14).dataset
    dataset: Any = [(x.expand(4, 8), y) for x, y in rows]
    loader = DataLoader(dataset, batch_size=4, collate_fn=list)
    alone, spread = Samples(), Samples()
    plain(max_epochs=2).fit(alone, loader)
    hetero(devices="cpu@speed=1,cpu@speed=1", max_epochs=2, **STEPS).fit(spread, loader)
    assert difference(alone, spread) < 1e-6
    assert "is not cut into micro-batches, because its batch has no rows to cut" in caplog.text


def test_what_does_not_belong_to_rows_goes_whole_to_a_last_batch_of_as_many_rows(plain: Any, hetero: Any) -> None:
    dataset = data(rows=14).dataset
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
    alone, spread = Takes(), Takes()
    plain(max_epochs=2).fit(alone, loader)
    hetero(devices="cpu@speed=1,cpu@speed=1", max_epochs=2, **STEPS).fit(spread, loader)
    assert difference(alone, spread) < 1e-6
