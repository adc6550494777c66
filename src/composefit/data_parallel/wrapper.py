"""The wrapper.

    forward:   cut the arguments -> each shard through a replica, in its lane -> join the outputs
    backward:  cut the outputs' gradient -> each shard's own graph, in its lane -> add up, in order

The shards' graphs hang together in one `autograd.Function`. Autograd would walk them one after
another in the thread that calls for the backward; behind the function each is walked in its lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from composefit.data_parallel.arguments import Arguments
from composefit.data_parallel.graph import Seam
from composefit.data_parallel.lanes import Pool, here, seeded
from composefit.replicas import merge
from composefit.strategies import Strategy
from composefit.tree import batch_size, cut, even_sizes


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
    from torch's default generator, so `torch.manual_seed` makes them reproducible; what Python and
    NumPy draw globally depends on which thread comes first. Hooks on submodules run once per shard,
    in its thread.

    The wrapper is transparent: `state_dict` and the names of parameters are those of the module,
    and attributes and methods are read from it and set on it. A method called so, such as
    `wrapped.encode(x)`, is the module's own, and runs in the calling thread alone.

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
        >>> import torch
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
        self._pool = Pool.of(threads, strategy)
        self._home = id(self)
        self.module = module
        self.register_load_state_dict_pre_hook(_enter_module)  # type: ignore[no-untyped-call]

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
        inside = self._home != id(self) or here.in_lane
        if inside or pool.strategy.lanes == 1 or not (args or kwargs):
            return self.module(*args, **kwargs)
        batch: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
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
        arguments = Arguments(batch, parts, dim)
        crew = self._pool.hire(self.module, len(sizes))
        outputs: list[Any] = [None] * len(sizes)

        def run(i: int) -> None:
            part = arguments.parts[i]
            named = {name: value for name, value in part.items() if isinstance(name, str)}
            unnamed = [value for name, value in part.items() if not isinstance(name, str)]
            outputs[i] = crew.replicas[i].module(*unnamed, **named)

        try:
            with seeded(crew.streams[: len(sizes)]):
                self._pool.each(len(sizes), run, crew, f"forward of {self._name()}")
            arguments.note_writes()
            merge(self.module, crew.replicas[: len(sizes)], [float(size) for size in sizes])
        except BaseException:
            self._pool.dismiss(crew)
            raise
        seam = Seam(self._pool, crew, arguments, f"backward of {self._name()}")
        return seam.join(outputs, sizes)

    def close(self) -> None:
        """Stop the threads. A later call or backward starts them again."""
        self._pool.close()

    # -- transparency --------------------------------------------------------------------------

    def _name(self) -> str:
        return f"DataParallel({type(self.module).__name__})"

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wrapped module's: parameters and buffers are named as without the wrapper."""
        yield from self.module.named_modules(memo, prefix, remove_duplicate)

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
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pool = Pool.of(*self._arguments)
        self._home = id(self)


def _enter_module(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where the wrapper is itself a child, `load_state_dict` looks for the child's own name."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name[len(prefix) :]}"] = state.pop(name)
