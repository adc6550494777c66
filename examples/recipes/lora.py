"""LoRA: a language model that has read code learns prose through a few small matrices.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, LoRA: Low-Rank Adaptation of Large Language
Models (2021, arXiv:2106.09685). Reference: github.com/microsoft/LoRA. The model, its tokenizer, its
batches and its loss are those of Hugging Face Transformers; nothing is downloaded.
"""

import math
from pydoc_data.topics import topics
from typing import Any

import torch
from _common import CHARACTERS, Result, Where, lines_of_code, measure, run, trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from composefit import LoopModule, Mean

LENGTH = 64


class Causal(LoopModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=4e-3)

    def training_step(self, batch: dict[str, Tensor]) -> Mean:
        return self.loss(batch)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("metric", self.loss(batch) / math.log(2))

    def loss(self, batch: dict[str, Tensor]) -> Mean:
        """The model's own mean, over the tokens that have another one before them."""
        return Mean.of(self.model(**batch).loss, (batch["labels"][:, 1:] != -100).sum())


class LoRA(nn.Module):
    """A linear layer that stays as it is, and a product of two thin matrices beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.scale * self.up(self.down(x))
        return out


def add_lora(model: nn.Module) -> None:
    """Freeze a model, and put thin matrices beside every linear layer of its blocks."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(parent, name, LoRA(child))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *CHARACTERS[1:]])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", unk_token="<unk>")


def model(width: int = 64, layers: int = 2) -> nn.Module:
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(lines: list[str], size: int = 32) -> DataLoader[Any]:
    own = tokenizer()
    collate = DataCollatorForLanguageModeling(own, mlm=False)
    return DataLoader([own(line) for line in lines], size, True, collate_fn=collate)  # type: ignore[arg-type]


def code() -> list[str]:
    kept = (row[row > 0].tolist() for row in lines_of_code(LENGTH)[0])
    return ["".join(CHARACTERS[i] for i in row) for row in kept]


def prose() -> list[str]:
    lines = "\n".join(topics.values()).splitlines()
    return [line.strip()[:LENGTH] for line in lines if len(line.strip()) > 20]


def build(quick: bool = False) -> tuple[Causal, DataLoader[Any]]:
    torch.manual_seed(0)
    return Causal(model()), batches(prose()[1000:])


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, train = build(quick)
    trainer(strategy, devices, max_steps=4 if quick else 120).fit(module, batches(code()))
    add_lora(module.model)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 240)
    test = batches(prose()[: 100 if quick else 1000])
    return measure(fitter, module, train, test, "bits a character", at_most=3.5)


if __name__ == "__main__":
    run(main)
