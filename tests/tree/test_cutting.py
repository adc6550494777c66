import collections
import dataclasses
import enum
import itertools
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from composefit.tree import Samples, batch_size, cut, join
from tests.tree.values import CPU, Encoding, Frozen, Graph, Record, marked_batch, tensors_in


class Color(enum.Enum):
    RED = 1


class Tagged(Tensor):
    pass


def marks(value: Any) -> Iterator[list[float]]:
    """The numbers in every leaf that holds samples, without repeats, in order."""
    if isinstance(value, Tensor | np.ndarray):
        yield sorted({float(number) for number in value.reshape(-1)})
    elif isinstance(value, collections.abc.Mapping):
        for key, child in value.items():
            if key == "names":
                yield [float(name) for name in child]
            elif key in ("boxes", "ragged"):
                yield [float(number) for item in child for (number,) in marks(item)]
            else:
                yield from marks(child)
    elif isinstance(value, Record | Frozen):
        yield from marks(value.x)
    elif isinstance(value, tuple | list):
        for child in value:
            yield from marks(child)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, collections.abc.Mapping):
        if isinstance(one, Encoding) and one.encodings != other.encodings:
            return False
        if isinstance(one, collections.defaultdict) and (
            one.default_factory is not other.default_factory
        ):
            return False
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, field.name), getattr(other, field.name))
            for field in dataclasses.fields(one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def random_sizes(rng: random.Random, samples: int) -> list[int]:
    ends = sorted(rng.sample(range(1, samples), rng.randint(0, min(3, samples - 1))))
    return [end - start for start, end in itertools.pairwise([0, *ends, samples])]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("seed", range(150))
def test_any_nesting_is_cut_into_its_samples_and_joined_again(seed: int, dim: int) -> None:
    rng = random.Random(seed)
    samples = rng.randint(1, 9)
    batch = marked_batch(rng, samples, dim)
    sizes = random_sizes(rng, samples)

    assert batch_size(batch, dim) == samples
    parts = cut(batch, sizes, dim)
    leaves = len(list(marks(batch)))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        expected = [float(number) for number in range(start, start + size)]
        assert list(marks(part)) == [expected] * leaves
        start += size
    assert same(join(parts, dim, sizes), batch)


@pytest.mark.parametrize("seed", range(60))
def test_no_part_is_a_copy_and_none_shares_a_version_counter(seed: int) -> None:
    rng = random.Random(seed)
    samples = rng.randint(2, 9)
    batch = marked_batch(rng, samples, 0)
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(batch)}
    parts = cut(batch, [1, samples - 1])
    assert {t.untyped_storage().data_ptr() for part in parts for t in tensors_in(part)} <= memory

    others = [*tensors_in(batch), *tensors_in(parts[0])]
    written = [t for t in tensors_in(parts[1]) if not any(t is other for other in others)]
    before = [tensor._version for tensor in others]
    for tensor in written:
        tensor.mul_(1)
    assert [tensor._version for tensor in others] == before


def test_in_place_operation_on_one_part_does_not_break_the_backward_of_another() -> None:
    weight = torch.ones(2, requires_grad=True)
    first, second = cut(torch.arange(8.0).view(4, 2), [2, 2])
    loss = (first * weight).sum()
    second.mul_(2)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 4.0]


def test_parts_of_a_tensor_that_requires_a_gradient_require_none() -> None:
    for part in cut(torch.zeros(4, requires_grad=True), [2, 2]):
        assert not part.requires_grad
        assert part.grad_fn is None


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_list_of_tensors_of_one_size_is_structure_also_when_as_long_as_the_batch(
    samples: int, kind: type
) -> None:
    batch = kind([torch.zeros(samples, 3), torch.zeros(samples)])
    assert batch_size(batch) == samples
    parts = cut(batch, [1] * samples)
    assert [(type(part), len(part), len(part[0])) for part in parts] == [(kind, 2, 1)] * samples


def test_list_of_tensors_of_other_sizes_is_one_tensor_per_sample() -> None:
    images = [torch.zeros(3), torch.zeros(5), torch.zeros(4)]
    assert batch_size(images) == 3
    assert batch_size({"images": images, "labels": torch.zeros(3)}) == 3
    first, second = cut({"images": images, "labels": torch.zeros(3)}, [2, 1])
    assert [len(image) for image in first["images"]] == [3, 5]
    assert second["images"][0] is images[2]


def test_dicts_per_sample_are_samples_also_when_their_sizes_agree_with_each_other() -> None:
    boxes = [{"box": torch.full((7, 4), float(i))} for i in range(3)]
    first, second = cut((torch.zeros(3, 2), boxes), [1, 2])
    assert first[1] == boxes[:1]
    assert second[1] == boxes[1:]


def test_containers_whose_tensors_all_have_the_batch_s_size_are_structure() -> None:
    batch = [{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2)}]
    parts = cut(batch, [1, 1])
    assert [[len(item["x"]) for item in part] for part in parts] == [[1, 1], [1, 1]]


def test_optional_tensors_per_sample_are_samples() -> None:
    masks = [torch.zeros(5), None, torch.zeros(2)]
    first, second = cut({"y": torch.zeros(3), "mask": masks}, [1, 2])
    assert first["mask"][0] is masks[0]
    assert second["mask"][0] is None
    assert second["mask"][1] is masks[2]


def test_list_of_strings_per_field_is_structure_and_per_sample_is_samples() -> None:
    labels = torch.zeros(3)
    collated = [("a", "b", "c"), ("d", "e", "f")]
    assert cut((labels, collated), [2, 1])[1][1] == [("c",), ("f",)]
    words = [["a", "b"], ["c"], []]
    assert cut((labels, words), [1, 2])[1][1] == [["c"], []]


def test_metadata_without_any_tensor_is_one_item_per_sample() -> None:
    metadata = [{"id": i} for i in range(3)]
    assert cut((torch.zeros(3), metadata), [1, 2])[1][1] == metadata[1:]
    assert cut({"names": ["a", "b"]}, [1, 1]) == [{"names": ["a"]}, {"names": ["b"]}]


def test_objects_of_any_type_in_a_list_as_long_as_the_batch_are_samples() -> None:
    graphs = [Graph(torch.zeros(i)) for i in range(3)]
    parts = cut({"graphs": graphs, "y": torch.zeros(3)}, [1, 2])
    assert parts[1]["graphs"] == graphs[1:]


def test_empty_list_is_replicated() -> None:
    assert [part["extra"] for part in cut({"x": torch.zeros(2), "extra": []}, [1, 1])] == [[], []]


@pytest.mark.parametrize(
    "constant",
    [
        *("text", b"raw", 3, True, 2.5, 1j, None, Color.RED, np.float32(2)),
        *(torch.float16, CPU, torch.Size([3, 4])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_constants_are_replicated(constant: Any) -> None:
    parts = cut({"x": torch.zeros(4), "constant": constant}, [2, 1, 1])
    assert all(part["constant"] is constant for part in parts)


@pytest.mark.parametrize("scalar", [torch.tensor(2.0), np.array(2.0)], ids=["torch", "numpy"])
def test_tensor_without_dimensions_is_replicated_so_that_no_shard_writes_another_s(
    scalar: Any,
) -> None:
    first, second = cut({"x": torch.zeros(2), "scale": scalar}, [1, 1])
    first["scale"] *= 3
    assert float(second["scale"]) == 2.0
    assert float(scalar) == 2.0


def test_batch_dim_counts_samples_along_another_dimension() -> None:
    batch = {"x": torch.zeros(7, 4, 2), "y": torch.zeros(7, 4)}
    assert batch_size(batch, dim=1) == 4
    assert [part["x"].shape for part in cut(batch, [3, 1], dim=1)] == [(7, 3, 2), (7, 1, 2)]


def test_dataclass_is_rebuilt_without_running_its_post_init() -> None:
    record = Record(torch.zeros(3), "text")
    record.total = 5
    parts = cut(record, [1, 2])
    assert [part.total for part in parts] == [5, 5]
    assert len(record.x) == 3


def test_encoding_keeps_its_type_and_attributes_and_the_batch_stays_whole() -> None:
    batch = Encoding({"ids": torch.arange(3)}, "encodings")
    parts = cut(batch, [2, 1])
    assert [type(part) for part in parts] == [Encoding, Encoding]
    assert parts[1].ids.tolist() == [2]
    assert parts[1].encodings == "encodings"
    assert batch["ids"].tolist() == [0, 1, 2]


def test_mapping_that_cannot_be_written_keeps_its_type() -> None:
    parts = cut(types.MappingProxyType({"x": torch.arange(3)}), [2, 1])
    assert isinstance(parts[1], types.MappingProxyType)
    assert parts[1]["x"].tolist() == [2]


def test_tensor_subclass_keeps_its_type_and_attributes() -> None:
    tensor = torch.arange(3).as_subclass(Tagged)
    tensor.tag = "boxes"  # type: ignore[attr-defined]
    part = cut(tensor, [2, 1])[1]
    assert type(part) is Tagged
    assert part.tag == "boxes"
    assert part.tolist() == [2]


def test_sparse_tensor_is_cut_by_rows() -> None:
    dense = torch.arange(6.0).view(3, 2)
    parts = cut(dense.to_sparse(), [1, 2])
    assert [part.layout for part in parts] == [torch.sparse_coo] * 2
    assert torch.equal(torch.cat([part.to_dense() for part in parts]), dense)


def test_tensor_without_the_batch_dimension_is_named() -> None:
    with pytest.raises(ValueError, match=r"a dimension 1"):
        batch_size(torch.zeros(4), dim=1)
    with pytest.raises(ValueError, match=r'batch\["length"\] has shape \(4,\) .*scatter_batch'):
        cut({"x": torch.zeros(7, 4), "length": torch.zeros(4)}, [2, 2], dim=1)


@pytest.mark.parametrize("value", [Graph(torch.zeros(2)), {1, 2}, Path("x"), range(2)])
def test_object_of_unknown_type_is_not_replicated_in_silence(value: Any) -> None:
    batch = {"x": torch.zeros(2), "other": value}
    assert batch_size(batch) == 2
    with pytest.raises(TypeError, match=r'batch\["other"\] is a .*LoopModule\.scatter_batch'):
        cut(batch, [1, 1])


@pytest.mark.filterwarnings("ignore:.*in beta state", "ignore:.*prototype stage")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(2).to_sparse_csr(),
    ],
    ids=["jagged", "nested", "csr"],
)
def test_tensor_that_has_no_slices_names_what_to_override(make: Callable[[], Tensor]) -> None:
    with pytest.raises(TypeError, match=r'batch\["x"\] is a .*LoopModule\.scatter_batch'):
        cut({"x": make()}, [1, 1])


@pytest.mark.parametrize("sizes", [[], [1], [2, 2], [4, -1]])
def test_sizes_must_add_up(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="3 samples, got"):
        cut(torch.zeros(3), sizes)


def test_a_list_said_to_be_samples_is_cut_by_its_items_whatever_their_sizes() -> None:
    images = [torch.full((3, 8, 8), float(i)) for i in range(3)]
    targets = [{"labels": torch.arange(3)} for _ in range(3)]
    assert len(cut((images, targets), [2, 1])[0][0]) == 3  # channels, taken for samples
    first, second = cut((Samples(images), Samples(targets)), [2, 1])
    assert [len(part) for part in (*first, *second)] == [2, 2, 1, 1]
    assert type(first[0]) is Samples
    assert second[0][0] is images[2]
    assert batch_size([Samples(images[:2]), torch.zeros(2)]) == 2
    assert batch_size(Samples([])) == 0
