"""Checkpoints whose tensors are cut over ranks: a folder, replaced as a whole and verified.

Tensors are written by torch's Distributed Checkpoint, each rank its rows, so that they can be read
by any number of ranks, one among them. Everything else stands in one file of plain data beside
them, `state.ckpt`, with the hash of every other file. A folder is either the old one or the new
one, whenever a process is killed; one that was cut short or changed since is never loaded; and no
code is run from it: what describes the tensors is a pickle, of which only the classes of the format
itself are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from composefit import checkpoint
from composefit.ranks.world import World

if sys.platform != "win32":
    import fcntl

#: The file of plain data within the folder.
STATE = checkpoint.STATE

#: The version of the folder's layout; it stands in `state.ckpt`.
FORMAT = 1

_METADATA = ".metadata"
_KEY = "composefit_tensor"  # of the dict that stands in a state for a tensor of the folder

Result = TypeVar("Result")

#: `place(name, shape, dtype)` makes the tensor that is read: a `DTensor` takes this rank's rows.
Place = Callable[[str, torch.Size, torch.dtype], Tensor]


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether there is a sharded checkpoint at a path."""
    return (checkpoint.where(path) / STATE).is_file()


def save(
    path: str | os.PathLike[str],
    state: dict[str, Any],
    tensors: Mapping[str, Tensor],
    world: World | None = None,
) -> None:
    """Write a sharded checkpoint in place of what may be there; all ranks must call it.

    Args:
        path: the folder, one that all machines share; folders above it are made.
        state: plain data, as for `checkpoint.save`; rank 0's counts.
        tensors: name -> a tensor. Of a `DTensor` each rank writes its rows, another one is the
            same on all ranks and written once.
        world: the ranks; None for one process.

    Raises:
        TypeError: something in `state` that a safe load could not read back.
        OSError: it could not be written. As with every error, which all ranks raise, what was at
            `path` before is unchanged.

    Source: `torch.distributed.checkpoint.save`.
    """
    target = Path(path)
    first = world is None or world.rank == 0
    lock = -1
    temporary = Path()
    try:
        if first:
            name, error = _attempt(lambda: str(_temporary(target)))
        else:
            name, error = None, None
        (name, *_) = _shared(world, f"the folder for {target}", name, error)
        assert name is not None
        temporary = Path(name)
        if first:
            lock = _lock(temporary)
        _write(temporary, tensors, world)
        own, error = _attempt(lambda: _hashes(temporary, None if world is None else world.rank))
        files: dict[str, Any] = {}
        for of_rank in _shared(world, f"the files of {target}", own, error):
            files |= of_rank or {}
        error = None
        if first:
            content = {"composefit_sharded": FORMAT, "files": files, "state": state}
            _, error = _attempt(lambda: _complete(temporary, target, content))
        _shared(world, f"the end of {target}", None, error)
    except BaseException as error:
        error.add_note(f"while {target} was written; what was there before is unchanged")
        if first and temporary != Path():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def load(
    path: str | os.PathLike[str],
    place: Place | None = None,
    world: World | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a sharded checkpoint, verified, and without running any code from it.

    Args:
        path: the folder.
        place: makes each tensor before it is read; whole ones on the CPU by default. Nothing is
            sent: each rank reads what it needs.
        world: the ranks, all of which call this: they share the verification. None: this process
            verifies everything by itself.

    Returns:
        The state and the tensors that were saved.

    Raises:
        ValueError: `path` is an address.
        FileNotFoundError: there is no such folder.
        RuntimeError: it is damaged, or asks for code. Nothing was loaded.

    Source: `torch.distributed.checkpoint.load`.
    """
    checkpoint.refuse_address(path)
    folder = checkpoint.where(path)
    content = checkpoint.load(folder / STATE)
    if content.get("composefit_sharded") != FORMAT:
        raise RuntimeError(
            f"{folder / STATE} is no part of a sharded checkpoint of format {FORMAT}: its keys are "
            f"{sorted(map(str, content))[:9]}"
        )
    files: dict[str, tuple[int, str]] = content["files"]
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    # The description too by every rank: it is read by all.
    mine = [name for i, name in enumerate(sorted(files)) if i % size == rank or name == _METADATA]
    _, error = _attempt(lambda: _verify(folder, {name: files[name] for name in mine}))
    _shared(world, f"the verification of {folder}", None, error)
    reader = _Reader(folder, set(files))
    described = reader.read_metadata()
    tensors: dict[str, Tensor] = {}
    for name, one in described.state_dict_metadata.items():
        assert isinstance(one, metadata.TensorStorageMetadata)
        make = place or _whole
        tensors[name] = make(name, one.size, one.properties.dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, described, True)
    reader.set_up_storage_reader(described, True)
    plan = planner.create_local_plan()
    with torch.no_grad():
        reader.read_data(planner.finish_plan(plan), planner).wait()
    return content["state"], tensors


# -- tensors in a state ------------------------------------------------------------------------


def part(state: Any, largest: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Take the sharded tensors out of a state.

    Args:
        state: dicts with str or int keys, lists and tuples of anything.
        largest: other tensors of more than so many bytes are taken out, too; 0 for none.

    Returns:
        The state with a mark in place of each tensor, and name -> tensor; a name is the path in the
        state, as a JSON list.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(value, Tensor):
            if isinstance(value, DTensor) or (largest and value.nbytes > largest):
                name = json.dumps(path)
                tensors[name] = value.detach()
                return {_KEY: name}
            return value
        if isinstance(value, dict):
            changed = {key: visit(item, (*path, key)) for key, item in value.items()}
            same = all(changed[key] is item for key, item in value.items())
            return value if same else changed
        if type(value) in (list, tuple):
            items = [visit(item, (*path, i)) for i, item in enumerate(value)]
            same = all(new is old for new, old in zip(items, value, strict=True))
            return value if same else type(value)(items)
        return value

    return visit(state, ()), tensors


def joined(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `part`."""
    if isinstance(state, dict):
        if state.keys() == {_KEY}:
            return tensors[state[_KEY]]
        return {key: joined(item, tensors) for key, item in state.items()}
    if type(state) in (list, tuple):
        return type(state)(joined(item, tensors) for item in state)
    return state


# -- writing -----------------------------------------------------------------------------------


class _Writer(filesystem.FileSystemWriter):
    """Writes where it is told, and does not write down where that was."""

    def storage_meta(self) -> metadata.StorageMeta | None:
        """Nothing: the folder is renamed afterwards."""
        return None


def _write(folder: Path, tensors: Mapping[str, Tensor], world: World | None) -> None:
    with warnings.catch_warnings():
        # That a process is alone.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        try:
            save_distributed(
                dict(tensors),
                storage_writer=_Writer(folder, sync_files=True),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                process_group=None if world is None else world.patient_group(),
                no_dist=world is None,
            )
        except CheckpointException as error:
            raise _own(error, 0 if world is None else world.rank) from None


def _own(error: CheckpointException, rank: int) -> BaseException:
    """What this rank raised, or else another one."""
    failures = {one: failed[0] for one, failed in error.failures.items()}
    if rank in failures:
        return failures[rank]
    other, failed = next(iter(failures.items()))
    return RuntimeError(f"rank {other} could not write its part: {type(failed).__name__}: {failed}")


def _temporary(target: Path) -> Path:
    """A folder beside the target, of the usual permissions; left-over ones are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp")
    for found in target.parent.iterdir():
        if pattern.fullmatch(found.name) and found.is_dir():
            with suppress(OSError):
                lock = _lock(found)
                if lock >= 0:
                    shutil.rmtree(found, ignore_errors=True)
                    os.close(lock)
    made = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    made.mkdir()
    return made


def _lock(folder: Path) -> int:
    """Lock a folder until the descriptor is closed, or its process dies; -1 if another has it."""
    if sys.platform == "win32":
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return -1
    return descriptor


def _complete(temporary: Path, target: Path, content: dict[str, Any]) -> None:
    """Write what belongs to the tensors, and give the folder its name."""
    checkpoint.save(temporary / STATE, content)
    checkpoint._sync_folder(temporary)
    aside = checkpoint.aside_of(target)
    if target.exists() or target.is_symlink():
        _remove(aside)
        # A folder cannot be replaced in one go: until the next line the old one is found aside.
        target.rename(aside)
    temporary.rename(target)
    checkpoint._sync_folder(target.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _shared(
    world: World | None, what: str, value: Result | None, error: Exception | None
) -> list[Result | None]:
    """Every rank's value; where one has an error, all raise."""
    if world is None:
        if error is not None:
            raise error
        return [value]
    text = None if error is None else f"{type(error).__name__}: {error}"
    said = world.gather(what, (value, text), patient=True)  # others may have larger files
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(said):
        if failed is not None:
            raise RuntimeError(f"rank {rank} has failed at {what}: {failed}")
    return [one for one, _ in said]


# -- verification ------------------------------------------------------------------------------


def _hashes(folder: Path, rank: int | None) -> dict[str, tuple[int, str]]:
    """The size and hash of each file that this rank has written."""
    own = "__" if rank is None else f"__{rank}_"
    names = [file.name for file in folder.iterdir() if file.name.startswith(own)]
    if not rank:
        names.append(_METADATA)
    return {name: _hash(folder / name) for name in names}


def _hash(file: Path) -> tuple[int, str]:
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
        return opened.tell(), found


def _verify(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    for name, (size, wanted) in files.items():
        file = folder / checkpoint.plain_name(name)
        if not file.is_file():
            raise RuntimeError(f"{folder} is damaged: its file {name} is missing; use another")
        found, digest = _hash(file)
        if found != size:
            raise RuntimeError(
                f"{file} is damaged: it has {found} bytes, and had {size} when it was written; use "
                "another checkpoint"
            )
        if digest != wanted:
            raise RuntimeError(
                f"{file} is damaged: it has changed since it was written; use another checkpoint"
            )


def _whole(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


# -- reading -----------------------------------------------------------------------------------


class _Reader(filesystem.FileSystemReader):
    """Reads the files of a folder, and of their description nothing but plain data.

    Args:
        folder: the checkpoint's.
        files: the names of its files, which were verified.
    """

    def __init__(self, folder: Path, files: set[str]) -> None:
        super().__init__(folder)
        self.folder = folder
        self.files = files

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """The description of the tensors.

        Raises:
            RuntimeError: it asks for other classes than the format's, or for other files.
        """
        path = self.folder / _METADATA
        with open(path, "rb") as file:
            try:
                found = _Unpickler(file).load()
            except RuntimeError:
                raise
            except Exception as error:
                raise RuntimeError(f"{path} could not be read: {error}") from error
        if not isinstance(found, metadata.Metadata):
            raise RuntimeError(f"{path} is no description of a checkpoint")
        for name, one in found.state_dict_metadata.items():
            if not isinstance(one, metadata.TensorStorageMetadata):
                raise RuntimeError(
                    f"{path} was not loaded: {name!r} is no tensor, and torch would unpickle it, "
                    "which runs its code. A sharded checkpoint holds tensors only"
                )
        for one in found.storage_data.values():
            if one.relative_path not in self.files or one.transform_descriptors:
                raise RuntimeError(
                    f"{path} was not loaded: it asks for {one.relative_path!r}, which is none of "
                    "the checkpoint's files, or for a file to be transformed"
                )
        return found


# What stands in a description of tensors; none of it does anything.
_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
}
_LAYOUT = ("torch.serialization", "_get_layout")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is not None:
            return found
        if (module, name) == _LAYOUT:
            return torch.serialization._get_layout
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise RuntimeError(
            f"a sharded checkpoint was not loaded: its {_METADATA} asks for {module}.{name}, and "
            "it describes tensors only. None of its code was run: use another"
        )
