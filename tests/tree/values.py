"""Batches of every kind, and what is in them."""

import collections
import dataclasses
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")


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
