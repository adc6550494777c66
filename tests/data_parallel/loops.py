"""Hand-written training loops in plain PyTorch: `wrap` is all that parallel ones add."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Wrap = Callable[[nn.Module], Any]
Loop = Callable[[Wrap], list[nn.Module]]

# Ragged, and with batches of fewer samples than threads.
SIZES = (8, 7, 5, 2, 6, 1, 7, 3, 8, 5)
PAD = 0


def plain(module: nn.Module) -> nn.Module:
    return module


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def double(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """The module in float64, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def images() -> Iterator[tuple[Tensor, Tensor]]:
    draw = seeded()
    for n in SIZES:
        x = torch.randn(n, 2, 4, 4, generator=draw, dtype=torch.float64)
        yield x, torch.randint(3, (n,), generator=draw)


def sentences() -> Iterator[Tensor]:
    """Padded to the longest, with another number of tokens in each row."""
    draw = seeded()
    for n in SIZES:
        tokens = torch.randint(1, 9, (n, 6), generator=draw)
        lengths = torch.randint(2, 7, (n, 1), generator=draw)
        yield tokens.masked_fill(torch.arange(6) >= lengths, PAD)


def noise() -> Iterator[tuple[Tensor, Tensor]]:
    draw = seeded()
    for n in SIZES:
        z, real = (torch.randn(n, k, generator=draw, dtype=torch.float64) for k in (3, 4))
        yield z, real + 2


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


class Tagger(nn.Module):
    """An LSTM that returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        states, (last, _) = self.lstm(self.embedding(tokens))
        return {"tags": self.head(states), "state": (last.transpose(0, 1), None)}


class Transformer(nn.Module):
    """A language model with tied embeddings; the mask comes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.register_buffer("causal", torch.full((5, 5), True).triu(1))

    def forward(self, tokens: Tensor, *, padding: Tensor) -> Tensor:
        found = self.layer(self.embedding(tokens), self.causal, padding)
        return found @ self.embedding.weight.T


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def tag_loss(out: dict[str, Any], tokens: Tensor) -> Tensor:
    return F.cross_entropy(out["tags"].flatten(0, 1), tokens.flatten() % 2) + (
        out["state"][0].square().mean()
    )


def token_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(
        scores.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD, reduction="sum"
    )


def classifier(wrap: Wrap) -> list[nn.Module]:
    net = double(Conv)
    call = wrap(net)
    optimizer = torch.optim.SGD(call.parameters(), lr=0.1, momentum=0.9)
    for x, y in images():
        loss = F.cross_entropy(call(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [net]


def lstm(wrap: Wrap) -> list[nn.Module]:
    net = double(Tagger)
    call = wrap(net)
    optimizer = torch.optim.SGD(call.parameters(), lr=0.5)
    for tokens in sentences():
        loss = tag_loss(call(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(call.parameters(), 0.5)
        optimizer.step()
    return [net]


def transformer(wrap: Wrap) -> list[nn.Module]:
    net = double(Transformer)
    call = wrap(net)
    optimizer = torch.optim.SGD(call.parameters(), lr=0.1)
    for tokens in sentences():
        inputs = tokens[:, :-1]
        scores = call(inputs, padding=inputs == PAD)
        loss = token_loss(scores, tokens) / (tokens[:, 1:] != PAD).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [net]


def gan(wrap: Wrap) -> list[nn.Module]:
    """The loop of the tutorials: detach for the critic, and gradients that nobody uses."""
    networks = double(generator), double(critic, seed=2)
    make, judge = map(wrap, networks)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in networks]
    for z, real in noise():
        fake = make(z)
        loss = F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        loss = F.softplus(-judge(fake)).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    return list(networks)


def gan_by_grad(wrap: Wrap) -> list[nn.Module]:
    """Both at once from one `fake`, each loss differentiated by the parameters that it is for."""
    networks = double(generator), double(critic, seed=2)
    make, judge = map(wrap, networks)
    for z, real in noise():
        fake = make(z)
        scores = judge(fake)
        losses = (
            F.softplus(-scores).mean(),
            F.softplus(-judge(real)).mean() + F.softplus(scores).mean(),
        )
        own = [list(net.parameters()) for net in networks]
        found = [torch.autograd.grad(losses[i], own[i], retain_graph=True) for i in (0, 1)]
        with torch.no_grad():
            for i in (0, 1):
                torch._foreach_add_(own[i], found[i], alpha=-0.1)
    return list(networks)


LOOPS: tuple[Loop, ...] = (classifier, lstm, transformer, gan, gan_by_grad)


def parameters(networks: list[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for net in networks for p in net.parameters()]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The law's measure: the largest over parameters, of the largest over elements."""
    return max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
        if b.abs().max() > 0
    )
