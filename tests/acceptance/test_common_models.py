"""Models of the kinds that people train are really cut into micro-batches, and give the numbers of one device.

Each is written as its users write it: nothing in it knows of devices or micro-batches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

ROUNDING = 1e-11
VOCABULARY, LENGTH, CLASSES = 19, 6, 4


def loader(make: Callable[[int], Any], rows: int = 22, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    """Rows by index, always the same; the last batch is smaller."""
    torch.manual_seed(1)
    return DataLoader([make(index) for index in range(rows)], batch_size=batch_size, **options)  # type: ignore[arg-type]


def vector(index: int) -> tuple[Tensor, Tensor]:
    return torch.randn(8, dtype=torch.float64), torch.tensor(index % CLASSES)


def image(index: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, 16, dtype=torch.float64), torch.tensor(index % CLASSES)


def sequence(index: int) -> tuple[Tensor, Tensor]:
    return torch.randn(LENGTH, 8, dtype=torch.float64), torch.tensor(index % CLASSES)


def segmentation(index: int) -> dict[str, Tensor]:
    return {"image": torch.randn(3, 16, 16, dtype=torch.float64), "mask": torch.randint(2, (1, 16, 16)).double()}


def text(index: int) -> dict[str, Tensor]:
    length = 2 + index % (LENGTH - 1)
    return {
        "input_ids": torch.randint(VOCABULARY, (LENGTH,)),
        "attention_mask": (torch.arange(LENGTH) < length).long(),
        "labels": torch.tensor(index % CLASSES),
    }


def tokens(index: int) -> Tensor:
    return torch.randint(VOCABULARY, (LENGTH + 1,))


def translation(index: int) -> tuple[Tensor, Tensor]:
    source, target = torch.randint(1, VOCABULARY, (LENGTH,)), torch.randint(1, VOCABULARY, (LENGTH,))
    source[2 + index % (LENGTH - 2) :] = 0
    return source, target


class Module(pl.LightningModule):
    """Adds to a user's module what all of them have: a step for validation, and an optimizer."""

    def __init__(self) -> None:
        super().__init__()

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True, batch_size=8)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Classifying(Module):
    """Calls itself, as the guide of Lightning shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.train_accuracy, self.val_accuracy = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        scores = self(x)
        name = "train_accuracy" if self.training else "val_accuracy"
        accuracy = getattr(self, name)
        accuracy(scores, y)
        self.log(name, accuracy, on_step=False, on_epoch=True, batch_size=8)
        return F.cross_entropy(scores, y)


# Transformers in the manner of Hugging Face


class BertEmbeddings(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, size, padding_idx=0)
        self.position_embeddings = nn.Embedding(LENGTH, size)
        self.token_type_embeddings = nn.Embedding(2, size)
        self.LayerNorm = nn.LayerNorm(size)
        self.register_buffer("position_ids", torch.arange(LENGTH).expand((1, -1)), persistent=False)
        self.register_buffer("token_type_ids", torch.zeros((1, LENGTH), dtype=torch.long), persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        rows, length = input_ids.size()
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :length].expand(rows, length)
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        embeddings += self.position_embeddings(self.position_ids[:, :length])
        return self.LayerNorm(embeddings)


class BertSelfAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, hidden: Tensor, mask: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        query, key, value = self.split(self.query(hidden)), self.split(self.key(hidden)), self.split(self.value(hidden))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.size(-1)) + mask
        weights = nn.functional.softmax(scores, dim=-1)
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.size()[:-2], -1)
        return (context, weights) if output_attentions else (context,)


class BertLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = BertSelfAttention(size, 2)
        self.output = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.intermediate, self.dense = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.LayerNorm = nn.LayerNorm(size)

    def forward(self, hidden: Tensor, mask: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        outputs = self.attention(hidden, mask, output_attentions)
        hidden = self.norm(hidden + self.output(outputs[0]))
        return (self.LayerNorm(hidden + self.dense(F.gelu(self.intermediate(hidden)))), *outputs[1:])


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict as well and leaves out what is None."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "loss"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class BertModel(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(size)
        self.layer = nn.ModuleList([BertLayer(size) for _ in range(3)])
        self.pooler = nn.Linear(size, size)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, device=input_ids.device)
        mask = (1.0 - attention_mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
        hidden = self.embeddings(input_ids)
        every, attentions = (hidden,), ()
        for layer in self.layer:
            outputs = layer(hidden, mask, output_attentions)
            hidden = outputs[0]
            every, attentions = (*every, hidden), (*attentions, *outputs[1:])
        return ModelOutput(
            hidden,
            torch.tanh(self.pooler(hidden[:, 0])),
            every if output_hidden_states else None,
            attentions if output_attentions else None,
        )


class TextClassifier(Module):
    """An encoder, a head beside it, a batch that is a dict."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.bert = BertModel().double()
        self.head = nn.Linear(8, CLASSES).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs = self.bert(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        return self.head(outputs.pooler_output)  # type: ignore[no-any-return]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(**batch), batch["labels"])


class EncoderAlone(TextClassifier):
    """The encoder is what the step calls, and it returns everything that it has."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        outputs = self.bert(
            batch["input_ids"], batch["attention_mask"], output_hidden_states=True, output_attentions=True
        )
        assert isinstance(outputs, ModelOutput)
        assert outputs["last_hidden_state"] is outputs.last_hidden_state
        assert len(outputs.to_tuple()) == 4
        extra = sum(h.pow(2).mean() for h in outputs.hidden_states) + sum(a.pow(2).mean() for a in outputs.attentions)
        return F.cross_entropy(self.head(outputs.pooler_output), batch["labels"]) + extra


class SequenceClassifier(nn.Module):
    """Computes its loss itself if it gets labels, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel()
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> ModelOutput:
        outputs = self.bert(input_ids, attention_mask=attention_mask)
        logits = self.classifier(outputs.pooler_output)
        return ModelOutput(last_hidden_state=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


class LossInside(Module):
    """The usual LightningModule around a model of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SequenceClassifier().double()

    def forward(self, **inputs: Tensor) -> ModelOutput:
        return self.model(**inputs)  # type: ignore[no-any-return]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self(**batch).loss  # type: ignore[no-any-return]


class Block(nn.Module):
    """A block of a causal model, with a mask in a buffer."""

    def __init__(self, size: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.ln_1, self.ln_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.c_attn, self.c_proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(size, 2 * size), "c_proj": nn.Linear(2 * size, size)})
        self.register_buffer("bias", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, size = x.size()
        q, k, v = (
            part.view(rows, length, 2, size // 2).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(size, 2)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, size))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """A causal model whose head is its embedding."""

    def __init__(self, fused: bool, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, 8),
                "wpe": nn.Embedding(LENGTH, 8),
                "h": nn.ModuleList([Block(8, fused) for _ in range(3)]),
                "ln_f": nn.LayerNorm(8),
            }
        )
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        _, length = idx.size()
        assert length <= LENGTH, f"a sequence of {length} is too long"
        position = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))  # type: ignore[no-any-return]


class LanguageModel(Module):
    """Predicts the next token."""

    def __init__(self, fused: bool = True, tied: bool = True) -> None:
        super().__init__()
        self.model = GPT(fused, tied).double()

    def forward(self, idx: Tensor) -> Tensor:
        return self.model(idx)  # type: ignore[no-any-return]

    def loss(self, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = self(inputs)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


class RotaryEmbedding(nn.Module):
    """Keeps sines and cosines of the longest sequence so far."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, size, 2).double() / size)), persistent=False)
        self.max_seq_len_cached = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        if length > self.max_seq_len_cached:
            self.max_seq_len_cached = length
            angles = torch.outer(torch.arange(length, device=x.device, dtype=x.dtype), self.inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            self.register_buffer("cos_cached", angles.cos(), persistent=False)
            self.register_buffer("sin_cached", angles.sin(), persistent=False)
        return self.cos_cached[:length], self.sin_cached[:length]


class LlamaBlock(nn.Module):
    """Rotary positions, grouped queries, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(8, 4, bias=False), nn.Linear(8, 8, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        rows, length, _ = x.shape
        cos, sin = position_embeddings

        def rotated(y: Tensor) -> Tensor:
            left, right = y.chunk(2, -1)
            return y * cos + torch.cat((-right, left), -1) * sin

        hidden = self.input_layernorm(x)
        q = rotated(self.q_proj(hidden).view(rows, length, 2, 4).transpose(1, 2))
        k = rotated(self.k_proj(hidden).view(rows, length, 1, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = self.v_proj(hidden).view(rows, length, 1, 4).transpose(1, 2).repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, 8)
        x = x + self.o_proj(y)
        hidden = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Llama(LanguageModel):
    """Positions are computed once and handed to every block."""

    def __init__(self) -> None:
        super().__init__()
        del self.model
        self.embed_tokens = nn.Embedding(VOCABULARY, 8).double()
        self.rotary_emb = RotaryEmbedding(4)
        self.layers = nn.ModuleList([LlamaBlock() for _ in range(3)]).double()
        self.norm, self.lm_head = nn.RMSNorm(8).double(), nn.Linear(8, VOCABULARY, bias=False).double()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed_tokens(idx)
        positions = self.rotary_emb(x)
        for layer in self.layers:
            x = layer(x, position_embeddings=positions)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]


class Translation(Module):
    """`nn.Transformer` with masks of padding and of the future."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, 8).double(), nn.Embedding(VOCABULARY, 8).double()
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).double()
        self.generator = nn.Linear(8, VOCABULARY).double()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1), device=target.device).to(torch.float64)
        padding = source == 0
        hidden = self.transformer(
            self.source(source),
            self.target(target),
            tgt_mask=mask,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.generator(hidden)  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        source, target = batch
        logits = self(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


class PaddedEncoder(TextClassifier):
    """`nn.TransformerEncoder` with a mask of padding, whose fast path runs in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Embedding(VOCABULARY, 8).double()  # type: ignore[assignment]
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.encoder(self.bert(input_ids), src_key_padding_mask=attention_mask == 0)
        mean = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.head(mean)  # type: ignore[no-any-return]


# Images


class BasicBlock(nn.Module):
    def __init__(self, planes: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(planes, out, 1, stride, bias=False), norm(out)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(Classifying):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), norm(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1, norm), BasicBlock(4, 4, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2, norm), BasicBlock(8, 8, 1, norm))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class FrozenStatistics(ResNet):
    """Fine-tuning, with the statistics of normalisations as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.train()

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision: a normalisation whose numbers are all buffers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(features))
        self.register_buffer("bias", torch.zeros(features))
        self.register_buffer("running_mean", torch.randn(features) * 0.1)
        self.register_buffer("running_var", torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class FrozenBackbone(Classifying):
    """A backbone in evaluation mode under no_grad, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet()
        self.backbone.fc = nn.Identity()  # type: ignore[assignment]
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


class DoubleConv(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1),
            nn.GroupNorm(2, out),
            nn.SiLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1),
            nn.GroupNorm(2, out),
            nn.SiLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)  # type: ignore[no-any-return]


class UNet(Module):
    """Skips from every level to its counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 8))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 8))
        self.up1, self.conv1 = nn.ConvTranspose2d(8, 8, 2, stride=2), DoubleConv(16, 4)
        self.conv2 = DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 1, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.conv1(torch.cat([x2, self.up1(self.down2(x2))], dim=1))
        x = F.interpolate(x, size=x1.shape[-2:], mode="bilinear", align_corners=False)
        return self.outc(self.conv2(torch.cat([x1, x], dim=1)))  # type: ignore[no-any-return]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["image"])
        intersection = (logits.sigmoid() * batch["mask"]).sum()
        dice = 1 - 2 * intersection / (logits.sigmoid().sum() + batch["mask"].sum())
        return F.binary_cross_entropy_with_logits(logits, batch["mask"]) + dice


class ViT(Classifying):
    """Patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 8, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, 8) * 0.02)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True, norm_first=True) for _ in range(3))
        )
        self.ln, self.heads = nn.LayerNorm(8), nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.heads(self.ln(self.layers(x + self.pos_embedding))[:, 0])  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.token_mix = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.channel_mix = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))  # type: ignore[no-any-return]


class MLPMixer(Classifying):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([MixerBlock() for _ in range(3)])
        self.head = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class DenseNet(Classifying):
    """Every layer sees all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.GroupNorm(1, 3 + 2 * i), nn.ReLU(), nn.Conv2d(3 + 2 * i, 2, 3, padding=1))
                for i in range(4)
            ]
        )
        self.classifier = nn.Linear(11, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.classifier(torch.cat(features, 1).mean((2, 3)))  # type: ignore[no-any-return]


class Denoising(Module):
    """A diffusion model: the step draws times and noise for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.inp, self.mid, self.out = nn.Conv2d(3, 8, 3, padding=1), DoubleConv(8, 8), nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("alphas", torch.linspace(0.99, 0.1, 50))
        self.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(4, device=x.device) / 4)
        angles = t[:, None].double() * frequencies[None]
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        return self.out(self.mid(self.inp(x) + embedding[:, :, None, None]))  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0]
        t = torch.randint(50, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        alpha = self.alphas[t][:, None, None, None]
        return F.mse_loss(self(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t), noise)


# Sequences, and structures of outputs


class Tagger(Classifying):
    """LSTM over sequences, two layers, both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(12, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(4, x.size(0), 6, dtype=x.dtype, device=x.device)
        out, (hidden, _) = self.lstm(self.embed(x), (h0, torch.zeros_like(h0)))
        return self.fc(torch.cat([hidden[-2], hidden[-1]], 1) + out[:, -1])  # type: ignore[no-any-return]


class Seq2Seq(Module):
    """An encoder whose last state starts the decoder, with teacher forcing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.encoder, self.decoder = nn.GRU(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, hidden = self.encoder(self.embed(source))
        output, _ = self.decoder(self.embed(target), hidden)
        return self.out(output)  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        source, target = batch
        return F.cross_entropy(self(source, target[:, :-1]).transpose(1, 2), target[:, 1:])


class Autoencoder(Module):
    """Returns the reconstruction, the code, and both heads of a variational bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.fc_mu, self.fc_var = nn.Linear(8, 4), nn.Linear(8, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.encoder(x)
        mu, log_var = self.fc_mu(hidden), self.fc_var(hidden)
        return self.decoder(mu), {"mu": mu, "log_var": log_var}

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        reconstruction, latent = self(batch[0])
        kl = -0.5 * (1 + latent["log_var"] - latent["mu"] ** 2 - latent["log_var"].exp()).sum(1).mean()
        return F.mse_loss(reconstruction, batch[0]) + 0.1 * kl


class PartsOfAModel(Module):
    """The step calls parts of the model instead of `self`, as Lightning's first example does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.double()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


class Triplets(Module):
    """One network for three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=-1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0]
        return F.triplet_margin_loss(self(x), self(x + 0.1), self(x.flip(0)))


class Contrastive(Triplets):
    """SimCLR: the loss pairs every row with every other one."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        views = torch.cat([batch[0], batch[0] * 1.1], 0)
        features = self(views)
        similarity = features @ features.t() / 0.5
        itself = torch.eye(len(features), dtype=torch.bool, device=similarity.device)
        pairs = itself.roll(len(features) // 2, 0)
        return -(similarity[pairs] - similarity.masked_fill(itself, -9e15).logsumexp(-1)).mean()


class Distilled(Classifying):
    """A student learns from a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES)).double()
        self.teacher.requires_grad_(False)
        self.student = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return super().loss(batch) + F.kl_div(self(batch[0]).log_softmax(1), target, reduction="batchmean")


class Recommender(Module):
    """Tables of embeddings, interactions, two towers."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(7, 4) for _ in range(3)])
        self.bottom = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.top = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
        self.double()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        dense = self.bottom(batch["dense"])
        every = torch.stack([dense, *(table(batch["sparse"][:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(every, every.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, offset=-1)
        return {"logit": self.top(torch.cat([dense, products[:, i, j]], 1)).squeeze(1), "explanation": None}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch)["logit"], batch["click"])


def click(index: int) -> dict[str, Tensor]:
    return {
        "dense": torch.randn(8, dtype=torch.float64),
        "sparse": torch.randint(7, (3,)),
        "click": torch.tensor(float(index % 2), dtype=torch.float64),
    }


MODELS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[int], Any]]] = {
    "encoder in the manner of Hugging Face": (TextClassifier, text),
    "encoder with all its outputs": (lambda: TextClassifier(output_attentions=True, output_hidden_states=True), text),
    "encoder called by the step": (EncoderAlone, text),
    "causal model, fused attention, tied head": (LanguageModel, tokens),
    "causal model, mask in a buffer": (lambda: LanguageModel(fused=False, tied=False), tokens),
    "nn.Transformer with masks": (Translation, translation),
    "nn.TransformerEncoder with padding": (PaddedEncoder, text),
    "residual network, statistics frozen": (FrozenStatistics, image),
    "residual network, normalisation of buffers": (lambda: ResNet(FrozenBatchNorm2d), image),
    "frozen backbone under no_grad": (FrozenBackbone, image),
    "U-Net": (UNet, segmentation),
    "vision transformer": (ViT, image),
    "MLP-mixer": (MLPMixer, image),
    "dense network": (DenseNet, image),
    "diffusion": (Denoising, image),
    "LSTM, batch first": (Tagger, sequence),
    "sequence to sequence": (Seq2Seq, translation),
    "autoencoder with several outputs": (Autoencoder, vector),
    "triplets": (Triplets, vector),
    "contrastive loss": (Contrastive, vector),
    "recommender with a dict": (Recommender, click),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode at the start of training")
@pytest.mark.parametrize("name", MODELS)
def test_is_cut_and_trains_as_on_one_device(
    name: str, fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, row = MODELS[name]
    runs = fit_both(make, loader(row), loader(row, 9, 9), devices=devices, max_epochs=1)
    assert "is not cut" not in caplog.text
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


def test_positions_that_are_computed_at_the_first_call_keep_only_that_one_whole(fit_both: Any, devices: str) -> None:
    runs = fit_both(Llama, loader(tokens), loader(tokens, 9, 9), devices=devices)
    del runs.watch.others[0]  # the sanity check of validation, which fills the cache
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


@pytest.mark.parametrize("make", [PartsOfAModel, Distilled])
def test_parts_that_the_step_calls_are_cut_one_by_one(
    make: Any, fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = fit_both(make, loader(vector), loader(vector, 9, 9), devices=devices, placement="round_robin")
    assert "is not cut" not in caplog.text
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


def test_a_loss_inside_of_a_model_leaves_its_inner_model_to_be_cut(
    fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = fit_both(LossInside, loader(text), loader(text, 9, 9), devices=devices)
    assert "does not have the batch as first dimension" in caplog.text
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


def test_batch_normalisation_runs_whole_in_training_and_cut_in_validation(
    fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = fit_both(ResNet, loader(image), loader(image, 9, 9), devices=devices)
    assert "uses the mean and variance of the whole batch" in caplog.text
    assert all(not batch.micro_batches for batch in runs.watch.train)
    assert all(batch.micro_batches == set(range(4)) for batch in runs.watch.others)
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


def test_deferred_batch_normalisation_is_cut_and_counts_batches(fit_both: Any, devices: str) -> None:
    data = loader(image, 24, 8)
    runs = fit_both(ResNet, data, loader(image, 9, 9), devices=devices, strategy={"batch_norm": "defer"})
    runs.check_every_batch_was_cut()
    ours, theirs = runs.spread, runs.alone
    assert int(ours.bn1.num_batches_tracked) == int(theirs.bn1.num_batches_tracked) == 6  # batches, not micro-batches
    assert all(torch.isfinite(value).all() for value in ours.state_dict().values())


def test_deferred_statistics_are_those_of_the_whole_batch(fit_both: Any, devices: str) -> None:
    class First(Classifying):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.norm(x))  # type: ignore[no-any-return]

    runs = fit_both(
        First, loader(vector, 24), devices=devices, strategy={"batch_norm": "defer"}, placement="round_robin"
    )
    runs.check_every_batch_was_cut()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        ours, theirs = getattr(runs.spread.norm, name), getattr(runs.alone.norm, name)
        assert torch.allclose(ours.double(), theirs.double(), rtol=0, atol=ROUNDING)


def test_deferred_normalisation_survives_a_last_batch_of_few_rows(fit_both: Any, devices: str) -> None:
    """Six rows are enough for a mean and a variance on one device; in four micro-batches some have a single row."""

    class Normalised(Classifying):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    runs = fit_both(Normalised, loader(vector, 22), devices=devices, strategy={"batch_norm": "defer"})
    assert runs.trainer.global_step == runs.plain.global_step == 6


class Attributes(dict):  # type: ignore[type-arg]
    """The well-known recipe for a dict whose items are attributes too."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__ = self


class Mirrored(dict):  # type: ignore[type-arg]
    """A dict that also has what it was made of as attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for name, value in values.items():
            setattr(self, name, value)


class Encoder(nn.Module):
    """Takes or returns a dict of the given kind."""

    def __init__(self, kind: Any, way: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind, self.way = kind, way

    def forward(self, x: Any) -> Any:
        hidden = self.b(torch.tanh(self.a(x.x if self.way == "input" else x)))
        return hidden if self.way == "input" else self.kind(hidden=hidden, last=hidden[:, 0])


class ReadsAttributes(Module):
    """Code that writes `outputs.hidden` for `outputs["hidden"]`."""

    def __init__(self, kind: Any, way: str) -> None:
        super().__init__()
        self.kind, self.way = kind, way
        self.encoder = Encoder(kind, way).double()
        self.head = nn.Linear(8, CLASSES).double()

    def encode(self, x: Tensor) -> Tensor:
        if self.way == "input":
            return self.encoder(self.kind(x=x))  # type: ignore[no-any-return]
        return self.encoder(x).hidden  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(self.encode(batch[0])).pow(2).mean()  # type: ignore[no-any-return]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.encode(batch[0])


@pytest.mark.parametrize("kind", [Attributes, Mirrored])
@pytest.mark.parametrize("way", ["output", "input"])
def test_attributes_of_a_dict_belong_to_the_same_batch_as_its_items(
    kind: Any, way: str, fit_both: Any, devices: str
) -> None:
    runs = fit_both(
        lambda: ReadsAttributes(kind, way), loader(vector), loader(vector), devices=devices, placement="round_robin"
    )
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


@pytest.mark.parametrize("kind", [Attributes, Mirrored])
def test_attributes_of_a_dict_have_all_rows_in_a_prediction(kind: Any, plain: Any, hetero: Any, devices: str) -> None:
    torch.manual_seed(0)
    model = ReadsAttributes(kind, "output")
    theirs = plain().predict(model, loader(vector))
    ours = hetero(devices=devices, placement="round_robin").predict(model, loader(vector))
    assert [len(batch) for batch in ours] == [len(batch) for batch in theirs]
    assert all(torch.allclose(a, b, rtol=0, atol=ROUNDING) for a, b in zip(ours, theirs, strict=True))


class Layers(Module):
    """Layers in a list, as most models have them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Noisy(dropout) for _ in range(3)])
        self.named = nn.ModuleDict({"head": nn.Linear(8, CLASSES)})
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.named["head"](x)  # type: ignore[no-any-return]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Noisy(nn.Linear):
    """A layer with dropout, which wants its input where it is itself."""

    def __init__(self, dropout: float) -> None:
        super().__init__(8, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        assert x.device == self.weight.device
        return F.dropout(super().forward(x).tanh(), self.dropout, self.training)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_list_of_layers_that_is_on_one_device_as_a_whole_is_run_by_that_device(
    dropout: float, fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"emulated:{index}" for index in range(3)] if "speed" in devices else devices.split(",")
    where = {"embed": names[0], "layers": names[1], "named": names[2]}
    runs = fit_both(lambda: Layers(dropout), loader(vector), devices=devices, placement=where)
    assert "is not cut" not in caplog.text
    runs.check_every_batch_was_cut()
    if not dropout:
        assert runs.difference <= ROUNDING


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_method_of_a_part_that_is_not_forward_runs_where_the_part_is(
    micro_batches: int, fit_both: Any, devices: str
) -> None:
    """`vae.encode(x)` and `vae.decode(z)` from the code around."""

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = Noisy(0.0), Noisy(0.0)

        def encode(self, x: Tensor) -> Tensor:
            return self.down(x)  # type: ignore[no-any-return]

        def decode(self, z: Tensor) -> Tensor:
            return self.up(z)  # type: ignore[no-any-return]

    class Latent(Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.model = Coder().double(), nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.vae.decode(self.model(self.vae.encode(x)))

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[0])

    names = ["emulated:0", "emulated:1"] if "speed" in devices else devices.split(",")
    where = {"vae": names[1], "model": names[0]}
    runs = fit_both(
        Latent,
        loader(vector),
        devices=devices,
        placement=where,
        strategy={"micro_batches": micro_batches},
        watched=micro_batches > 1,
    )
    assert runs.difference <= ROUNDING
    if micro_batches > 1:
        runs.check_every_batch_was_cut()


# What models of Hugging Face do beside computing


class Registry(OrderedDict):  # type: ignore[type-arg]
    """Makes what it is asked for, as the table of activation functions does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


ACTIVATIONS = Registry(gelu=nn.GELU, relu=nn.ReLU)


class FromRegistry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act = ACTIVATIONS["gelu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.dense(x)))  # type: ignore[no-any-return]


class UsesRegistry(Classifying):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(FromRegistry(), FromRegistry(), FromRegistry(), nn.Linear(8, CLASSES)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def test_a_global_table_that_makes_objects_is_as_it_was(fit_both: Any, devices: str) -> None:
    before = dict(OrderedDict.items(ACTIVATIONS))
    try:
        fit_both(UsesRegistry, loader(vector, 30), devices=devices, placement="round_robin")
        assert {name: dict.__getitem__(ACTIVATIONS, name) for name in ACTIVATIONS} == {"gelu": nn.GELU, "relu": nn.ReLU}
    finally:
        for name, made in (("gelu", nn.GELU), ("relu", nn.ReLU)):
            dict.__setitem__(ACTIVATIONS, name, made)
    assert before.keys() == {"gelu", "relu"}


def test_a_global_table_that_makes_objects_is_no_reason_not_to_cut(
    fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        runs = fit_both(UsesRegistry, loader(vector, 30), devices=devices, placement="round_robin")
    finally:
        for name, made in (("gelu", nn.GELU), ("relu", nn.ReLU)):
            dict.__setitem__(ACTIVATIONS, name, made)
    assert "is not cut" not in caplog.text
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


class Cache:
    """Keys and values of all layers, which only a generation needs."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor) -> None:
        self.layers.append((key, value))


class Cached(LanguageModel):
    """Returns its cache beside the scores, as causal models do unless `use_cache=False`."""

    def forward(self, idx: Tensor) -> Any:
        model, cache = self.model, Cache()
        x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in model.transformer.h:
            x = block(x)
            cache.update(x, x)
        return {"logits": model.lm_head(model.transformer.ln_f(x)), "past_key_values": cache}

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1])["logits"].flatten(0, 1), batch[:, 1:].flatten())


class SkipsMasksOfOnes(LanguageModel):
    """Leaves the mask of padding out where nothing is masked, which changes no number."""

    def forward(self, idx: Tensor) -> Tensor:
        model, mask = self.model, (idx >= 0)
        x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(idx.size(1), device=idx.device))
        if not mask.all():
            x = x * mask[..., None]
        for block in model.transformer.h:
            x = block(x)
        return model.lm_head(model.transformer.ln_f(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Cached, "it returns a Cache, which cannot be joined"), (SkipsMasksOfOnes, "reads the content of a tensor")],
)
def test_habits_of_hugging_face_run_whole_and_say_why(
    make: Any, reason: str, fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit: write `use_cache=False`, and leave out a mask that masks nothing."""
    runs = fit_both(make, loader(tokens, 30), devices=devices)
    assert runs.difference <= ROUNDING
    assert reason in caplog.text
