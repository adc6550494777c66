import csv
import json
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from composefit.images import Image
from composefit.loggers import CSVLogger


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(root: Path, *calls: tuple[int, dict[str, Any]], flush_every: int = 100) -> Path:
    """One run's worth of calls."""
    logger = CSVLogger(root, flush_every=flush_every)
    for step, metrics in calls:
        logger.log_metrics(metrics, step)
    logger.finalize("finished")
    return logger.path


def test_the_columns_are_step_epoch_and_the_metrics_in_the_order_seen(tmp_path: Path) -> None:
    path = write(tmp_path, (1, {"loss": 0.5, "epoch": 0, "a": 2}), (2, {"b": 1.0, "epoch": 1}))
    assert path == tmp_path / "metrics.csv"
    assert path.read_text() == "step,epoch,loss,a,b\n1,0,0.5,2,\n2,1,,,1.0\n"


def test_values_read_back_as_the_same_numbers(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.inf, -math.inf, 3, -0.0, True, float(torch.tensor(0.1))]
    path = write(tmp_path, *((i, {"x": value}) for i, value in enumerate(values)))
    assert [float(row["x"]) for row in rows(path)] == values
    (row,) = rows(write(tmp_path / "nan", (0, {"x": math.nan, "none": None})))
    assert math.isnan(float(row["x"]))
    assert row["none"] == ""


def test_a_run_has_a_folder_by_name_and_version(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "gan", "3")
    logger.log_metrics({"critic/loss": 0.5}, 1)
    logger.finalize("finished")
    assert logger.log_dir == tmp_path / "gan" / "3"
    assert rows(tmp_path / "gan" / "3" / "metrics.csv")[0]["critic/loss"] == "0.5"
    assert CSVLogger(tmp_path, name="gan").path == tmp_path / "gan" / "metrics.csv"
    assert CSVLogger(tmp_path, version="3").path == tmp_path / "3" / "metrics.csv"


def test_rows_wait_in_memory_until_there_are_enough(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_every=3)
    for step in range(5):
        logger.log_metrics({"loss": 1.0}, step)
        expected = [] if step < 2 else ["0", "1", "2"]
        assert logger.path.exists() == bool(expected)
        assert not expected or [row["step"] for row in rows(logger.path)] == expected
    logger.finalize("failed")
    assert [row["step"] for row in rows(logger.path)] == ["0", "1", "2", "3", "4"]


def test_a_value_is_converted_only_when_it_is_written(tmp_path: Path) -> None:
    class Value:
        read = 0

        def __float__(self) -> float:
            self.read += 1
            return 1.5

    value = Value()
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": value}, 1)  # type: ignore[dict-item]
    assert value.read == 0
    logger.finalize("finished")
    assert (value.read, rows(logger.path)[0]["loss"]) == (1, "1.5")


def test_the_callers_dict_may_change_after_the_call(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    metrics = {"loss": 1.0}
    logger.log_metrics(metrics, 1)
    metrics["loss"] = 2.0
    logger.finalize("finished")
    assert rows(logger.path)[0]["loss"] == "1.0"


@pytest.mark.parametrize("flush_every", [1, 2, 100])
def test_a_metric_that_comes_later_gets_a_column_and_earlier_rows_stay(
    tmp_path: Path, flush_every: int
) -> None:
    calls = [(1, {"loss": 1.0}), (2, {"val": 2.0}), (3, {"loss": 3.0}), (4, {"other": 4.0})]
    path = write(tmp_path, *calls, flush_every=flush_every)
    assert path.read_text() == (
        "step,epoch,loss,val,other\n1,,1.0,,\n2,,,2.0,\n3,,3.0,,\n4,,,,4.0\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_rows_without_a_new_metric_are_appended(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_every=1)
    logger.log_metrics({"loss": 1.0}, 1)
    before = logger.path.stat().st_ino
    logger.log_metrics({"loss": 2.0}, 2)
    assert logger.path.stat().st_ino == before  # a file written anew is another file
    logger.log_metrics({"val": 2.0}, 3)
    assert logger.path.stat().st_ino != before


def test_a_new_column_that_fails_to_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path, flush_every=1)
    logger.log_metrics({"loss": 1.0}, 1)
    before = logger.path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no"):
            logger.log_metrics({"val": 1.0}, 2)
    assert logger.path.read_bytes() == before
    logger.finalize("failed")
    assert [row["val"] for row in rows(logger.path)] == ["", "1.0"]


def test_another_run_continues_the_file(tmp_path: Path) -> None:
    write(tmp_path, (1, {"loss": 1.0, "a": 5.0}))
    path = write(tmp_path, (2, {"b": 7.0, "loss": 2.0}))
    assert path.read_text() == "step,epoch,loss,a,b\n1,,1.0,5.0,\n2,,2.0,,7.0\n"
    logger = CSVLogger(tmp_path)
    for fit in (3, 4):  # a logger may be used for several runs
        logger.log_metrics({"loss": 0.0}, fit)
        logger.finalize("finished")
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("end", ["3,0,0.12", "3,0", '3,0,"te', '3,"te\nxt', "3,0,0.12,1"])
def test_a_line_that_a_killed_run_left_unfinished_is_dropped_on_resuming(
    tmp_path: Path, end: str
) -> None:
    path = write(tmp_path, (1, {"loss": 1.0}), (2, {"loss": 2.0}))
    with open(path, "a") as file:
        file.write(end)
    write(tmp_path, (3, {"loss": 3.0}))
    assert path.read_text() == "step,epoch,loss\n1,,1.0\n2,,2.0\n3,,3.0\n"


@pytest.mark.parametrize("there", ["", "step,ep"])
def test_a_file_without_a_whole_header_is_begun_anew(tmp_path: Path, there: str) -> None:
    (tmp_path / "metrics.csv").write_text(there)
    path = write(tmp_path, (1, {"loss": 1.0}))
    assert path.read_text() == "step,epoch,loss\n1,,1.0\n"


def test_a_file_that_was_removed_in_mid_run_is_begun_anew(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_every=1)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.path.unlink()
    logger.log_metrics({"loss": 2.0}, 2)
    assert logger.path.read_text() == "step,epoch,loss\n2,,2.0\n"


def test_a_foreign_file_is_refused_before_the_run_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,price\nx,1\n")
    with pytest.raises(ValueError, match="first column is 'name': give CSVLogger another folder"):
        CSVLogger(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "name,price\nx,1\n"


def test_a_run_that_logs_nothing_writes_nothing(tmp_path: Path) -> None:
    CSVLogger(tmp_path / "new").finalize("finished")
    assert list(tmp_path.iterdir()) == []


# -- resuming --------------------------------------------------------------------------------------


def killed(root: Path, steps: int) -> Path:
    """What a run leaves that logs every step and is then killed."""
    logger = CSVLogger(root, flush_every=1)
    for step in range(1, steps + 1):
        logger.log_metrics({"loss": float(step), "killed": 1}, step)
    return logger.path


def test_a_resumed_run_drops_the_rows_from_after_its_checkpoint(tmp_path: Path) -> None:
    path = killed(tmp_path, 5)
    resumed = CSVLogger(tmp_path, flush_every=1)
    resumed.load_state_dict({**resumed.state_dict(), "step": 3})
    for step in (4, 5, 6):
        resumed.log_metrics({"loss": -float(step)}, step)
    assert [(row["step"], row["loss"]) for row in rows(path)] == [
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "3.0"),
        ("4", "-4.0"),
        ("5", "-5.0"),
        ("6", "-6.0"),
    ]


def test_a_resumed_runs_own_rows_stay_when_the_file_is_written_anew(tmp_path: Path) -> None:
    path = killed(tmp_path, 5)
    resumed = CSVLogger(tmp_path, flush_every=1)
    resumed.load_state_dict({"step": 3})
    resumed.log_metrics({"loss": 4.0}, 4)
    resumed.log_metrics({"a column": 5.0}, 5)
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4", "5"]


def test_rows_of_the_checkpoints_own_step_stay(tmp_path: Path) -> None:
    write(tmp_path, (3, {"loss": 1.0}), (3, {"val": 2.0}), (4, {"loss": 3.0}))
    resumed = CSVLogger(tmp_path)
    resumed.load_state_dict({"step": 3})
    resumed.log_metrics({"val": 4.0}, 3)
    resumed.flush()
    assert [row["step"] for row in rows(resumed.path)] == ["3", "3", "3"]


def test_a_logger_that_goes_on_itself_drops_rows_in_memory_and_in_the_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_every=4)
    for step in range(1, 7):  # 1 to 4 are written, 5 and 6 in memory
        logger.log_metrics({"loss": float(step)}, step)
    logger.load_state_dict({"step": 3})
    logger.log_metrics({"loss": -4.0}, 4)
    logger.finalize("finished")
    assert [row["loss"] for row in rows(logger.path)] == ["1.0", "2.0", "3.0", "-4.0"]
    logger.log_metrics({"loss": 2.5}, 2)  # another run of the same logger: nothing is dropped now
    logger.finalize("finished")
    assert [row["step"] for row in rows(logger.path)] == ["1", "2", "3", "4", "2"]


def test_rows_are_dropped_in_one_piece_and_not_before_there_are_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed(tmp_path, 5)
    before = path.read_bytes()
    resumed = CSVLogger(tmp_path, flush_every=1)
    resumed.load_state_dict({"step": 3})
    resumed.flush()
    assert path.read_bytes() == before

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no"):
            resumed.log_metrics({"loss": 4.0}, 4)
    assert path.read_bytes() == before
    resumed.finalize("failed")
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4"]


# -- pictures --------------------------------------------------------------------------------------


def test_a_picture_is_a_file_beside_the_table(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "gan")
    image = Image(torch.rand(5, 3, 8, 8), "fakes")
    logger.log_image("fakes", image, 12)
    path = tmp_path / "gan" / "images" / "fakes-12.png"
    assert path.read_bytes() == image.png()
    logger.log_image("fakes", Image(torch.zeros(8, 8)), 12)  # a resumed run overwrites
    assert path.read_bytes() == Image(torch.zeros(8, 8)).png()
    assert [file.name for file in path.parent.iterdir()] == ["fakes-12.png"]


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/x",
        "critic/fakes",
        "critic_fakes",
        "critic%2Ffakes",
        "..",
        "",
        "a\\b",
        "ü\0",
    ],
)
def test_a_pictures_name_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    CSVLogger(tmp_path, "a", "b").log_image(name, Image(torch.rand(2, 2)), 1)
    (found,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert found.parent == tmp_path / "a" / "b" / "images"
    assert unquote(found.name) == f"{name}-1.png"  # so that no two names share a file


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: like a full disk, it fails in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_every=10)
    with pytest.raises(OSError, match="File too large"):
        for step in range(1000):
            logger.log_metrics({"loss": 0.25}, step)
    # Rows of 8 or 9 bytes in tens: those that fit, and no part of those that did not.
    written = [int(row["step"]) for row in rows(logger.path)]
    assert written == list(range(100))
    assert logger.path.read_text().endswith("\n99,,0.25\n")


# -- names (F41) and formulas (F42) ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", "a/b.csv", "/etc/x", "a\\b.csv", "x\0.csv"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name of a file: give the folder separately"):
        CSVLogger(tmp_path / "runs", filename=name)


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "/etc", "a\\b", "x\0"])
@pytest.mark.parametrize("argument", ["name", "version"])
def test_a_name_or_version_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, name: str, argument: str
) -> None:
    with pytest.raises(ValueError, match=r"is no name of a file"):
        CSVLogger(tmp_path, **{argument: name})


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a str, got 3"):
        CSVLogger(tmp_path, filename=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a str, got 3"):
        CSVLogger(tmp_path, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        CSVLogger(tmp_path, flush_every=0)
    with pytest.raises(TypeError, match=r"an int, got 1\.5"):
        CSVLogger(tmp_path, flush_every=1.5)  # type: ignore[arg-type]


def test_a_metric_called_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log under another name"):
        CSVLogger(tmp_path).log_metrics({"step": 1.0}, 1)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\n"])
def test_names_and_text_that_look_like_formulas_are_escaped(tmp_path: Path, first: str) -> None:
    formula = f"{first}cmd|'/C calc'!A0"
    path = write(tmp_path, (1, {formula: 1.0, "text": formula, "negative": -1.0}))
    with open(path, newline="") as file:
        header, row = csv.reader(file)
    assert header == ["step", "epoch", f"'{formula}", "text", "negative"]
    assert row == ["1", "", "1.0", f"'{formula}", "-1.0"]  # a number is no formula


def test_carriage_returns_are_line_ends_and_break_no_row(tmp_path: Path) -> None:
    write(tmp_path, (1, {"a\rb": 1.0, "text": "\r=x\r\ny"}))
    (row,) = rows(write(tmp_path))
    assert row == {"step": "1", "epoch": "", "a\nb": "1.0", "text": "'\n=x\ny"}


def test_an_escaped_name_keeps_its_column_over_runs_and_apart_from_others(tmp_path: Path) -> None:
    write(tmp_path, (1, {"=x": 1.0, "'=x": 2.0}), flush_every=1)
    path = write(tmp_path, (2, {"'=x": 4.0, "=x": 3.0}), flush_every=1)
    assert path.read_text() == "step,epoch,'=x,''=x\n1,,1.0,2.0\n2,,3.0,4.0\n"


def test_names_with_commas_quotes_and_line_ends_read_back(tmp_path: Path) -> None:
    name = 'a,"b"\nc'
    write(tmp_path, (1, {name: 1.0, "text": "x,\ny"}))
    path = write(tmp_path, (2, {name: 2.0, "new": 3.0}))
    assert [row[name] for row in rows(path)] == ["1.0", "2.0"]
    assert [row["text"] for row in rows(path)] == ["x,\ny", ""]


# -- settings --------------------------------------------------------------------------------------


def test_settings_are_written_as_json_beside_the_table(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "runs", filename="critic.csv")
    logger.log_hyperparams({"lr": 0.1, "path": Path("x"), "net": {"depth": 3}})
    with open(tmp_path / "runs" / "critic.hparams.json") as file:
        assert json.load(file) == {"lr": 0.1, "path": repr(Path("x")), "net": {"depth": 3}}
