"""`Update`, the effect that steps optimizers, and `Gradient`, which only takes gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from composefit.effects import Barrier, Effect, ShardView, kinds, numbers_of, with_numbers
from composefit.losses import Loss, as_loss, describe, is_function

Gradients: TypeAlias = "list[Tensor | None]"


class Grads:
    """Gradients to update an optimizer with, in place of a loss: `yield {"model": Grads(list)}`.

    Made from what `Gradient` gave, and the same on every shard.

    Args:
        gradients: one for each trainable parameter of the optimizer, in its order: a tensor of the
            parameter's shape, or None for one that is to stay as it is.
        loss: what comes back from the yield, reduced over all shards; nothing is taken of it.

    Raises:
        TypeError: something else than tensors and None, or a loss that is none.
        ValueError: no gradient at all.

    Example:
        ```python
        parameters = list(self.parameters())
        found = yield from Gradient({"a": a, "b": b}, wrt=parameters)
        yield {"model": Grads(without_conflict(found["a"], found["b"]))}
        ```
    """

    __slots__ = ("_fingerprint", "gradients", "loss")

    def __init__(
        self, gradients: Iterable[Tensor | None], loss: Tensor | Loss | None = None
    ) -> None:
        if isinstance(gradients, Tensor) or not isinstance(gradients, Iterable):
            raise TypeError(
                "Grads expects a list with a gradient for each parameter, got "
                f"{describe(gradients)}"
            )
        self.gradients: Gradients = list(gradients)
        for gradient in self.gradients:
            if gradient is not None and not isinstance(gradient, Tensor):
                raise TypeError(
                    f"Grads expects tensors, or None for a parameter that is to stay as it is, "
                    f"got {describe(gradient)}"
                )
        if all(gradient is None for gradient in self.gradients):
            raise ValueError(
                "Grads holds no gradient at all: to leave the update out, end the step"
            )
        if loss is not None:
            loss = as_loss(loss, "the loss of Grads")
            loss = loss.detach()
        self.loss = loss
        self._fingerprint: Tensor | None = None

    def detached(self, parameters: Sequence[Parameter], name: str) -> Gradients:
        """Without a graph, in the parameters' dtypes, and found to fit these parameters.

        Raises:
            TypeError: a gradient of integers.
            ValueError: another number of them, or another shape.
        """
        if len(self.gradients) != len(parameters):
            raise ValueError(
                f"Grads for {name!r} holds {len(self.gradients)} gradients, and the optimizer has "
                f"{len(parameters)} trainable parameters: one for each, in its order, None for one "
                f"that is to stay as it is. Gradient(..., wrt={name!r}) gives them so"
            )
        found: Gradients = []
        for i, (gradient, parameter) in enumerate(zip(self.gradients, parameters, strict=True)):
            if gradient is not None and gradient.shape != parameter.shape:
                raise ValueError(
                    f"gradient {i} of Grads for {name!r} has shape {tuple(gradient.shape)}, its "
                    f"parameter {tuple(parameter.shape)}"
                )
            if gradient is not None and not (gradient.is_floating_point() or gradient.is_complex()):
                raise TypeError(
                    f"gradient {i} of Grads for {name!r} is of {gradient.dtype}, its parameter of "
                    f"{parameter.dtype}: gradients are floating-point numbers"
                )
            found.append(None if gradient is None else gradient.detach().to(parameter.dtype))
        return found

    def fingerprint(self) -> Tensor:
        """A number (0-dim, float64, whole) that is another one where a bit of a gradient is."""
        if self._fingerprint is None:
            total = 0
            for i, gradient in enumerate(self.gradients):
                total += 0 if gradient is None else (i + 1) * _checksum(gradient.detach())
            self._fingerprint = torch.tensor(float(total % 2**52), dtype=torch.float64)
        return self._fingerprint

    def __repr__(self) -> str:
        return "gradients"


#: What an update may be given for an optimizer.
Given: TypeAlias = "Tensor | Loss | Grads | Callable[[], Tensor | Loss]"


class Update(Effect["dict[str, Tensor]"]):
    """Update the named optimizers with these losses, now; `yield {name: loss}` in full.

    Several names are one simultaneous update: every gradient is taken and found finite before
    anything steps. Gradients are those of the named optimizer's parameters only: nothing else gets
    one, so nothing needs freezing or detaching.

    Args:
        losses: name of an optimizer -> its loss: a 0-dim tensor (a mean over the shard's samples),
            `Mean`, `Sum`, or a sum of those. In place of a loss may stand a function without
            arguments that returns one: it is evaluated over all shards whenever the optimizer asks
            (`torch.optim.LBFGS` does so several times), random streams and buffers being each
            time what they were at the yield. Or `Grads`: gradients that the step made itself.
        retain_graph: keep the graph for a later update that goes through the same part of it, as in
            `torch.autograd.grad`.

    Returns (from the yield):
        name -> the loss, reduced over all shards, micro-batches and ranks, detached, 0-dim: that of
        a function as it was first evaluated. `Grads` without a loss have no entry.

    Raises:
        TypeError: `losses` is no dict, a name is no string, a loss is none.
        ValueError: no loss at all, a loss that is not 0-dim, a name without an optimizer.

    Example:
        ```python
        scores = self.critic(fake)
        yield Update({"generator": real_loss(scores)}, retain_graph=True)
        yield {"critic": fake_loss(scores)}
        ```
    """

    __slots__ = ("functions", "given", "losses", "retain_graph")

    def __init__(self, losses: Mapping[str, Any], retain_graph: bool = False) -> None:
        if type(losses) is not dict and not isinstance(losses, Mapping):
            raise TypeError(f"Update expects {{name: loss, ...}}, got {describe(losses)}")
        if not losses:
            raise ValueError("Update expects at least one {name: loss}, got an empty dict")
        self.losses: dict[str, Any] = dict(losses)
        self.functions: dict[str, Callable[[], Any]] | None = None
        self.given: dict[str, Grads] | None = None
        for name, loss in self.losses.items():
            if type(loss) is not Tensor or loss.dim():
                self._read(name, loss)
        self.retain_graph = retain_graph

    def _read(self, name: str, loss: Any) -> None:
        """Something else than a plain 0-dim tensor."""
        if isinstance(loss, Grads):
            self.given = {**(self.given or {}), name: loss}
            self.losses[name] = loss.loss
        elif is_function(loss):
            function: Callable[[], Any] = loss
            self.functions = {**(self.functions or {}), name: function}
        else:
            self.losses[name] = as_loss(loss, f"the loss of {name!r}" if name else "the loss")

    def rename(self, old: str, new: str) -> None:
        """Give a loss the name of its optimizer."""
        tables: list[dict[str, Any] | None] = [self.losses, self.functions, self.given]
        for found in tables:
            if found is not None and old in found:
                found[new] = found.pop(old)

    def evaluate(self, name: str, function: Callable[[], Any]) -> None:
        """Put the loss in the place of a function; it may be called again."""
        self.functions = {**(self.functions or {}), name: function}
        loss = function()
        what = f"what the loss function of {name!r} returned"
        self.losses[name] = loss if type(loss) is Tensor and not loss.dim() else as_loss(loss, what)

    def agreement(self) -> Hashable:
        """The names, in their order."""
        losses = tuple(
            (name, None if loss is None else kinds(loss)) for name, loss in self.losses.items()
        )
        of_its_own = (tuple(self.functions or ()), tuple(self.given or ()))
        return ("Update", losses, self.retain_graph, of_its_own)

    def visit(self, shard: ShardView) -> None:
        """Take this shard's gradients."""
        last = len(self.losses) - 1
        for i, (name, loss) in enumerate(self.losses.items()):
            if self.given is not None and name in self.given:
                self.given[name].gradients = self.given[name].detached(shard.parameters(name), name)
                continue
            # Losses of one update often share a graph: it must live until the last of them. A
            # function may go through what the step had computed before, time and again.
            retain = self.retain_graph or i < last or self.functions is not None
            shard.take(name, loss, shard.parameters(name), retain)
            # Of a loss whose gradient is taken nothing may keep the graph.
            self.losses[name] = loss.detach()

    def values(self) -> tuple[Tensor | float, ...]:
        """Total and weight of each term of each loss."""
        found = [n for loss in self.losses.values() if loss is not None for n in numbers_of(loss)]
        if self.given is not None:
            found += [one.fingerprint() for one in self.given.values()]
        return tuple(found)

    def of_another_rank(self, values: Sequence[Any]) -> Update:
        """With its totals and weights, and the fingerprints of its gradients."""
        losses, left = _with_values(self.losses, values)
        other = type(self).__new__(type(self))
        other.losses, other.retain_graph = losses, self.retain_graph
        other.functions = self.functions
        other.given = self.given
        if self.given is not None:
            for name, fingerprint in zip(self.given, left, strict=True):
                _refuse_difference(name, torch.equal(fingerprint, self.given[name].fingerprint()))
        return other

    def loss_of(self, key: str) -> Tensor | Loss:
        """That of the named optimizer."""
        loss: Tensor | Loss = self.losses[key]
        return loss

    def combine(self, barrier: Barrier, effects: Sequence[Update]) -> list[Any]:
        """Step with the total gradients."""
        reduced = self._update(barrier, effects)
        if len(effects) == 1:
            return [reduced]
        # Each shard may write to what it gets.
        return [{name: loss.clone() for name, loss in reduced.items()} for _ in effects]

    def _update(self, barrier: Barrier, effects: Sequence[Update]) -> dict[str, Tensor]:
        losses = _columns(effects)
        if self.functions is None and self.given is None:
            return barrier.update(losses)
        given = {} if self.given is None else self._alike(effects)
        return barrier.update(losses, given, tuple(self.functions or ()))

    def _alike(self, effects: Sequence[Update]) -> dict[str, Gradients]:
        """The gradients given, which must be the same in every shard."""
        assert self.given is not None
        for name, own in self.given.items():
            for effect in effects:
                assert effect.given is not None
                other = effect.given[name]
                pairs = zip(own.gradients, other.gradients, strict=True)
                same = other is own or all(_same(a, b) for a, b in pairs)
                _refuse_difference(name, same)
        return {name: own.gradients for name, own in self.given.items()}

    def __repr__(self) -> str:
        of = {name: "gradients" for name in self.given or ()}
        return "{" + ", ".join(f"{name!r}: {of.get(name, 'loss')}" for name in self.losses) + "}"


class OnlyUpdate(Update):
    """A bare loss, where there is one optimizer: the reduced loss itself comes back."""

    __slots__ = ()

    def combine(self, barrier: Barrier, effects: Sequence[Update]) -> list[Any]:
        """As `Update`, with the loss by itself; None where gradients came without one."""
        reduced = next(iter(self._update(barrier, effects).values()), None)
        if len(effects) == 1 or reduced is None:
            return [reduced] * len(effects)
        return [reduced.clone() for _ in effects]

    def __repr__(self) -> str:
        return "a loss"


class Gradient(Effect["dict[str, Gradients]"]):
    """Gradients over all shards, without a step; the graph stays.

    Args:
        losses: any key -> a loss, as in an update.
        wrt: parameters (one, or several), or the name of an optimizer, for its trainable ones.

    Returns (from the yield):
        key -> its gradients in the order of `wrt`: reduced over all shards, micro-batches and
        ranks, unscaled, whole (also where parameters are sharded), detached; None for a parameter
        that no shard reached.

    Raises:
        TypeError: `losses` is no dict, a loss is none, `wrt` holds something else than parameters.
        ValueError: no loss, no parameter, one that requires no gradient, or a loss that reaches
            none of them.

    For gradients with respect to inputs, a penalty say, there is `torch.autograd.grad`: they are
    each sample's own.

    Example:
        ```python
        last = self.decoder[-1].weight
        found = yield from Gradient({"difference": difference, "fooled": fooled}, wrt=last)
        balance = found["difference"][0].norm() / found["fooled"][0].norm()
        ```
    """

    __slots__ = ("losses", "retain_graph", "wrt")

    def __init__(
        self,
        losses: Mapping[str, Tensor | Loss],
        wrt: Parameter | Iterable[Parameter] | str,
    ) -> None:
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"Gradient expects {{key: loss, ...}} and wrt=parameters, got {describe(losses)}"
            )
        if not losses:
            raise ValueError("Gradient expects at least one {key: loss}, got an empty dict")
        self.losses: dict[str, Any] = {
            key: loss
            if type(loss) is Tensor and not loss.dim()
            else as_loss(loss, f"the loss of {key!r}")
            for key, loss in losses.items()
        }
        self.wrt: str | list[Parameter] = wrt if isinstance(wrt, str) else _parameters(wrt)
        self.retain_graph = True

    def agreement(self) -> Hashable:
        """The keys, in their order, and the parameters' shapes."""
        losses = tuple((key, kinds(loss)) for key, loss in self.losses.items())
        wrt = self.wrt if isinstance(self.wrt, str) else tuple(tuple(p.shape) for p in self.wrt)
        return ("Gradient", losses, wrt)

    def visit(self, shard: ShardView) -> None:
        """Take this shard's gradients."""
        parameters = shard.parameters(self.wrt) if isinstance(self.wrt, str) else self.wrt
        last = len(self.losses) - 1
        for i, (key, loss) in enumerate(self.losses.items()):
            shard.take(key, loss, parameters, self.retain_graph or i < last)
            self.losses[key] = loss.detach()

    def values(self) -> tuple[Tensor | float, ...]:
        """Total and weight of each term of each loss."""
        return tuple(number for loss in self.losses.values() for number in numbers_of(loss))

    def of_another_rank(self, values: Sequence[Any]) -> Gradient:
        """With its totals and weights."""
        return Gradient(_with_values(self.losses, values)[0], self.wrt)

    def loss_of(self, key: str) -> Tensor | Loss:
        """The loss under this key."""
        loss: Tensor | Loss = self.losses[key]
        return loss

    def combine(self, barrier: Barrier, effects: Sequence[Gradient]) -> list[Any]:
        """The reduced gradients, each shard's its own: it may write to them."""
        found = {key: barrier.gradients(key) for key in self.losses}
        for key, own in found.items():
            if all(gradient is None for gradient in own):
                raise ValueError(
                    f"the loss {key!r} given to Gradient reaches none of the {len(own)} parameters "
                    "in wrt: was it computed with them, outside of torch.no_grad(), and not "
                    "detached? An evaluation step runs without gradients: write `with "
                    "torch.enable_grad():` there, and Trainer(inference_mode=False)"
                )
        others = [
            {k: [None if g is None else g.clone() for g in own] for k, own in found.items()}
            for _ in effects[1:]
        ]
        return [found, *others]

    def __repr__(self) -> str:
        return f"Gradient({', '.join(map(repr, self.losses))})"


class LossAndGradient(Gradient):
    """One loss and its gradients as they are, the graph not kept: what a strategy's own call takes.

    Args:
        loss: of this shard.
        parameters: may be none.
    """

    __slots__ = ()

    KEY = "loss"

    def __init__(self, loss: Tensor | Loss, parameters: list[Parameter]) -> None:
        if type(loss) is not Tensor or loss.dim():
            loss = as_loss(loss, "the loss")
        self.losses = {self.KEY: loss}
        self.wrt = parameters
        self.retain_graph = False

    def of_another_rank(self, values: Sequence[Any]) -> Gradient:
        """With its totals and weights."""
        assert not isinstance(self.wrt, str)
        return LossAndGradient(with_numbers(self.losses[self.KEY], values), self.wrt)

    def combine(self, barrier: Barrier, effects: Sequence[Gradient]) -> list[Any]:
        """The reduced loss and gradients, for whoever called."""
        loss = barrier.reduce([effect.losses[self.KEY] for effect in effects])
        return [(loss, barrier.gradients(self.KEY, whole=False))] * len(effects)

    def __repr__(self) -> str:
        return "a loss"


def _with_values(
    losses: Mapping[str, Any], values: Sequence[Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Losses of the same terms with the numbers that another rank told, and what is left of these.

    None stays where an update has no loss.
    """
    left, found = list(values), dict(losses)
    for name, loss in losses.items():
        if loss is not None:
            own, left = left[: (count := len(numbers_of(loss)))], left[count:]
            found[name] = with_numbers(loss, own)
    return found, left


def _parameters(wrt: object) -> list[Parameter]:
    """What gradients are asked with respect to."""
    found = [wrt] if isinstance(wrt, Tensor) else wrt
    if not isinstance(found, Iterable):
        raise TypeError(
            "Gradient(wrt=...) expects parameters, or the name of an optimizer, got "
            f"{describe(wrt)}: write wrt=module.parameters()"
        )
    parameters: list[Any] = list(found)
    if len({id(one) for one in parameters}) < len(parameters):
        raise ValueError(
            "Gradient(wrt=...) holds a parameter twice (a shared weight?): give each one once"
        )
    if not parameters:
        raise ValueError("Gradient(wrt=...) expects at least one parameter, got none")
    for one in parameters:
        if not isinstance(one, Parameter):
            raise TypeError(
                f"Gradient(wrt=...) expects parameters, got {describe(one)}: for a gradient with "
                "respect to an input call torch.autograd.grad(..., create_graph=True)"
            )
        if not one.requires_grad:
            raise ValueError(
                f"Gradient(wrt=...): a parameter of shape {tuple(one.shape)} requires no gradient "
                "(it is frozen): leave it out"
            )
    return parameters


# Numbers at a time: a checksum takes some times their memory.
_CHUNK = 2**20


def _checksum(tensor: Tensor) -> int:
    """Of its bits, each weighed by its place; NaN has bits as any other number."""
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return _checksum(tensor.indices()) + 3 * _checksum(tensor.values())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    weights = torch.arange(1, min(_CHUNK, len(flat)) + 1, device=flat.device)
    for i, chunk in enumerate(torch.split(flat, _CHUNK)):
        total += (i + 1) * (chunk.long() * weights[: len(chunk)]).sum()
    return int(total.item())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit by bit, NaN being equal to NaN."""
    if a is None or b is None:
        return a is b
    if a.layout is not b.layout or a.dtype is not b.dtype:
        return False
    if a.is_sparse:
        a, b = a.coalesce(), b.coalesce()
        return torch.equal(a.indices(), b.indices()) and _same(a.values(), b.values())
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _refuse_difference(name: str, same: bool) -> None:
    if not same:
        raise RuntimeError(
            f"shards yielded different Grads for {name!r}: an update has one gradient. Make them "
            "of what all shards have in common: what `yield from Gradient(...)`, `Gather` or a "
            "bare `Mean` gave, and self.random.shared"
        )


def _columns(effects: Sequence[Update]) -> dict[str, list[Tensor | Loss]]:
    """Name -> its loss in each shard; None in each where gradients came without one."""
    return {name: [effect.losses[name] for effect in effects] for name in effects[0].losses}
