"""Recipes of `examples/recipes` in reduced size: their own steps against loops written by hand.

The steps are those of the files, imported; smaller networks, GroupNorm where they have BatchNorm,
and SGD, which does not divide by gradients that are nothing but rounding.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Categorical
from torch.optim import SGD

from composefit.data import LoaderBatches
from tests.laws.recipe import Draws, Recipe
from tests.laws.recipes.adversarial import draws_of_steps
from tests.laws.recipes.gallery import example

byol, clip, dino, fixmatch, moco, pinn, ppo, sac, sam, simclr, tbptt = map(
    example,
    "byol clip dino fixmatch moco pinn ppo sac sam simclr tbptt".split(),  # noqa: SIM905
)


def step(optimizer: SGD, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def average(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    for own, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
        own.copy_(momentum * own + (1 - momentum) * theirs)


def views(count: int, *sides: int) -> Any:
    """Batches of so many images of each sample, with these sides."""

    def batches(sizes: list[int]) -> list[list[Tensor]]:
        draws, sides_of = Draws(count), (*sides, *[8] * count)[:count]
        return [[draws.normal(n, 1, side, side) for side in sides_of] for n in sizes]

    return batches


# -- SimCLR ----------------------------------------------------------------------------------------


class SimCLR(simclr.SimCLR):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def simclr_by_hand(module: SimCLR, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    for first, second in batches:
        n = len(first)
        a, b = (module.projector(module.encoder(x)) for x in (first, second))
        z = F.normalize(torch.cat([a, b]), dim=1)
        scores = (z @ z.T / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        step(optimizer, F.cross_entropy(scores, torch.arange(2 * n).roll(n)))
        yield


# -- MoCo ------------------------------------------------------------------------------------------


class MoCo(moco.MoCo):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4, keys=16)

    def configure_optimizers(self) -> SGD:
        return SGD(self.queries.parameters(), lr=0.1)


def moco_by_hand(module: MoCo, batches: list[Any]) -> Iterator[None]:
    optimizer, queue = SGD(module.queries.parameters(), lr=0.1), module.queue.clone()
    for first, second in batches:
        query = F.normalize(module.queries(first), dim=1)
        key = F.normalize(module.keys(second), dim=1).detach()
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
        step(optimizer, F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long)))
        average(module.keys, module.queries, 0.99)
        queue = torch.cat([key, queue])[:16]
        yield


# -- BYOL ------------------------------------------------------------------------------------------


class BYOL(byol.BYOL):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4)

    def configure_optimizers(self) -> SGD:
        return SGD([*self.online.parameters(), *self.predictor.parameters()], lr=0.1)


def byol_by_hand(module: BYOL, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD([*module.online.parameters(), *module.predictor.parameters()], lr=0.1)
    for k, (first, second) in enumerate(batches):
        loss = torch.zeros(())
        for x, other in (first, second), (second, first):
            guess = F.normalize(module.predictor(module.online(x)), dim=1)
            with torch.no_grad():
                goal = F.normalize(module.target(other), dim=1)
            loss = loss + (guess - goal).square().sum(1).mean()
        step(optimizer, loss)
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * k / len(batches)) + 1) / 2
        average(module.target, module.online, tau)
        yield


# -- DINO ------------------------------------------------------------------------------------------


class DINO(dino.DINO):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4, prototypes=6)

    def configure_optimizers(self) -> SGD:
        return SGD(self.student.parameters(), lr=0.1)


def dino_by_hand(module: DINO, batches: list[Any]) -> Iterator[None]:
    optimizer, centre = SGD(module.student.parameters(), lr=0.1), torch.zeros(6)
    for crops in batches:
        with torch.no_grad():
            scores = module.teacher(torch.cat(crops[:2]))
        goals = ((scores - centre) / 0.04).softmax(1).chunk(2)
        loss, pairs = torch.zeros(()), 0
        for i, goal in enumerate(goals):
            for j, crop in enumerate(crops):
                if j != i:
                    loss = loss + F.cross_entropy(module.student(crop) / 0.1, goal)
                    pairs += 1
        step(optimizer, loss / pairs)
        average(module.teacher, module.student, 0.99)
        centre = 0.9 * centre + 0.1 * scores.mean(0)
        yield


# -- CLIP ------------------------------------------------------------------------------------------


def captioned(sizes: list[int]) -> list[Any]:
    draws = Draws(11)
    rows = [draws.integers(100, n) for n in sizes]
    return [[draws.normal(len(own), 1, 8, 16), clip.CAPTIONS[own]] for own in rows]


class CLIP(clip.CLIP):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4, features=3)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.05)


def clip_by_hand(module: CLIP, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.05)
    for images, captions in batches:
        image = F.normalize(module.image(images), dim=1)
        text = F.normalize(module.text(captions), dim=1)
        scores, own = module.scale.exp() * image @ text.T, torch.arange(len(images))
        step(optimizer, (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2)
        with torch.no_grad():
            module.scale.clamp_(0, math.log(100))
        yield


# -- PPO -------------------------------------------------------------------------------------------


def played(sizes: list[int]) -> list[Any]:
    draws = Draws(12)
    return [
        [
            draws.normal(n, 4),
            draws.integers(2, n),
            -draws.uniform(n) / 2 - 0.5,
            draws.normal(n),
            draws.normal(n),
        ]
        for n in sizes
    ]


class PPO(ppo.PPO):  # type: ignore[misc]
    parts, epochs, furthest = 2, 3, 0.03

    def __init__(self) -> None:
        super().__init__(width=6)

    def configure_optimizers(self) -> dict[str, SGD]:
        return {"policy": SGD(self.parameters(), lr=0.1)}


def ppo_by_hand(module: PPO, batches: list[Any]) -> Iterator[None]:
    optimizer, lengths = SGD(module.parameters(), lr=0.1), set()
    for batch, random in zip(batches, draws_of_steps(len(batches)), strict=True):
        epochs, moved = 0, 0.0
        while epochs < 3 and moved <= 0.03:
            epochs += 1
            order = random.uniform(len(batch[0])).argsort()
            for first in range(2):
                state, action, before, advantage, earned = (x[order[first::2]] for x in batch)
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                policy = Categorical(logits=module.actor(state))
                change = policy.log_prob(action) - before
                ratio = change.exp()
                loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
                loss = loss - 0.01 * policy.entropy().mean()
                loss = loss + F.mse_loss(module.critic(state).flatten(), earned) / 2
                step(optimizer, loss)
                moved = (ratio - 1 - change).mean().item()
        lengths.add(epochs)
        yield
    assert len(lengths) > 1  # some stopped early, others did not


# -- SAC -------------------------------------------------------------------------------------------


def moments(sizes: list[int]) -> list[Any]:
    draws = Draws(13)
    return [
        [draws.normal(n, 3), draws.uniform(n, 1), draws.normal(n, 1), draws.normal(n, 3)]
        for n in sizes
    ]


class SAC(sac.SAC):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(width=6)

    def configure_optimizers(self) -> dict[str, SGD]:
        return dict(zip(("critics", "actor", "temperature"), sac_optimizers(self), strict=True))


def sac_optimizers(module: SAC) -> list[SGD]:
    owned = module.critics.parameters(), module.actor.parameters(), [module.temperature]
    return [SGD(parameters, lr=0.05) for parameters in owned]


def sac_by_hand(module: SAC, batches: list[Any]) -> Iterator[None]:
    critics, actor, temperature = sac_optimizers(module)
    normal = torch.distributions.Normal(0.0, 1.0)

    def act(state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = module.actor(state).split(1, 1)
        action = (mean + spread.clamp(-5, 2).exp() * noise).tanh()
        likelihood = normal.log_prob(noise) - spread.clamp(-5, 2)
        return action, likelihood - (1 - action.square()).log()

    def worth(networks: nn.ModuleList, state: Tensor, action: Tensor) -> list[Tensor]:
        return [network(torch.cat([state, action], 1)) for network in networks]

    for batch, random in zip(batches, draws_of_steps(len(batches)), strict=True):
        state, action, reward, following = batch
        price = module.temperature.detach().exp()
        with torch.no_grad():
            then, likelihood = act(following, random.normal(len(state), 1))
            least = torch.min(*worth(module.targets, following, then))
            goal = reward + 0.98 * (least - price * likelihood)
        step(
            critics,
            sum((w - goal).square().mean() / 2 for w in worth(module.critics, state, action)),
        )
        average(module.targets, module.critics, 0.99)
        action, likelihood = act(state, random.normal(len(state), 1))
        least = torch.min(*worth(module.critics, state, action))
        step(actor, (price * likelihood - least).mean())
        step(temperature, -(module.temperature * (likelihood.detach() - 1)).mean())
        yield


# -- FixMatch --------------------------------------------------------------------------------------


def half_labelled(sizes: list[int]) -> list[Any]:
    draws = Draws(14)

    def images(n: int) -> Tensor:
        return draws.normal(n, 1, 8, 8)

    return [
        LoaderBatches(
            labelled=[images(n), draws.integers(10, n)],
            unlabelled=[images(2 * n + 1), images(2 * n + 1)],
        )
        for n in sizes
    ]


class FixMatch(fixmatch.FixMatch):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("group", width=4)
        self.confidence = 0.2

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.05)


def fixmatch_by_hand(module: FixMatch, batches: list[Any]) -> Iterator[None]:
    optimizer, confident = SGD(module.parameters(), lr=0.05), []
    for batch in batches:
        (images, labels), (weak, strong) = batch["labelled"], batch["unlabelled"]
        loss = F.cross_entropy(module.net(images), labels)
        with torch.no_grad():
            confidence, guess = module.net(weak).softmax(1).max(1)
        confident.append(confidence >= 0.2)
        losses = F.cross_entropy(module.net(strong), guess, reduction="none")
        step(optimizer, loss + (losses * confident[-1]).mean())
        yield
    assert set(torch.cat(confident).tolist()) == {True, False}


# -- a physics-informed network --------------------------------------------------------------------


def points(sizes: list[int]) -> list[Any]:
    draws = Draws(15)
    return [[draws.normal(n, 2), draws.normal(n, 2), draws.normal(n, 1)] for n in sizes]


class PINN(pinn.PINN):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(width=4, by_adam=4)

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": SGD(self.parameters(), lr=0.05), "lbfgs": l_bfgs(self)}


def l_bfgs(module: nn.Module) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(module.parameters(), max_iter=4, line_search_fn="strong_wolfe")


def burgers(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """The loss of all points, by the derivatives of one point after the other."""
    inside, edge, expected = batch

    def u(point: Tensor) -> Tensor:
        return module(point[None]).squeeze()

    residuals = []
    for point in inside.detach():
        u_x, u_t = jacobian(u, point, create_graph=True)
        u_xx = hessian(u, point, create_graph=True)[0, 0]
        residuals.append(u_t + u(point) * u_x - 0.1 / math.pi * u_xx)
    return torch.stack(residuals).square().mean() + F.mse_loss(module(edge), expected)


def pinn_by_hand(module: PINN, batches: list[Any]) -> Iterator[None]:
    optimizer, lbfgs = SGD(module.parameters(), lr=0.05), l_bfgs(module)
    for i, batch in enumerate(batches):

        def closure(batch: list[Tensor] = batch) -> Tensor:
            lbfgs.zero_grad()
            loss = burgers(module, batch)
            loss.backward()
            return loss

        if i < 4:
            step(optimizer, burgers(module, batch))
        else:
            lbfgs.step(closure)
        yield


# -- truncated back-propagation through time -------------------------------------------------------


def texts(sizes: list[int]) -> list[Any]:
    draws = Draws(16)
    return [[draws.integers(5, n, 10)] for n in sizes]


class Recurrent(tbptt.Recurrent):  # type: ignore[misc]
    window = 3

    def __init__(self) -> None:
        super().__init__(width=4, characters=5)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.2)


def tbptt_by_hand(module: Recurrent, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.2)
    for (text,) in batches:
        state = torch.zeros(1, len(text), 4, dtype=torch.float64)
        for start in (0, 3, 6):
            found, state = module.memory(
                module.embedding(text[:, start : start + 3]), state.detach()
            )
            goal = text[:, start + 1 : start + 4].flatten()
            step(optimizer, F.cross_entropy(module.head(found).flatten(0, 1), goal))
        yield


# -- sharpness-aware minimisation ------------------------------------------------------------------


def labelled(sizes: list[int]) -> list[Any]:
    draws = Draws(17)
    return [[draws.normal(n, 1, 8, 8), draws.integers(10, n)] for n in sizes]


class SAM(sam.SAM):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(radius=0.2, width=6)


def sam_by_hand(module: SAM, batches: list[Any]) -> Iterator[None]:
    parameters = list(module.parameters())
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    for images, labels in batches:
        loss = F.cross_entropy(module.net(images), labels)
        slopes = torch.autograd.grad(loss, parameters)
        length = torch.cat([slope.flatten() for slope in slopes]).norm()
        nearby = copy.deepcopy(module.net)
        with torch.no_grad():
            for p, slope in zip(nearby.parameters(), slopes, strict=True):
                p += 0.2 * slope / length
        F.cross_entropy(nearby(images), labels).backward()
        for p, there in zip(parameters, nearby.parameters(), strict=True):
            p.grad = there.grad
        optimizer.step()
        yield


RECIPES = {
    "SimCLR": Recipe(SimCLR, views(2), simclr_by_hand),
    "MoCo, of the gallery": Recipe(MoCo, views(2), moco_by_hand),
    "BYOL": Recipe(BYOL, views(2), byol_by_hand),
    "DINO": Recipe(DINO, views(4, 8, 8, 7, 7), dino_by_hand),
    "CLIP": Recipe(CLIP, captioned, clip_by_hand),
    "PPO": Recipe(PPO, played, ppo_by_hand),
    "SAC": Recipe(SAC, moments, sac_by_hand),
    "FixMatch": Recipe(FixMatch, half_labelled, fixmatch_by_hand),
    "PINN": Recipe(PINN, points, pinn_by_hand),
    "truncated back-propagation through time": Recipe(Recurrent, texts, tbptt_by_hand),
    "SAM": Recipe(SAM, labelled, sam_by_hand),
}
