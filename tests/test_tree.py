import collections
import dataclasses
import enum
import itertools
import random
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from composefit.tree import (
    batch_size,
    cut,
    even_sizes,
    join,
    move,
    samples_of,
    shard_sizes,
    split,
)

CPU = torch.device("cpu")
META = torch.device("meta")  # stands for any other device: no memory, but `to` really changes it


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    x: Any
    y: Any
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    y: Any


class Encoding(collections.UserDict):  # what transformers' BatchEncoding is made like
    def __init__(self, data: dict[str, Any], encodings: str) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device) -> "Encoding":
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:  # what torch_geometric's Data is made like
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, non_blocking: bool = False) -> "Graph":
        moved = Graph(self.x.to(device))
        moved.non_blocking = non_blocking  # type: ignore[attr-defined]
        return moved


class Blocking:
    def to(self, device: torch.device) -> tuple[str, torch.device]:
        return ("moved", device)


class Color(enum.Enum):
    RED = 1


class Tagged(Tensor):
    pass


# --------------------------------------------------------------------------------------------------
# An oracle that knows nothing of the rule: every leaf carries the number of its sample
# --------------------------------------------------------------------------------------------------


def marked_tensor(rng: random.Random, samples: int, dim: int) -> Any:
    shape = [rng.randint(1, 3) for _ in range(dim)] + [samples]
    shape += [rng.randint(1, 3) for _ in range(rng.randint(0, 2))]
    numbers = torch.arange(samples).view([1] * dim + [samples] + [1] * (len(shape) - dim - 1))
    tensor = numbers.expand(shape).to(rng.choice([torch.float32, torch.int64, torch.float64]))
    tensor = tensor.contiguous()
    return tensor.numpy() if rng.random() < 0.2 else tensor


def marked_batch(rng: random.Random, samples: int, dim: int, depth: int = 0) -> Any:
    def inside() -> Any:
        return marked_batch(rng, samples, dim, depth + 1)

    makers = [
        lambda: marked_tensor(rng, samples, dim),
        lambda: {"a": inside(), 3: inside()},
        lambda: collections.OrderedDict(b=inside(), a=inside()),
        lambda: collections.defaultdict(list, a=inside()),
        lambda: Encoding({"ids": inside(), "mask": inside()}, "kept"),
        lambda: (inside(), inside()),
        lambda: [inside(), marked_tensor(rng, samples, dim)],
        lambda: [inside()],
        lambda: Pair(inside(), inside()),
        lambda: Record(inside(), "constant"),
        lambda: Frozen(inside(), None),
        lambda: {"t": inside(), "constant": 7},
        lambda: {"t": marked_tensor(rng, samples, dim), "names": [str(i) for i in range(samples)]},
        lambda: {
            # Boxes per image: other sizes than the batch's along every dimension.
            "t": marked_tensor(rng, samples, dim),
            "boxes": [
                {"box": torch.full([samples + 1 + i % 2] * (dim + 1), float(i))}
                for i in range(samples)
            ],
        },
        lambda: {
            "t": marked_tensor(rng, samples, dim),
            "ragged": tuple(
                torch.full([samples + 1 + i] * (dim + 1), float(i)) for i in range(samples)
            ),
        },
    ]
    # Ragged items need two samples to show that they are ragged.
    count = len(makers) if samples > 1 else len(makers) - 2
    return makers[rng.randrange(count) if depth < 3 else 0]()


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


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, collections.abc.Mapping):
        for child in value.values():
            yield from tensors_in(child)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors_in(child)


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


# --------------------------------------------------------------------------------------------------
# Samples or structure
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "paths"),
    [
        ({"image": [torch.zeros(4)], "label": torch.zeros(5)}, ['["image"][0]', '["label"]', "45"]),
        ([torch.zeros(4, 2), torch.zeros(5)], ["[0]", "[1]", "45"]),
        (Pair(torch.zeros(4), {"a": np.zeros(5)}), [".x", '.y["a"]', "45"]),
        (Record(torch.zeros(4), torch.zeros(5)), [".x", ".y", "45"]),
        ((torch.zeros(4), {7: torch.zeros(5)}), ["[0]", "[1][7]", "45"]),
        ({"x": torch.zeros(4), "n": ["a", "b"]}, ['["x"]', '["n"]', "42"]),
        ({"n": [1, 2], "x": torch.zeros(4)}, ['["n"]', '["x"]', "24"]),
        ({"x": torch.zeros(4), "size": (224, 224)}, ['["x"]', '["size"]', "42"]),
        ({"x": torch.zeros(4), "meta": [{"id": 1}]}, ['["x"]', '["meta"]', "41"]),
        ({"x": torch.zeros(4), "s": [torch.tensor(1)] * 3}, ['["x"]', '["s"]', "43"]),
        ({"x": torch.zeros(4), "r": [torch.zeros(5), torch.zeros(6)]}, ['["x"]', '["r"]', "42"]),
        ({"x": torch.zeros(4), "m": [{"b": torch.zeros(5)}]}, ['["x"]', '["m"][0]["b"]', "45"]),
        (
            {"x": torch.zeros(4), "m": [[torch.zeros(3)] * 4, {"k": 1}]},
            ['["x"]', '["m"][0][0]', "43"],
        ),
        ({"y": torch.zeros(4), "x": [torch.zeros(3, 8)] * 4}, ['["y"]', '["x"][0]', "43"]),
        (
            (torch.zeros(4), [{"b": torch.zeros(5)}, {"b": torch.zeros(6)}]),
            ["[0]", "[1]", "42"],
        ),
    ],
)
def test_leaves_that_disagree_are_named_with_their_sizes(batch: Any, paths: list[str]) -> None:
    one, other, (size, other_size) = paths
    for function in (batch_size, lambda batch: cut(batch, [2, 2])):
        with pytest.raises(ValueError) as caught:
            function(batch)
        message = str(caught.value)
        assert f"batch{one} has {size} samples, but batch{other} has {other_size};" in message
        assert "LoopModule.scatter_batch" in message


@pytest.mark.parametrize("batch", [3, "text", {}, [], (None, 7), torch.tensor(1.0), Path("x")])
def test_batch_that_counts_no_samples_names_what_to_override(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"dimension 0.*batch_size and LoopModule\.scatter_batch"):
        batch_size(batch)


def test_tensor_without_the_batch_dimension_is_named() -> None:
    with pytest.raises(ValueError, match=r"a dimension 1"):
        batch_size(torch.zeros(4), dim=1)
    with pytest.raises(ValueError, match=r'batch\["length"\] has shape \(4,\) .*scatter_batch'):
        cut({"x": torch.zeros(7, 4), "length": torch.zeros(4)}, [2, 2], dim=1)


def test_packed_sequence_has_a_size_but_is_not_cut() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert batch_size(packed) == 2
    assert batch_size((packed, torch.zeros(2))) == 2
    with pytest.raises(TypeError, match=r"PackedSequence.*LoopModule\.scatter_batch") as caught:
        cut({"text": packed}, [1, 1])
    assert 'batch["text"]' in caught.value.__notes__[0]


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


def test_public_extension_points_refuse_what_nobody_registered() -> None:
    with pytest.raises(TypeError, match=r"samples_of\.register\(object"):
        samples_of(object())


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


def possible_parts(groups: int, parts: int) -> Iterator[tuple[int, ...]]:
    for ends in itertools.combinations(range(1, groups), parts - 1):
        yield tuple(end - start for start, end in itertools.pairwise((0, *ends, groups)))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_even_sizes_are_the_evenest_there_are(group: int) -> None:
    for samples, parts in itertools.product(range(1, 14), range(1, 6)):
        sizes = even_sizes(samples, parts, group)
        assert sum(sizes) == samples
        assert len(sizes) == max(1, min(parts, samples // group))
        assert all(end % group == 0 for end in itertools.accumulate(sizes[:-1]))
        assert min(sizes) >= min(group, samples)
        whole = [size // group for size in sizes]
        assert whole == sorted(whole, reverse=True)
        if samples >= group:
            spread = min(max(p) - min(p) for p in possible_parts(samples // group, len(sizes)))
            assert max(whole) - min(whole) == spread


def test_seven_samples_on_four_lanes_leave_no_shard_of_one_if_pairs_stay_together() -> None:
    assert even_sizes(7, 4) == [2, 2, 2, 1]
    assert even_sizes(7, 4, group=2) == [2, 2, 3]
    assert even_sizes(0, 4) == []


def test_shard_sizes_hold_what_they_promise() -> None:
    for samples, lanes, microbatch, group in itertools.product(
        range(0, 20), range(1, 5), range(1, 8), range(1, 4)
    ):
        if microbatch < group:
            continue
        shards = shard_sizes(samples, lanes, microbatch, group)
        assert [sum(lane) for lane in shards] == even_sizes(samples, lanes, group)
        flat = [size for lane in shards for size in lane]
        assert all(1 <= size <= microbatch for size in flat)
        assert all(end % group == 0 for end in itertools.accumulate(flat[:-1]))
        for lane in shards:
            # No more micro-batches than needed: whole groups, then room for what is left over.
            most, (groups, rest) = microbatch // group, divmod(sum(lane), group)
            if groups == 0:
                assert lane == [rest]
                continue
            fewest = -(-groups // most)
            room = any(
                parts[-1] * group + rest <= microbatch and max(parts) <= most
                for parts in possible_parts(groups, fewest)
            )
            assert len(lane) == fewest + (not room)
            if group + rest <= microbatch:
                assert lane[-1] >= group


def test_shard_sizes_without_a_microbatch_are_one_per_lane() -> None:
    assert shard_sizes(7, 3, None) == [[3], [2], [2]]
    assert shard_sizes(2, 4, None) == [[1], [1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even_sizes(-1, 1), "samples of at least 0, got -1"),
        (lambda: even_sizes(1, 0), "parts of at least 1, got 0"),
        (lambda: even_sizes(1, 1, 0), "group of at least 1, got 0"),
        (lambda: shard_sizes(1, 1, 0), "microbatch of at least 1, got 0"),
        (lambda: shard_sizes(4, 1, 1, 2), "one group of 2 samples, got 1; raise microbatch_size"),
    ],
)
def test_impossible_sizes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------
# Moving
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Joining
# --------------------------------------------------------------------------------------------------


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
