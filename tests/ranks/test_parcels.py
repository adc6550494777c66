"""Values that go to another process as a file; here they are read in the same one."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composefit.ranks.parcels import culprit, pack, unpack


def sent(tmp_path: Path, *values: Any) -> list[Any]:
    pack(tmp_path / "parcel", values)
    return unpack(tmp_path / "parcel")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.empty(0, 3),
        torch.tensor(3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([1, 2], dtype=torch.uint32),
        torch.eye(2).to_sparse(),
        torch.tensor([1 + 2j]),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_tensors_arrive_as_they_are(tmp_path: Path, tensor: torch.Tensor) -> None:
    (got,) = sent(tmp_path, tensor)
    assert got.dtype == tensor.dtype
    assert got.layout == tensor.layout
    assert torch.equal(got.to_dense(), tensor.to_dense())
    if tensor.layout == torch.strided:
        assert got.stride() == tensor.stride()


def test_what_shares_memory_still_does_across_values(tmp_path: Path) -> None:
    base = torch.zeros(4)
    module = nn.Linear(2, 2)
    module.tied = module.weight
    got, view, linear = sent(tmp_path, base, {"view": base[1:]}, module)
    got.fill_(1)
    assert torch.equal(view["view"], torch.ones(3))
    assert linear.tied is linear.weight
    assert isinstance(linear.weight, nn.Parameter)


def test_what_has_no_module_to_be_imported_from_comes_along(tmp_path: Path) -> None:
    base = 3

    class Local:
        def value(self) -> int:
            return base

    function, one = sent(tmp_path, lambda x: x + base, Local())
    assert function(4) == 7
    assert one.value() == 3


def test_a_weak_reference_still_points_to_its_object(tmp_path: Path) -> None:
    class Owner:
        pass

    owner, gone = Owner(), Owner()
    alive, dead = weakref.ref(owner), weakref.ref(gone)
    del gone
    got, (points, points_nowhere) = sent(tmp_path, owner, (alive, dead))
    assert points() is got
    assert points_nowhere() is None


def test_the_innermost_part_is_named() -> None:
    found = culprit({"a": [1, (x for x in "ab")]}, "given")
    assert found is not None
    assert found[0] == "given['a'][1]"

    module: Any = nn.Sequential(nn.Linear(1, 1), nn.Identity())
    assert culprit(module, "module") is None
    module[1].guard = threading.Lock()
    found = culprit(module, "module")
    assert found is not None
    assert found[0] == "module.1.guard"

    guard = threading.Lock()
    loader = DataLoader(TensorDataset(torch.ones(2)), collate_fn=lambda rows: (rows, guard))
    found = culprit(loader, "train_dataloaders")
    assert found is not None
    assert found[0] == "guard (in train_dataloaders.collate_fn)"


def test_a_variable_that_a_function_closes_over_is_named() -> None:
    guard = threading.Lock()
    found = culprit([lambda: guard], "hooks")
    assert found is not None
    assert found[0] == "guard (in hooks[0])"
    assert found[1] is guard


def test_what_an_object_leaves_out_itself_is_no_culprit() -> None:
    class Careful:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.file = open(__file__)  # noqa: SIM115
            self.file.close()

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "lock": None}

    found = culprit(Careful(), "one")
    assert found is not None
    assert found[0] == "one.file"


def test_arrays_and_random_states_arrive(tmp_path: Path) -> None:
    array, generator = sent(tmp_path, np.arange(3), torch.Generator().manual_seed(7))
    assert array.tolist() == [0, 1, 2]
    assert generator.initial_seed() == 7
