from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

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


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_sequence_is_cut_by_packing_its_parts_anew(enforce_sorted: bool) -> None:
    rows = [torch.arange(4.0), torch.arange(3.0) + 10, torch.arange(2.0) + 20]
    if not enforce_sorted:
        rows = [rows[2], rows[0], rows[1]]
    packed = pack_sequence(rows, enforce_sorted=enforce_sorted)
    assert batch_size(packed) == 3
    assert batch_size((packed, torch.zeros(3))) == 3
    first, second = cut({"text": packed}, [1, 2])
    assert [row.tolist() for row in unpack_sequence(first["text"])] == [rows[0].tolist()]
    assert [row.tolist() for row in unpack_sequence(second["text"])] == [
        row.tolist() for row in rows[1:]
    ]


def test_public_extension_points_refuse_what_nobody_registered() -> None:
    with pytest.raises(TypeError, match=r"samples_of\.register\(object"):
        samples_of(object())
