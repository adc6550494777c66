"""`DataParallel`: a module that runs its forward and its backward in parallel, in any loop.

    forward:   cut the arguments -> each shard through a replica, in its lane -> join the outputs
    backward:  cut the outputs' gradient -> each shard's own graph, in its lane -> add up, in order

The shards' graphs hang together in one `autograd.Function`. Autograd would walk them one after
another in the thread that calls for the backward; behind the function each is walked in its lane.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from composefit.lockstep import gradients, guards
from composefit.lockstep.gradients import Gradients
from composefit.random import Stream, hash_key, thread_local_generators
from composefit.replicas import Replica, merge
from composefit.strategies.base import Strategy
from composefit.strategies.thread_data_parallel import ThreadDataParallel
from composefit.tree import batch_size, cut, even_sizes, join, map_tensors, tensors


class DataParallel(nn.Module):
    """Wraps a module for a hand-written loop: forward and backward in parallel on threads.

    The rest of the loop stays as it is: losses, `backward`, `torch.autograd.grad`, optimizers,
    several wrapped networks, several forwards before one backward, `no_grad`, autocast. A call cuts
    its arguments into shards, runs each in a thread on a replica that shares the parameters, and
    joins the outputs in sample order; the loss is then computed on the whole batch. Only the
    gradients that a backward asks for are computed, and they are added up in the order of the
    shards: the same from run to run.

    Every tensor among the arguments, however nested, must have its samples in dimension 0 (in
    `batch_dim`, if the module has an attribute of that name), and so must the outputs. Tensors
    without dimensions, numbers, strings and None go to every shard as they are. Batches of fewer
    samples than threads make fewer shards; one shard alone is a plain call of the module.

    What the forward writes: statistics of normalisation layers come back as the weighted mean of
    the shards' changes, a buffer that all shards write alike is taken over; attributes that it sets
    stay on the replicas. Dropout and other draws of torch come from a stream per shard that follows
    from torch's default generator, so `torch.manual_seed` makes them reproducible; draws of Python's
    and NumPy's global generators depend on which thread comes first. Hooks on submodules run once
    per shard, in its thread.

    The wrapper is transparent: `state_dict` and the names of parameters are those of the module,
    and attributes and methods are read from it and set on it. A method called so (`wrapped.encode(
    x)`) is the module's own, and runs in the calling thread alone.

    Args:
        module: any module; its parameters stay where and what they are.
        threads: how many, the calling one among them; None for the cores this process may use.
            They start at the first call, and stop at `close`, or when nobody holds the wrapper or a
            graph of its outputs any more.
        strategy: lanes of another kind in place of threads; `SingleDevice(shards=n)` runs the
            same shards one after another, for a debugger.

    Raises:
        TypeError: `module` is no module.
        ValueError: `threads` is less than one, or given beside a strategy.
        RuntimeError: from a backward with `create_graph=True`: gradients of gradients do not reach
            through the threads. Compute a gradient penalty inside the module's forward, in a
            `training_step`, or on the module itself (`wrapped.module`).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> parallel = DataParallel(net, threads=2)
        >>> loss = parallel(torch.randn(7, 4)).square().mean()
        >>> loss.backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
        >>> list(parallel.state_dict()) == list(net.state_dict())
        True
        >>> parallel.close()
    """

    module: nn.Module

    def __init__(
        self, module: nn.Module, threads: int | None = None, *, strategy: Strategy | None = None
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"DataParallel expects a torch.nn.Module, got {type(module).__name__}")
        if threads is not None and strategy is not None:
            raise ValueError("DataParallel expects either threads or a strategy, got both")
        self._arguments = (threads, strategy)
        self._pool = _Pool.of(threads, strategy)
        self._home = id(self)
        self.module = module
        self.register_load_state_dict_pre_hook(_enter_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, its samples spread over the lanes.

        Args:
            args: what the module takes; nested as one likes.
            kwargs: the same by name.

        Returns:
            What the module returns, joined over the shards: tensors concatenated in sample order,
            those without dimensions stacked to one entry per shard.

        Raises:
            Whatever the module raises, with a note of the shard.
            ValueError: arguments disagree in their number of samples, or outputs in structure.
            RuntimeError: the forward changes an argument that requires a gradient in place.
        """
        pool = self._pool
        # A replica of the wrapper, and a call from inside a shard, are part of a shard already.
        inside = self._home != id(self) or _here.in_lane
        if inside or pool.strategy.lanes == 1 or not (args or kwargs):
            return self.module(*args, **kwargs)
        batch = {**dict(enumerate(args)), **kwargs}
        dim = getattr(self.module, "batch_dim", 0)
        try:
            samples = batch_size(batch, dim)
            sizes = even_sizes(
                samples, pool.strategy.lanes, getattr(self.module, "samples_per_group", 1)
            )
            if len(sizes) < 2:
                return self.module(*args, **kwargs)
            parts = cut(batch, sizes, dim)
        except (TypeError, ValueError) as error:
            error.add_note(f"{self._name()}: batch[0] is the call's first argument")
            raise
        return self._forward(batch, parts, sizes, dim)

    def _forward(self, batch: Any, parts: list[Any], sizes: list[int], dim: int) -> Any:
        arguments = _Arguments(batch, parts, dim)
        crew = self._pool.hire(self.module, len(sizes))
        outputs: list[Any] = [None] * len(sizes)

        def run(i: int) -> None:
            part = arguments.parts[i]
            named = {name: value for name, value in part.items() if isinstance(name, str)}
            unnamed = [value for name, value in part.items() if not isinstance(name, str)]
            outputs[i] = crew.replicas[i].module(*unnamed, **named)

        try:
            with _seeded(crew.streams[: len(sizes)]):
                self._pool.each(len(sizes), run, crew, f"forward of {self._name()}")
            arguments.note_writes()
            merge(self.module, crew.replicas[: len(sizes)], [float(size) for size in sizes])
        except BaseException:
            self._pool.dismiss(crew)
            raise
        seam = _Seam(self._pool, crew, arguments, f"backward of {self._name()}")
        return seam.join(outputs, sizes)

    def close(self) -> None:
        """Stop the threads. A later call or backward starts them again."""
        self._pool.close()

    # -- transparency ------------------------------------------------------------------------------

    def _name(self) -> str:
        return f"DataParallel({type(self.module).__name__})"

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapped module's: parameters and buffers are named as without the wrapper."""
        return self.module.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's."""
        return self.module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "module" or name in self.__dict__ or hasattr(type(self), name)
        if own or "module" not in self.__dict__.get("_modules", {}):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # threads are neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pool = _Pool.of(*self._arguments)
        self._home = id(self)


def _enter_module(
    wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Where the wrapper is itself a child, `load_state_dict` looks for the child's own name."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name[len(prefix) :]}"] = state.pop(name)


# --------------------------------------------------------------------------------------------------
# Lanes
# --------------------------------------------------------------------------------------------------


class _Here(threading.local):
    in_lane = False


_here = _Here()


class _Crew:
    """Replicas of one module and their random streams: what one forward needs.

    Replicas own buffers, and a graph may have saved them: a crew serves the next forward only when
    the graph of its last one is gone.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.replicas: list[Replica] = []
        self.streams: list[Stream] = []

    def refresh(self, shards: int) -> None:
        """Read the owner anew for so many shards."""
        for replica in self.replicas[:shards]:
            replica.refresh()
        while len(self.replicas) < shards:
            self.replicas.append(Replica(self.owner))
            self.streams.append(Stream())


class _Pool:
    """The lanes of one wrapper, opened when they are first needed, and its crews."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._crews: list[_Crew] = []
        self._lock = threading.Lock()
        self._intra_op_threads = 1
        self._opened = False
        self._stack = ExitStack()
        weakref.finalize(self, _close, self._stack)

    @classmethod
    def of(cls, threads: int | None, strategy: Strategy | None) -> _Pool:
        return cls(ThreadDataParallel(threads) if strategy is None else strategy)

    def hire(self, owner: nn.Module, shards: int) -> _Crew:
        """A crew that no graph needs, as the owner is now."""
        crew = self._crews.pop() if self._crews else _Crew(owner)
        if crew.owner is not owner:
            crew = _Crew(owner)
        crew.refresh(shards)
        return crew

    def dismiss(self, crew: _Crew) -> None:
        """Let another forward have it."""
        self._crews.append(crew)

    def open(self) -> None:
        """Start the lanes, unless they are."""
        if self._opened:
            return
        threads = torch.get_num_threads()
        self._stack.enter_context(self.strategy.session())
        self._stack.enter_context(thread_local_generators())
        self._intra_op_threads = torch.get_num_threads()
        self.strategy.run([self._settle] * self.strategy.lanes)
        # Between the calls the loop has as many as it had.
        torch.set_num_threads(threads)
        self._opened = True

    def _settle(self) -> None:
        # A thread takes over the caller's number of intra-op threads at its first use of them; the
        # question counts as one, and what is set afterwards lasts.
        torch.get_num_threads()
        torch.set_num_threads(self._intra_op_threads)

    def close(self) -> None:
        """Stop the lanes."""
        with self._lock:
            _close(self._stack)
            self._opened = False

    def each(self, shards: int, function: Callable[[int], None], crew: _Crew, what: str) -> None:
        """Run `function(i)` for every shard in its lane, in the modes of the calling thread.

        Raises:
            Whatever a function raises, of several the first shard's, with a note.
        """
        caller = threading.get_ident()
        ambient = _Ambient(crew.owner)
        errors: list[tuple[int, BaseException]] = []

        def lane(i: int) -> None:
            here = threading.get_ident() == caller
            try:
                modes = self._intra_op() if here else ambient.entered()
                with modes, _in_lane(), crew.streams[i]:
                    function(i)
            except BaseException as error:
                thread = threading.current_thread().name
                error.add_note(f"shard {i} of {shards} (thread {thread}), {what}")
                errors.append((i, error))

        with self._lock:
            self.open()
            self.strategy.run([lambda i=i: lane(i) for i in range(shards)])  # type: ignore[misc]
        if errors:
            # Ctrl-C and the like before errors: they were meant for everybody.
            errors.sort(key=lambda found: (isinstance(found[1], Exception), found[0]))
            raise errors[0][1]

    @contextmanager
    def _intra_op(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._intra_op_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _close(stack: ExitStack) -> None:
    threads = torch.get_num_threads()
    stack.close()
    torch.set_num_threads(threads)


class _Ambient:
    """All modes of the calling thread, for its workers."""

    def __init__(self, module: nn.Module) -> None:
        parameter = next(module.parameters(), None)
        self.modes = guards.Ambient("cpu" if parameter is None else parameter.device.type)
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with (
            torch.inference_mode() if self.inference else nullcontext(),
            torch.set_grad_enabled(self.grad),
            self.modes.entered(),
        ):
            yield


@contextmanager
def _in_lane() -> Iterator[None]:
    before, _here.in_lane = _here.in_lane, True
    try:
        yield
    finally:
        _here.in_lane = before


@contextmanager
def _seeded(streams: Sequence[Stream]) -> Iterator[None]:
    """Start the shards' streams from torch's default generator.

    It moves on, by one draw, only if a shard has drawn: what the loop itself draws (noise, the
    order of samples) is not changed by wrapping a module without dropout.
    """
    state = torch.get_rng_state()
    key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    for i, stream in enumerate(streams):
        stream.seed(hash_key(key, i))
    before = [stream.generator.get_state() for stream in streams]
    yield
    after = [stream.generator.get_state() for stream in streams]
    if all(map(torch.equal, before, after)):
        torch.set_rng_state(state)


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


class _Argument(NamedTuple):
    """A tensor among the arguments, and its part in each shard."""

    whole: Tensor
    parts: list[Tensor | None]  # None: it is one of a list of samples, and another shard has it


class _Arguments:
    """The arguments of one call, in parts, with the leaves at which their gradients arrive.

    Args:
        batch: the arguments.
        parts: they, cut.
        dim: where samples are.
    """

    def __init__(self, batch: Any, parts: list[Any], dim: int) -> None:
        self.parts = parts
        self.dim = dim
        self.leaves: list[_Argument] = []
        self._versions: list[tuple[weakref.ref[Tensor], int]] = []
        self._given = _aligned(batch, parts)
        self._entered: dict[int, Tensor] = {}
        if not torch.is_grad_enabled():
            return
        for argument in self._given:
            if argument.whole.requires_grad:
                self._enter(argument)
        if self._entered:
            swap = self._entered
            self.parts = [map_tensors(lambda t: swap.get(id(t), t), part) for part in parts]

    def _enter(self, argument: _Argument) -> None:
        leaves: list[Tensor | None] = []
        for part in argument.parts:
            leaf = None if part is None else part.data.requires_grad_()
            if part is not None and leaf is not None:
                # Not the leaf itself, which nobody may change in place.
                self._entered[id(part)] = _Alias.apply(leaf)  # type: ignore[no-untyped-call]
            leaves.append(leaf)
        self.leaves.append(_Argument(argument.whole, leaves))

    def note_writes(self) -> None:
        """Tell the arguments' version counters what the shards wrote, and remember them.

        Each part has a counter of its own: a write in one shard must not break the others.

        Raises:
            RuntimeError: a shard wrote to one that requires a gradient: the graph outside, which
                made it, cannot know.
        """
        for whole, parts in self._given:
            if any(part is not None and part is not whole and part._version for part in parts):
                torch.autograd.graph.increment_version(whole)
        if any(entered._version for entered in self._entered.values()):
            raise RuntimeError(
                "the forward changes, in place, an argument that requires a gradient: in "
                "DataParallel that change would be lost to the graph that made the argument. "
                "Pass a clone (`wrapped(x.clone())` does not do: the clone requires a gradient, "
                "too), or begin the forward with an operation that is not in place"
            )
        if torch.is_grad_enabled():
            wholes = [whole for whole, _ in self._given if not whole.is_inference()]
            self._versions = [(weakref.ref(whole), whole._version) for whole in wholes]
        # The graph keeps of the arguments what it needs, no more.
        self._given, self._entered, self.parts = [], {}, []

    def check(self) -> None:
        """Raise if an argument was changed in place since the forward, as autograd does."""
        for reference, version in self._versions:
            whole = reference()
            if whole is not None and whole._version != version:
                raise RuntimeError(
                    "an argument of DataParallel, of shape "
                    f"{tuple(whole.shape)}, has been modified by an inplace operation after the "
                    "forward and before its backward: change a clone of it"
                )
