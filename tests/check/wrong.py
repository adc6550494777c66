"""Steps whose losses mean something else once their batch is cut, as people write them."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from composefit import LoopModule, Step

N = 32  # samples


class Net(LoopModule):
    """A network, and one optimizer for all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def labelled(n: int = N, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 6, generator=generator),
        torch.randint(4, (n,), generator=generator),
    ]


def texts(n: int = N) -> Tensor:
    """Tokens (n, 9), padded with zeros to unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (n, 9), generator=generator)
    lengths = torch.randint(3, 10, (n, 1), generator=generator)
    return tokens.masked_fill(torch.arange(9) >= lengths, 0)


# -- means over something else than samples --------------------------------------------------------


class TokenMean(LoopModule):
    """A language model with padding, the loss as a library gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.rnn = nn.GRU(12, 12, batch_first=True)
        self.head = nn.Linear(12, 20)

    def training_step(self, batch: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch[:, :-1]))
        return F.cross_entropy(self.head(hidden).mT, batch[:, 1:], ignore_index=0)

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters())


class TokenMeanByHand(TokenMean):
    def training_step(self, batch: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch[:, :-1]))
        losses = F.cross_entropy(self.head(hidden).mT, batch[:, 1:], reduction="none")
        mask = (batch[:, 1:] != 0).to(losses.dtype)
        return (losses * mask).sum() / mask.sum()


class TokenMeanByItem(TokenMean):
    """The count as a Python number, as for logging."""

    def training_step(self, batch: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch[:, :-1]))
        losses = F.cross_entropy(self.head(hidden).mT, batch[:, 1:], reduction="none")
        mask = batch[:, 1:] != 0
        return (losses * mask).sum() / mask.sum().item()


class MaskedMean(TokenMean):
    """Only the tokens that count are kept."""

    def training_step(self, batch: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch[:, :-1]))
        keep = batch[:, 1:] != 0
        return F.cross_entropy(self.head(hidden)[keep], batch[:, 1:][keep])


class ClassWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2, 2.0]))

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        loss: Tensor = self.criterion(self.net(x), y)
        return loss


class Summed(Net):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="sum")


class RootMeanSquare(Net):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, _ = batch
        return F.mse_loss(self.net(x), x[:, :4]).sqrt()


class NormOfAll(Net):
    """The penalty is a norm over all gradients, not the mean of each sample's norm."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return F.cross_entropy(self.net(x), y) + (slope.norm() - 1) ** 2


class Normalised(Net):
    """Features scaled by the norm of all of the batch."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x / x.norm()), y)


# -- samples that meet -----------------------------------------------------------------------------


class BatchNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class VICReg(Net):
    """Bardes, Ponce and LeCun, 2022: the variance and covariance of a batch of embeddings."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, _ = batch
        a = self.net(x + 0.1 * self.random.normal(*x.shape))
        b = self.net(x + 0.1 * self.random.normal(*x.shape))
        return 25 * F.mse_loss(a, b) + sum(25 * self.spread(z) + self.overlap(z) for z in (a, b))

    def spread(self, z: Tensor) -> Tensor:
        return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()

    def overlap(self, z: Tensor) -> Tensor:
        z = z - z.mean(0)
        covariance = z.T @ z / (len(z) - 1)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.size(1)


class Advantages(Net):
    """A policy gradient with normalised advantages, which have no graph."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, action = batch
        advantage = x[:, 0]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        chosen = self.net(x).log_softmax(1).gather(1, action[:, None])[:, 0]
        return -(chosen * advantage).mean()


class Relativistic(LoopModule):
    """A GAN with the average relativistic loss (Jolicoeur-Martineau, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 6))
        self.critic = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))

    def configure_optimizers(self) -> Any:
        return {
            "critic": SGD(self.critic.parameters(), lr=0.1),
            "generator": SGD(self.generator.parameters(), lr=0.1),
        }

    def training_step(self, batch: list[Tensor]) -> Step:
        real, _ = batch
        fake = self.generator(self.random.normal(len(real), 5))
        of_real, of_fake = self.critic(real), self.critic(fake)
        yield {
            "critic": F.softplus(of_fake.mean() - of_real).mean()
            + F.softplus(of_fake - of_real.mean()).mean()
        }
        yield {"generator": F.softplus(-self.critic(fake)).mean()}


class Contrastive(Net):
    """SimCLR within a shard."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, _ = batch
        a = F.normalize(self.net(x), dim=1)
        b = F.normalize(self.net(x + 0.1 * self.random.normal(*x.shape)), dim=1)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))


class TwoViews(Net):
    """Both views in one batch, as the reference implementation of SimCLR does it."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, _ = batch
        n = len(x)
        views = torch.cat([x, x + 0.1 * self.random.normal(*x.shape)])
        z = F.normalize(self.net(views), dim=1)
        similar = (z @ z.T / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
        return F.cross_entropy(similar, torch.arange(2 * n).roll(n))


class ForgottenBatchFirst(LoopModule):
    """Attention takes dimension 0 for time, so that samples attend to samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 4)

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        attended, _ = self.attention(x, x, x, need_weights=False)
        return F.cross_entropy(self.head(attended.mean(1)), y)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


class TimeFirst(LoopModule):
    """Sequences (time, samples, 6) in a loader that nobody was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8)
        self.head = nn.Linear(8, 6)

    def training_step(self, batch: Tensor) -> Tensor:
        hidden, _ = self.rnn(batch[:-1])
        return F.mse_loss(self.head(hidden), batch[1:])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


# -- what a step writes ----------------------------------------------------------------------------


class WritesBuffer(Net):
    """A queue of negatives that each shard would fill for itself."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(64, 4))

    def training_step(self, batch: list[Tensor]) -> Any:
        x, _ = batch
        z = F.normalize(self.net(x), dim=1)
        positive = (z * F.normalize(x[:, :4], dim=1)).sum(1, keepdim=True)
        loss = F.cross_entropy(
            torch.cat([positive, z @ self.queue.clone().T], 1), torch.zeros(len(x)).long()
        )
        self.queue = torch.cat([z.detach(), self.queue])[:64]
        return loss


class WritesBufferInPlace(WritesBuffer):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        loss = (
            F.cross_entropy(self.net(x), y) + (self.net(x) @ self.queue.clone().T).square().mean()
        )
        self.queue[: len(x)] = self.net(x).detach()
        return loss


class WritesAttribute(Net):
    """A running mean in a Python attribute."""

    baseline: Any = 0.0

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        self.baseline = 0.9 * self.baseline + 0.1 * losses.mean().detach()
        return (losses * (losses.detach() > self.baseline)).mean()


class Memory(nn.Module):
    """A recurrent layer that keeps its state from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(12, 6)
        self.state: Any = None

    def forward(self, x: Tensor) -> Any:
        before = torch.zeros_like(x) if self.state is None else self.state[: len(x)]
        after = self.cell(torch.cat([x, before], 1)).tanh()
        self.state = after.detach()
        return after


class KeepsState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(self.memory(x)), y)


# -- draws -----------------------------------------------------------------------------------------


class TorchDraw(Net):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x + torch.randn_like(x)), y)


class PythonDraw(Net):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x * random.uniform(0.5, 1.5)), y)


class Mixup(Net):
    """Zhang et al., 2018: each sample is mixed with another one of its batch."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        other = torch.randperm(len(x))
        scores = self.net(0.7 * x + 0.3 * x[other])
        return 0.7 * F.cross_entropy(scores, y) + 0.3 * F.cross_entropy(scores, y[other])


class Branching(Net):
    """A condition on what a shard holds."""

    def training_step(self, batch: list[Tensor]) -> Step:
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        yield losses.mean()
        if len(x) > 20:
            yield F.cross_entropy(self.net(x), y)


class Counting(Net):
    """As many updates as fit into the batch."""

    def training_step(self, batch: list[Tensor]) -> Step:
        x, y = batch
        for part in range(0, len(x), 25):
            yield F.cross_entropy(self.net(x[part : part + 25]), y[part : part + 25])


def sequences(n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, 6, generator=generator), labelled(n)[1]]


def time_first() -> Tensor:
    return torch.randn(11, 14, 6, generator=torch.Generator().manual_seed(0))


Case = tuple[Callable[[], LoopModule], Callable[[], Any], str, str]

#: Name -> module, batch, cause, and a part of the line that does it.
WRONG: dict[str, Case] = {
    "ignore_index": (TokenMean, texts, "token mean", "ignore_index=0"),
    "mean by hand": (TokenMeanByHand, texts, "token mean by hand", "/ mask.sum()"),
    "mean by item": (TokenMeanByItem, texts, "token mean by hand", "/ mask.sum().item()"),
    "masked mean": (MaskedMean, texts, "token mean", "[keep], batch"),
    "class weights": (ClassWeights, labelled, "class weights", "self.criterion(self.net"),
    "sum": (Summed, labelled, "sum", ""),
    "RMSE": (RootMeanSquare, labelled, "RMSE", ".sqrt()"),
    "norm of all gradients": (NormOfAll, labelled, "norm per shard", "slope.norm()"),
    "norm of a batch": (Normalised, labelled, "norm per shard", "x.norm()"),
    "BatchNorm": (BatchNorms, labelled, "BatchNorm", "F.cross_entropy(self.net(x), y)"),
    "VICReg": (VICReg, labelled, "minibatch statistics", "z.var(0)"),
    "advantages": (Advantages, labelled, "minibatch statistics", "advantage.mean()"),
    "relativistic GAN": (Relativistic, labelled, "minibatch statistics", "of_fake.mean()"),
    "contrastive": (Contrastive, labelled, "contrastive loss without Gather", "a @ b.T"),
    "two views": (TwoViews, labelled, "contrastive loss without Gather", "z @ z.T"),
    "batch_first": (
        *(ForgottenBatchFirst, sequences),
        *("contrastive loss without Gather", "self.attention(x, x, x"),
    ),
    "time first": (TimeFirst, time_first, "time-first batch", "def training_step"),
    "buffer": (WritesBuffer, labelled, "buffer written in the step", "self.queue = "),
    "buffer in place": (
        *(WritesBufferInPlace, labelled),
        *("buffer written in the step", "self.queue[: len(x)] = "),
    ),
    "condition": (
        *(Branching, labelled),
        *("control flow that differs from shard to shard", "yield "),
    ),
    "number of updates": (
        *(Counting, labelled),
        *("control flow that differs from shard to shard", "def training_step"),
    ),
    "attribute": (
        *(WritesAttribute, labelled),
        *("Python state written in the step", "self.baseline = "),
    ),
    "torch's draw": (
        *(TorchDraw, labelled),
        *("draw that depends on the strategy", "torch.randn_like(x)"),
    ),
    "Python's draw": (PythonDraw, labelled, "draw from a global generator", "def training_step"),
    "mixup": (Mixup, labelled, "draw that depends on the strategy", "torch.randperm"),
}
