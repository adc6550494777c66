from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from composefit.tree import Samples, join
from tests.tree.values import Graph


def test_join_concatenates_differentiably_in_order() -> None:
    leaves = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    joined = join([{"y": leaf * 2} for leaf in leaves])["y"]
    assert joined.tolist() == [2.0, 4.0, 6.0]
    (joined * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert [leaf.grad.tolist() for leaf in leaves if leaf.grad is not None] == [[2, 20], [200]]


def test_join_stacks_tensors_without_dimensions_also_of_a_single_part() -> None:
    assert join([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]
    assert join([torch.tensor(1.0)]).tolist() == [1.0]
    assert join([np.array(1.0), np.array(2.0)]).tolist() == [1.0, 2.0]


def test_join_keeps_equal_constants_and_refuses_others() -> None:
    nan = float("nan")
    assert join([{"k": 3, "n": None}, {"k": 3, "n": None}]) == {"k": 3, "n": None}
    assert join([[torch.zeros(1), nan], [torch.zeros(1), float("nan")]])[1] is nan
    with pytest.raises(ValueError, match=r'output\["k"\] to be equal .* 3 and 4; return a tensor'):
        join([{"k": 3}, {"k": 4}])


def test_join_extends_lists_of_samples_of_any_length() -> None:
    boxes = [{"box": torch.zeros(n, 4)} for n in (2, 0, 3)]
    assert join([boxes[:2], boxes[2:]]) == boxes
    assert join([["a", "b"], ["c", "d"]]) == ["a", "b", "c", "d"]
    ragged = [torch.zeros(2), torch.zeros(3), torch.zeros(4), torch.zeros(5)]
    assert join([ragged[:2], ragged[2:]]) == ragged


def test_known_sizes_settle_whether_single_items_are_samples() -> None:
    one, two = [{"box": torch.zeros(2, 4)}], [{"box": torch.zeros(3, 4)}]
    assert join([one, two], sizes=[1, 1]) == one + two
    assert len(join([one, two], sizes=[2, 3])) == 1


def test_outputs_of_time_first_parts_are_joined_where_their_samples_are() -> None:
    parts = [(torch.zeros(5, 2, 3), torch.zeros(2, 3)), (torch.ones(5, 1, 3), torch.ones(1, 3))]
    sequences, scores = join(parts, 1, sizes=[2, 1])
    assert sequences.shape == (5, 3, 3)
    assert sequences[0, :, 0].tolist() == scores[:, 0].tolist() == [0, 0, 1]
    square = [torch.zeros(2, 2), torch.ones(2, 2)]
    for leading, shape in (({(5,)}, (4, 2)), ({(2,)}, (2, 4)), (set(), (2, 4))):
        assert join(square, 1, sizes=[2, 2], leading=leading).shape == shape
    with pytest.raises(ValueError, match=r"a dimension 1 to join along .* shapes \(4,\), \(6,\)"):
        join([torch.zeros(4), torch.zeros(6)], 1, sizes=[2, 1])


def test_tensors_that_are_not_alike_are_structure_whatever_they_count() -> None:
    # As many of them as a part has samples, counting something else: nodes.
    joined = join([(torch.zeros(9, 4), torch.zeros(9)) for _ in range(2)], sizes=[2, 2])
    assert [part.shape[0] for part in joined] == [18, 18]


def test_samples_are_chained_whatever_they_hold() -> None:
    heads = [{"y": torch.zeros(2)}, {"y": torch.ones(2)}]
    assert len(join([heads, heads], sizes=[2, 2])) == 2
    joined = join([Samples(heads), Samples(heads)], sizes=[2, 2])
    assert type(joined) is Samples
    assert joined == heads + heads


def test_join_takes_dicts_filled_in_another_order() -> None:
    joined = join(
        [{"a": torch.zeros(1), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.zeros(1)}]
    )
    assert joined["a"].tolist() == [0.0, 0.0]
    assert joined["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one part"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "output to have the same entries"),
        ([{"a": torch.zeros(1)}, {"a": None}], r'output\["a"\] to be of one type'),
        ([torch.zeros(1), torch.zeros(1, 2)], r"shapes \(1,\), \(1, 2\)"),
        ([torch.zeros(1), torch.tensor(1.0)], r"shapes \(1,\), \(\)"),
    ],
)
def test_parts_that_differ_are_refused(parts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(parts)
    with pytest.raises(ValueError, match="one size for each of 1 parts, got 2"):
        join([torch.zeros(1)], sizes=[1, 1])


def test_objects_that_nobody_can_join_are_named() -> None:
    packed = [pack_sequence([torch.zeros(2)]) for _ in range(2)]
    with pytest.raises(TypeError, match=r"output\[0\] is a .*PackedSequence"):
        join([[part] for part in packed])
    with pytest.raises(TypeError, match=r"output is a .*Graph"):
        join([Graph(torch.zeros(1)), Graph(torch.zeros(1))])
