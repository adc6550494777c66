"""Checkpoints: plain data in one file, replaced as a whole and verified when read.

A file is either the old one or the new one, whenever the process is killed; it holds nothing that
a safe load could not read back; and one that was cut short or changed since is never loaded.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import secrets
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn import Parameter

if sys.platform != "win32":
    import fcntl

#: The version of what a trainer writes; it stands in the file under `"composefit_checkpoint"`.
FORMAT = 1

#: What a sharded checkpoint, which is a folder, has its plain data in.
STATE = "state.ckpt"


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint, in place of the one that may be there.

    Args:
        path: the file; folders above it are made.
        state: plain data: tensors, numbers, text, bytes, None, and dicts, lists, tuples and sets
            of these; in short, what `torch.load(weights_only=True)` reads.

    Raises:
        TypeError: something that a safe load could not read back, named by its path in `state`.
        OSError: the file could not be written: no permission, disk full. As with every error, what
            was at `path` before is unchanged.

    Source: the file format is that of `torch.save`.
    """
    if not isinstance(state, dict):
        raise TypeError(f"a checkpoint is a dict, got {type(state).__name__}")
    _refuse_unreadable(state, "state", set())
    with replacing(path) as file, _checksums():
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's writer raises while it closes, which hides that the disk is full.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, verified, and without running any code from it.

    Args:
        path: the file.
        map_location: the device that its tensors go to.

    Returns:
        What was saved.

    Raises:
        ValueError: `path` is an address.
        FileNotFoundError: there is no such file.
        RuntimeError: the file is damaged (cut short, or a bit has flipped), or is no checkpoint of
            plain data. Nothing was loaded.

    Source: each record's CRC-32, which the zip format of `torch.save` carries and `torch.load`
    does not look at.
    """
    refuse_address(path)
    # Opened once, so that what is loaded is what was verified.
    with open(path, "rb") as file:
        _verify(file, Path(path))
        try:
            state = torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            # Not chained: torch's text recommends weights_only=False, which runs the file's code.
            raise RuntimeError(
                f"{path} was not loaded: it asks for {_foreign(file)}, and a checkpoint holds "
                "plain data only. None of its code was run: use another file, or save its tensors "
                "and numbers anew"
            ) from None
        except Exception as error:
            raise RuntimeError(f"{path} could not be loaded: {error}") from error
    if not isinstance(state, dict):
        raise RuntimeError(f"{path} is no checkpoint: it holds a {type(state).__name__}, no dict")
    return state


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Refuse an address in place of a file: what is fetched from elsewhere is the user's choice.

    Raises:
        ValueError: it is one.
    """
    if "://" in str(path):
        raise ValueError(f"'{path}' is an address, and checkpoints are files: download it first")


def of_trainer(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse what a trainer has not written, or what a newer one has.

    Raises:
        ValueError: it says what the file seems to be, and how to read that.
    """
    version = state.get("composefit_checkpoint")
    if version == FORMAT:
        return
    if isinstance(version, int):
        raise ValueError(
            f"{path} has checkpoint format {version}, and this release reads {FORMAT}: it was "
            "written by a newer release, upgrade composefit"
        )
    if state and all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} is a state_dict, weights without the state of a training: write "
            "module.load_state_dict(torch.load(path, weights_only=True)), and fit without ckpt_path"
        )
    if "pytorch-lightning_version" in state:
        raise ValueError(
            f"{path} is a checkpoint of Lightning's: its weights load with module.load_state_dict("
            'torch.load(path, weights_only=True)["state_dict"])'
        )
    keys = sorted(map(str, state))[:9]
    raise ValueError(f"{path} is no checkpoint of a composefit Trainer: its keys are {keys}")


def load_module(
    module: nn.Module, weights: dict[str, Any], path: str | os.PathLike[str], strict: bool = True
) -> None:
    """Load weights into a module, after it is sure that they fit: all of them or none.

    Args:
        module: is changed in place.
        weights: its state_dict.
        path: of the checkpoint, for messages.
        strict: every parameter and buffer must be there, and no other.

    Raises:
        RuntimeError: they do not fit; missing, unknown and differently shaped names are listed.
    """
    difference = module_difference(module, weights, strict)
    if difference:
        raise misfit(module, difference, path)
    module.load_state_dict(weights, strict=False)


def misfit(module: nn.Module, difference: str, path: str | os.PathLike[str]) -> RuntimeError:
    """The error for weights that do not fit a module."""
    return RuntimeError(
        f"{path} does not fit {type(module).__name__}: {difference}. Nothing was loaded: make the "
        "module as it was (the checkpoint has its hyper_parameters), or take the names that both "
        "have with load_from_checkpoint(path, strict=False)"
    )


def module_difference(module: nn.Module, weights: dict[str, Any], strict: bool = True) -> str:
    """What keeps these weights from fitting a module, grouped; empty if nothing does."""
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if isinstance(own[name], Tensor)
        and isinstance(weights.get(name), Tensor)
        and not torch.nn.parameter.is_lazy(own[name])
        and own[name].shape != weights[name].shape
    ]
    groups = {"of another shape": shapes}
    if strict:
        groups["missing in the file"] = [name for name in own if name not in weights]
        groups["unknown to the module"] = [name for name in weights if name not in own]
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in groups.items()
        if names
    )


def refuse_hyperparameters(values: dict[str, Any]) -> None:
    """Refuse hyperparameters that no checkpoint could hold, before anything is trained.

    Raises:
        TypeError: names the argument, and says how to leave it out.
    """
    try:
        _refuse_unreadable(values, "hparams", set())
    except TypeError as error:
        error.add_note("leave it out: self.save_hyperparameters(ignore=[...])")
        raise


# -- what a safe load reads --------------------------------------------------------------------


def _refuse_unreadable(value: Any, where: str, seen: set[int]) -> None:
    """Raise TypeError for the first thing, by its path, that a safe load would not read."""
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() <= 64):
        return
    # A tensor with attributes takes them along, so it is asked about like anything else.
    if kind in (Tensor, Parameter) and not value.__dict__:
        return
    if kind in (dict, OrderedDict, list, tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                _refuse_unreadable(key, f"the key {key!r} of {where}", seen)
                label = f'"{key}"' if isinstance(key, str) else repr(key)
                _refuse_unreadable(item, f"{where}[{label}]", seen)
        else:
            for index, item in enumerate(value):
                _refuse_unreadable(item, f"{where}[{index}]", seen)
        # `nn.Module.state_dict` hangs its metadata on the dict it returns.
        for name, item in getattr(value, "__dict__", {}).items():
            _refuse_unreadable(item, f"{where}.{name}", seen)
    elif hasattr(value, "full_tensor"):
        raise TypeError(
            f"{where} is a tensor of which this process holds a part only: store "
            "value.full_tensor(), which every rank must call"
        )
    elif not _reads_back(value):
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which a safe load does not read "
            "back: store plain data in its place, such as str(path), torch.from_numpy(array), "
            "number.item(), member.value, or a dict of what is needed to build it again"
        )


def _reads_back(value: object) -> bool:
    """Ask torch itself, since its list of what is safe is its own and changes."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


# -- whole files -------------------------------------------------------------------------------


def aside_of(path: Path) -> Path:
    """Where a folder, or what a folder takes the place of, is while it is replaced."""
    return path.with_name(f".{path.name}.previous")


def where(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint of a path is: aside, if its replacement was interrupted."""
    given = Path(path)
    aside = aside_of(given)
    return aside if aside.exists() and not given.exists() else given


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, or of nothing if that fails.

    It is written beside `path` under another name (a rename is atomic only within a file system),
    forced to the disk, and renamed. What killed processes left of such files for the same `path`
    is removed.

    A sharded checkpoint, which is a folder, is replaced too, but no other folder is. That takes
    two renames: who is killed between them leaves it as `.NAME.previous`, where
    `where` finds it.

    Yields:
        The file, open for writing bytes.

    Raises:
        IsADirectoryError: there is a folder at `path`, and it is no sharded checkpoint.
        OSError: from the file system; with every error, what was at `path` before is unchanged.
    """
    path = Path(path)
    aside = aside_of(path)
    moved = False
    file: BinaryIO | None = None
    try:
        if path.is_dir() and not (path / STATE).is_file():
            raise IsADirectoryError(f"{path} is a folder: give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        file = _open_temporary(path)
        yield file
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":  # there, an open file cannot be renamed
            file.close()
        if path.is_dir() and not path.is_symlink():
            _remove(aside)
            moved = True  # said first, since a signal may come in between
            path.rename(aside)
        os.replace(file.name, path)
    except BaseException as error:
        cure = _cure(error) if isinstance(error, OSError) else ""
        error.add_note(f"while {path} was written; what was there before is unchanged{cure}")
        if moved:
            with suppress(OSError):
                aside.rename(path)
        if file is not None:
            with suppress(OSError):
                os.unlink(file.name)
        raise
    finally:
        if file is not None:
            with suppress(OSError):  # after a full disk: what is buffered still does not fit
                file.close()
    _sync_folder(path.parent)
    if moved or (aside / STATE).is_file():
        _remove(aside)


def plain_name(name: str) -> str:
    """The name of a file in a given folder, refused if it could lead out of that folder.

    Args:
        name: what the user wants to call the file.

    Returns:
        The same name.

    Raises:
        TypeError: it is no str.
        ValueError: it is empty, `.` or `..`, or holds a separator of folders.

    Example:
        >>> plain_name("metrics.csv")
        'metrics.csv'
        >>> plain_name("../../metrics.csv")
        Traceback (most recent call last):
            ...
        ValueError: '../../metrics.csv' is no name of a file: give the folder separately
    """
    if not isinstance(name, str):
        raise TypeError(f"a file's name must be a str, got {name!r}")
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{name!r} is no name of a file: give the folder separately")
    return name


def _cure(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ". Choose a folder in which this user may write"
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return ". The disk is full, or a quota: make room, or choose another folder"
    return ""


def _open_temporary(path: Path) -> BinaryIO:
    while True:
        # Not tempfile's, which nobody else may read: the usual permissions.
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), "xb")  # noqa: SIM115
        _lock(file)
        # Before the lock was ours, another process may have taken the file for a leftover.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    for found in path.parent.iterdir():
        if pattern.fullmatch(found.name):
            with suppress(OSError), open(found, "r+b") as file:
                if _lock(file, wait=False):
                    found.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(file: BinaryIO, wait: bool = True) -> bool:
    """Lock a file until it is closed, or its process dies; False if that cannot be.

    A lock rather than a process id in the name: it goes whenever the process does, on whichever
    machine, while ids are used again (a training in a container has the same one each time).
    """
    if sys.platform == "win32":
        return not wait  # there, a file that somebody holds open cannot be removed anyway
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename last; where a folder cannot be forced to the disk, the file is whole anyway."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- verification ------------------------------------------------------------------------------


@contextmanager
def _checksums() -> Iterator[None]:
    """Have CRC-32s written: without them every file would look damaged."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _verify(file: BinaryIO, path: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            # No checksum covers the attributes. For a record that they call a folder, torch reads
            # nothing, and takes what happens to be in memory for its content.
            folders = [
                record.filename for record in archive.infolist() if record.external_attr & 16
            ]
    except Exception as error:  # damage to the directory shows in many ways
        raise _damaged(path, str(error) or type(error).__name__) from error
    if damaged is not None:
        raise _damaged(path, f"the record {damaged} does not match its checksum")
    if folders:
        raise _damaged(path, f"the record {folders[0]} is marked as a folder")
    file.seek(0)


def _damaged(path: Path, what: str) -> RuntimeError:
    others = [
        (other.stat().st_mtime, other.name)
        for other in path.parent.glob(f"*{path.suffix}")
        if other.is_file() and other.name != path.name and not other.name.startswith(".")
    ]
    hint = f"; the latest other one beside it is {max(others)[1]}" if others else ""
    return RuntimeError(
        f"{path} ({path.stat().st_size} bytes) is damaged or no checkpoint: {what}. It was not "
        f"written to its end, or has changed since: use another{hint}"
    )


def _foreign(file: BinaryIO) -> str:
    """What the file would have had to import."""
    names: list[str] = []
    with suppress(Exception):  # of a file that is no pickle either
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return ", ".join(sorted(names)) or "more than a safe load allows"
