"""Which modules are sharded as a unit, and which parameters stay whole on every rank.

A unit's parameters are gathered together when it is called, and are gone when it returns. So a unit
must be a module that is *called*: never the `LoopModule` itself, whose step uses its children, and
no list of modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from composefit.module import LoopModule

#: From this many parameters on, a module within a child is a unit of its own by default.
DEFAULT_SIZE = 10_000_000

#: A size in parameters, the types of modules to shard, or None for the module's own choice.
Policy: TypeAlias = int | type[nn.Module] | Sequence[type[nn.Module]] | None

# These use the weights of modules within them without calling those.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase)


@dataclass
class Units:
    """How a module is to be sharded.

    Attributes:
        modules: the units, inner ones before those around them.
        whole: the parameters that no unit gets, to be replicated.
    """

    modules: list[nn.Module]
    whole: list[Parameter]


def check_policy(policy: object) -> Policy:
    """The policy that a user gave.

    Raises:
        TypeError: it is neither a size, nor types of modules, nor None.
        ValueError: a size below 1.
    """
    if policy is None or (isinstance(policy, type) and issubclass(policy, nn.Module)):
        return policy
    if isinstance(policy, int) and not isinstance(policy, bool):
        if policy < 1:
            raise ValueError(
                f"FullySharded(policy=...) as a size is a number of parameters from 1, got {policy}"
            )
        return policy
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        types = list(policy)
        if types and all(isinstance(t, type) and issubclass(t, nn.Module) for t in types):
            return types
    raise TypeError(
        "FullySharded(policy=...) expects a size in parameters (policy=1_000_000), types of "
        f"modules (policy=[TransformerBlock]), or None, got {policy!r}"
    )


def choose_units(module: nn.Module, policy: Policy) -> Units | None:
    """Choose what to shard.

    Every child of the module is a unit (of a list, every item), and within it what the policy
    names. A parameter stays whole if it belongs to several units, to none (the module's own), has
    no dimension to cut, or gets sparse gradients.

    Args:
        module: the owner; never a unit itself.
        policy: what is a unit within a child. None: what the module's own method
            `configure_sharding` returns, if it has one (NotImplemented leaves it to the default),
            else `DEFAULT_SIZE`.

    Returns:
        The units; None if `configure_sharding` returned None: it has sharded by itself.

    Raises:
        ValueError: a parameter is not initialised yet; or what `configure_sharding` returned is
            no module that can be a unit.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is not initialised yet, and so cannot be cut: run one forward first "
                "(in configure_model, say)"
            )
    chosen: Any = NotImplemented
    own: Any = getattr(module, "configure_sharding", None)
    if policy is None and own is not None:
        chosen = own()
        if chosen is None:
            return None
    if chosen is not NotImplemented:
        units = _named(module, chosen)
    else:
        tops = list(_tops(module))
        units = []
        for top in tops:
            _within(top, DEFAULT_SIZE if policy is None else policy, units)
        # Two children may share a part: whichever is called first would be the root of it.
        roots = {id(unit): _roots_of(unit, tops) for unit in units}
        units = [unit for unit in units if roots[id(unit)] == 1]
    owners = _owners(module, units)
    sparse = {
        part.weight
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }
    whole = [
        parameter
        for parameter in module.parameters()
        if len(found := owners[parameter]) > 1
        or None in found
        or not parameter.dim()
        or parameter in sparse
    ]
    apart = set(whole)
    managed = {owner for p, found in owners.items() if p not in apart for owner in found}
    return Units([unit for unit in units if id(unit) in managed], whole)


def _tops(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are called, each once."""
    seen: set[int] = set()

    def visit(parent: nn.Module) -> Iterator[nn.Module]:
        for child in parent.children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            if not _is_called(child):
                yield from visit(child)
            elif next(child.parameters(), None) is not None:
                yield child

    return visit(module)


def _is_called(module: nn.Module) -> bool:
    """Whether a module computes something itself; a list does not, nor does a step's module."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, LoopModule)


def _within(module: nn.Module, policy: Policy, found: list[nn.Module]) -> int:
    """Add the units of a child, itself last; returns the parameters that are not in inner ones."""

    def visit(part: nn.Module, top: bool) -> int:
        left = sum(p.numel() for p in part.parameters(recurse=False))
        if isinstance(part, _WHOLE) or parametrize.is_parametrized(part):
            left = sum(p.numel() for p in part.parameters())
        else:
            left += sum(visit(child, False) for child in part.children())
        if not any(part is known for known in found) and (
            top or (_is_called(part) and left and _meant(part, policy, left))
        ):
            found.append(part)
            return 0
        return left

    return visit(module, True)


def _meant(part: nn.Module, policy: Policy, size: int) -> bool:
    if isinstance(policy, int):
        return size >= policy
    types = (policy,) if isinstance(policy, type) else tuple(policy or ())
    return isinstance(part, types)


def _named(module: nn.Module, chosen: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that `configure_sharding` returned, inner ones first."""
    try:
        found = list(chosen)
    except TypeError:
        found = [None]  # type: ignore[list-item]
    parts = {id(part): depth for depth, part in enumerate(module.modules())}
    for part in found:
        if not isinstance(part, nn.Module) or id(part) not in parts or part is module:
            raise ValueError(
                "configure_sharding returns the modules within this one to shard, such as "
                f"[*self.net.blocks, self.net]; got {type(part).__name__} among them. It returns "
                "None where it has called fully_shard itself"
            )
        if not _is_called(part):
            raise ValueError(
                f"configure_sharding returned a {type(part).__name__}, which is not called itself: "
                "name the modules within it"
            )
    return sorted(found, key=lambda part: -parts[id(part)])


def _roots_of(unit: nn.Module, tops: Sequence[nn.Module]) -> int:
    return sum(any(part is unit for part in top.modules()) for top in tops)


def _owners(module: nn.Module, units: Sequence[nn.Module]) -> dict[Parameter, set[int | None]]:
    """For each parameter the units that have it, by id; None for outside of all."""
    known = {id(unit) for unit in units}
    found: dict[Parameter, set[int | None]] = {}
    seen: set[tuple[int, int | None]] = set()

    def visit(part: nn.Module, unit: int | None) -> None:
        if id(part) in known:
            unit = id(part)
        if (id(part), unit) in seen:
            return
        seen.add((id(part), unit))
        for parameter in part.parameters(recurse=False):
            found.setdefault(parameter, set()).add(unit)
        for child in part.children():
            visit(child, unit)

    visit(module, None)
    return found
