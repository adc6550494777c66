"""The demo from beginning to end, for two epochs."""

import csv
from pathlib import Path

import pytest
import torch

from composefit.cli import main
from composefit.demo import run as demo


@pytest.mark.parametrize("strategy", ["threads", "single"])
def test_the_demo_leaves_pictures_and_figures_and_says_where(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    arguments = ["demo", "--epochs", "2", "--accumulate", "3", "--strategy", strategy]
    assert main([*arguments, "--out", str(out)]) == 0
    files = {"samples.png", "curves.png", "metrics.csv", "report.html"}
    assert {file.name for file in out.iterdir()} == files
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10"]
    assert all(float(row[name]) > 0 for row in rows for name in ("critic", "generator", "frechet"))
    printed = capsys.readouterr().out
    assert str(out / "samples.png") in printed
    assert "floor" in printed
    other = {"threads": "+ Trainer(strategy=SingleDevice()", "single": "+ Trainer(strategy=Thread"}
    assert other[strategy] in printed
    assert "\x1b" not in printed  # no terminal: plain lines


def test_a_second_demo_does_not_continue_the_figures_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,critic\n1,0,2.0\n")
    main(["demo", "--epochs", "1", "--accumulate", "15", "--out", str(tmp_path)])
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1"]


def test_torch_has_one_thread_inside_during_the_demo_and_its_own_number_again_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def stop(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise InterruptedError("far enough")

    monkeypatch.setattr(demo, "real_digits", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(InterruptedError):
            demo.run(out=tmp_path)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)
