"""The contract of a strategy: places, and how to run a function in each of them.

Order, weights, denominators and replicas are the driver's; epochs, callbacks and loggers are
nobody's business here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit.lockstep import gradients
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.gradients import Gradients
from composefit.losses import Loss
from composefit.optimizers import clip
from composefit.precision import Precision
from composefit.ranks import World
from composefit.ranks.reduction import GradientReducer, Reducer
from composefit.strategies import stepping
from composefit.updates import LossAndGradient

LossFunction: TypeAlias = Callable[[Any, Any], "Tensor | Loss"]


class Strategy(ABC):
    """Where and how the shards of a step are run.

    A new strategy says how many lanes it has and where, runs tasks in them, and may do better than
    the defaults in adding up gradients and stepping optimizers.

    Attributes:
        lanes: into how many shards a batch is cut in space.
        concurrent: whether the lanes run at the same time.
        device: where parameters and batches are.
        world: the ranks of the job; None where this process is all.
        together: every rank runs as many shards as the others, forward and backward, also where
            it has no samples for them.
        shards_state: a checkpoint is a folder to which each rank writes its part.
    """

    lanes: int = 1
    concurrent: bool = False
    device: torch.device = torch.device("cpu")
    world: World | None = None
    together: bool = False
    shards_state: bool = False

    _sessions: int = 0

    # -- the contract --------------------------------------------------------------------------

    @abstractmethod
    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run task i in lane i, always the same place for the same i; return when all have ended.

        Tasks raise nothing: what goes wrong in one they keep for the driver.
        """

    def open(self) -> None:  # noqa: B027 (a strategy without threads has nothing to do)
        """Get what the lanes need (threads); called once before the first `run`."""

    def close(self) -> None:  # noqa: B027
        """Give it back; called once after the last `run`, also after an error."""

    def place(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Bring a module's parameters and buffers to their places, in place."""
        module.to(self.device, dtype)

    def add_up(self, lanes: Sequence[Gradients], parameters: Sequence[Parameter]) -> Gradients:
        """The sum of the lanes' gradients, in the order of the lanes; may use up the first."""
        total, *others = lanes
        for other in others:
            gradients.add_(total, other, parameters)
        return total

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """Step an optimizer whose parameters have their total gradients.

        Args:
            optimizer: is stepped.
            closure: where the loss is a function: gives that loss, and at each further call loss
                and gradients anew. The same on every rank.
        """
        stepping.step(optimizer, closure)

    # -- where parameters are not whole in this process: see `FullySharded` ---------------------

    def leaves(self, parameters: list[Parameter]) -> list[Parameter]:
        """What stands for these parameters in a graph, to differentiate with respect to."""
        return parameters

    def reducer(self) -> Reducer:
        """What adds up gradients over the ranks; each driver has one."""
        assert self.world is not None
        return GradientReducer(self.world)

    def whole_gradients(self, gradients: Gradients) -> Gradients:
        """Total gradients as whole tensors, for the step's own code; all ranks must call it."""
        return gradients

    def own_gradients(self, gradients: Gradients, parameters: list[Parameter]) -> Gradients:
        """The part of whole gradients that this process steps these parameters with."""
        return gradients

    def local(self, gradients: list[Tensor]) -> list[Tensor]:
        """This process's part of total gradients, in the same memory."""
        return gradients

    def agree_found_(self, found: Tensor) -> None:  # noqa: B027 (total gradients are the same)
        """Make a number that is not zero where a gradient is not finite so on every rank."""

    def norm(self, gradients: Sequence[Tensor], order: float = 2.0) -> Tensor:
        """The norm of total gradients together, 0-dim."""
        return torch.nn.utils.get_total_norm(gradients, order)

    def clip(self, parameters: list[Parameter], limit: float, algorithm: str | None) -> None:
        """Clip `.grad` of these parameters together: `composefit.optimizers.clip`."""
        clip(parameters, limit, algorithm)

    def stepped(self, parameters: list[Parameter]) -> None:  # noqa: B027
        """These parameters have changed."""

    def full_state(self, value: Any) -> Any:
        """A state with whole tensors, for a file that every strategy reads; on rank 0."""
        return value

    def release(self, module: nn.Module, keep: bool = True) -> Mapping[int, Tensor]:
        """Make a module that was placed an ordinary one again; all ranks must call it.

        Args:
            module: it is changed in place.
            keep: whether this rank wants its numbers.

        Returns:
            By the id of each parameter that was sharded, the whole one in its place.
        """
        return {}

    def load_weights(self, module: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
        """Whole weights as `module.load_state_dict` takes them here."""
        return weights

    def load_optimizer(self, optimizer: Optimizer, kept: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's whole state as its `load_state_dict` takes it here."""
        return kept

    def end_step(self, module: nn.Module) -> None:  # noqa: B027
        """A step of this module is over, also after an error."""

    def processes_to_launch(self) -> int | None:
        """How many processes a run has to start for itself; None where it runs in this one."""
        return None

    def describe(self, samples: int) -> str:
        """How a loader's batch is cut, for the summary: `32 = 2 threads x 16`."""
        return f"{samples}"

    # -- built on it ---------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep the lanes open for many steps. Also entered by `with strategy:`."""
        self.__enter__()
        try:
            yield
        finally:
            self._leave()

    def __enter__(self) -> Strategy:
        self._sessions += 1  # first, so that no other thread opens as well
        if self._sessions == 1:
            try:
                self.open()
            except BaseException:
                self._sessions -= 1
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._sessions -= 1
        if self._sessions == 0:
            self.close()

    def gradient(
        self,
        loss_fn: LossFunction,
        module: nn.Module,
        batch: Any,
        parameters: Iterable[Parameter] | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss over all shards and its gradients, for hand-written loops.

        The batch is cut into shards, each runs through `loss_fn` in its lane, and everything is
        reduced: one call is exact data-parallel forward and backward. Call it within
        `with strategy:`, or its threads are made anew each time.

        Args:
            loss_fn: `loss_fn(replica, shard)` returns this shard's loss: a 0-dim tensor (a mean
                over the shard's samples), `Mean`, `Sum`, or a sum of those. It must use `replica`
                where it would use `module`.
            module: any module; what is replicated for the shards (parameters are shared).
            batch: nested tensors with samples in dimension 0.
            parameters: what to differentiate with respect to; all that require a gradient by
                default.

        Returns:
            The reduced loss, detached, 0-dim; and the gradients in the order of `parameters`, None
            for one that no shard reached or that is frozen. `p.grad = g` for each, then
            `optimizer.step()`.

        What the shards draw follows from torch's default generator, so that `torch.manual_seed`
        repeats it. That goes on by one number if they draw, and else stays where it was.

        Raises:
            TypeError: `parameters` is one tensor.
            RuntimeError: the strategy is at it already, in another thread or around this call.
            Whatever `loss_fn` raises, with a note of the shard.
        """
        if isinstance(parameters, Tensor):
            raise TypeError(
                "gradient(parameters=...) expects several parameters, got one tensor: write "
                "parameters=[p]"
            )
        if parameters is None:
            parameters = (p for p in module.parameters() if p.requires_grad)
        wanted = list(parameters)
        places = [i for i, p in enumerate(wanted) if p.requires_grad]
        loss, found = self._job(module).run(loss_fn, [wanted[i] for i in places], batch)
        aligned: list[Tensor | None] = [None] * len(wanted)
        for i, gradient in zip(places, found, strict=True):
            aligned[i] = gradient
        return loss, aligned

    def _job(self, module: nn.Module) -> _GradientJob:
        jobs: OrderedDict[int, _GradientJob] = self.__dict__.setdefault("_jobs", OrderedDict())
        job = jobs.get(id(module))
        if job is None:
            job = jobs[id(module)] = _GradientJob(module, self)
            if len(jobs) > _JOBS_KEPT:
                jobs.popitem(last=False)
        return job


# Replicas are kept for this many modules: a hand-written loop has one or two.
_JOBS_KEPT = 4


class _GradientJob:
    """A module's driver, whose step is to take one gradient."""

    def __init__(self, module: nn.Module, strategy: Strategy) -> None:
        self.loss_fn: LossFunction | None = None
        self.parameters: list[Parameter] = []
        self.found: tuple[Tensor, list[Tensor | None]] | None = None
        self.drew = False
        body = Body(lambda part: partial(self._body, part), 1, "loss_fn", training=True)
        self.driver = Lockstep(module, strategy, body, Precision.of("32"))

    def _body(self, module: nn.Module, shard: Any) -> Generator[Any, Any, None]:
        assert self.loss_fn is not None
        before = torch.get_rng_state()  # this shard's
        # No variable for the loss: it would keep its graph until the other shards have run.
        self.found = yield LossAndGradient(self.loss_fn(module, shard), self.parameters)
        self.drew = self.drew or not torch.equal(torch.get_rng_state(), before)

    def run(
        self, loss_fn: LossFunction, parameters: list[Parameter], batch: Any
    ) -> tuple[Tensor, list[Tensor | None]]:
        if self.loss_fn is not None:
            raise RuntimeError(
                "strategy.gradient is already running for this module, in another thread or around "
                "this call: use another strategy object here"
            )
        self.loss_fn, self.parameters = loss_fn, parameters
        try:
            state = torch.get_rng_state()
            key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            if (world := self.driver.lanes.world) is not None:
                key = int(world.broadcast("the seed of a gradient", key))
            # Draws on an accelerator or from a LoopModule's own streams are not seen.
            self.drew = self.driver.is_loop or self.driver.device_type != "cpu"
            self.driver.seed_anew(key)
            self.driver.step([batch], 0, 0)
            if not self.drew:
                torch.set_rng_state(state)
            assert self.found is not None
            return self.found
        finally:
            self.loss_fn = self.found = None
            self.parameters = []
