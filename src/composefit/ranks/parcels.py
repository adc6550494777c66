"""Parcels: any Python value as a file, for another process of this machine.

Tensors travel as `torch.save` writes them, so that those which share their numbers still do, and
arrive on the CPU. Everything else is pickled by cloudpickle, which takes along what plain pickle
looks up in the main script: functions, lambdas and classes of a script or of a notebook.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.storage import TypedStorage, UntypedStorage

__all__ = ["Known", "culprit", "pack", "unpack"]

#: For an object: what stands for it in the parcel; None to pack the object itself.
Known = Callable[[Any], Any]


def pack(path: Path, values: Iterable[Any], known: Known | None = None) -> None:
    """Write values to a file; what they share, they share when they are read, too.

    Args:
        path: the file. Whoever may write to its folder can make the reader run any code.
        values: anything that cloudpickle takes; each is asked for when those before are packed.
        known: asked for each object; what it gives in place of None is pickled for the object, and
            handed to `resolve` when the parcel is read.

    Raises:
        Exception: something cannot be pickled, of whichever type that raises; see `culprit`.
    """
    stream = io.BytesIO()
    packer = Packer(stream, known)
    number = 0
    for value in values:
        packer.dump(value)
        number += 1
    # Last: all that was taken along from the main module has been seen by now.
    packer.dump(packer.of_main)
    data = torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)
    with open(path, "wb") as file:
        torch.save([data, number, packer.storages], file)


def unpack(path: Path, resolve: Callable[[Any], Any] | None = None) -> list[Any]:
    """Read what `pack` has written, with all tensors on the CPU.

    Args:
        path: the file.
        resolve: gives the object for what `known` gave.

    Returns:
        The values.
    """
    with open(path, "rb") as file:
        data, number, storages = torch.load(file, map_location="cpu", weights_only=True)
    unpacker = _Unpacker(io.BytesIO(data.numpy()), storages, resolve)
    values = [unpacker.load() for _ in range(number)]
    # Plain pickle, in this process and in those that it spawns, looks them up by these names.
    main = vars(sys.modules["__main__"])
    for name, value in unpacker.load().items():
        main.setdefault(name, value)
    return values


class Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, with tensors' numbers beside the pickle.

    Attributes:
        storages: the numbers of the tensors, as bytes.
        of_main: name -> a class or function of the main module that was taken along.
    """

    def __init__(self, file: io.BytesIO, known: Known | None = None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._known = known
        self._places: dict[int, int] = {}
        self.storages: list[Tensor] = []
        self.of_main: dict[str, Any] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, TypedStorage):
            return ("storage", self._place(obj._untyped_storage), obj.dtype)
        if isinstance(obj, UntypedStorage):
            # As torch.load gives it back, for tensors of dtypes that have no typed storage.
            return ("storage", self._place(obj), torch.uint8)
        found = None if self._known is None else self._known(obj)
        return None if found is None else ("known", found)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType) and obj.__module__ == "__main__":
            name = obj.__qualname__
            if vars(sys.modules["__main__"]).get(name) is obj:
                self.of_main[name] = obj
        if type(obj) is weakref.ref:
            return weakref.ref, (obj() or _Gone(),)
        return super().reducer_override(obj)

    def _place(self, storage: UntypedStorage) -> int:
        place = self._places.setdefault(storage._cdata, len(self.storages))
        if place == len(self.storages):
            empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
            self.storages.append(empty.set_(storage))
        return place


class _Gone:
    """In place of what a weak reference pointed to: when it is read, nobody holds it."""


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, storages: list[Tensor], resolve: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(file)
        self._storages = storages
        self._resolve = resolve

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "known":
            assert self._resolve is not None
            return self._resolve(pid[1])
        _, place, dtype = pid
        storage = self._storages[place].untyped_storage()
        return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


# -- what cannot be packed ---------------------------------------------------------------------


def culprit(value: Any, name: str, known: Known | None = None) -> tuple[str, Any, Exception] | None:
    """The innermost part of a value that cannot be packed.

    Args:
        value: what could not be packed.
        name: what it is called.
        known: as for `pack`.

    Returns:
        Its path, such as `callbacks[0].lock`, itself, and why; None if all of it can be packed.
    """
    return _culprit(value, name, known, set())


def _culprit(
    value: Any, name: str, known: Known | None, seen: set[int]
) -> tuple[str, Any, Exception] | None:
    if id(value) in seen:
        return None
    seen.add(id(value))
    error = _refusal(value, known)
    if error is None:
        return None
    for label, part in _parts(value, name):
        found = _culprit(part, label, known, seen)
        if found is not None:
            return found
    return name, value, error


def _refusal(value: Any, known: Known | None) -> Exception | None:
    try:
        Packer(io.BytesIO(), known).dump(value)
    except Exception as error:
        return error
    return None


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a value consists of, and what each part is called."""
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{name}[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield name.rpartition(".")[0] or f"{name}.__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value, name)
    elif not isinstance(value, type | types.ModuleType):
        state = dict(getattr(value, "__dict__", {}))
        if isinstance(value, nn.Module):  # as their user calls them
            for kind in ("_modules", "_parameters", "_buffers"):
                state |= state.pop(kind, {})
        with suppress(Exception):  # what it leaves out is no culprit
            kept = value.__getstate__()
            if isinstance(kept, dict):
                state = {key: part for key, part in state.items() if kept.get(key, part) is part}
        yield from ((f"{name}.{key}", part) for key, part in state.items())


def _parts_of_function(function: types.FunctionType, name: str) -> Iterator[tuple[str, Any]]:
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        with suppress(ValueError):  # not yet assigned
            yield f"{variable} (in {name})", cell.cell_contents
    for variable in function.__code__.co_names:
        if variable in function.__globals__:
            yield f"{variable} (in {name})", function.__globals__[variable]
