"""`Distributed` and `MultiGPU`: one process per place, on torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit.lockstep.gradients import Gradients
from composefit.ranks import World, join
from composefit.ranks.environment import found_job
from composefit.strategies.base import Strategy
from composefit.strategies.single_device import SingleDevice


class Distributed(Strategy):
    """Data-parallel over processes: each holds the whole module and some rows of each batch.

    Under `torchrun` or SLURM the process is a rank of that job; started plainly, a run launches the
    processes itself and brings weights, metrics and errors back to the caller. A loader's batch is
    the world's: a rank loads and computes only its rows of it. Gradients are added up in buckets
    while the backward goes on, those of the named optimizer only.

    Args:
        processes: how many to launch; None for one per GPU, or two on a CPU. In a job that was
            launched otherwise its size counts, and a number that differs is an error.
        accelerator: `"cpu"`, `"cuda"` (or `"gpu"`), or `"auto"`: CUDA where there is a GPU for
            each process of this machine.
        backend: of torch.distributed: `"gloo"`, `"nccl"`, or `"auto"`: NCCL on CUDA.
        timeout: seconds that a rank waits for the others before it says which one is missing.
        per_process: the strategy within each rank, such as `ThreadDataParallel(2)`;
            `SingleDevice()` by default.
        sync_batchnorm: normalise over the rows of all ranks (`torch.nn.SyncBatchNorm`, CUDA only).

    Raises:
        ValueError: a number, accelerator or back end that cannot be.

    Example:
        ```python
        trainer = Trainer(strategy=Distributed(processes=2), max_epochs=5)
        trainer.fit(GAN(...), loader)
        ```
    """

    def __init__(
        self,
        processes: int | None = None,
        accelerator: str = "auto",
        backend: str = "auto",
        timeout: float = 100.0,
        per_process: Strategy | None = None,
        sync_batchnorm: bool = False,
    ) -> None:
        name = type(self).__name__
        if processes is not None and (
            not isinstance(processes, int) or isinstance(processes, bool) or processes < 1
        ):
            raise ValueError(f"{name}(processes=...) expects a positive number, got {processes!r}")
        if accelerator not in _ACCELERATORS:
            raise ValueError(
                f"{name}(accelerator=...) must be one of {', '.join(map(repr, _ACCELERATORS))}, "
                f"got {accelerator!r}"
            )
        if backend not in _BACKENDS:
            raise ValueError(
                f"{name}(backend=...) must be one of {', '.join(map(repr, _BACKENDS))}, got "
                f"{backend!r}"
            )
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ValueError(f"{name}(timeout=...) expects seconds, got {timeout!r}")
        if isinstance(per_process, Distributed):
            raise ValueError(
                f"{name}(per_process=...) is what runs within one rank: SingleDevice() or "
                f"ThreadDataParallel(...), got {type(per_process).__name__}"
            )
        if per_process is not None and not isinstance(per_process, Strategy):
            raise TypeError(f"{name}(per_process=...) expects a Strategy, got {per_process!r}")
        self.processes = processes
        self.accelerator = "cuda" if accelerator == "gpu" else accelerator
        self.backend = backend
        self.timeout = float(timeout)
        self.sync_batchnorm = sync_batchnorm
        self._given = per_process
        self._inner: Strategy | None = None
        self._world: World | None = None

    # -- places --------------------------------------------------------------------------------

    @property
    def inner(self) -> Strategy:
        """The strategy within this rank."""
        if self._inner is None:
            self._inner = self._given or SingleDevice(self._own_device())
        return self._inner

    @property
    def lanes(self) -> int:  # type: ignore[override]
        """Those of this rank."""
        return self.inner.lanes

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether the lanes of this rank run at the same time."""
        return self.inner.concurrent

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """That of this rank."""
        return self.inner.device

    @property
    def world(self) -> World | None:  # type: ignore[override]
        """The ranks of the job, which this process joins; None where there is no job yet."""
        if self._world is None:
            job = found_job()
            if job is None:
                return None
            if self.processes not in (None, job.size):
                raise ValueError(
                    f"{type(self).__name__}(processes={self.processes}) is running in a job of "
                    f"{job.size} processes that {job.launcher} has started: leave processes out, "
                    "or start as many"
                )
            self._world = join(self._own_backend(), self.timeout, self.device)
        return self._world

    def processes_to_launch(self) -> int | None:
        """As `Strategy.processes_to_launch`."""
        if found_job() is not None:
            return None
        return self._number()

    def _number(self) -> int:
        if self.processes is not None:
            return self.processes
        if self._own_device().type == "cuda":
            return torch.cuda.device_count()
        return 2

    def _own_device(self) -> torch.device:
        job = found_job()
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.accelerator == "cpu" or (self.accelerator == "auto" and not here):
            return torch.device("cpu")
        if not here:
            raise ValueError(
                f"{type(self).__name__}(accelerator={self.accelerator!r}), and this machine has no "
                "GPU that torch can use: write accelerator='cpu'"
            )
        local = 0 if job is None else job.local_rank
        ranks_here = (self.processes or here) if job is None else job.local_size
        if ranks_here > here:
            if self.accelerator == "auto":
                return torch.device("cpu")
            if self.backend != "gloo":
                raise ValueError(
                    f"{ranks_here} processes on a machine with {here} GPUs: NCCL takes one GPU for "
                    "each. Start as many as there are GPUs, or let them share with backend='gloo'"
                )
        return torch.device("cuda", local % here)

    def _own_backend(self) -> str:
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.device.type == "cuda" else "gloo"

    # -- the contract --------------------------------------------------------------------------

    def open(self) -> None:
        """Join the job."""
        if self._world is not None and self._world.closed:  # after an error: it may be a new one
            self._world = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        world = self.world
        if world is None:
            raise RuntimeError(
                f"{type(self).__name__} runs in several processes, and this is one alone: call "
                "trainer.fit (validate, test, predict, run), which launches them, or start the "
                "script with torchrun"
            )
        self.inner.__enter__()

    def close(self) -> None:
        """Leave the lanes; the job goes on."""
        self.inner.__exit__(None, None, None)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """In the lanes of this rank."""
        self.inner.run(tasks)

    def place(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Bring the module to this rank's device, with the numbers that it has on rank 0."""
        if self.sync_batchnorm:
            self._synchronise_batchnorm(module)
        self.inner.place(module, dtype)
        world = self.world
        if world is None:
            return
        shapes = [(tuple(t.shape), str(t.dtype)) for t in _tensors_of(module)]
        world.agree(f"the module of parameters and buffers {shapes}")
        with torch.no_grad():
            world.send_from_first_([tensor.detach() for tensor in _tensors_of(module)])

    def _synchronise_batchnorm(self, module: nn.Module) -> None:
        """BatchNorm layers become torch's SyncBatchNorm; their parameters stay the same objects."""
        if self.device.type != "cuda":
            raise ValueError(
                "sync_batchnorm=True needs CUDA, as torch.nn.SyncBatchNorm does: on a CPU use "
                "nn.GroupNorm or nn.LayerNorm, which normalise each sample by itself"
            )
        for name, child in list(module.named_children()):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
            setattr(module, name, converted)

    def add_up(self, lanes: Sequence[Gradients], parameters: Sequence[Parameter]) -> Gradients:
        """Over the lanes of this rank; the driver adds up over the ranks."""
        return self.inner.add_up(lanes, parameters)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """On each rank alike."""
        self.inner.optimizer_step(optimizer, closure)

    def describe(self, samples: int) -> str:
        """As `Strategy.describe`: `32 = 2 ranks x 16`."""
        ranks = self._number() if self.world is None else self.world.size
        each = -(-samples // ranks)
        inner = self.inner.describe(each)
        return f"{samples} = {ranks} ranks x {each}" + (
            f", {inner}" if self.inner.lanes > 1 else f" on {self.device.type}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that a run launches: each finds its own place."""
        return {**self.__dict__, "_world": None, "_inner": None, "_sessions": 0, "_jobs": {}}


class MultiGPU(Distributed):
    """`Distributed` on CUDA with NCCL, one process per GPU.

    Args:
        devices: how many GPUs of this machine; `"auto"` or -1 for all.
        backend, timeout, sync_batchnorm: as in `Distributed`.

    Raises:
        ValueError: as many GPUs are not here.
    """

    def __init__(
        self,
        devices: int | str = "auto",
        backend: str = "auto",
        timeout: float = 100.0,
        sync_batchnorm: bool = False,
    ) -> None:
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices in ("auto", -1, "-1"):
            number: int | None = None
        elif isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
            number = devices
        else:
            raise ValueError(f"MultiGPU(devices=...) expects 'auto' or a number, got {devices!r}")
        if not here or (number or 1) > here:
            raise ValueError(
                f"MultiGPU(devices={devices!r}), and torch sees {here} GPUs here: write "
                "Distributed(processes=..., accelerator='cpu') for processes on a CPU"
            )
        super().__init__(number, "cuda", backend, timeout, None, sync_batchnorm)


_ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
_BACKENDS = ("auto", "gloo", "nccl")


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]
