"""Digests: by which ranks find out at little cost that they do not read the same samples."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

_ITEMS, _NUMBERS, _LETTERS = 8, 64, 200  # so much of everything is looked at


def digest(value: Any) -> int:
    """A number of 32 bits that differs with what a batch, or a dataset, holds first.

    Of floating point numbers ten bits of the fraction count, since machines of different kinds do
    not round alike. What is on no CPU counts by its shape, and objects by their type.

    Example:
        >>> digest([torch.arange(3), "a"]) == digest([torch.arange(3), "a"])
        True
        >>> digest([torch.arange(3), "a"]) == digest([torch.arange(1, 4), "a"])
        False
    """
    found = 0
    for part in _parts(value):
        found = zlib.crc32(part, found)
    return found


def _parts(value: Any) -> Iterator[bytes]:
    yield type(value).__name__.encode()
    if isinstance(value, bool | int | str | bytes | None):
        yield repr(value[:_LETTERS] if isinstance(value, str | bytes) else value).encode()
    elif isinstance(value, float | np.floating):
        yield _rounded(torch.tensor([float(value)], dtype=torch.float64))
    elif isinstance(value, Tensor):
        yield from _of_tensor(value)
    elif isinstance(value, np.ndarray | np.generic):
        yield from _of_array(np.asarray(value))
    elif isinstance(value, Mapping):
        yield from _of_items(value.items(), len(value))
    elif isinstance(value, list | tuple | range):
        yield from _of_items(value, len(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _of_items((getattr(value, field.name) for field in fields(value)), 0)
    else:
        for kind, content in _DATASETS.items():
            if isinstance(value, kind):
                yield from _parts(content(value))


#: Datasets that a rank may have been given a part of.
_DATASETS: dict[type, Callable[[Any], Any]] = {
    Subset: lambda subset: (subset.indices, subset.dataset),
    ConcatDataset: lambda several: list(several.datasets),
    TensorDataset: lambda tensors: tensors.tensors,
}


def _of_items(items: Any, number: int) -> Iterator[bytes]:
    yield str(number).encode()
    for item in islice(items, _ITEMS):
        yield from _parts(item)


def _of_tensor(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype}{tensor.layout}".encode()
    if tensor.is_nested:
        return
    yield str(tuple(tensor.shape)).encode()
    if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.detach()
        while tensor.ndim > 1:
            tensor = tensor[0]  # flattening may copy all of it
        yield _rounded(tensor.reshape(-1)[:_NUMBERS])


def _of_array(array: np.ndarray[Any, Any]) -> Iterator[bytes]:
    yield f"{array.dtype}{array.shape}".encode()
    while array.ndim > 1 and array.size:
        array = array[0]
    first = array.reshape(-1)[:_NUMBERS]
    if array.dtype.kind == "f":
        yield _rounded(torch.from_numpy(first.astype(np.float64)))
    else:
        yield repr(first.tolist() if array.dtype.kind != "O" else len(first)).encode()


def _rounded(numbers: Tensor) -> bytes:
    if numbers.is_floating_point():
        bits = numbers.to(torch.float32).contiguous().view(torch.int32)
        numbers = (bits + (1 << 12)) >> 13
    return repr(numbers.tolist()).encode()
