import collections
import enum
import fcntl
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from composefit import checkpoint, saved, sharded_checkpoint


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    pass


class Kept(torch.Tensor):
    pass


Pair = collections.namedtuple("Pair", "left right")


def tagged() -> torch.Tensor:
    tensor = torch.zeros(2)
    tensor.tag = pathlib.Path("x")  # type: ignore[attr-defined]
    return tensor


PLAIN: list[Any] = [
    None,
    True,
    3,
    -(10**30),
    0.1,
    float("inf"),
    1 + 2j,
    "text",
    "",
    b"bytes",
    bytearray(b"x"),
    (),
    (1, (2.0, "x"), [None]),
    {"a"},
    {1: {"a": []}, (1, 2): 3, None: 4},
    collections.OrderedDict(a=1),
    collections.Counter("aab"),
    torch.Size([1, 2]),
    torch.float16,
    torch.device("cpu"),
    torch.arange(6.0).reshape(2, 3).t(),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.tensor(3),
    nn.Parameter(torch.ones(2)),
]
FOREIGN: list[Any] = [
    pathlib.Path("x"),
    Colour.RED,
    Level.LOW,
    Text("x"),
    Pair(1, 2),
    np.float64(1.0),
    np.zeros(2),
    np.random.RandomState(0).get_state()[1],
    collections.defaultdict(list),
    collections.deque(),
    frozenset({1}),
    {Colour.RED},
    b"",
    2**3000,
    range(3),
    nn.Linear(1, 1),
    torch.zeros(2).as_subclass(Kept),
    tagged(),
    torch.Generator(),
    int,
    len,
    lambda: None,
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) in (list, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


# -- what is saved is what is loaded ---------------------------------------------------------------


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_comes_back_as_it_was(path: Path, value: Any) -> None:
    checkpoint.save(path, {"value": value, "in": [value, {"deep": (value,)}]})
    assert same(checkpoint.load(path), {"value": value, "in": [value, {"deep": (value,)}]})


def test_the_state_of_modules_optimizers_and_random_streams_comes_back_bitwise(path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": net.state_dict(),
        "optimizers": {"optimizer": optimizer.state_dict()},
        "random": torch.get_rng_state(),
    }
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert same(loaded, state)
    assert loaded["module"]._metadata == net.state_dict()._metadata


def test_tensors_that_share_memory_still_do_after_loading(path: Path) -> None:
    tensor = torch.zeros(3)
    shared = [tensor]
    checkpoint.save(path, {"a": tensor, "b": tensor[1:], "c": shared, "d": shared})
    loaded = checkpoint.load(path)
    loaded["a"][1] = 7.0
    assert loaded["b"][0] == 7.0
    assert loaded["c"] is loaded["d"]


def test_a_state_that_holds_itself_comes_back(path: Path) -> None:
    state: dict[str, Any] = {"list": []}
    state["list"].append(state["list"])
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert loaded["list"][0] is loaded["list"]


def test_tensors_go_to_the_device_asked_for(path: Path) -> None:
    checkpoint.save(path, {"x": torch.zeros(2)})
    assert checkpoint.load(path, map_location="meta")["x"].is_meta


def test_folders_above_the_file_are_made_and_the_file_is_as_readable_as_any(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path / "a" / "b" / "x.ckpt"), {"x": 1})
    (tmp_path / "plain").write_bytes(b"")
    assert files(tmp_path / "a" / "b") == ["x.ckpt"]
    usual = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a" / "b" / "x.ckpt").stat().st_mode == usual


# -- what a safe load could not read (F39) ---------------------------------------------------------


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
def test_what_a_safe_load_could_not_read_is_refused_at_save(path: Path, value: Any) -> None:
    with pytest.raises(Exception, match=r"Weights only|pickle|Can't"):  # torch's own verdict
        buffer = io.BytesIO()
        torch.save({"x": value}, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    checkpoint.save(path, {"previous": 1})
    with pytest.raises(TypeError, match=r'^state\["a"\]\[1\] is a .*a safe load does not read'):
        checkpoint.save(path, {"a": (0, value)})
    assert checkpoint.load(path) == {"previous": 1}
    assert files(path.parent) == ["last.ckpt"]


def test_the_refusal_names_the_path_in_the_state(path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"callbacks": {"x": {"best": Path("y")}}}, 'state["callbacks"]["x"]["best"]'),
        ({"a": [{3: Path("y")}]}, 'state["a"][0][3]'),
        ({"a": {Colour.RED: 1}}, f'the key {Colour.RED!r} of state["a"]'),
    ]
    net = nn.Linear(1, 1).state_dict()
    net._metadata["version"] = Path("y")
    cases.append(({"module": net}, 'state["module"]._metadata["version"]'))
    for state, where in cases:
        with pytest.raises(TypeError) as caught:
            checkpoint.save(path, state)
        assert str(caught.value).startswith(f"{where} is a ")
    assert files(path.parent) == []


def test_something_else_than_a_dict_is_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint is a dict, got list"):
        checkpoint.save(path, [1])  # type: ignore[arg-type]


# -- damage (F30, F31) -----------------------------------------------------------------------------


def test_no_flipped_bit_changes_what_is_loaded(path: Path) -> None:
    state = {"weights": torch.arange(64.0), "step": 12345, "name": "critic"}
    checkpoint.save(path, state)
    whole = path.read_bytes()
    refused = 0
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir  # no checksum covers what follows
    for offset in [*range(0, directory, 5), *range(directory, len(whole))]:
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path)
        except RuntimeError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # padding, or a date
            assert same(loaded, state)
    assert refused > 0


def test_every_flipped_bit_in_a_tensor_or_in_the_plain_data_is_found(path: Path) -> None:
    checkpoint.save(path, {"weights": torch.arange(16.0), "step": 12345})
    whole = path.read_bytes()
    start = whole.index(torch.arange(16.0).numpy().tobytes())
    number = whole.index((12345).to_bytes(2, "little"))
    for offset in [*range(start, start + 64, 3), number]:
        flipped = bytearray(whole)
        flipped[offset] ^= 0x10
        path.write_bytes(flipped)
        control = torch.load(path, weights_only=True)
        assert control["step"] != 12345 or not torch.equal(control["weights"], torch.arange(16.0))
        with pytest.raises(RuntimeError, match=r"last\.ckpt .*does not match its checksum"):
            checkpoint.load(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_a_flipped_bit_that_turns_a_record_into_a_folder_is_found(path: Path, record: str) -> None:
    # torch would load such a tensor from memory that nobody wrote: other numbers each time.
    checkpoint.save(path, {"weights": torch.arange(64.0)})
    whole = bytearray(path.read_bytes())
    attributes = whole.rindex(f"archive/{record}".encode()) - 8
    assert whole[attributes : attributes + 4] == bytes(4)
    whole[attributes] ^= 16
    path.write_bytes(whole)
    with pytest.raises(RuntimeError, match=rf"archive/{record} is marked as a folder"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_or_empty_file_is_an_error_that_names_it(path: Path, part: float) -> None:
    checkpoint.save(path, {"weights": torch.arange(64.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(RuntimeError, match=r"last\.ckpt \(\d+ bytes\) is damaged or no checkpoint"):
        checkpoint.load(path)


def test_the_error_of_a_damaged_file_offers_the_latest_other_one(path: Path) -> None:
    for age, name in enumerate(["new.ckpt", "old.ckpt"]):
        checkpoint.save(path.with_name(name), {"x": 1})
        os.utime(path.with_name(name), (1e9 - age, 1e9 - age))
    path.with_name("notes.txt").write_text("newer, but no checkpoint")
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"the latest other one beside it is new\.ckpt$"):
        checkpoint.load(path)


def test_other_files_are_no_checkpoints(path: Path) -> None:
    path.write_text("hello")
    with pytest.raises(RuntimeError, match="no checkpoint"):
        checkpoint.load(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(RuntimeError, match="it holds a Tensor, no dict"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(RuntimeError, match=r"last\.ckpt could not be loaded"):
        checkpoint.load(path)


def test_a_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        checkpoint.load(path)


def test_checksums_are_written_even_where_torch_is_told_not_to(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.save(path, {"x": torch.ones(3)})
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(checkpoint.load(path), {"x": torch.ones(3)})


# -- code in files (F40) ---------------------------------------------------------------------------


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_file_that_asks_for_code_runs_none_and_the_error_recommends_none(path: Path) -> None:
    marker = path.with_name("ran")
    torch.save({"x": Hostile(marker)}, path)
    with pytest.raises(
        RuntimeError, match=r"asks for posix\.mkdir.*None of its code was"
    ) as caught:
        checkpoint.load(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    assert caught.value.__suppress_context__
    torch.load(path, weights_only=False)
    assert marker.exists()  # the control


def test_a_file_whose_plain_data_is_garbage_is_an_error_that_names_it(path: Path) -> None:
    checkpoint.save(path, {"x": 1})
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    records["archive/data.pkl"] = b"\x00garbage"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    with pytest.raises(RuntimeError, match=r"last\.ckpt was not loaded: it asks for more than"):
        checkpoint.load(path)


# -- nothing is lost (F29, F36) --------------------------------------------------------------------

BEGINNING = """
    import importlib.util, os, signal, sys, torch
    spec = importlib.util.spec_from_file_location("checkpoint", sys.argv[1])
    checkpoint = importlib.util.module_from_spec(spec)  # it alone: the whole package takes longer
    spec.loader.exec_module(checkpoint)
    path = sys.argv[2]
    state = {"weights": torch.full((100_000,), 2.0)}
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    def half(state, file, save=torch.save):
        import io
        buffer = io.BytesIO()
        save(state, buffer)
        handle = file if hasattr(file, "write") else open(file, "wb")
        handle.write(buffer.getvalue()[: 200_000])
        handle.flush()
        die()
"""
MOMENTS = {
    "half_written": "torch.save = half",
    "before_the_disk_has_it": "os.fsync = die",
    "before_the_rename": "os.replace = die",
}


def run_and_die(body: str, path: Path) -> None:
    code = textwrap.dedent(BEGINNING) + body
    command = [sys.executable, "-c", code, checkpoint.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_kill_9_while_overwriting_keeps_the_old_file_and_leaves_nothing_for_long(
    path: Path, moment: str
) -> None:
    old = {"weights": torch.full((100_000,), 1.0)}
    checkpoint.save(path, old)
    run_and_die(f"{moment}\ncheckpoint.save(path, state)", path)
    assert len(files(path.parent)) == 2  # it died where it should
    assert same(checkpoint.load(path), old)
    checkpoint.save(path, {"next": 1})
    assert files(path.parent) == ["last.ckpt"]
    assert checkpoint.load(path) == {"next": 1}


def test_kill_9_while_overwriting_in_place_loses_the_file(path: Path) -> None:
    """The control: the same death, without what `save` does."""
    checkpoint.save(path, {"weights": torch.full((100_000,), 1.0)})
    run_and_die("half(state, path)", path)
    with pytest.raises(RuntimeError, match="damaged"):
        checkpoint.load(path)


def test_a_temporary_that_somebody_is_writing_is_not_taken_for_a_leftover(path: Path) -> None:
    with checkpoint.replacing(path) as file:
        checkpoint.save(path, {"first": 1})
        assert len(files(path.parent)) == 2
        file.write(b"second")
    assert path.read_bytes() == b"second"
    assert files(path.parent) == ["last.ckpt"]


def test_a_temporary_that_another_process_removed_before_it_was_locked_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []

    def flock(file: Any, how: int, really: Callable[..., None] = fcntl.flock) -> None:
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        really(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    checkpoint.save(path, {"x": 1})
    assert len(removed) == 1
    assert checkpoint.load(path) == {"x": 1}


def test_a_file_system_without_locks_is_written_to_and_leftovers_stay(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    leftover = path.with_name(f".last.ckpt.{'0' * 16}.tmp")
    leftover.touch()
    checkpoint.save(path, {"x": 1})
    assert checkpoint.load(path) == {"x": 1}
    assert leftover.exists()  # it might be somebody's


def test_leftovers_of_other_targets_are_left_alone(path: Path) -> None:
    mine = [f".last.ckpt.{'0' * 16}.tmp"]
    others = [
        f".last.ckpt.x.{'0' * 16}.tmp",
        ".last.ckpt.tmp",
        f".a.last.ckpt.{'0' * 16}.tmp",
        f"last.ckpt.{'0' * 16}.tmp",
    ]
    for name in mine + others:
        path.with_name(name).touch()
    checkpoint.save(path, {"x": 1})
    assert files(path.parent) == sorted([*others, "last.ckpt"])


def test_the_file_is_on_the_disk_before_the_rename_and_the_name_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", target.suffix or "folder"))
        if target.suffix:
            assert target.read_bytes() == b"all of it"  # nothing is left in the process's buffer

    def replace(source: Any, target: Any, really: Callable[..., None] = os.replace) -> None:
        assert Path(source).parent == Path(target).parent
        events.append(("replace", Path(target).suffix))
        really(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with checkpoint.replacing(path.parent / "runs" / "last.ckpt") as file:
        file.write(b"all of it")
    assert events == [("fsync", ".tmp"), ("replace", ".ckpt"), ("fsync", "folder")]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: like a full disk, it fails in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("size", [50_000, 2_000_000])
def test_a_full_disk_is_an_os_error_and_the_old_file_stays(path: Path, size: int) -> None:
    checkpoint.save(path, {"x": torch.zeros(100)})
    with pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(path, {"x": torch.zeros(size)})
    assert "what was there before is unchanged" in "".join(caught.value.__notes__)
    assert same(checkpoint.load(path), {"x": torch.zeros(100)})
    assert files(path.parent) == ["last.ckpt"]


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_is_full_at_the_last_bytes_is_the_same(path: Path) -> None:
    path.write_bytes(b"old")
    with (
        pytest.raises(OSError, match="File too large") as caught,
        checkpoint.replacing(path) as file,
    ):
        file.write(b"x" * 99_999)
        file.write(b"in the buffer until the end")
    assert "what was there before is unchanged" in "".join(caught.value.__notes__)
    assert path.read_bytes() == b"old"
    assert files(path.parent) == ["last.ckpt"]


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.save(folder / "last.ckpt", {"x": 1})
        folder.chmod(0o555)
        # For root every folder is writable.
        if os.geteuid() == 0:
            os.seteuid(65534)
            yield folder
            os.seteuid(0)
        else:
            yield folder
        folder.chmod(0o755)


def test_a_read_only_folder_is_a_permission_error_and_the_old_file_stays(
    read_only_folder: Path,
) -> None:
    path = read_only_folder / "last.ckpt"
    with pytest.raises(PermissionError) as caught:
        checkpoint.save(path, {"x": 2})
    assert str(path) in "".join(caught.value.__notes__)
    assert checkpoint.load(path) == {"x": 1}
    assert files(read_only_folder) == ["last.ckpt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_no_file(path: Path, error: type[BaseException]) -> None:
    checkpoint.save(path, {"x": 1})
    with pytest.raises(error), checkpoint.replacing(path) as file:
        file.write(b"half")
        raise error
    assert files(path.parent) == ["last.ckpt"]
    assert checkpoint.load(path) == {"x": 1}


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "notes.txt"])
def test_a_folder_in_the_files_place_is_an_error_before_anything_is_written(
    path: Path, content: str
) -> None:
    path.mkdir()
    if content:
        (path / content).write_text("mine")
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        checkpoint.save(path, {"x": 1})
    assert files(path.parent) == ["last.ckpt"]
    assert files(path) == ([content] if content else [])


def sharded(path: Path, step: int = 3) -> Path:
    sharded_checkpoint.save(path, {"step": step}, {"x": torch.arange(4.0)})
    return path


def test_a_file_takes_the_place_of_a_sharded_checkpoint_and_leaves_nothing(path: Path) -> None:
    sharded(path)
    sharded(path.with_name(".last.ckpt.previous"))  # of an earlier death
    checkpoint.save(path, {"step": 4})
    assert files(path.parent) == ["last.ckpt"]
    assert checkpoint.load(path) == {"step": 4}
    assert not sharded_checkpoint.is_sharded(path)


def test_a_link_to_a_sharded_checkpoint_is_replaced_and_not_what_it_leads_to(path: Path) -> None:
    path.symlink_to(sharded(path.with_name("best.ckpt")))
    checkpoint.save(path, {"step": 4})
    assert files(path.parent) == ["best.ckpt", "last.ckpt"]
    assert checkpoint.load(path) == {"step": 4}
    assert sharded_checkpoint.load(path.with_name("best.ckpt"))[0] == {"step": 3}


FOLDER_MOMENTS = MOMENTS | {"before_the_folder_is_removed": "checkpoint._sync_folder = die"}


@pytest.mark.parametrize("moment", FOLDER_MOMENTS)
def test_kill_9_while_a_sharded_checkpoint_is_replaced_keeps_one_of_the_two(
    path: Path, moment: str
) -> None:
    sharded(path)
    run_and_die(f"{FOLDER_MOMENTS[moment]}\ncheckpoint.save(path, state)", path)
    assert len(files(path.parent)) == 2  # it died where it should
    if moment == "before_the_folder_is_removed":
        assert same(checkpoint.load(path), {"weights": torch.full((100_000,), 2.0)})
    else:
        assert path.exists() is (moment != "before_the_rename")
        assert sharded_checkpoint.is_sharded(path)
        assert sharded_checkpoint.load(path)[0] == {"step": 3}
    checkpoint.save(path, {"next": 1})
    assert files(path.parent) == ["last.ckpt"]
    assert checkpoint.load(path) == {"next": 1}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_while_a_sharded_checkpoint_is_replaced_leaves_it_where_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    sharded(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, {"step": 4})
    assert files(path.parent) == ["last.ckpt"]
    assert sharded_checkpoint.load(path)[0] == {"step": 3}


def test_a_folder_of_the_users_with_the_name_for_the_old_one_is_left_alone(path: Path) -> None:
    aside = path.with_name(".last.ckpt.previous")
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    assert files(aside) == ["notes.txt"]


def test_what_an_interrupted_replacement_left_aside_is_found_by_its_own_path(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"step": 3})
    path.rename(checkpoint.aside_of(path))
    assert checkpoint.where(path) == checkpoint.aside_of(path)
    assert saved.load(path)["step"] == 3
    checkpoint.save(path, {"step": 4})
    assert saved.load(path)["step"] == 4
