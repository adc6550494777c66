"""`FullySharded`: parameters, gradients and optimizer state cut over the ranks, by FSDP2.

FSDP2 gathers a unit's weights when it is called, in forward and backward, and frees them again.
The gradients are not left to it: its reduction hangs on hooks that a backward of *some* parameters
skips, which is silently wrong. They are taken, like everywhere, with `torch.autograd.grad` with
respect to the named optimizer's parameters, that is, to the whole leaves which stand for them in
the graph, and each rank gets its rows of their sum (`sharding.reduction`).

Two more things make that exact. Gathered anew, weights keep their version counter, so that a graph
from before an update would silently go through the new ones: it is moved after every update, and
autograd's own check holds. And a backward that makes a graph (a gradient penalty's) would lose the
weights which that graph goes through: of the units that it reaches they stay until the update.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from composefit.lockstep.gradients import Gradients
from composefit.optimizers import clip, needs_closure
from composefit.ranks.reduction import GradientReducer
from composefit.ranks.world import World
from composefit.strategies.distributed import Distributed
from composefit.strategies.sharding import norms, state
from composefit.strategies.sharding.internals import (
    Group,
    ShardedParameter,
    forget,
    gather_once,
    groups_of,
    roots_of,
    settle,
)
from composefit.strategies.sharding.reduction import ShardedReducer
from composefit.strategies.sharding.stepping import step_locally, step_whole
from composefit.strategies.sharding.undoing import Before
from composefit.strategies.sharding.units import Policy, Units, check_policy, choose_units


class FullySharded(Distributed):
    """One process per device, each with a part of every parameter, gradient and optimizer state.

    For models that do not fit on one device. What is trained is what every other strategy trains:
    several optimizers, clipping by the norm over all ranks, and accumulation included. Steps with
    a gradient penalty (double backward) are exact too, but hold the weights they go through whole
    until the update.

    Accumulated gradients are added up whole and sent once per update, so with several shards in
    time a rank holds the whole gradients of one optimizer; with one, those of two units at most.

    Args:
        processes: how many; None as for `Distributed`.
        policy: what is gathered together. Every child of the module is a unit (of a list, every
            item), and within it every module of at least so many parameters (an int), or of these
            types. None: what the module's `configure_sharding` says, else
            `sharding.units.DEFAULT_SIZE`. Parameters of the module itself and those shared by
            several units stay whole on every rank.
        mixed_precision: a dtype such as `torch.bfloat16`, in which weights are gathered and units
            compute (inputs are cast, results are float32 again, gradients are added up in float32,
            optimizers keep the parameters' own dtype), or torch's `MixedPrecisionPolicy`.
        activation_checkpointing: innermost units keep no activations and compute them again in
            the backward.
        reshard_after_forward: True: weights are freed after a unit's forward and gathered again in
            its backward. False: they stay until then. None: those of outermost units stay, which
            the backward needs first. Without gradients they are always freed.
        accelerator, backend, timeout: as for `Distributed`.

    Raises:
        TypeError, ValueError: an argument cannot be meant.
        RuntimeError: torch is older than 2.13, with which this was tested.

    Source: `torch.distributed.fsdp.fully_shard` (FSDP2); the idea is ZeRO's, Rajbhandari et al.
    2020, arXiv:1910.02054.
    """

    #: Ranks call units together: each runs as many shards, and a spare one's backward, too.
    together = True
    shards_state = True

    def __init__(
        self,
        processes: int | None = None,
        policy: Policy = None,
        mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
        activation_checkpointing: bool = False,
        reshard_after_forward: bool | None = None,
        accelerator: str = "auto",
        backend: str = "auto",
        timeout: float = 100.0,
    ) -> None:
        super().__init__(processes, accelerator, backend, timeout)
        if not hasattr(FSDPModule, "reset_iter_state"):
            raise RuntimeError(
                f"FullySharded needs torch 2.13 or later, and this is {torch.__version__}: upgrade "
                "torch, or use Distributed"
            )
        self.policy = check_policy(policy)
        self.mixed_precision = _precision(mixed_precision)
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward
        self._begin()

    def _begin(self) -> None:
        """With nothing placed yet."""
        self._groups: WeakKeyDictionary[nn.Module, list[Group]] = WeakKeyDictionary()
        self._before: WeakKeyDictionary[nn.Module, Before] = WeakKeyDictionary()
        self._by_parameter: dict[int, ShardedParameter] = {}
        self._by_leaf: dict[int, ShardedParameter] = {}
        self._held: set[Group] = set()
        self._mesh: DeviceMesh | None = None
        self._sums: dist.ProcessGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that a run launches: without what is placed here."""
        working = ("_groups", "_before", "_by_parameter", "_by_leaf", "_held", "_mesh", "_sums")
        return {n: value for n, value in super().__getstate__().items() if n not in working}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process."""
        self.__dict__.update(state)
        self._begin()

    # -- placement -----------------------------------------------------------------------------

    def place(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Cut the module over the ranks, with the numbers that it has on rank 0; once.

        Unit by unit, so that a device never holds more than its part and one whole unit.
        """
        world = self.world
        if module in self._groups:
            return
        if world is None:
            super().place(module, dtype)
            return
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]
        world.agree(f"the module of parameters {shapes}")
        units = choose_units(module, self.policy)
        before = Before(module)
        if units is not None:
            self._shard(world, units, dtype)
        self.inner.place(module, dtype)
        rest = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, DTensor)]
        with torch.no_grad():
            world.send_from_first_([tensor.detach() for tensor in rest])
        if isinstance(module, FSDPModule):
            raise RuntimeError(
                f"{type(module).__name__} itself was sharded with fully_shard: its step uses its "
                "children, so that its own weights would not be there; shard the children"
            )
        # It warns of an in-place operation on a view that a unit returns, which loses the hook that
        # gathers its weights again. Here that is no wrong gradient: what is not there raises.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        gather_once(roots_of(module))
        groups = list(groups_of(module))
        recurrent: set[int] = set()
        for group in groups:
            for one in group.parameters:
                self._by_parameter[id(one.parameter)] = one
                self._by_leaf[id(one.leaf)] = one
            self._prepare(world, group, recurrent)
        self._groups[module] = groups
        before.empty_({id(parameter): None for parameter in module.parameters()})
        self._before[module] = before

    def _shard(self, world: World, units: Units, dtype: torch.dtype | None) -> None:
        mesh, whole = self._own_mesh(world), set(units.whole)
        outer = _outermost(units.modules)
        for unit in units.modules:
            innermost = not any(isinstance(part, FSDPModule) for part in unit.modules())
            unit.to(self.device, dtype)
            own = [p for p in unit.parameters() if p not in whole and not isinstance(p, DTensor)]
            for parameter in own:
                if not parameter.is_contiguous():  # a layout in memory, not what is trained
                    parameter.data = parameter.data.contiguous()
            with torch.no_grad():
                world.send_from_first_([parameter.detach() for parameter in own])
            if self.activation_checkpointing and innermost:
                unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=self.reshard_after_forward,
                mp_policy=self._policy_of(any(unit is one for one in outer)),
                ignored_params=whole,
            )

    def _policy_of(self, outermost: bool) -> MixedPrecisionPolicy:
        given = self.mixed_precision
        if given is None:
            return MixedPrecisionPolicy()
        if isinstance(given, MixedPrecisionPolicy):
            return given
        return MixedPrecisionPolicy(
            param_dtype=given,
            reduce_dtype=torch.float32,
            # What a step computes with a unit's results, a loss say, is in float32.
            output_dtype=torch.float32 if outermost else None,
        )

    def _own_mesh(self, world: World) -> DeviceMesh:
        """The ranks, with a group of their own for weights.

        Where ranks disagree about a gradient, sums travel at other times than elsewhere: weights
        must not wait behind them.
        """
        if self._mesh is None:
            limit = timedelta(seconds=world.timeout)
            backend = dist.get_backend(world.data)
            weights = dist.new_group(backend=backend, timeout=limit)
            assert isinstance(weights, dist.ProcessGroup)
            self._mesh = DeviceMesh.from_group(weights, world.device.type)
            self._sums = dist.new_group(backend=backend, timeout=limit)
        return self._mesh

    def _prepare(self, world: World, group: Group, recurrent: set[int]) -> None:
        group.gather_by(_Gathering(world))
        for unit in group.units:
            unit.register_forward_hook(_Watch(self, group))
            for part in unit.modules():
                if part._parameters and not isinstance(part._parameters, _Shown):
                    # FSDP2 exchanges whole and sharded parameters in this dict.
                    part.__dict__["_parameters"] = _Shown(part._parameters)
                if isinstance(part, nn.RNNBase) and id(part) not in recurrent:
                    recurrent.add(id(part))
                    part.register_forward_pre_hook(_show_weights)

    # -- gradients -----------------------------------------------------------------------------

    def leaves(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What stands for these parameters in a graph, to take gradients with respect to."""
        found: list[Parameter] = []
        for parameter in parameters:
            one = self._by_parameter.get(id(parameter))
            if one is None:
                found.append(parameter)
                continue
            if one.leaf.requires_grad != parameter.requires_grad:  # unfrozen since its last call
                one.leaf.requires_grad_(parameter.requires_grad)
            found.append(one.leaf)
        return found

    def reducer(self) -> ShardedReducer | GradientReducer:
        """What adds up gradients with respect to leaves over the ranks, one for each driver."""
        assert self.world is not None
        whole = GradientReducer(self.world)
        if self._sums is None:
            return whole
        return ShardedReducer(self.world, self._by_leaf, self._sums, whole)

    def whole_gradients(self, gradients: Gradients) -> Gradients:
        """With all rows, on every rank; all ranks must call it."""
        return [state.everybodys(gradient) for gradient in gradients]

    def own_gradients(self, gradients: Gradients, parameters: list[Parameter]) -> Gradients:
        """This rank's rows, where the parameter is sharded."""
        return [
            None if gradient is None else state.cut_like(gradient, parameter)
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]

    def local(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """This rank's rows of sharded gradients, in the same memory; others as they are."""
        return [norms.local(gradient) for gradient in gradients]

    def agree_found_(self, found: Tensor) -> None:
        """Make a number that tells of non-finite gradients (0: none) the sum of all ranks'."""
        if self.world is not None:
            self.world.add_up_([found])

    def norm(self, gradients: Sequence[Tensor], order: float = 2.0) -> Tensor:
        """The norm of gradients over all ranks, a plain 0-dim tensor; all ranks must call it."""
        if self.world is None:
            return torch.nn.utils.get_total_norm(gradients, order)
        return norms.norm(self.world, gradients, order)

    def clip(
        self, parameters: Sequence[Parameter], limit: float, algorithm: str | None = "norm"
    ) -> None:
        """Clip `.grad` by the norm over all ranks, or by value; all ranks must call it."""
        if self.world is None:
            clip(parameters, limit, algorithm)
        else:
            norms.clip(self.world, parameters, limit, algorithm)

    # -- updates -------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """Each rank its rows; an optimizer that asks for its loss anew gets whole parameters."""
        if closure is not None:
            step_whole(optimizer, closure)
        elif not step_locally(optimizer):
            super().optimizer_step(optimizer)

    def stepped(self, parameters: Sequence[Parameter]) -> None:
        """These parameters have changed: gathered weights are old, and so are graphs."""
        found = [one for p in parameters if (one := self._by_parameter.get(id(p))) is not None]
        for group in dict.fromkeys(one.group for one in found):
            self._release(group)
        torch.autograd.graph.increment_version([one.leaf for one in found])
        for one in found:
            one.version = one.leaf._version

    def end_step(self, module: nn.Module) -> None:
        """Between two steps every unit shows its sharded parameters, also after an error."""
        groups = self._groups.get(module)
        if not groups:
            return
        for group in groups:
            self._release(group)
        if any(group.busy for group in groups):
            settle(roots_of(module))

    def hold(self, group: Group) -> None:
        """Keep a unit's whole weights until its update or the end of the step."""
        self._held.add(group)
        group.keep_after_backward(True)

    def _release(self, group: Group) -> None:
        group.refuse_writes()
        if group in self._held:
            self._held.discard(group)
            group.keep_after_backward(False)
        group.reshard()

    # -- state ---------------------------------------------------------------------------------

    def full_state(self, value: Any) -> Any:
        """State with whole tensors on the CPU of rank 0; all ranks must call it.

        Args:
            value: dicts, lists and tuples, of `module.state_dict()`, `optimizer.state_dict()` and
                whatever else there is.

        Returns:
            On rank 0 the same tree without sharded tensors; on others what was sharded is empty.
        """
        return state.gathered(value, self.world is None or self.world.rank == 0)

    def release(self, module: nn.Module, keep: bool = True) -> dict[int, Parameter]:
        """Make a module an ordinary one again, with whole parameters; all ranks must call it.

        The parameters are the same objects as before the module was placed. Its optimizers still
        hold the sharded ones.

        Args:
            module: was placed by this strategy; another one stays as it is.
            keep: whether this rank wants the numbers; elsewhere parameters are empty.

        Returns:
            By the id of each sharded parameter the whole one that has taken its place.
        """
        before = self._before.pop(module, None)
        if before is None:
            return {}
        self.end_step(module)
        whole: dict[int, Tensor] = {}
        for group in self._groups.pop(module):
            for unit in group.units:
                forget(unit)
            for one in group.parameters:
                del self._by_parameter[id(one.parameter)], self._by_leaf[id(one.leaf)]
                whole[id(one.parameter)] = state.whole(one.parameter, keep, one.parameter.device)
        return before.put_back(whole)

    def load_weights(self, module: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
        """Whole weights as `module.load_state_dict` takes them; each rank has the whole ones."""
        return state.for_module(module, weights)

    def load_optimizer(self, optimizer: Optimizer, kept: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's whole state as its `load_state_dict` takes it."""
        if needs_closure(optimizer):  # it is stepped with whole parameters
            return kept
        return state.for_optimizer(optimizer, kept)


class _Shown(dict[str, Any]):
    """A module's parameters, shared with its replicas: in them too, FSDP2 exchanges them."""

    def copy(self) -> _Shown:
        """Itself."""
        return self


def _show_weights(module: nn.RNNBase, _: Any) -> None:
    """An RNN keeps its weights in a list besides, of which each replica has its own."""
    module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]


class _Watch:
    """A forward hook: a backward through a unit that makes a graph needs its weights again."""

    def __init__(self, strategy: FullySharded, group: Group) -> None:
        self.strategy = strategy
        self.group = group
        self.watched = False

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After the forward of a unit."""
        self.watched = False
        state.map_tensors(self._watch, output)
        if not self.watched:  # no backward will free the weights, and others may come meanwhile
            self.group.reshard()

    def _watch(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad and torch.is_grad_enabled():
            self.watched = True
            tensor.register_hook(self._passed)  # type: ignore[no-untyped-call]
        return tensor

    def _passed(self, gradient: Tensor) -> None:
        if torch.is_grad_enabled():  # create_graph=True
            self.strategy.hold(self.group)


class _Gathering:
    """How weights are gathered: as by default, but a peer that is gone is named."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Gather; on a GPU its stream waits."""
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        self.world.wait(work, "the weights of a sharded module")


def _outermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    return [
        unit
        for unit in units
        if not any(
            other is not unit and any(part is unit for part in other.modules()) for other in units
        )
    ]


def _precision(given: object) -> torch.dtype | MixedPrecisionPolicy | None:
    if given is None or isinstance(given, MixedPrecisionPolicy):
        return given
    if isinstance(given, torch.dtype) and given.is_floating_point:
        return given
    raise TypeError(
        "FullySharded(mixed_precision=...) expects a dtype such as torch.bfloat16, a "
        f"MixedPrecisionPolicy, or None, got {given!r}"
    )
