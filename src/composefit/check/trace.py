"""`Trace`: where a step lets samples meet, found by following which tensors hold rows of samples.

Looks at every operation that torch carries out, with or without a graph: what couples samples
(normalised advantages, running statistics) is often detached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from composefit import tree
from composefit.check.operations import MEAN, Operation
from composefit.check.places import place

#: What an event is; see `Event`.
BATCH_NORM = "BatchNorm"
CLASS_WEIGHTS = "class weights"
CONTRASTIVE = "contrastive loss without Gather"
DRAW = "draw that depends on the strategy"
NORM = "norm per shard"
RATIO = "token mean by hand"
ROOT = "RMSE"
STATISTICS = "minibatch statistics"
TOKENS = "token mean"


class Event(NamedTuple):
    """A place where samples meet, or where a result comes to depend on how a batch is cut.

    Attributes:
        kind: `BATCH_NORM`, `CLASS_WEIGHTS`, `CONTRASTIVE`, `DRAW`, `NORM`, `RATIO`, `ROOT`,
            `STATISTICS` or `TOKENS`.
        operation: torch's name of it, such as `"aten.native_batch_norm"`.
        module: the path of the module that runs it in the traced one, and its class:
            `"net.1 (BatchNorm2d)"`; None outside of its forward calls.
        where: the user's file and line, `"train.py:12"`; None where the stack shows none.
    """

    kind: str
    operation: str
    module: str | None
    where: str | None


class _Level(IntEnum):
    """What a memory holds."""

    CONSTANT = 0  # nothing of the batch
    SAMPLE = 1  # of a few samples of it, picked out
    ROWS = 2  # something for each sample
    STATISTIC = 3  # one thing of all samples together


class _Kept(NamedTuple):
    """What is known of a memory. The reference keeps its address from being used again."""

    memory: Any
    level: _Level
    events: frozenset[int]


_NOTHING: frozenset[int] = frozenset()


class Trace(TorchDispatchMode):
    """Follows one shard's samples through the operations of its step.

    A dimension is taken for one of samples where it is a multiple of their number (and so of
    batch x time, or two views of each): take a number that no weight has as a dimension, see
    `composefit.check.telling_size`.

    Args:
        samples: how many the shard holds, at least 2; with groups of samples, how many groups.
        batch: the shard's, nested tensors; further sizes of their dimension 0 (of another loader's,
            nodes of graphs) count as rows, too.
        module: for the names of its parts; what it and its parts hold is not of the batch.
        dim: the dimension of the batch's tensors that counts samples.

    Attributes:
        events: in their order.
        dtypes: the floating dtypes in which something of the batch was computed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> x = torch.randn(7, 2)
        >>> with Trace(7, x, net) as trace:
        ...     loss = net(x).square().mean()
        >>> [(event.kind, event.module) for event in trace.events]
        [('BatchNorm', '1 (BatchNorm1d)')]
        >>> trace.of(loss) == trace.events
        True
    """

    @classmethod
    def of_shard(cls, module: nn.Module, part: Any, samples: int) -> Trace:
        """Of a shard of so many samples, as its module counts them."""
        group = getattr(module, "samples_per_group", 1)
        return cls(samples // group, part, module, getattr(module, "batch_dim", 0))

    def __init__(
        self, samples: int, batch: Any = None, module: nn.Module | None = None, dim: int = 0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.dtypes: set[torch.dtype] = set()
        self._found: dict[Event, int] = {}
        self._known: dict[int, _Kept] = {}
        self._numbers: dict[float, frozenset[int]] = {}  # statistics that Python was told
        self._trusted: set[int] = set()  # seeds of generators
        self._resting = 0
        self._sizes = {samples} if samples > 1 else set()
        self._ragged: set[int] = set()  # how many rows a mask has left
        self._names: dict[int, str] = {}
        if module is not None:
            for name, part in module.named_modules():
                self._names[id(part)] = f"{name or 'self'} ({type(part).__name__})"
                for held in (*vars(part).values(), part._parameters, part._buffers):
                    for tensor in _tensors(held):
                        self._keep(tensor, _Level.CONSTANT, _NOTHING)
        for tensor in _held(batch):
            if tensor.dim() > dim and tensor.size(dim) > 1:
                self._sizes.add(tensor.size(dim))
            self._keep(tensor, _Level.ROWS if tensor.dim() else _Level.CONSTANT, _NOTHING)

    def of(self, *tensors: Tensor) -> list[Event]:
        """The events that the values of these tensors depend on, in their order."""
        found = _NOTHING.union(*(self._look(tensor)[1] for tensor in tensors))
        return [self.events[i] for i in sorted(found)]

    def trust(self, generator: torch.Generator) -> None:
        """Draws from this one do not depend on the cut: from `self.random.shared` of the shard."""
        self._trusted.add(generator.initial_seed())

    def receive(self, values: Any, sources: Iterable[Tensor], rows: bool) -> None:
        """Take note of what comes from all shards: nothing in it depends on the cut.

        Args:
            values: nested tensors.
            sources: what they were made of; what these depend on they do, too.
            rows: something for each of this shard's samples.
        """
        events = _NOTHING.union(*(self._look(tensor)[1] for tensor in sources))
        level = _Level.ROWS if rows else _Level.CONSTANT
        for tensor in _tensors(values):
            self._keep(tensor, level, events)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Look away."""
        self._resting += 1
        try:
            yield
        finally:
            self._resting -= 1

    # -- what is known of a tensor -------------------------------------------------------------

    def _keep(self, tensor: Tensor, level: _Level, events: frozenset[int]) -> None:
        memory = _memory(tensor)
        if memory is not None:
            self._known[memory.cdata] = _Kept(memory, level, events)

    def _look(self, tensor: Tensor) -> tuple[_Level, frozenset[int]]:
        kept = self._known.get(_address(tensor))
        if kept is None:  # made where torch does not see it, such as of an array of NumPy's
            return (_Level.ROWS if self._rows(tensor) else _Level.CONSTANT), _NOTHING
        if kept.level is _Level.ROWS and not self._rows(tensor):
            return _Level.SAMPLE, kept.events  # such as x[0]
        return kept.level, kept.events

    def _rows(self, tensor: Tensor) -> int:
        """How many dimensions count samples, or what is left of them."""
        return sum(self._counts(size) or size in self._ragged for size in tensor.shape)

    def _counts(self, size: int) -> bool:
        return size > 1 and any(size % one == 0 for one in self._sizes)

    # -- operations ----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry it out, and look at what went in and came out."""
        kwargs = kwargs or {}
        if self._resting or func._schema.name.startswith(("prim::", "profiler::")):
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs)]
        before = [self._look(tensor) for tensor in given]  # an operation in place changes it
        shapes = [self._rows(tensor) for tensor in given]
        out = func(*args, **kwargs)
        self._resting += 1
        try:
            self._see(Operation(func, args, kwargs), given, before, shapes, out)
        finally:
            self._resting -= 1
        return out

    def _see(
        self,
        operation: Operation,
        given: list[Tensor],
        before: list[tuple[_Level, frozenset[int]]],
        shapes: list[int],
        out: Any,
    ) -> None:
        levels = [level for level, _ in before]
        events = _NOTHING.union(*(events for _, events in before))
        if operation.shapes:  # of what it is given it looks at the shape
            for output in _tensors(out):
                self._keep(output, _Level.CONSTANT, _NOTHING)
            return
        if operation.name == "_local_scalar_dense":
            if levels == [_Level.STATISTIC] and _telling(out):
                self._numbers[float(out)] = events
            return
        if self._numbers:
            for number in operation.numbers():
                if (known := self._numbers.get(number)) is not None:
                    levels.append(_Level.STATISTIC)
                    events |= known
        outputs = list(_tensors(out))
        rows = _Level.ROWS in levels
        if rows and operation.name == "cat" and not self._rows(out):  # of two loaders, say
            self._sizes.add(out.size(operation.named()["dim"]))
        statistic = _Level.STATISTIC in levels
        tainted = rows or statistic or _Level.SAMPLE in levels
        kind = self._drawn(operation)
        if kind is None and tainted:
            kind = self._kind(operation, given, levels, shapes, outputs, out)
        if kind is not None and (noted := self._note(kind, operation)) is not None:
            events |= {noted}
        if operation.chooses and rows:
            self._ragged.update(
                o.size(0) for o in outputs if o.dim() and o.size(0) > 1 and not self._rows(o)
            )
        addresses = {_address(tensor) for tensor in given}
        for output in outputs:
            own = self._rows(output)
            if _address(output) in addresses and not operation.writes:
                continue  # a view: its memory is known
            if tainted and output.is_floating_point():
                self.dtypes.add(output.dtype)
            if not tainted:
                level = _Level.CONSTANT
            elif own:
                level = _Level.ROWS if rows or not statistic else _Level.STATISTIC
            elif statistic or (rows and not operation.picks):
                level = _Level.STATISTIC
            else:
                level = _Level.SAMPLE
            self._keep(output, level, events)

    def _drawn(self, operation: Operation) -> str | None:
        if not operation.draws:
            return None
        named = operation.named()
        generator = named.get("generator")  # not the same object as the caller's
        if generator is not None and generator.initial_seed() in self._trusted:
            return None
        if any(named.get(name) == 0 for name in ("dropout_p", "dropout", "p")):
            return None
        return DRAW

    def _kind(
        self,
        operation: Operation,
        given: list[Tensor],
        levels: list[_Level],
        shapes: list[int],
        outputs: list[Tensor],
        out: Any,
    ) -> str | None:
        """What it does to samples that must not be; None where they keep to themselves."""
        name = operation.name
        rows, statistic = _Level.ROWS in levels, _Level.STATISTIC in levels
        own = max((self._rows(output) for output in outputs), default=0)
        if "batch_norm" in name:
            return self._normalised(operation, given)
        if name.startswith("nll_loss"):
            return self._nll(operation, out)
        if operation.means() and rows and self._is_ragged(given[0]):
            return TOKENS
        if rows and own > 1 and own > max(shapes) and levels.count(_Level.ROWS) > 1:
            return CONTRASTIVE
        if "scaled_dot_product" in name and self._counts(given[0].size(-2)):
            return CONTRASTIVE  # attention of samples to samples: batch_first was forgotten
        if rows and own and any(self._counts(given[0].size(dim)) for dim in operation.dims()):
            return CONTRASTIVE
        if rows and statistic and own:
            return STATISTICS  # a statistic goes back into the rows
        if own or not outputs:
            return None
        if rows and not (operation.picks or operation.adds_up()):
            return NORM if "norm" in name else STATISTICS
        if statistic and not rows:
            return self._of_statistic(operation, given, levels)
        return None

    def _normalised(self, operation: Operation, given: list[Tensor]) -> str | None:
        named = operation.named()
        training = named.get("training", named.get("train", "stats" in operation.name))
        sizes = given[0].shape
        # As a normalisation of each sample (InstanceNorm) it is called with samples as channels.
        over = [size for i, size in enumerate(sizes) if i != 1]
        return BATCH_NORM if training and any(map(self._counts, over)) else None

    def _nll(self, operation: Operation, out: Any) -> str | None:
        named = operation.named()
        if named.get("reduction") != MEAN or "total_weight" in named:
            return None
        if named.get("weight") is not None:
            return CLASS_WEIGHTS
        target = named["target"]
        ignored = out[1].item() != target.numel()
        return TOKENS if ignored or self._is_ragged(target) else None

    def _is_ragged(self, tensor: Tensor) -> bool:
        return any(size in self._ragged for size in tensor.shape) and not any(
            map(self._counts, tensor.shape)
        )

    def _of_statistic(
        self, operation: Operation, given: list[Tensor], levels: list[_Level]
    ) -> str | None:
        """What is not linear in a mean over samples is not the mean over shards."""
        name = operation.name
        several = levels.count(_Level.STATISTIC) > 1
        if name in ("div", "div_"):
            if _Level.STATISTIC not in levels[1:]:
                return None
            return STATISTICS if any(tensor.dim() for tensor in given) else RATIO
        if name in ("mul", "mul_"):
            return STATISTICS if several else None
        if operation.is_linear or operation.picks or not _floating(given):
            return None
        root = name in ("sqrt", "sqrt_") or (name == "pow" and operation.args[1] == 0.5)
        return ROOT if root and not given[0].dim() else STATISTICS

    # -- where it happens ----------------------------------------------------------------------

    def _note(self, kind: str, operation: Operation) -> int | None:
        found_at = place(self._names)
        if found_at is None:
            return None
        module, where = found_at
        event = Event(kind, f"aten.{operation.name}", module, where)
        found = self._found.get(event)
        if found is None:
            found = self._found[event] = len(self.events)
            self.events.append(event)
        return found


def _floating(given: list[Tensor]) -> bool:
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in given)


def _telling(value: object) -> bool:
    """Whether a number is one that would not turn up by chance."""
    if isinstance(value, float):
        return value == value and value not in (0.0, 1.0)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2


# -- tensors and their memory ----------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf


def _held(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch; of one of a library's own type those that it has as attributes."""
    found = list(tree.tensors(batch))
    attributes = getattr(batch, "__dict__", {}).values()
    yield from found or (value for value in attributes if isinstance(value, Tensor))


def _address(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse
        return id(tensor)


def _memory(tensor: Tensor) -> Any:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None
