"""One network and its labels: classifier, two heads, control flow by the loss."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import LoopModule, Step
from tests.laws.recipe import Draws, Recipe


def labelled(sizes: list[int]) -> list[Any]:
    draws = Draws(1)
    return [(draws.normal(n, 4), draws.integers(3, n)) for n in sizes]


# -- classifier ------------------------------------------------------------------------------------


class Classifier(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> SGD:
        return SGD(self.net.parameters(), lr=0.1)


def classifier(module: Classifier, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.net.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        optimizer.step()
        yield


def averaged_classifier(module: Classifier, batches: list[Any]) -> Iterator[None]:
    """The control: two shards whose means are averaged, as if they had equally many samples."""
    optimizer = SGD(module.net.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        for part in (slice(0, len(x) // 2), slice(len(x) // 2, None)):
            (F.cross_entropy(module.net(x[part]), y[part]) / 2).backward()
        optimizer.step()
        yield


# -- clipped, with momentum, weight decay and a schedule -------------------------------------------


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.net.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def scheduled(module: Scheduled, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.net.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        nn.utils.clip_grad_norm_(module.net.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        yield


# -- control flow by the reduced loss --------------------------------------------------------------


class UntilGoodEnough(Classifier):
    """Up to three updates on a batch, until its loss is small enough: the loss over all shards."""

    enough = 1.05

    def training_step(self, batch: Any) -> Step:
        x, y = batch
        for _ in range(3):
            loss = yield F.cross_entropy(self.net(x), y)
            if loss < self.enough:
                return


def until_good_enough(module: UntilGoodEnough, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.net.parameters(), lr=0.1)
    updates = []
    for x, y in batches:
        updates.append(0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(module.net(x), y)
            loss.backward()
            optimizer.step()
            updates[-1] += 1
            if loss.item() < module.enough:
                break
        yield
    assert {1, 3} <= set(updates)  # both ways were taken


# -- two losses on one encoder ---------------------------------------------------------------------


class ActorCritic(LoopModule):
    """The encoder is the actor's; the critic reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.actor = nn.Linear(6, 3)
        self.critic = nn.Linear(6, 1)

    def training_step(self, batch: Any) -> Step:
        x, y = batch
        features = self.encoder(x)
        yield {"critic": F.mse_loss(self.critic(features).squeeze(1), x.sum(1))}
        yield {"actor": F.cross_entropy(self.actor(features), y)}

    def configure_optimizers(self) -> dict[str, SGD]:
        return {
            "actor": SGD([*self.encoder.parameters(), *self.actor.parameters()], lr=0.1),
            "critic": SGD(self.critic.parameters(), lr=0.05),
        }


def actor_critic(module: ActorCritic, batches: list[Any]) -> Iterator[None]:
    actor = SGD([*module.encoder.parameters(), *module.actor.parameters()], lr=0.1)
    critic = SGD(module.critic.parameters(), lr=0.05)
    for x, y in batches:
        features = module.encoder(x)
        critic.zero_grad()
        F.mse_loss(module.critic(features.detach()).squeeze(1), x.sum(1)).backward()
        critic.step()
        actor.zero_grad()
        F.cross_entropy(module.actor(features), y).backward()
        actor.step()
        yield


# -- simultaneous updates of overlapping parameters ------------------------------------------------


class Overlapping(ActorCritic):
    """Both optimizers own the encoder: each moves it by its own loss, taken before either steps."""

    def training_step(self, batch: Any) -> Step:
        x, y = batch
        features = self.encoder(x)
        value = F.mse_loss(self.critic(features).squeeze(1), x.sum(1))
        yield {"critic": value, "actor": F.cross_entropy(self.actor(features), y) + 0.1 * value}

    def configure_optimizers(self) -> dict[str, SGD]:
        return {
            "actor": SGD([*self.encoder.parameters(), *self.actor.parameters()], lr=0.1),
            "critic": SGD([*self.encoder.parameters(), *self.critic.parameters()], lr=0.05),
        }


def overlapping(module: Overlapping, batches: list[Any]) -> Iterator[None]:
    actor = [*module.encoder.parameters(), *module.actor.parameters()]
    critic = [*module.encoder.parameters(), *module.critic.parameters()]
    for x, y in batches:
        features = module.encoder(x)
        value = F.mse_loss(module.critic(features).squeeze(1), x.sum(1))
        policy = F.cross_entropy(module.actor(features), y) + 0.1 * value
        of_critic = torch.autograd.grad(value, critic, retain_graph=True)
        of_actor = torch.autograd.grad(policy, actor)
        with torch.no_grad():
            for p, g in zip(critic, of_critic, strict=True):
                p -= 0.05 * g
            for p, g in zip(actor, of_actor, strict=True):
                p -= 0.1 * g
        yield


RECIPES = {
    "classifier": Recipe(Classifier, labelled, classifier),
    "clipped, momentum, schedule": Recipe(
        Scheduled, labelled, scheduled, {"gradient_clip_val": 0.3}
    ),
    "control flow by the reduced loss": Recipe(UntilGoodEnough, labelled, until_good_enough),
    "two losses on a shared encoder": Recipe(ActorCritic, labelled, actor_critic),
    "simultaneous, overlapping parameters": Recipe(Overlapping, labelled, overlapping),
}
