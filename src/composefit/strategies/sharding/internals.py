"""Where this package reaches into FSDP2's private parts, all of it in one file.

Gradients are wanted of the *unsharded* leaves of some parameters and of no others. FSDP2 keeps them
in `_unsharded_param`, within groups that it keeps in the state of each sharded module; neither is
public. A test pins both, and says what to do when they go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter


class ShardedParameter:
    """A parameter of which each rank has some rows.

    Attributes:
        parameter: the sharded one, a `DTensor`: what the module shows between calls and what
            optimizers hold.
        leaf: the whole one, which stands in the module while it is called, and is a leaf of the
            graph. The same object for good; its memory comes and goes.
        version: the leaf's version counter; gathering does not move it, updates are made to.
        rows: how many rows (of dimension 0) each rank has, the last ones perhaps fewer.
    """

    def __init__(self, fsdp_param: Any, group: Group) -> None:
        self.parameter: Parameter = fsdp_param.sharded_param
        self.leaf: Parameter = fsdp_param._unsharded_param
        self.group = group
        spec = _dtensor(self.parameter)
        if spec.placements != (Shard(0),):
            raise RuntimeError(
                f"a parameter of shape {tuple(self.parameter.shape)} is sharded as "
                f"{spec.placements}; FullySharded adds up gradients of parameters that are cut in "
                "dimension 0 over one mesh: leave shard_placement_fn and further meshes out"
            )
        self.rows: int = fsdp_param.padded_sharded_param_size[0]
        self.version = self.leaf._version

    def local(self, numbers: Tensor) -> DTensor:
        """This rank's rows of a tensor like the parameter, out of a flat one that may be padded."""
        own = _dtensor(self.parameter)._local_tensor.shape
        return of_rows(numbers[: own.numel()].view(own), self.parameter)


class Group:
    """The parameters of one unit: gathered in one message.

    Attributes:
        units: the module (several where they were sharded together).
        parameters: those of the unit that are not in an inner one.
        reduce_dtype: what their gradients are added up in; None for their own dtype.
    """

    def __init__(self, fsdp_group: Any) -> None:
        self._fsdp_group = fsdp_group
        self.units: tuple[nn.Module, ...] = tuple(fsdp_group.modules)
        self.parameters = [ShardedParameter(one, self) for one in fsdp_group.fsdp_params]
        self.reduce_dtype: torch.dtype | None = fsdp_group.mp_policy.reduce_dtype

    @property
    def busy(self) -> bool:
        """Whether something was interrupted within the unit."""
        return self._fsdp_group._training_state is not TrainingState.IDLE

    def gather_by(self, gathering: Any) -> None:
        """Have weights gathered by this (FSDP2's `AllGather`)."""
        self._fsdp_group._all_gather_comm = gathering

    def reshard(self) -> None:
        """Give the whole parameters' memory back, if there is any."""
        if not self._fsdp_group.is_sharded:
            self._fsdp_group._to_sharded()

    def refuse_writes(self) -> None:
        """Refuse what somebody has written into whole parameters, since it would be lost.

        Raises:
            RuntimeError: it says where the parameters can be written.
        """
        for one in self.parameters:
            if one.leaf._version != one.version:
                one.version = one.leaf._version
                raise RuntimeError(
                    f"a parameter of shape {tuple(one.leaf.shape)} of a sharded "
                    f"{type(self.units[0]).__name__} was written while it was gathered, between "
                    "its call and its update, where it is a copy: write it in "
                    "on_after_optimizer_step of its own optimizer, or between steps"
                )

    def keep_after_backward(self, keep: bool) -> None:
        """Whether the whole parameters stay after a backward through the unit."""
        self._fsdp_group.reshard_after_backward = not keep


def groups_of(module: nn.Module) -> Iterator[Group]:
    """The groups of all units within a module, in the order of its modules."""
    seen: set[int] = set()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield Group(group)


def roots_of(module: nn.Module) -> list[FSDPModule]:
    """The outermost units."""
    found: list[FSDPModule] = []
    for child in module.children():
        found += [child] if isinstance(child, FSDPModule) else roots_of(child)
    return list(dict.fromkeys(found))


def gather_once(roots: Sequence[FSDPModule]) -> None:
    """Let every unit make its leaves, which are the same objects from then on.

    Outside of inference mode: leaves that are made in a validation before the training could not
    be trained.
    """
    with torch.inference_mode(False):
        for root in roots:
            root._get_fsdp_state()._lazy_init()  # else the first inner unit would be a root
            for part in root.modules():  # type: ignore[attr-defined]
                if isinstance(part, FSDPModule):
                    part.unshard()
                    part.reshard()


def settle(roots: Sequence[FSDPModule]) -> None:
    """Bring units back to between two steps, whatever was going on."""
    for root in roots:
        root.reset_iter_state()


def forget(module: nn.Module) -> None:
    """Let a module be sharded anew that once was."""
    _composable_state._module_state_mapping.pop(module, None)


def of_rows(rows: Tensor, like: Tensor) -> DTensor:
    """A tensor that is sharded as another, of this rank's rows; quicker than `from_local`."""
    return DTensor(rows, _dtensor(like)._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _dtensor(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter
