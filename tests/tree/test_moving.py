import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from composefit.tree import move
from tests.tree.values import CPU, Encoding, Graph, marked_batch, tensors_in

META = torch.device("meta")  # stands for any other device: no memory, but `to` really changes it


class Blocking:
    def to(self, device: torch.device) -> tuple[str, torch.device]:
        return ("moved", device)


@pytest.mark.parametrize("seed", range(40))
def test_move_reaches_every_tensor_and_returns_the_same_object_if_nothing_changes(
    seed: int,
) -> None:
    batch = marked_batch(random.Random(seed), 3, 0)
    assert move(batch, CPU) is batch
    moved = move(batch, META)
    assert type(moved) is type(batch)
    assert all(tensor.device == META for tensor in tensors_in(moved))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch)))
    assert all(tensor.device == CPU for tensor in tensors_in(batch))


def test_move_brings_a_batch_back_to_the_cpu() -> None:
    class Elsewhere(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return torch.ones(1)

    batch = [torch.zeros(1), torch.zeros(1).as_subclass(Elsewhere)]
    assert move(batch, CPU)[1].tolist() == [1.0]


def test_dtype_casts_floating_tensors_only() -> None:
    batch = {
        "half": torch.zeros(2, dtype=torch.float16),
        "double": torch.zeros(2, dtype=torch.float64),
        "int": torch.zeros(2, dtype=torch.int64),
        "bool": torch.zeros(2, dtype=torch.bool),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "packed": pack_sequence([torch.zeros(2)]),
        "numpy": np.zeros(2, dtype=np.float32),
        "size": torch.Size([2]),
        "k": 1.5,
    }
    moved = move(batch, CPU, torch.float64)
    assert moved["half"].dtype == torch.float64
    assert moved["packed"].data.dtype == torch.float64
    assert moved["packed"].batch_sizes.dtype == torch.int64
    for key in ("double", "int", "bool", "complex", "numpy", "size", "k"):
        assert moved[key] is batch[key]


def test_object_with_a_to_of_its_own_moves_itself() -> None:
    moved = move({"graph": Graph(torch.zeros(2)), "blocking": Blocking()}, META)
    assert moved["graph"].x.device == META
    assert moved["graph"].non_blocking
    assert moved["blocking"] == ("moved", META)


def test_encoding_is_moved_without_changing_the_loader_s_object() -> None:
    batch = Encoding({"ids": torch.zeros(2)}, "encodings")
    moved = move(batch, META)
    assert type(moved) is Encoding
    assert moved["ids"].device == META
    assert moved.encodings == "encodings"
    assert batch["ids"].device == CPU


def test_packed_sequence_keeps_its_sizes_on_the_cpu() -> None:
    moved = move([pack_sequence([torch.zeros(3), torch.zeros(2)])], META)[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META
    assert moved.batch_sizes.device == CPU
