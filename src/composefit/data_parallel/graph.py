"""The seam between the graph of the loop and those of the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from composefit.data_parallel.arguments import Alias, Argument, Arguments
from composefit.data_parallel.lanes import Crew, Pool
from composefit.lockstep import gradients
from composefit.lockstep.gradients import Gradients
from composefit.tree import join, map_tensors, tensors

_ACCUMULATE_GRAD: Any = vars(torch._C._functions)["AccumulateGrad"]


class _Gate(torch.autograd.Function):
    """Between the loop's graph and the shards'."""

    @staticmethod
    def forward(ctx: Any, seam: Seam, joined: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.seam = seam
        ctx.set_materialize_grads(False)
        return tuple(tensor.data for tensor in joined)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True reaches a DataParallel module, whose gradients cannot be "
                "differentiated again. Compute a gradient penalty inside the module's forward, in "
                "a training_step, or with the module itself (`wrapped.module(x)`)"
            )
        wanted = [node is not None and _executed(node) for node, _ in ctx.next_functions]
        keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        return (None, None, *ctx.seam.pull_back(cotangents, wanted, keep))


def _executed(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward that is running will hand this node a gradient."""
    try:
        executed: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True
    return executed


_Parts: TypeAlias = "list[list[Tensor | None]]"


class Seam:
    """Where the shards' graphs are joined to the loop's.

    It holds points of the graphs, not tensors: what is saved for backward is autograd's affair.
    """

    def __init__(self, pool: Pool, crew: Crew, arguments: Arguments, what: str) -> None:
        self.pool = pool
        self.crew = crew
        self.arguments = arguments
        self.what = what
        self.exits: list[list[GradientEdge]] = []  # each shard's outputs
        self.joined: list[GradientEdge] = []
        self.sources: list[Tensor] = []  # the leaves of all graphs
        self.entries: list[Argument] = []

    def __del__(self) -> None:
        self.pool.dismiss(self.crew)

    def join(self, outputs: list[Any], sizes: list[int]) -> Any:
        """The outputs of the shards as one, with a graph if they have any."""
        graph = torch.is_grad_enabled()
        seen: set[int] = set()

        def leave(tensor: Tensor) -> Tensor:
            if graph and tensor.requires_grad:
                tensor = Alias.apply(tensor)  # type: ignore[no-untyped-call]
                exits.append(get_gradient_edge(tensor))
            seen.add(id(tensor))
            return tensor

        for i, output in enumerate(outputs):
            exits: list[GradientEdge] = []
            outputs[i] = map_tensors(leave, output)
            self.exits.append(exits)
        joined = join(outputs, self.arguments.dim, sizes)
        # An item of a list of samples is a shard's own tensor, which its graph may have saved.
        joined = map_tensors(lambda t: t.clone() if graph and id(t) in seen else t, joined)
        tracked = [t for t in tensors(joined) if graph and t.requires_grad]
        if not tracked:
            return joined
        self.joined = [get_gradient_edge(tensor) for tensor in tracked]
        # Whatever the forward reached, as in a plain graph: parameters, but also tensors that are
        # attributes or global variables; and of the arguments those that it used.
        reached = _leaves([edge for exits in self.exits for edge in exits])
        parts = {id(part) for argument in self.arguments.leaves for part in argument.parts}
        self.sources = [leaf for key, leaf in reached.items() if key not in parts]
        self.entries = [
            argument
            for argument in self.arguments.leaves
            if any(id(part) in reached for part in argument.parts)
        ]
        inputs = [*self.sources, *(whole for whole, _ in self.entries)]
        found = _Gate.apply(self, tracked, *inputs)  # type: ignore[no-untyped-call]
        swap = {id(before): after for before, after in zip(tracked, found, strict=True)}
        return map_tensors(lambda t: swap.get(id(t), t), joined)

    def pull_back(
        self, cotangents: Sequence[Tensor | None], wanted: list[bool], keep: bool
    ) -> list[Tensor | None]:
        """From gradients of the joined outputs to those of the wanted inputs, None for the others.

        Args:
            cotangents: one for each joined output, None where there is none.
            wanted: one for each source and entry.
            keep: whether the shards' graphs are to be walked again.
        """
        self.arguments.check()
        count = len(self.sources)
        sources = [x for x, want in zip(self.sources, wanted[:count], strict=True) if want]
        entries = [x for x, want in zip(self.entries, wanted[count:], strict=True) if want]
        shares = self._shares(cotangents)
        of_sources: list[Gradients] = [[] for _ in shares]
        of_entries: _Parts = [[] for _ in shares]

        def walk(i: int) -> None:
            leaves = [entry.parts[i] for entry in entries]
            targets = [*sources, *(leaf for leaf in leaves if leaf is not None)]
            found = _differentiate(self.exits[i], shares[i], targets, keep)
            mine, rest = found[: len(sources)], iter(found[len(sources) :])
            del found  # `own` counts who holds a gradient
            of_sources[i] = gradients.own(mine, sources)  # type: ignore[arg-type]
            of_entries[i] = [None if leaf is None else next(rest) for leaf in leaves]

        with _without_hooks(sources):
            self.pool.each(len(shares), walk, self.crew, self.what)
        total = iter(self.pool.strategy.add_up(of_sources, sources))  # type: ignore[arg-type]
        whole = iter(
            [self._whole(e, [own[j] for own in of_entries]) for j, e in enumerate(entries)]
        )
        return [
            next(total if i < count else whole) if want else None for i, want in enumerate(wanted)
        ]

    def _shares(self, cotangents: Sequence[Tensor | None]) -> _Parts:
        """What of the cotangents each shard's outputs get."""
        roots, starts = _given(self.joined, cotangents)
        exits = [edge for edges in self.exits for edge in edges]
        found = iter(
            torch.autograd.grad(roots, exits, starts, retain_graph=True, allow_unused=True)
        )
        return [[next(found) for _ in edges] for edges in self.exits]

    def _whole(self, entry: Argument, found: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of an argument from those of its parts."""
        pairs = [
            (leaf, gradient)
            for leaf, gradient in zip(entry.parts, found, strict=True)
            if leaf is not None
        ]
        there = [gradient for _, gradient in pairs if gradient is not None]
        if not there:
            return None
        if entry.whole.dim() == 0:  # every shard had all of it
            return torch.stack(there).sum(0)
        filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]
        return torch.cat(filled, self.arguments.dim)


def _given(
    edges: Sequence[GradientEdge], cotangents: Sequence[Tensor | None]
) -> tuple[list[GradientEdge], list[Tensor]]:
    """The edges that have a cotangent, and it."""
    pairs = [(e, c) for e, c in zip(edges, cotangents, strict=True) if c is not None]
    return [edge for edge, _ in pairs], [cotangent for _, cotangent in pairs]


def _differentiate(
    outputs: Sequence[GradientEdge],
    cotangents: Sequence[Tensor | None],
    targets: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor | None, ...]:
    roots, starts = _given(outputs, cotangents)
    if not (roots and targets):
        return (None,) * len(targets)
    return torch.autograd.grad(roots, targets, starts, retain_graph=keep, allow_unused=True)


def _leaves(edges: Sequence[GradientEdge]) -> dict[int, Tensor]:
    """The leaves that a graph leads to, by their id, always in the same order (1.3 us a node)."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack: list[Any] = [edge.node for edge in edges]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if isinstance(node, _ACCUMULATE_GRAD):
                leaf: Tensor = node.variable
                found[id(leaf)] = leaf
            stack.extend(next_ for next_, _ in node.next_functions if next_ is not None)
    return found


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep a parameter's hooks from the shards' gradients: they run later, on the total."""
    hooks = [
        (leaf._backward_hooks, dict(leaf._backward_hooks))
        for leaf in leaves
        if leaf._backward_hooks
    ]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)
