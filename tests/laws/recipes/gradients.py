"""Gradients as values, and losses that are evaluated again: balance, surgery, SAM, L-BFGS."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from composefit import Gather, Gradient, Grads, LoopModule, Mean, Step
from composefit.random import SampleRandom
from tests.laws.recipe import Draws, Recipe


def tasks(sizes: list[int]) -> list[Any]:
    """Inputs, two targets of each, and how much each sample's second target weighs (0 or 1)."""
    draws = Draws(11)
    return [
        (
            draws.normal(n, 3),
            draws.normal(n, 2),
            draws.integers(3, n),
            draws.integers(2, n).double(),
        )
        for n in sizes
    ]


class TwoHeads(LoopModule):
    """A trunk and two heads; the second task has a denominator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.first, self.second = nn.Linear(5, 2), nn.Linear(5, 3)

    def losses(self, batch: Any) -> tuple[Tensor, Mean]:
        x, y, label, counts = batch
        h = self.trunk(x)
        errors = F.cross_entropy(self.second(h), label, reduction="none")
        return (self.first(h) - y).square().mean(), Mean((errors * counts).sum(), counts.sum())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def plain_losses(module: TwoHeads, batch: Any) -> tuple[Tensor, Tensor]:
    """The same, over the full batch."""
    x, y, label, counts = batch
    h = module.trunk(x)
    errors = F.cross_entropy(module.second(h), label, reduction="none")
    return (module.first(h) - y).square().mean(), (errors * counts).sum() / counts.sum()


# -- an adaptive weight, from the norms of two gradients of one layer ------------------------------


class Balanced(TwoHeads):
    def training_step(self, batch: Any) -> Step:
        first, second = self.losses(batch)
        layer = self.trunk[0].weight
        found = yield from Gradient({"first": first, "second": second}, wrt=layer)
        balance = found["first"][0].norm() / found["second"][0].norm()
        yield {"optimizer": second * balance + first}


def balanced(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    for batch in batches:
        first, second = plain_losses(module, batch)
        layer = module.trunk[0].weight
        a, b = (torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in (first, second))
        optimizer.zero_grad()
        (first + a.norm() / b.norm() * second).backward()
        optimizer.step()
        yield


# -- surgery: each task's gradient without what goes against the other's ---------------------------


def without_conflict(a: list[Any], b: list[Any], parameters: list[Any]) -> list[Tensor]:
    """The sum of two gradients, each without its part against the other."""
    sizes = [p.numel() for p in parameters]
    flat = [
        torch.cat(
            [
                torch.zeros(s, dtype=torch.float64) if g is None else g.flatten()
                for g, s in zip(one, sizes, strict=True)
            ]
        )
        for one in (a, b)
    ]
    changed = [x - (x @ y).clamp(max=0) / (y @ y) * y for x, y in (flat, flat[::-1])]
    parts = (changed[0] + changed[1]).split(sizes)
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


class Surgery(TwoHeads):
    def training_step(self, batch: Any) -> Step:
        first, second = self.losses(batch)
        found = yield from Gradient({"first": first, "second": second}, wrt="optimizer")
        parameters = list(self.parameters())
        yield Grads(without_conflict(found["first"], found["second"], parameters), loss=first)


def surgery(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    parameters = list(module.parameters())
    optimizer = SGD(parameters, lr=0.1)
    for batch in batches:
        a, b = (
            list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
            for loss in plain_losses(module, batch)
        )
        for p, g in zip(parameters, without_conflict(a, b, parameters), strict=True):
            p.grad = g
        optimizer.step()
        yield


# -- sharpness-aware minimisation: uphill and back between two gradients ---------------------------


class Sharpness(TwoHeads):
    """Uphill, and back, by an optimizer that does as it is told."""

    def training_step(self, batch: Any) -> Step:
        found = yield from Gradient({"here": sum_of(self.losses(batch))}, wrt="move")
        norm = torch.stack([g.norm() for g in found["here"]]).norm()
        climb = [0.1 * g / norm for g in found["here"]]
        yield {"move": Grads([-step for step in climb])}
        found = yield from Gradient({"uphill": sum_of(self.losses(batch))}, wrt="descend")
        yield {"move": Grads(climb)}
        yield {"descend": Grads(found["uphill"])}

    def configure_optimizers(self) -> Any:
        return {"move": SGD(self.parameters(), lr=1.0), "descend": SGD(self.parameters(), lr=0.1)}


def sum_of(losses: tuple[Any, Any]) -> Any:
    return losses[1] + losses[0]


class Evaluated(TwoHeads):
    """L-BFGS after the first step of SGD, in a step that yields."""

    def training_step(self, batch: Any) -> Step:
        yield {"sgd": sum_of(self.losses(batch))}
        yield {"lbfgs": lambda: sum_of(self.losses(batch))}

    def configure_optimizers(self) -> Any:
        return {
            "sgd": SGD(self.parameters(), lr=0.05),
            "lbfgs": LBFGS(self.parameters(), lr=0.2, max_iter=3, history_size=3),
        }


def evaluated(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    named = module.configure_optimizers()
    for batch in batches:

        def closure(optimizer: Any, batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = sum(plain_losses(module, batch))  # type: ignore[assignment]
            loss.backward()
            return loss

        closure(named["sgd"])
        named["sgd"].step()
        named["lbfgs"].step(lambda: closure(named["lbfgs"]))
        yield


class Returned(TwoHeads):
    """A step as Lightning's users write it: it returns a loss, and L-BFGS runs it again."""

    def training_step(self, batch: Any) -> Any:
        return sum_of(self.losses(batch))

    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters(), lr=0.2, max_iter=3, history_size=3)


def returned(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    optimizer = LBFGS(module.parameters(), lr=0.2, max_iter=3, history_size=3)
    for batch in batches:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = sum(plain_losses(module, batch))  # type: ignore[assignment]
            loss.backward()
            return loss

        optimizer.step(closure)
        yield


def sharpness(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    parameters = list(module.parameters())
    optimizer = SGD(parameters, lr=0.1)
    for batch in batches:
        gradients = torch.autograd.grad(sum(plain_losses(module, batch)), parameters)  # type: ignore[arg-type]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(0.1 * g / norm)
        uphill = torch.autograd.grad(sum(plain_losses(module, batch)), parameters)  # type: ignore[arg-type]
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(0.1 * g / norm)
        for p, g in zip(parameters, uphill, strict=True):
            p.grad = g
        optimizer.step()
        yield


# -- between shards, and then again ----------------------------------------------------------------


class Anchored(TwoHeads):
    """The loss function uses rows that were gathered before, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.second.requires_grad_(False)

    def training_step(self, batch: Any) -> Step:
        x, y, _, _ = batch
        centre, _ = yield from Gather(y)
        middle = centre.mean(0)

        def loss() -> Tensor:
            noise = self.random.normal(len(x), 3)
            return (self.first(self.trunk(x + 0.1 * noise)) - middle).square().mean()

        yield loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return LBFGS(trained, lr=0.2, max_iter=3, history_size=3)


def anchored(module: TwoHeads, batches: list[Any]) -> Iterator[None]:
    optimizer = module.configure_optimizers()
    for step, (x, y, _, _) in enumerate(batches):
        random = SampleRandom(0)
        random.begin(step, 0, None, None, torch.float64, torch.device("cpu"))
        noise = random.normal(len(x), 3)

        def closure(x: Tensor = x, y: Tensor = y, noise: Tensor = noise) -> Tensor:
            optimizer.zero_grad()
            loss = (module.first(module.trunk(x + 0.1 * noise)) - y.mean(0)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        yield


def recipe(make: Callable[[], LoopModule], by_hand: Any) -> Recipe:
    return Recipe(make, tasks, by_hand)


RECIPES = {
    "balance by Gradient": recipe(Balanced, balanced),
    "surgery by Gradient and Grads": recipe(Surgery, surgery),
    "SAM by Gradient and Grads": recipe(Sharpness, sharpness),
    "SGD, then L-BFGS on a function": recipe(Evaluated, evaluated),
    "L-BFGS on a returned loss": recipe(Returned, returned),
    "L-BFGS after a Gather, with noise": recipe(Anchored, anchored),
}
