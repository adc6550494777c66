from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from composefit.tree import batch_size, cut, samples_of, split


class Rows:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


def test_custom_type_says_how_it_is_sized_and_split() -> None:
    @samples_of.register
    def _(value: Rows) -> int:
        return value.rows.shape[1]

    @split.register
    def _(value: Rows, sizes: Sequence[int]) -> list[Rows]:
        return [Rows(rows.data) for rows in value.rows.split(list(sizes), 1)]

    batch = {"rows": Rows(torch.zeros(5, 3)), "y": torch.zeros(3)}
    assert batch_size(batch) == batch_size(batch["rows"]) == 3
    assert [part["rows"].rows.shape for part in cut(batch, [1, 2])] == [(5, 1), (5, 2)]
    with pytest.raises(ValueError, match=r'batch\["rows"\] has 3 samples, .*batch\["y"\] has 4'):
        batch_size(batch | {"y": torch.zeros(4)})


class Constant:
    pass


def test_custom_type_without_samples_is_replicated() -> None:
    samples_of.register(Constant, lambda value: None)
    constant = Constant()
    assert [part["c"] for part in cut({"x": torch.zeros(2), "c": constant}, [1, 1])] == [
        constant,
        constant,
    ]


class Broken:
    pass


def test_fault_in_a_registered_split_names_the_leaf() -> None:
    samples_of.register(Broken, lambda value: 2)
    with pytest.raises(TypeError, match=r"composefit\.tree\.split\.register\(Broken") as caught:
        cut({"broken": Broken()}, [1, 1])
    assert 'batch["broken"]' in caught.value.__notes__[0]

    split.register(Broken, lambda value, sizes: [value])
    with pytest.raises(ValueError, match=r"one part for each of the 2 sizes, got 1"):
        cut({"broken": Broken()}, [1, 1])


def test_packed_sequence_has_a_size_but_is_not_cut() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert batch_size(packed) == 2
    assert batch_size((packed, torch.zeros(2))) == 2
    with pytest.raises(TypeError, match=r"PackedSequence.*LoopModule\.scatter_batch") as caught:
        cut({"text": packed}, [1, 1])
    assert 'batch["text"]' in caught.value.__notes__[0]


def test_public_extension_points_refuse_what_nobody_registered() -> None:
    with pytest.raises(TypeError, match=r"samples_of\.register\(object"):
        samples_of(object())
