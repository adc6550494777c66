import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL_Image

from composefit.images import Image
from composefit.loggers import WandbLogger
from composefit.loggers.wandb_file import cut, entries

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings or key of the user's, no output, and no service left for the next test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", "")
    for name in ("DISABLE_STATS", "DISABLE_META", "DISABLE_MACHINE_INFO"):  # only for speed
        monkeypatch.setenv(f"WANDB_X_{name}", "true")
    yield
    wandb.teardown()


def records(path: Path) -> list[Any]:
    """A `.wandb` file read block by block, its checksums verified."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, parts = [], b""
    for start in range(0, len(data), 32768):
        block = data[start : start + 32768]
        at = 0 if start else 7
        while at + 7 <= len(block):
            checksum, length, kind = struct.unpack("<IHB", block[at : at + 7])
            assert zlib.crc32(block[at + 6 : at + 7 + length]) == checksum
            parts += block[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                found.append(Record.FromString(parts))
                parts = b""
    return found


def files(save_dir: Path) -> list[Path]:
    return sorted(save_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name)


def history(save_dir: Path) -> list[dict[str, Any]]:
    """The rows of all files of a folder, as `wandb sync` would upload them one after the other."""
    rows = []
    for path in files(save_dir):
        for record in records(path):
            if record.HasField("history"):
                items = record.history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                rows.append(row)
    return rows


def curve(save_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(row["global_step"], row[name]) for row in history(save_dir) if name in row]


def services() -> list[int]:
    """The ids of W&B's processes that this process has started, and of theirs."""
    found, parents = [], [os.getpid()]
    while parents:
        listed = Path(f"/proc/{parents[0]}/task/{parents[0]}/children")
        children = [int(child) for child in listed.read_text().split()]
        found += [c for c in children if Path(f"/proc/{c}/comm").read_text().startswith("wandb")]
        parents = [*parents[1:], *children]
    return found


def script(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_name_value_and_step_arrive_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.inf, -math.inf, 3, -0.0, True, float(torch.tensor(0.1))]
    logger = WandbLogger("project", "name", tmp_path)
    for i, value in enumerate(values):
        logger.log_metrics({"critic/loss": value, "../../x": value, "a.b": 1, "epoch": 0}, 7 + i)
    logger.log_metrics({"nan": math.nan}, 10**9)
    logger.finalize("finished")
    for name in ("critic/loss", "../../x"):
        assert curve(tmp_path, name) == [(7 + i, value) for i, value in enumerate(values)]
    ((step, nan),) = curve(tmp_path, "nan")
    assert step == 10**9 and math.isnan(nan)
    own = {"_step", "_runtime", "_timestamp", "global_step"}
    assert set().union(*history(tmp_path)) - own == {
        "critic/loss",
        "../../x",
        "a.b",
        "epoch",
        "nan",
    }


def test_all_curves_are_over_the_global_step(tmp_path: Path) -> None:
    logger = WandbLogger("project", "a name", tmp_path, id="abc", tags=["x"])
    logger.log_metrics({"loss": 1.0}, 3)
    logger.finalize("finished")
    (path,) = files(tmp_path)
    metrics = [record.metric for record in records(path) if record.HasField("metric")]
    assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [
        ("global_step", "", ""),
        ("", "*", "global_step"),
    ]
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.run_id, run.project, run.display_name) == ("abc", "project", "a name")
    assert list(run.tags) == ["x"]
    (end,) = [record.exit for record in records(path) if record.HasField("exit")]
    assert end.exit_code == 0


def test_a_failed_run_is_marked_as_such(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 3)
    logger.finalize("failed")
    (end,) = [r.exit for r in records(files(tmp_path)[0]) if r.HasField("exit")]
    assert end.exit_code == 1


def test_a_metric_called_like_the_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log under another name"):
        WandbLogger(save_dir=tmp_path).log_metrics({"global_step": 1.0}, 1)


def test_a_run_that_logs_nothing_writes_nothing_and_starts_no_process(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path / "new")
    logger.flush()
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("finished")
    assert not (tmp_path / "new").exists()
    assert services() == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_no_process_is_left_after_the_end(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    started = services()
    assert started
    logger.finalize("finished")
    assert services() == []
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{one}").exists() for one in started):  # grandchildren end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_follows_continues_the_same_one(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("finished")
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert [row["_step"] for row in history(tmp_path)] == [0, 1]
    assert [path.name for path in files(tmp_path)] == [f"run-{logger.id}.wandb"] * 2


def test_a_run_of_the_script_is_used_and_left_open(tmp_path: Path) -> None:
    run = wandb.init(project="mine", dir=str(tmp_path), mode="offline")
    logger = WandbLogger("other", save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    run.log({"mine": 2.0})
    logger.log_metrics({"loss": 2.0}, 2)
    assert logger.experiment is run and logger.id == run.id
    logger.finalize("finished")
    assert wandb.run is run
    run.log({"mine": 3.0})
    run.finish()
    wandb.teardown()  # only then is the file complete
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert [row["mine"] for row in history(tmp_path) if "mine" in row] == [2.0, 3.0]


def test_another_run_of_the_script_is_in_the_way_of_a_resumed_one(tmp_path: Path) -> None:
    run = wandb.init(dir=str(tmp_path), mode="offline", id="mine")
    logger = WandbLogger(save_dir=tmp_path)
    logger.load_state_dict({"id": "abc", "next_row": 3, "step": 3})
    with pytest.raises(
        RuntimeError, match=r"'abc' cannot be continued while 'mine' is open: .*fin"
    ):
        logger.log_metrics({"loss": 1.0}, 4)
    run.finish()
    logger.log_metrics({"loss": 1.0}, 4)
    logger.finalize("finished")
    assert curve(tmp_path, "loss") == [(4, 1.0)]


def test_a_service_that_another_run_needs_stays(tmp_path: Path) -> None:
    other = wandb.init(dir=str(tmp_path / "other"), mode="offline", reinit="create_new")
    logger = WandbLogger(save_dir=tmp_path, reinit="create_new")
    logger.log_metrics({"loss": 1.0}, 1)
    assert logger.experiment is not other
    logger.finalize("finished")
    other.log({"mine": 1.0})
    other.finish()
    wandb.teardown()
    assert curve(tmp_path, "loss") == [(1, 1.0)]


# -- resuming --------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from composefit.loggers import WandbLogger

save_dir, checkpoint, last, wait = sys.argv[1], *map(int, sys.argv[2:])
logger = WandbLogger("project", save_dir=save_dir)
for step in range(1, last + 1):
    logger.log_metrics({"loss": float(step), "epoch": 0}, step)
    if step == checkpoint:
        logger.flush()
        print(json.dumps(logger.state_dict()), flush=True)
if wait:
    logger.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(save_dir: Path, checkpoint: int, last: int, wait: bool) -> dict[str, Any]:
    """A run that logs every step, saves its state at one, and is killed; returns the state."""
    done = script(KILLED, save_dir, checkpoint, last, int(wait))
    assert done.returncode == -signal.SIGKILL
    state: dict[str, Any] = json.loads(done.stdout)
    return {**state, "step": checkpoint}


def test_a_resumed_run_continues_the_curves_of_a_killed_one(tmp_path: Path) -> None:
    state = killed(tmp_path, checkpoint=5, last=9, wait=True)
    assert [step for step, _ in curve(tmp_path, "loss")] == list(range(1, 10))

    resumed = WandbLogger("project", save_dir=tmp_path)
    resumed.log_hyperparams({"lr": 0.1})  # before the state is loaded: no run of its own
    resumed.load_state_dict(state)
    for step in range(6, 13):
        resumed.log_metrics({"loss": -float(step), "epoch": 0}, step)
    resumed.finalize("finished")

    expected = [(s, float(s)) for s in range(1, 6)] + [(s, -float(s)) for s in range(6, 13)]
    assert curve(tmp_path, "loss") == expected
    assert [row["_step"] for row in history(tmp_path)] == list(range(12))
    assert [path.name for path in files(tmp_path)] == [f"run-{state['id']}.wandb"] * 2
    runs = [record.run for path in files(tmp_path) for record in records(path)]
    assert {run.run_id for run in runs if run.run_id} == {state["id"]}


def test_what_was_logged_before_a_checkpoint_is_on_the_disk_whenever_the_run_is_killed(
    tmp_path: Path,
) -> None:
    killed(tmp_path, checkpoint=4, last=4, wait=False)
    assert curve(tmp_path, "loss") == [(step, float(step)) for step in range(1, 5)]


def test_a_run_may_be_resumed_twice_from_one_checkpoint(tmp_path: Path) -> None:
    first = WandbLogger(save_dir=tmp_path)
    for step in range(1, 4):
        first.log_metrics({"loss": float(step)}, step)
    state = first.state_dict()
    first.log_metrics({"loss": 4.0}, 4)
    first.finalize("failed")
    for sign in (-1.0, -10.0):
        resumed = WandbLogger(save_dir=tmp_path)
        resumed.load_state_dict({**state, "step": 3})
        for step in (4, 5):
            resumed.log_metrics({"loss": sign * step}, step)
        resumed.finalize("failed")
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, -40.0), (5, -50.0)]
    assert curve(tmp_path, "loss") == expected
    assert [row["_step"] for row in history(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_logger_with_a_run_open_goes_on_with_the_one_of_the_state(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": float(step)}, step)
    logger.load_state_dict({**logger.state_dict(), "next_row": 1, "step": 1})
    logger.log_metrics({"loss": -2.0}, 2)
    logger.finalize("finished")
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, -2.0)]


def test_runs_of_other_ids_are_left_alone(tmp_path: Path) -> None:
    for name in ("abc", "abc-2", "2-abc"):
        other = WandbLogger(save_dir=tmp_path, id=name)
        other.log_metrics({name: 1.0}, 9)
        other.finalize("finished")
    resumed = WandbLogger(save_dir=tmp_path)
    resumed.load_state_dict({"id": "abc", "next_row": 1, "step": 3})
    resumed.log_metrics({"abc": 2.0}, 4)
    resumed.finalize("finished")
    assert curve(tmp_path, "abc-2") == curve(tmp_path, "2-abc") == [(9, 1.0)]
    assert curve(tmp_path, "abc") == [(4, 2.0)]


def test_a_disabled_run_that_is_resumed_cuts_nothing_off(tmp_path: Path) -> None:
    first = WandbLogger(save_dir=tmp_path, id="abc")
    first.log_metrics({"loss": 1.0}, 9)
    first.finalize("failed")
    resumed = WandbLogger(save_dir=tmp_path, mode="disabled")
    resumed.load_state_dict({"id": "abc", "next_row": 0, "step": 3})
    resumed.log_metrics({"loss": 2.0}, 4)
    resumed.finalize("finished")
    assert curve(tmp_path, "loss") == [(9, 1.0)]


def test_a_state_from_before_the_first_row_begins_a_run(tmp_path: Path) -> None:
    resumed = WandbLogger(save_dir=tmp_path, id="abc")
    resumed.load_state_dict({**WandbLogger(save_dir=tmp_path).state_dict(), "step": 3})
    resumed.log_metrics({"loss": 1.0}, 4)
    resumed.finalize("finished")
    assert curve(tmp_path, "loss") == [(4, 1.0)]
    assert [path.name for path in files(tmp_path)] == ["run-abc.wandb"]


def test_flushing_warns_where_the_service_does_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composefit.loggers.wandb._PATIENCE", 0.05)
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.flush()
    (service, *_) = services()
    os.kill(service, signal.SIGSTOP)
    try:
        logger.log_metrics({"loss": 2.0}, 2)
        with pytest.warns(UserWarning, match="has not written all rows to .*may miss some"):
            logger.flush()
    finally:
        os.kill(service, signal.SIGCONT)
    logger.flush()
    logger.finalize("finished")


# In a process of its own: W&B leaves a socket and a thread of a dead service behind.
SERVICE_DIES = """
import os, signal, sys, time
from pathlib import Path
from composefit.loggers import WandbLogger

logger = WandbLogger(save_dir=sys.argv[1])
logger.log_metrics({"loss": 1.0}, 1)
logger.flush()
for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
    if Path(f"/proc/{child}/comm").read_text().startswith("wandb"):
        os.kill(int(child), signal.SIGKILL)
try:
    while True:  # the first ones may go into the socket's buffer
        logger.log_metrics({"loss": 2.0}, 2)
        time.sleep(0.01)
except ConnectionError:
    print("raised")
try:
    logger.finalize("failed")
except ConnectionError:
    print("raised")
logger.log_metrics({"loss": 3.0}, 3)
logger.finalize("finished")
"""


def test_a_service_that_dies_raises_and_the_logger_can_be_used_again(tmp_path: Path) -> None:
    done = script(SERVICE_DIES, tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["raised", "raised"])
    assert curve(tmp_path, "loss") == [(1, 1.0), (3, 3.0)]
    assert [row["_step"] for row in history(tmp_path)] == [0, 1]


# -- the file --------------------------------------------------------------------------------------


def test_rows_longer_than_a_block_are_read_and_cut_off(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    many = {f"layer {i}": float(i) for i in range(3000)}
    for step in range(1, 6):
        logger.log_metrics({**many, "x": float(step)}, step)
    logger.flush()
    logger.finalize("finished")
    (path,) = files(tmp_path)
    found = [entry.values for entry in entries(path) if entry.is_row]
    assert found == history(tmp_path)
    assert found[3]["layer 2999"] == 2999.0
    *_, entry = (one for one in entries(path) if one.values.get("x") == 2.0)
    assert [e.values["x"] for e in entries(path, entry.end) if e.is_row] == [3.0, 4.0, 5.0]
    cut(path, "global_step", 3)
    assert curve(tmp_path, "x") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_an_unfinished_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    for step in range(1, 400):
        logger.log_metrics({"x": float(step)}, step)
    logger.finalize("finished")
    (path,) = files(tmp_path)
    whole, rows = path.read_bytes(), history(tmp_path)
    assert len(whole) > 2 * 32768
    *_, last = (entry for entry in entries(path) if entry.is_row)
    for size, count in [
        (last.end, 399),
        (last.end - 1, 398),
        (last.begin + 1, 398),
        (20, 0),
        (0, 0),
    ]:
        path.write_bytes(whole[:size])
        assert [entry.values for entry in entries(path) if entry.is_row] == rows[:count]


@pytest.mark.parametrize("left", range(7))
def test_a_block_that_ends_in_too_few_bytes_for_a_record_is_padded(
    tmp_path: Path, left: int
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    def framed(value: str) -> bytes:
        record = Record()
        record.history.item.add(key="x", value_json=value)
        body = b"\x01" + record.SerializeToString()
        return struct.pack("<IH", zlib.crc32(body), len(body) - 1) + body

    text = json.dumps("1" * (32768 - 7 - left - len(framed("1" * 30000)) + 30000 - 2))
    path = tmp_path / "run-abc.wandb"
    block = b":W&B\xe1\xbe\x00" + framed(text) + bytes(left)
    assert len(block) == 32768
    path.write_bytes(block + framed("2"))
    first, second = entries(path)
    assert (first.values, second.values) == ({"x": json.loads(text)}, {"x": 2})


# -- pictures, settings, the package ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["fakes", "critic/fakes", "../../../../../x", "/etc/x"])
def test_a_picture_arrives_pixel_by_pixel_and_stays_in_the_runs_folder(
    tmp_path: Path, name: str
) -> None:
    image = Image(torch.rand(5, 3, 6, 7), "five fakes")
    logger = WandbLogger(save_dir=tmp_path / "a" / "b")
    logger.log_image(name, image, 3)
    logger.log_metrics({"loss": 1.0}, 3)
    logger.finalize("finished")
    (path,) = tmp_path.rglob("*.png")
    assert path.is_relative_to(files(tmp_path / "a" / "b")[0].parent / "files" / "media")
    assert np.array_equal(np.asarray(PIL_Image.open(path)), image.array())
    row, other = history(tmp_path / "a" / "b")
    assert row["global_step"] == other["global_step"] == 3
    assert row[f"{name}/caption"] == "five fakes"


def test_settings_are_in_the_runs_config(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"depth": 3}, "path": Path("x")})
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_hyperparams({"lr": 0.2})
    assert logger.experiment.config["lr"] == 0.2
    logger.finalize("finished")
    (path,) = files(tmp_path)
    updates = [
        item
        for record in records(path)
        for item in (*record.run.config.update, *record.config.update)
    ]
    found: dict[str, Any] = {}
    for item in updates:
        found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert (found["lr"], found["net"], found["path"]) == (0.2, {"depth": 3}, "x")


def test_settings_of_the_service_may_be_given(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings={"run_notes": "mine"})
    assert logger.experiment.notes == "mine"
    logger.finalize("finished")
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(run_notes="mine"))
    assert logger.experiment.notes == "mine"
    logger.finalize("finished")


def test_a_folder_that_is_not_there_yet_is_no_reason_to_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "false")
    logger = WandbLogger(save_dir=tmp_path / "new")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("finished")
    printed = "".join(capfd.readouterr())
    assert "Tracking run" in printed and "WARNING" not in printed


def test_a_disabled_run_writes_nothing(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path / "new", mode="disabled")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_image("fakes", Image(torch.rand(2, 2)), 1)
    logger.flush()
    logger.finalize("finished")
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(ModuleNotFoundError, match=r'pip install "composefit\[wandb\]"'):
        WandbLogger(save_dir=tmp_path)
