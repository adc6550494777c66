"""What the ranks of `test_sharded.py` do: each case on every rank, which says what came of it.

The cases take gradients and step by hand, with the calls that the driver makes, and compare with a
plain loop over the whole batch in the same process: `worst` is the largest relative difference of a
parameter, `moved` how far the least moved one has come.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.optim import Optimizer

from composefit import LoopModule, sharded_checkpoint
from composefit.lockstep import gradients
from composefit.lockstep.guards import StaleWeights
from composefit.random import recomputation
from composefit.replicas import Replica
from composefit.strategies.fully_sharded import FullySharded

CASES: dict[str, Callable[[], dict[str, Any]]] = {}

Shard = tuple[Tensor, float]  # a loss, and its share of the whole


def case(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


def sharded(module: nn.Module, **arguments: Any) -> FullySharded:
    torch.manual_seed(100 + dist.get_rank() if dist.is_initialized() else 0)
    strategy = FullySharded(accelerator="cpu", timeout=20, **arguments)
    strategy.place(module, None)
    return strategy


class ByHand:
    """Updates of one module, as the driver makes them."""

    def __init__(self, strategy: FullySharded, module: nn.Module) -> None:
        self.strategy = strategy
        self.module = module
        self.reducer = strategy.reducer()

    def total(
        self, key: str, parameters: Sequence[Any], shards: Sequence[Shard], retain: bool = False
    ) -> list[Tensor | None]:
        leaves = self.strategy.leaves(parameters)
        reduction = self.reducer.begin(key, leaves, lambda: None)
        if len(shards) == 1:
            with reduction:
                found = self._take(shards[0], leaves, retain)
            reduction.hand_over(found)
            return reduction.finish()
        total: list[Tensor | None] | None = None
        for shard in shards:
            found = self._take(shard, leaves, retain)
            if total is None:
                total = gradients.own(found, leaves)
            else:
                gradients.add_(total, found, leaves)
        assert total is not None
        reduction.hand_over(total)
        return reduction.finish()

    def _take(self, shard: Shard, leaves: Any, retain: bool) -> Any:
        loss, share = shard
        return gradients.differentiate([loss], [torch.full_like(loss, share)], leaves, retain)

    def update(
        self,
        key: str,
        optimizer: Optimizer,
        *shards: Shard,
        retain: bool = False,
        limit: float | None = None,
    ) -> list[Tensor | None]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = self.total(key, parameters, shards, retain)
        self.step(optimizer, found, limit)
        return found

    def step(
        self, optimizer: Optimizer, found: Sequence[Tensor | None], limit: float | None = None
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        if limit is not None:
            self.strategy.clip(parameters, limit)
        self.strategy.optimizer_step(optimizer)
        torch.autograd.graph.increment_version(parameters)
        self.strategy.stepped(parameters)
        for parameter in parameters:
            parameter.grad = None


class Plain(LoopModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Tanh()] * (i > 0) + [nn.Linear(a, b)]
    return nn.Sequential(*layers).double()


def gan_module() -> Plain:
    torch.manual_seed(1)
    return Plain(generator=mlp(3, 7, 5), critic=mlp(5, 9, 6, 1))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(tensor: Tensor) -> Tensor:
    """This rank's of a batch whose size the ranks need not divide."""
    return tensor.tensor_split(dist.get_world_size())[dist.get_rank()]


def adam_or_sgd(kind: str, module: nn.Module) -> Optimizer:
    if kind == "adam":
        return torch.optim.Adam(module.parameters(), lr=0.01)
    return torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)


def compare(module: nn.Module, plain: nn.Module, start: nn.Module) -> dict[str, Any]:
    own = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in whole_names(module)}
    first = dict(start.named_parameters())
    worst, moved = 0.0, float("inf")
    for name, wanted in plain.named_parameters():
        worst = max(worst, ((own[name] - wanted).abs().max() / wanted.abs().max()).item())
        moved = min(moved, (wanted - first[name]).abs().max().item())
    return {"worst": worst, "moved": moved}


def whole_names(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return iter(module.named_parameters())


def split(loss_of: Callable[..., Tensor], *tensors: Tensor, parts: int = 1) -> list[Shard]:
    """This rank's rows, in `parts` shards in time, each with its share of all samples."""
    count = len(tensors[0])
    own = [rows(t) for t in tensors]
    cuts = list(zip(*(t.tensor_split(parts) for t in own), strict=True))
    return [(loss_of(*cut), len(cut[0]) / count) for cut in cuts]


def loss_critic(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(critic(fake)).mean() + F.softplus(-critic(real)).mean()


def loss_generator(critic: nn.Module, fake: Tensor) -> Tensor:
    return F.softplus(-critic(fake)).mean()


def take(loss: Tensor, optimizer: Optimizer, retain: bool = False) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def gan(
    order: str = "critic",
    kind: str = "sgd",
    critic_steps: int = 1,
    limit: float | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    start, plain, module = gan_module(), gan_module(), gan_module()
    strategy = sharded(module, **arguments)
    hand = ByHand(strategy, module)
    g, c = adam_or_sgd(kind, module.generator), adam_or_sgd(kind, module.critic)
    pg, pc = adam_or_sgd(kind, plain.generator), adam_or_sgd(kind, plain.critic)
    counts: dict[str, Counter[str]] = {}
    turns = ["critic"] * critic_steps
    turns = [*turns, "generator"] if order == "critic" else ["generator", *turns]
    for i in range(4):
        z, real = draw(7, 3, seed=i), draw(7, 5, seed=50 + i)
        share = len(rows(z)) / 7
        fake, plain_fake = module.generator(rows(z)), plain.generator(z)
        for turn in turns:
            if turn == "critic":
                loss = loss_critic(module.critic, rows(real), fake)
                plain_loss = loss_critic(plain.critic, real, plain_fake)
            else:
                loss = loss_generator(module.critic, fake)
                plain_loss = loss_generator(plain.critic, plain_fake)
            own, by_hand = (c, pc) if turn == "critic" else (g, pg)
            with counted() as counts[turn]:
                hand.update(turn, own, (loss, share), retain=True, limit=limit)
            take(plain_loss, by_hand, retain=True)
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(by_hand.param_groups[0]["params"], limit)
            by_hand.step()
        strategy.end_step(module)
    return {**compare(module, plain, start), "counts": {n: dict(c) for n, c in counts.items()}}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often, and how many numbers, collectives carry."""
    found: Counter[str] = Counter()
    kept = {}

    def wrap(name: str, sent: int) -> None:
        original = kept[name] = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            found[name + " numbers"] += args[sent].numel()
            return original(*args, **kwargs)

        setattr(dist, name, call)

    for name, sent in (("reduce_scatter_single", 1), ("all_gather_single", 0), ("all_reduce", 0)):
        wrap(name, sent)
    try:
        yield found
    finally:
        for name, original in kept.items():
            setattr(dist, name, original)


@case
def critic_first() -> dict[str, Any]:
    return gan("critic")


@case
def generator_first() -> dict[str, Any]:
    return gan("generator")


@case
def with_adam() -> dict[str, Any]:
    return gan("critic", "adam")


@case
def three_critic_steps_on_one_fake() -> dict[str, Any]:
    return gan("critic", critic_steps=3)


@case
def clipped_by_the_norm_over_all_ranks() -> dict[str, Any]:
    return gan("critic", limit=0.05)


@case
def units_within_children() -> dict[str, Any]:
    return gan("critic", policy=nn.Linear)


@case
def weights_freed_after_each_forward() -> dict[str, Any]:
    return gan("generator", reshard_after_forward=True)


@case
def activation_checkpointing() -> dict[str, Any]:
    return gan("critic", activation_checkpointing=True, policy=nn.Linear)


class ActorCritic(LoopModule):
    """One encoder, two heads, a scale that is the module's own, and a weight in two children."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = mlp(4, 6, 5)
        self.actor = mlp(5, 5, 2)
        self.critic = mlp(5, 5, 1)
        self.critic[0].weight = self.actor[0].weight
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x) * self.scale
        actor = (self.actor(h) + self.shift).pow(2).sum(1).add(1).log().mean()
        return actor, (self.critic(h) - 1).pow(2).mean()

    def optimizers(self) -> tuple[Optimizer, Optimizer]:
        of_actor = [*self.encoder.parameters(), *self.actor.parameters(), self.scale, self.shift]
        own = {id(p) for p in of_actor}
        of_critic = [p for p in self.critic.parameters() if id(p) not in own]
        return torch.optim.SGD(of_actor, lr=0.2), torch.optim.SGD(of_critic, lr=0.2)


def actor_critic(parts: int, at_once: bool) -> dict[str, Any]:
    start, plain, module = ActorCritic(), ActorCritic(), ActorCritic()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    a, c = module.optimizers()
    pa, pc = plain.optimizers()
    replicas = [Replica(module) for _ in range(parts)]
    counts: list[Counter[str]] = []
    for i in range(4):
        x = draw(11, 4, seed=i)
        own = rows(x).tensor_split(parts)
        shards = []
        for n, part in enumerate(own):
            if parts > 1:
                replicas[n].refresh()
            runner: Any = replicas[n].module if parts > 1 else module
            shards.append((runner.losses(part), len(part) / 11))
        if at_once:
            of = {"actor": (a, 0), "critic": (c, 1)}
            with counted() as found:
                totals = {
                    name: hand.total(
                        name,
                        [p for group in optimizer.param_groups for p in group["params"]],
                        [(losses[n], share) for losses, share in shards],
                        retain=True,
                    )
                    for name, (optimizer, n) in of.items()
                }
            counts.append(found)
            for name, (optimizer, _) in of.items():
                hand.step(optimizer, totals[name])
        else:
            hand.update("critic", c, *[(losses[1], share) for losses, share in shards], retain=True)
            fresh = [
                ((replicas[n].module if parts > 1 else module).losses(part)[0], len(part) / 11)
                for n, part in enumerate(own)
            ]
            hand.update("actor", a, *fresh)
        actor, critic = plain.losses(x)
        if at_once:
            take(actor, pa, retain=True)
            take(critic, pc)
            pa.step()
            pc.step()
        else:
            take(critic, pc, retain=True)
            pc.step()
            take(plain.losses(x)[0], pa)
            pa.step()
        strategy.end_step(module)
    whole = sorted(n for n, p in module.named_parameters() if not isinstance(p, DTensor))
    found = compare(module, plain, start)
    return {**found, "whole": whole, "counts": [dict(one) for one in counts[:1]]}


@case
def shared_encoder_and_whole_parameters() -> dict[str, Any]:
    return actor_critic(parts=1, at_once=False)


@case
def both_at_once() -> dict[str, Any]:
    return actor_critic(parts=1, at_once=True)


@case
def shards_in_time() -> dict[str, Any]:
    return actor_critic(parts=3, at_once=False)


@case
def shards_in_time_at_once() -> dict[str, Any]:
    return actor_critic(parts=2, at_once=True)


def penalised(module: Plain, real: Tensor, fake: Tensor) -> Tensor:
    x = (0.3 * real + 0.7 * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(module.critic(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).pow(2).mean()


@case
def gradient_penalty() -> dict[str, Any]:
    start, plain, module = gan_module(), gan_module(), gan_module()
    strategy = sharded(module, policy=nn.Linear)
    hand = ByHand(strategy, module)
    g, c = adam_or_sgd("sgd", module.generator), adam_or_sgd("sgd", module.critic)
    pg, pc = adam_or_sgd("sgd", plain.generator), adam_or_sgd("sgd", plain.critic)
    held = 0
    for i in range(3):
        z, real = draw(7, 3, seed=i), draw(7, 5, seed=50 + i)
        fake = module.generator(rows(z))
        share = len(rows(z)) / 7
        for _ in range(2):
            loss = loss_critic(module.critic, rows(real), fake)
            loss = loss + 0.5 * penalised(module, rows(real), fake)
            held = max(held, len(strategy._held))
            hand.update("critic", c, (loss, share), retain=True)
        hand.update("generator", g, (loss_generator(module.critic, fake), share))
        held_after = len(strategy._held)
        strategy.end_step(module)
        fake = plain.generator(z)
        for _ in range(2):
            take(
                loss_critic(plain.critic, real, fake) + 0.5 * penalised(plain, real, fake), pc, True
            )
            pc.step()
        take(loss_generator(plain.critic, fake), pg)
        pg.step()
    return {**compare(module, plain, start), "held": held, "after": held_after}


@case
def a_penalty_of_old_weights_raises() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    c = adam_or_sgd("sgd", module.critic)
    real = rows(draw(6, 5, seed=0))
    old = penalised(module, real, real + 1)
    hand.update("critic", c, (module.critic(real).mean(), 0.5))
    try:
        hand.update("critic", c, (old, 0.5))
    except RuntimeError as error:
        return {"raised": str(error)}
    finally:
        strategy.end_step(module)
    return {"raised": ""}


@case
def a_stale_graph_raises_and_the_next_step_runs() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    g, c = adam_or_sgd("sgd", module.generator), adam_or_sgd("sgd", module.critic)
    z, real = rows(draw(6, 3, seed=0)), rows(draw(6, 5, seed=1))
    fake = module.generator(z)
    old = loss_generator(module.critic, fake)
    hand.update("critic", c, (loss_critic(module.critic, real, fake), 0.5), retain=True)
    raised = ""
    try:
        hand.update("generator", g, (old, 0.5))
    except RuntimeError as error:
        raised = str(error)
    strategy.end_step(module)
    hand.reducer.world.busy = False
    loss = loss_critic(module.critic, real, module.generator(z).detach())
    hand.update("critic", c, (loss, 0.5))
    return {"raised": raised}


@case
def a_recomputed_stale_graph_raises() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module, activation_checkpointing=True)
    hand = ByHand(strategy, module)
    c = adam_or_sgd("sgd", module.critic)
    stale = StaleWeights()
    real = rows(draw(6, 5, seed=1))
    with recomputation(stale):
        old = module.critic(real).mean()
        found = hand.update("critic", c, (module.critic(real).mean(), 0.5))
        assert found[0] is not None
        stale.stepped.append(strategy.leaves(list(c.param_groups[0]["params"])))
        try:
            hand.update("critic", c, (old, 0.5))
        except RuntimeError as error:
            return {"raised": type(error).__name__}
        finally:
            strategy.end_step(module)
    return {"raised": ""}


@case
def a_parameter_that_only_one_rank_reaches() -> dict[str, Any]:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.a, self.b, self.c = (nn.Linear(4, 3, bias=False).double() for _ in range(3))

        def forward(self, x: Tensor, second: bool) -> Tensor:
            out = self.a(x)
            return out + self.b(x) if second else out

    plain, module = (Plain(net=Two()) for _ in range(2))
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    o = torch.optim.SGD(module.parameters(), lr=0.1)
    po = torch.optim.SGD([plain.net.a.weight, plain.net.b.weight, plain.net.c.weight], lr=0.1)
    nones = []
    rank = dist.get_rank()
    for i in range(4):
        x = draw(6, 4, seed=i)
        second = rank == 1 and i != 1  # nobody in step 1
        found = hand.update("net", o, (module.net(rows(x), second).pow(2).mean(), 0.5))
        nones.append([g is None for g in found])
        parts = x.tensor_split(2)
        loss = plain.net(parts[0], False).pow(2).mean() + plain.net(parts[1], i != 1).pow(2).mean()
        take(0.5 * loss, po)
        po.step()
        strategy.end_step(module)
    own = dict(module.named_parameters())
    worst = max((own[n].full_tensor() - p).abs().max().item() for n, p in plain.named_parameters())
    return {"worst": worst, "nones": nones}


@case
def a_sum_that_travels_at_another_time_than_weights() -> dict[str, Any]:
    """One rank reaches all of the last unit and sends its gradients before it gathers the first."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(3, 3).double() for _ in range(2))

        def forward(self, x: Tensor, second: bool) -> Tensor:
            return self.a(x) + self.b(x) if second else self.a(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first, self.last = mlp(4, 5, 3), Last()

        def forward(self, x: Tensor, second: bool) -> Tensor:
            return self.last(self.first(x).tanh(), second)

    start, plain, module = (Plain(net=Net()) for _ in range(3))
    strategy = sharded(module, policy=[nn.Sequential, Last], reshard_after_forward=True)
    hand = ByHand(strategy, module)
    o, po = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, plain))
    for i in range(4):
        x = draw(6, 4, seed=i)
        loss = module.net(rows(x), dist.get_rank() == 1).pow(2).mean()
        hand.update("net", o, (loss, 0.5))
        first, second = x.tensor_split(2)
        take(
            0.5 * (plain.net(first, False).pow(2).mean() + plain.net(second, True).pow(2).mean()),
            po,
        )
        po.step()
        strategy.end_step(module)
    return compare(module, plain, start)


@case
def a_rank_without_samples() -> dict[str, Any]:
    start, plain, module = gan_module(), gan_module(), gan_module()
    strategy = sharded(module)
    c, pc = adam_or_sgd("sgd", module.critic), adam_or_sgd("sgd", plain.critic)
    reducer = strategy.reducer()
    for i in range(3):
        x = draw(4, 5, seed=i)
        spare = dist.get_rank() > 0
        loss = module.critic(x).pow(2).mean()
        leaves = strategy.leaves(list(module.critic.parameters()))
        reduction = reducer.begin("critic", leaves, lambda: None)
        share = torch.full_like(loss, 0.0 if spare else 1.0)
        with reduction:
            found = gradients.differentiate([loss], [share], leaves, False)
        reduction.hand_over(found, spare)
        ByHand(strategy, module).step(c, reduction.finish())
        take(plain.critic(x).pow(2).mean(), pc)
        pc.step()
    worst = compare(module.critic, plain.critic, start.critic)
    return worst


@case
def mixed_precision() -> dict[str, Any]:
    start, plain, module = (gan_module().float() for _ in range(3))
    strategy = sharded(module, mixed_precision=torch.bfloat16)
    hand = ByHand(strategy, module)
    c, pc = adam_or_sgd("sgd", module.critic), adam_or_sgd("sgd", plain.critic)
    for i in range(10):
        x = draw(8, 5, seed=i).float()
        out = module.critic(rows(x))
        hand.update("critic", c, ((out - 1).pow(2).mean(), 0.5))
        take((plain.critic(x) - 1).pow(2).mean(), pc)
        pc.step()
    leaf = strategy.leaves(list(module.critic.parameters()))[0]
    found = compare(module.critic, plain.critic, start.critic)
    own = next(module.critic.parameters())
    return {**found, "output": str(out.dtype), "leaf": str(leaf.dtype), "own": str(own.dtype)}


@case
def an_evaluation_in_inference_mode_before_the_training() -> dict[str, Any]:
    start, plain, module = gan_module(), gan_module(), gan_module()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    c, pc = adam_or_sgd("sgd", module.critic), adam_or_sgd("sgd", plain.critic)
    same = True
    for i in range(3):
        x = draw(6, 5, seed=i)
        with torch.inference_mode():
            same = same and torch.allclose(module.critic(x), plain.critic(x), atol=1e-12)
        hand.update("critic", c, (module.critic(rows(x)).pow(2).mean(), 0.5))
        take(plain.critic(x).pow(2).mean(), pc)
        pc.step()
    return {**compare(module.critic, plain.critic, start.critic), "same": same}


@case
def recurrent_shards_in_time() -> dict[str, Any]:
    def make() -> Plain:
        torch.manual_seed(5)
        return Plain(net=nn.LSTM(3, 4, batch_first=True).double())

    start, plain, module = make(), make(), make()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    replicas = [Replica(module) for _ in range(2)]
    o, po = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (module, plain))
    for i in range(3):
        x = draw(8, 5, 3, seed=i)
        parts = rows(x).tensor_split(2)
        runners: list[Any] = [module, module]  # at first, which notes the weights that it sees
        if i > 0:
            runners = [replica.module for replica in replicas]
        for replica in replicas:
            replica.refresh()  # none of them while the weights are there
        losses = [run.net(part)[0].pow(2).mean() for run, part in zip(runners, parts, strict=True)]
        hand.update("net", o, *[(one, len(p) / 8) for one, p in zip(losses, parts, strict=True)])
        strategy.end_step(module)
        take(plain.net(x)[0].pow(2).mean(), po)
        po.step()
    return compare(module, plain, start)


@case
def whole_state_and_back() -> dict[str, Any]:
    module, other = gan_module(), gan_module()
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    c = adam_or_sgd("adam", module.critic)
    x = rows(draw(6, 5, seed=0))
    for _ in range(3):
        hand.update("critic", c, (module.critic(x).pow(2).mean(), 0.5))
    kept = {"weights": module.state_dict(), "optimizer": c.state_dict()}
    full = strategy.full_state(kept)
    rank_zero = all(
        not isinstance(v, DTensor) and (v.numel() > 0) is (dist.get_rank() == 0)
        for v in full["weights"].values()
    )
    # As every rank reads it from a file.
    box = [full]
    dist.broadcast_object_list(box)
    full = copy.deepcopy(box[0])
    again = sharded(other)
    oc = adam_or_sgd("adam", other.critic)
    other.load_state_dict(again.load_weights(other, full["weights"]))
    oc.load_state_dict(again.load_optimizer(oc, full["optimizer"]))
    for _ in range(2):
        hand.update("critic", c, (module.critic(x).pow(2).mean(), 0.5))
        ByHand(again, other).update("critic", oc, (other.critic(x).pow(2).mean(), 0.5))
    equal = all(
        torch.equal(a.full_tensor(), b.full_tensor())
        for a, b in zip(module.parameters(), other.parameters(), strict=True)
    )
    plain = gan_module()
    plain.load_state_dict(full["weights"])
    return {"rank zero alone": rank_zero, "equal": equal}


@case
def norms_and_nonfinite() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module)
    c = list(module.critic.parameters())
    hand = ByHand(strategy, module)
    x = draw(6, 5, seed=0)
    found = hand.total("critic", c, [(module.critic(rows(x)).pow(2).mean(), 0.5)])
    plain = gan_module()
    wanted = torch.autograd.grad(plain.critic(x).pow(2).mean(), list(plain.critic.parameters()))
    mixed = [*found, torch.full((3,), 0.25, dtype=torch.float64)]
    whole = [*wanted, mixed[-1]]
    off = {
        order: abs(strategy.norm(mixed, order) - torch.nn.utils.get_total_norm(whole, order)).item()
        for order in (1.0, 2.0, 3.0, float("inf"))
    }
    for p, g in zip(c, found, strict=True):
        p.grad = g
    strategy.clip(c, 0.01, "value")
    largest = strategy.norm([p.grad for p in c], float("inf")).item()
    flag = torch.tensor(1.0 if dist.get_rank() == 1 else 0.0)
    strategy.agree_found_(flag)
    return {"off": max(off.values()), "largest": largest, "found": flag.item()}


@case
def parameters_at_hooks_are_the_sharded_ones() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module, reshard_after_forward=None)
    x = draw(6, 5, seed=0)
    module.critic(x)  # and no backward
    before = all(isinstance(p, DTensor) for p in module.critic.parameters())
    strategy.end_step(module)
    after = all(isinstance(p, DTensor) for p in module.critic.parameters())
    with torch.no_grad():
        for p in module.critic.parameters():
            p.clamp_(-0.01, 0.01)
    largest = max(p.full_tensor().abs().max().item() for p in module.critic.parameters())
    with torch.no_grad():
        bound = module.critic[4].bias.full_tensor().abs() + 0.01 * 6
        seen = (module.critic(x).abs() <= bound + 1e-12).all().item()
    return {"before": before, "after": after, "largest": largest, "seen": seen}


@case
def parameters_that_are_unfrozen_later() -> dict[str, Any]:
    """Also of a child that was not called since."""
    start, plain, module = gan_module(), gan_module(), gan_module()
    for m in (plain, module):
        m.critic[0].requires_grad_(False)
        m.generator.requires_grad_(False)
    strategy = sharded(module)
    hand = ByHand(strategy, module)
    o, po = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, plain))
    for i in range(3):
        if i == 1:
            for m in (plain, module):
                m.requires_grad_(True)
        x = draw(6, 5, seed=i)
        trained = [p for p in module.parameters() if p.requires_grad]
        found = hand.total("critic", trained, [(module.critic(rows(x)).pow(2).mean(), 0.5)])
        for p, g in zip(trained, found, strict=True):
            p.grad = g
        strategy.optimizer_step(o)
        strategy.stepped(trained)
        for p in trained:
            p.grad = None
        trained = [p for p in plain.parameters() if p.requires_grad]
        grads = torch.autograd.grad(plain.critic(x).pow(2).mean(), trained, allow_unused=True)
        for p, g in zip(trained, grads, strict=True):
            p.grad = g
        po.step()
        po.zero_grad()
    return compare(module.critic, plain.critic, start.critic)


@case
def every_elementwise_optimizer() -> dict[str, Any]:
    """Of sharded and whole parameters together, and its state."""
    kinds: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        "foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
        "fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
        "nadam": (torch.optim.NAdam, {"lr": 0.01}),
        "radam": (torch.optim.RAdam, {"lr": 0.01}),
        "adamax": (torch.optim.Adamax, {"lr": 0.01}),
        "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
        "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
        "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    }
    worst = {}
    cut = {}
    for name, (kind, options) in kinds.items():
        plain, module = ActorCritic(), ActorCritic()
        strategy = sharded(module)
        hand = ByHand(strategy, module)
        o, po = (kind(m.parameters(), **options) for m in (module, plain))
        for i in range(4):
            x = draw(10, 4, seed=i)
            hand.update("all", o, (sum(module.losses(rows(x))), 0.5))  # type: ignore[arg-type]
            take(sum(plain.losses(x)), po)  # type: ignore[arg-type]
            po.step()
        own = strategy.full_state(o.state_dict())
        wanted = po.state_dict()
        off = compare(module, plain, ActorCritic())["worst"]
        if dist.get_rank() == 0:
            for i, entry in wanted["state"].items():
                assert entry.keys() == own["state"][i].keys()
                for key, value in entry.items():
                    if isinstance(value, Tensor):
                        scale = value.abs().max().clamp(min=1e-12)
                        off = max(off, ((own["state"][i][key] - value).abs().max() / scale).item())
        worst[name] = off
        states = [s for p in module.encoder.parameters() for s in o.state[p].values()]
        cut[name] = any(isinstance(s, DTensor) for s in states)
    return {"worst": worst, "cut": cut}


@case
def the_weights_of_an_evaluation_do_not_stay() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module)
    x = draw(6, 5, seed=0)
    own = {n: p.detach().clone() for n, p in module.critic.named_parameters()}
    with torch.no_grad():
        before = module.critic(x)
        for p in module.critic.parameters():
            p.mul_(0.5)
        other = module.critic(x)
        for n, p in module.critic.named_parameters():
            p.copy_(own[n])
    after = module.critic(x)
    strategy.end_step(module)
    return {"other": not torch.equal(before, other), "back": torch.equal(before, after.detach())}


@case
def written_while_gathered() -> dict[str, Any]:
    module = gan_module()
    strategy = sharded(module)
    module.critic(draw(6, 5, seed=0))  # and no backward: the weights are there
    with torch.no_grad():
        module.critic[0].weight.mul_(2)
    try:
        strategy.end_step(module)
    except RuntimeError as error:
        return {"raised": str(error)}
    return {"raised": ""}


@case
def an_in_place_operation_on_what_a_unit_returns() -> dict[str, Any]:
    start, plain, module = gan_module(), gan_module(), gan_module()
    strategy = sharded(module, policy=nn.Linear)
    hand = ByHand(strategy, module)
    c, pc = adam_or_sgd("sgd", module.critic), adam_or_sgd("sgd", plain.critic)
    for i in range(3):
        x = draw(6, 2, 5, seed=i)
        losses = []
        for net, part in ((module.critic, rows(x)), (plain.critic, x)):
            hidden = net[0](part)
            hidden += 1  # a view, where the input has three dimensions
            losses.append(net[4](net[2](hidden.tanh()).tanh()).pow(2).mean())
        hand.update("critic", c, (losses[0], 0.5))
        take(losses[1], pc)
        pc.step()
        strategy.end_step(module)
    return compare(module.critic, plain.critic, start.critic)


@case
def released() -> dict[str, Any]:
    """A module with everything that sharding changes: units, checkpoints, an RNN, tied weights."""

    class Net(LoopModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.body = mlp(4, 6, 5)
            self.rnn = nn.LSTM(5, 3, batch_first=True).double()
            self.a, self.b = mlp(3, 3, 3), mlp(3, 3, 3)
            self.b[0].weight = self.a[0].weight
            self.body[0].register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.rnn(self.body(x))[0]
            return self.a(h) + self.b(h)

    module, plain = Net(), Net()
    known = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    before = {n: (type(m), set(vars(m)), len(m._forward_hooks)) for n, m in module.named_modules()}
    strategy = sharded(module, policy=nn.Linear, activation_checkpointing=True)
    hand = ByHand(strategy, module)
    o, po = (torch.optim.SGD(m.parameters(), lr=0.3) for m in (module, plain))
    x = draw(6, 2, 4, seed=0)
    emptied = strategy._before[module]._parts[2][1]
    for _ in range(3):
        hand.update("net", o, (module(rows(x)).pow(2).mean(), 0.5))
        strategy.end_step(module)
        take(plain(x).pow(2).mean(), po)
        po.step()
    hidden = [p.numel() for p in emptied.parameters.values() if p is not None]
    sharded_ids = [id(p) for p in o.param_groups[0]["params"] if isinstance(p, DTensor)]
    back = strategy.release(module, keep=True)
    after = {n: (type(m), set(vars(m)), len(m._forward_hooks)) for n, m in module.named_modules()}
    found = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    copied = copy.deepcopy(module)
    again = sharded(module)  # and once more
    with torch.no_grad():
        same = torch.allclose(module(x), copied(x), atol=1e-12)
    again.release(module, keep=dist.get_rank() == 0)
    left = sum(p.numel() for p in module.parameters())
    return {
        **compare(copied, plain, Net()),
        "hidden": hidden,
        "as before": before == after and known == found,
        "back": sorted(back) == sorted(sharded_ids),
        "same": same,
        "left": left == sum(p.numel() for p in plain.parameters()) or dist.get_rank() > 0,
    }


def run_case(name: str) -> dict[str, Any]:
    """Called on every rank."""
    return CASES[name]()


# -- checkpoints -----------------------------------------------------------------------------------


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _numbers(name: str, shape: Sequence[int]) -> Tensor:
    size = torch.Size(shape)
    return torch.arange(size.numel(), dtype=torch.float64).view(size) + len(name)


def save_case(path: str) -> None:
    """Writes two sharded tensors, of which some ranks may have no rows, and a whole one."""
    world = FullySharded(accelerator="cpu", timeout=20).world
    mesh = _mesh()
    tensors: dict[str, Tensor] = {
        name: distribute_tensor(_numbers(name, shape), mesh, [Split(0)], src_data_rank=None)
        for name, shape in (("weight", (7, 5)), ("bias", (1,)))
    }
    tensors["whole"] = _numbers("whole", (3,))
    sharded_checkpoint.save(path, {"step": 3}, tensors, world)


def load_case(path: str) -> bool:
    """Reads this rank's rows; whether they are right."""
    world = FullySharded(accelerator="cpu", timeout=20).world
    mesh = _mesh()

    def place(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if name == "whole":
            return torch.empty(shape, dtype=dtype)
        return torch.distributed.tensor.empty(
            shape, dtype=dtype, device_mesh=mesh, placements=[Split(0)]
        )

    state, tensors = sharded_checkpoint.load(path, place, world)
    wanted = {n: _numbers(n, t.shape) for n, t in tensors.items()}
    right = state == {"step": 3} and sorted(tensors) == ["bias", "weight", "whole"]
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            wanted[name] = distribute_tensor(
                wanted[name], mesh, [Split(0)], src_data_rank=None
            ).to_local()
            tensor = tensor.to_local()
        right = right and torch.equal(tensor, wanted[name])
    return right
