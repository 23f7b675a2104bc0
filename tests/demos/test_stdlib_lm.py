"""What the small GPT promises: it is causal, tied, and learns."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from lightning_hetero.demos.stdlib_lm import CausalSelfAttention, StdlibTextDataModule, TinyGPT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def trained(model: TinyGPT, data: StdlibTextDataModule, steps: int) -> dict[str, float]:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]


def unigram_bits(data: StdlibTextDataModule) -> float:
    """Bits per byte of the test text for a model that knows how often each byte occurs, and nothing else."""
    seen = torch.bincount(data.train_dataloader().dataset.text.long(), minlength=256) + 1.0
    following = data.test_dataloader().dataset.text.long()
    return float(-(seen / seen.sum()).log2()[following].mean())


def test_a_byte_cannot_see_what_follows_it() -> None:
    model = TinyGPT(context=8).eval()
    ids = torch.arange(8).unsqueeze(0)
    changed = torch.cat([ids[:, :5], ids[:, 5:] + 100], dim=1)
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :5], model(changed)[:, :5])
        assert not torch.equal(model(ids)[:, 5:], model(changed)[:, 5:])


def test_embedding_and_output_layer_are_one_parameter() -> None:
    model = TinyGPT()
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_untrained_it_needs_about_eight_bits_for_a_byte() -> None:
    torch.manual_seed(0)
    model = TinyGPT(context=32).eval()
    ids = torch.randint(256, (16, 33))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() / math.log(2) == pytest.approx(8.0, abs=0.1)


def test_heads_that_do_not_divide_the_features_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=10 cannot be shared by heads=4"):
        CausalSelfAttention(10, heads=4)


def test_a_tiny_one_soon_knows_more_than_the_frequency_of_bytes() -> None:
    pl.seed_everything(1, verbose=False)
    data = StdlibTextDataModule(context=32, max_bytes=400_000)
    metrics = trained(TinyGPT(context=32, dim=32, depth=1, lr=5e-3), data, steps=250)
    assert metrics["test/bits_per_byte"] < unigram_bits(data) - 0.5
    assert metrics["test/loss"] == pytest.approx(metrics["test/bits_per_byte"] * math.log(2), rel=1e-3)
    assert 0.2 < metrics["test/acc"] < 1.0
