import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL_Image

from composefit.images import Image
from composefit.loggers import TensorBoardLogger

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


def read(folder: Path) -> Any:
    """What TensorBoard makes of a folder of event files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def test_name_value_and_step_arrive_exactly(tmp_path: Path) -> None:
    values = [0.1, -0.0, 3, 1e-30, math.inf, -math.inf, True, float(torch.tensor(0.3))]
    logger = TensorBoardLogger(tmp_path)
    for i, value in enumerate(values):
        logger.log_metrics({"critic/loss": value, "../../x": 2 * value, "epoch": 0}, 7 + i)
    logger.log_metrics({"nan": math.nan}, 10**9)
    logger.finalize("finished")
    # Single precision is the format's; a loss that was computed in it arrives as it was.
    expected = [(7 + i, float(np.float32(value))) for i, value in enumerate(values)]
    assert curve(tmp_path, "critic/loss") == expected
    assert curve(tmp_path, "critic/loss")[-1][1] == float(torch.tensor(0.3))
    assert [step for step, _ in curve(tmp_path, "../../x")] == [step for step, _ in expected]
    ((step, nan),) = curve(tmp_path, "nan")
    assert step == 10**9 and math.isnan(nan)
    assert set(read(tmp_path).Tags()["scalars"]) == {"critic/loss", "../../x", "epoch", "nan"}
    assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path]


def test_a_run_has_a_folder_by_name_and_version(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "gan", "3")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("finished")
    assert logger.log_dir == tmp_path / "gan" / "3"
    assert curve(tmp_path / "gan" / "3", "loss") == [(1, 1.0)]


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "/etc", "a\\b", "x\0"])
@pytest.mark.parametrize("argument", ["name", "version"])
def test_a_name_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, name: str, argument: str
) -> None:
    with pytest.raises(ValueError, match="is no name of a file"):
        TensorBoardLogger(tmp_path, **{argument: name})


def test_a_run_that_logs_nothing_writes_nothing_and_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    logger = TensorBoardLogger(tmp_path / "new")
    logger.flush()
    assert threading.active_count() == before
    logger.finalize("finished")
    assert list(tmp_path.iterdir()) == []


def test_what_is_flushed_is_in_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.flush()
    assert [step for step, _ in curve(tmp_path, "loss")] == [0, 1, 2]
    logger.finalize("finished")


def test_no_thread_is_left_after_the_end_and_another_run_may_follow(tmp_path: Path) -> None:
    before = threading.active_count()
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": float(step)}, step)
        assert threading.active_count() > before
        logger.finalize("finished")
        assert threading.active_count() == before
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]


# -- resuming --------------------------------------------------------------------------------------


def killed(folder: Path, steps: int) -> None:
    """What a run leaves that logs every step and is then killed."""
    logger = TensorBoardLogger(folder)
    for step in range(1, steps + 1):
        logger.log_metrics({"loss": float(step)}, step)
        logger.log_image("fakes", Image(torch.full((4, 4), step / 10)), step)
    logger.log_metrics({"val": 7.0}, steps)
    logger.flush()
    assert len(read(folder).Scalars("loss")) == steps
    logger.finalize("failed")  # here only for its thread


def test_a_resumed_run_continues_the_curve_without_the_steps_after_its_checkpoint(
    tmp_path: Path,
) -> None:
    killed(tmp_path, 5)
    resumed = TensorBoardLogger(tmp_path)
    resumed.load_state_dict({**resumed.state_dict(), "step": 3})
    for step in (4, 5, 6):
        resumed.log_metrics({"loss": -float(step)}, step)
        resumed.log_image("fakes", Image(torch.zeros(4, 4)), step)
    resumed.finalize("finished")
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0), (5, -5.0), (6, -6.0)]
    assert curve(tmp_path, "loss") == expected
    assert [event.step for event in read(tmp_path).Images("fakes")] == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path, "val") == []  # the killed run's, from after the checkpoint


def test_a_run_may_be_resumed_twice_from_one_checkpoint(tmp_path: Path) -> None:
    killed(tmp_path, 5)
    for sign in (-1.0, -10.0):
        resumed = TensorBoardLogger(tmp_path)
        resumed.load_state_dict({"step": 2})
        for step in (3, 4):
            resumed.log_metrics({"loss": sign * step}, step)
        resumed.finalize("failed")
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, -30.0), (4, -40.0)]


def test_what_a_logger_wrote_before_the_state_was_loaded_is_dropped_as_well(
    tmp_path: Path,
) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": float(step)}, step)
    logger.load_state_dict({"step": 1})
    logger.log_metrics({"loss": -2.0}, 2)
    logger.finalize("finished")
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, -2.0)]


# -- pictures, settings, the package ---------------------------------------------------------------


def test_a_picture_arrives_pixel_by_pixel(tmp_path: Path) -> None:
    image = Image(torch.rand(5, 3, 6, 7), "no place for it")
    logger = TensorBoardLogger(tmp_path)
    logger.log_image("../fakes", image, 3)
    logger.finalize("finished")
    (event,) = read(tmp_path).Images("../fakes")
    assert event.step == 3
    path = tmp_path / "picture.png"
    path.write_bytes(event.encoded_image_string)
    assert np.array_equal(np.asarray(PIL_Image.open(path)), image.array())


def test_settings_are_in_the_hparams_tab_without_a_folder_of_their_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    params = {"lr": 0.1, "name": "a", "net": {"depth": 3, "act": torch.nn.ReLU}, "none": None}
    logger.log_hyperparams(params)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("finished")
    content = read(tmp_path).PluginTagToContent("hparams")[SESSION_START_INFO_TAG]
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["name"].string_value == "a"
    assert start.hparams["net/depth"].number_value == 3
    assert start.hparams["net/act"].string_value == repr(torch.nn.ReLU)
    assert start.hparams["none"].string_value == "None"
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"]
    assert curve(tmp_path, "loss") == [(1, 1.0)]


def test_the_writer_itself_is_at_hand(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_histogram("weights", torch.randn(10), 1)
    logger.finalize("finished")
    assert read(tmp_path).Tags()["histograms"] == ["weights"]


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not there
    with pytest.raises(ModuleNotFoundError, match=r'pip install "composefit\[tensorboard\]"'):
        TensorBoardLogger(tmp_path)
