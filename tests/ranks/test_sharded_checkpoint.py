"""Sharded checkpoints: whole or not there, verified, without code, for any number of ranks."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata

from composefit import checkpoint, sharded_checkpoint
from tests.ranks.pool import RankPool
from tests.ranks.sharded_cases import load_case, save_case

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.tensor(3, dtype=torch.int64)}


def write(path: Path, **more: Any) -> Path:
    sharded_checkpoint.save(path, {"step": 3, **more}, TENSORS)
    return path


def rewrite_hashes(path: Path, **files: str) -> None:
    """What somebody does who changes a file on purpose."""
    content = checkpoint.load(path / "state.ckpt")
    content["files"] = {
        name: sharded_checkpoint._hash(path / name) for name in [*content["files"], *files]
    }
    checkpoint.save(path / "state.ckpt", content)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "run.ckpt", text="x")
    state, tensors = sharded_checkpoint.load(path)
    assert state == {"step": 3, "text": "x"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensors[name].dtype is TENSORS[name].dtype for name in TENSORS)
    assert sharded_checkpoint.is_sharded(path)
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]


def test_a_file_or_nothing_is_not_sharded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "plain.ckpt", {"a": 1})
    assert not sharded_checkpoint.is_sharded(tmp_path / "plain.ckpt")
    assert not sharded_checkpoint.is_sharded(tmp_path)
    assert not sharded_checkpoint.is_sharded(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        sharded_checkpoint.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is an address"):
        sharded_checkpoint.load("http://example.com/run.ckpt")


@pytest.mark.parametrize("before", ["folder", "file"])
def test_a_new_one_takes_the_place_of_the_old_one(tmp_path: Path, before: str) -> None:
    path = tmp_path / "last.ckpt"
    if before == "folder":
        write(path)
    else:
        checkpoint.save(path, {"a": 1})
    write(path, step=4)
    assert sharded_checkpoint.load(path)[0] == {"step": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("where", ["_write", "_hashes", "_complete"])
def test_after_an_error_the_old_one_is_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = write(tmp_path / "last.ckpt")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint, where, full)
    with pytest.raises(OSError, match="No space left") as raised:
        write(path, step=4)
    assert "what was there before is unchanged" in raised.value.__notes__[-1]
    assert sharded_checkpoint.load(path)[0] == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_state_that_a_safe_load_does_not_read_raises(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="which a safe load does not read back"):
        write(tmp_path / "last.ckpt", where=Path("x"))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from composefit import sharded_checkpoint as s
place, path = sys.argv[1:]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
def renamed(self, target):
    found = rename(self, target)
    if place == "between" and str(target).endswith(".previous"): die()
    return found
Path.rename = renamed
if place == "writing": s._hashes = die
if place == "ending": s.checkpoint._sync_folder = die
s.save(path, {"step": 4}, {"a": torch.zeros(3)})
"""


@pytest.mark.parametrize("place", ["writing", "ending", "between"])
def test_killed_while_it_is_replaced_the_old_one_is_found(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "last.ckpt")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(path)],
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) > 1 or place == "between"
    assert sharded_checkpoint.is_sharded(path)
    assert sharded_checkpoint.load(path)[0] == {"step": 3}
    write(path, step=5)
    assert sharded_checkpoint.load(path)[0] == {"step": 5}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_being_written_is_no_left_over(tmp_path: Path) -> None:
    made = sharded_checkpoint._temporary(tmp_path / "last.ckpt")
    lock = sharded_checkpoint._lock(made)
    try:
        write(tmp_path / "last.ckpt")
        assert made.is_dir()
    finally:
        os.close(lock)
    write(tmp_path / "last.ckpt")
    assert not made.exists()


# -- damage ----------------------------------------------------------------------------------------


def shard_of(path: Path) -> Path:
    (found,) = path.glob("*.distcp")
    return found


@pytest.mark.parametrize("which", ["shard", "metadata", "state"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, which: str, damage: str) -> None:
    path = write(tmp_path / "run.ckpt")
    files = {"shard": shard_of(path), "metadata": path / ".metadata", "state": path / "state.ckpt"}
    file = files[which]
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 16
        file.write_bytes(content if damage == "bit" else content[: len(content) // 2])
    expected = FileNotFoundError if (which, damage) == ("state", "gone") else RuntimeError
    with pytest.raises(expected, match=file.name.replace(".", r"\.")):
        sharded_checkpoint.load(path)


# -- security --------------------------------------------------------------------------------------


class Code:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hostile_metadata(path: Path, mark: Path) -> None:
    with open(path / ".metadata", "rb") as file:
        found = pickle.load(file)
    found.planner_data = Code(mark)
    (path / ".metadata").write_bytes(pickle.dumps(found))


def hostile_shard(path: Path, mark: Path) -> None:
    """A tensor is said to be an object, which torch unpickles with everything that it asks for."""
    with open(path / ".metadata", "rb") as file:
        found = pickle.load(file)
    found.state_dict_metadata["a"] = metadata.BytesStorageMetadata()
    index = metadata.MetadataIndex("a")
    info = next(one for key, one in found.storage_data.items() if key.fqn == "a")
    found.storage_data = {k: v for k, v in found.storage_data.items() if k.fqn != "a"}
    buffer = io.BytesIO()
    torch.save(Code(mark), buffer)
    code = buffer.getvalue()
    file = shard_of(path)
    info.offset, info.length = file.stat().st_size, len(code)
    file.write_bytes(file.read_bytes() + code)
    found.storage_data[index] = info
    (path / ".metadata").write_bytes(pickle.dumps(found))


def hostile_tensor(path: Path, mark: Path) -> None:
    """The record of a tensor is code."""
    with open(path / ".metadata", "rb") as file:
        found = pickle.load(file)
    info = next(one for key, one in found.storage_data.items() if key.fqn == "a")
    code = pickle.dumps(Code(mark))
    file = shard_of(path)
    info.offset, info.length = file.stat().st_size, len(code)
    file.write_bytes(file.read_bytes() + code)
    (path / ".metadata").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (hostile_metadata, "asks for (posix|nt).mkdir"),
        (hostile_shard, "'a' is no tensor"),
        (hostile_tensor, "weights_only|Weights only|unsupported|could not"),
    ],
)
def test_code_in_a_checkpoint_is_not_run(
    tmp_path: Path, attack: Callable[[Path, Path], None], message: str
) -> None:
    path, mark = write(tmp_path / "run.ckpt"), tmp_path / "run by the checkpoint"
    attack(path, mark)
    rewrite_hashes(path)
    with pytest.raises(Exception, match=message):
        sharded_checkpoint.load(path)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("attack", [hostile_metadata, hostile_shard])
def test_torch_itself_runs_that_code(tmp_path: Path, attack: Callable[[Path, Path], None]) -> None:
    """The control: these attacks are real."""
    path, mark = write(tmp_path / "run.ckpt"), tmp_path / "run by the checkpoint"
    attack(path, mark)
    target: dict[str, Any] = {"a": None if attack is hostile_shard else torch.zeros(4, 3)}
    dcp.load(target, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert mark.exists()


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "run.ckpt")
    outside = tmp_path / "outside"
    outside.write_bytes(shard_of(path).read_bytes())
    with open(path / ".metadata", "rb") as file:
        found = pickle.load(file)
    for info in found.storage_data.values():
        info.relative_path = "../outside"
    (path / ".metadata").write_bytes(pickle.dumps(found))
    rewrite_hashes(path)
    with pytest.raises(RuntimeError, match=r"asks for '\.\./outside', which is none of"):
        sharded_checkpoint.load(path)
    content = checkpoint.load(path / "state.ckpt")
    content["files"]["../outside"] = sharded_checkpoint._hash(outside)
    checkpoint.save(path / "state.ckpt", content)
    with pytest.raises(ValueError, match="is no name of a file"):
        sharded_checkpoint.load(path)


# -- tensors in a state ----------------------------------------------------------------------------


def test_large_tensors_are_taken_out_of_a_state_and_put_back(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "weights": {"a": torch.ones(100), "b": torch.ones(2)},
        "optimizers": {"x": {"state": {0: {"step": 3, "m": [torch.zeros(100), 1]}}}},
        "pair": (1, "two"),
    }
    rest, tensors = sharded_checkpoint.part(state, largest=100)
    assert sorted(tensors) == ['["optimizers", "x", "state", 0, "m", 0]', '["weights", "a"]']
    assert rest["weights"]["b"] is state["weights"]["b"]
    assert rest["pair"] is state["pair"]
    sharded_checkpoint.save(tmp_path / "run.ckpt", rest, tensors)
    found = sharded_checkpoint.joined(*sharded_checkpoint.load(tmp_path / "run.ckpt"))
    assert torch.equal(found["weights"]["a"], state["weights"]["a"])
    assert torch.equal(found["optimizers"]["x"]["state"][0]["m"][0], torch.zeros(100))
    assert found["pair"] == (1, "two")


# -- ranks -----------------------------------------------------------------------------------------


def test_two_ranks_write_their_rows_and_one_process_reads_all(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    two_ranks.run(save_case, str(path))
    assert len(list(path.glob("*.distcp"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    state, tensors = sharded_checkpoint.load(path)
    assert state["step"] == 3
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected(name, tensor.shape)), name


def expected(name: str, shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel(), dtype=torch.float64).view(shape) + len(name)


def test_two_ranks_read_what_two_have_written(two_ranks: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "run.ckpt")
    two_ranks.run(save_case, path)
    assert all(two_ranks.run(load_case, path))


@pytest.mark.full
def test_four_ranks_read_what_two_have_written_and_back(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    path = str(tmp_path / "run.ckpt")
    two_ranks.run(save_case, path)
    assert all(four_ranks.run(load_case, path))
    four_ranks.run(save_case, path)
    assert all(two_ranks.run(load_case, path))


def test_ranks_read_what_one_process_has_written(two_ranks: RankPool, tmp_path: Path) -> None:
    tensors = {
        name: expected(name, torch.Size(shape))
        for name, shape in {"weight": (7, 5), "bias": (1,), "whole": (3,)}.items()
    }
    sharded_checkpoint.save(tmp_path / "run.ckpt", {"step": 3}, tensors)
    assert all(two_ranks.run(load_case, str(tmp_path / "run.ckpt")))


def test_where_a_folder_cannot_be_written_every_rank_raises(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    outcomes = two_ranks.outcomes(save_case, str(tmp_path / "file" / "run.ckpt"))
    assert [one.kind for one in outcomes] == ["NotADirectoryError", "RuntimeError"] or [
        one.kind for one in outcomes
    ] == ["FileExistsError", "RuntimeError"]
    assert "rank 0 has failed" in outcomes[1].text


def test_a_damaged_shard_is_found_by_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    two_ranks.run(save_case, str(path))
    shard = sorted(path.glob("*.distcp"))[1]
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    outcomes = two_ranks.outcomes(load_case, str(path))
    assert all(shard.name in one.text and "damaged" in one.text for one in outcomes)
