"""How many bytes tensors hold: at one moment, and at most."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def size_of(tensor: Tensor) -> int:
    """The bytes of a tensor's numbers; none yet of a lazy module's, both parts of a sparse one."""
    if is_lazy(tensor):
        return 0
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.detach()
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes if tensor.layout is torch.strided else 0


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all these, each taken by itself."""
    return sum(map(size_of, tensors))


def resident(module: nn.Module, optimizers: Iterable[Optimizer]) -> int:
    """What a training holds between its steps: parameters, buffers, state of the optimizers."""
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held.update({id(p): p for p in group["params"]})
        state = tree_iter(list(optimizer.state.values()))
        held.update({id(t): t for t in state if isinstance(t, Tensor)})
    return bytes_of(held.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, from their birth to their death.

    In every thread that the mode is carried into. What an operation needs within itself is not
    seen, nor what was there before.

    Attributes:
        live: bytes alive now.
        peak: the most that were at one moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # A storage may die, and call back, in the midst of the counting.
        self._lock = threading.RLock()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        if made:
            given = {
                storage._cdata
                for t in tree_iter((args, kwargs))
                if isinstance(t, Tensor) and (storage := storage_of(t)) is not None
            }
            for tensor in made:
                storage = storage_of(tensor)
                if storage is not None and storage._cdata not in given:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        with self._lock:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        with self._lock:
            self.live -= size


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """What holds its numbers; None where nothing single does (sparse tensors, wrappers)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class Allocated:
    """The same on an accelerator, from its own allocator, temporaries included.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0

    def __enter__(self) -> Self:
        torch.cuda.synchronize(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return torch.cuda.memory_allocated(self.device) - self.before

    @property
    def peak(self) -> int:
        """The most that were at one moment."""
        return torch.cuda.max_memory_allocated(self.device) - self.before


class Unmeasured:
    """Where nobody can tell."""

    live: int | None = None
    peak: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def meter(device: torch.device) -> LiveBytes | Allocated | Unmeasured:
    """What measures the memory of a step on this device, within its `with`."""
    if device.type == "cuda":
        return Allocated(device)
    return LiveBytes() if device.type == "cpu" else Unmeasured()
