"""What the recipes share: a result with its target, the command line, a trainer, and real data."""

import argparse
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import LoopModule, Strategy, Trainer
from composefit.callbacks import Callback
from composefit.demo.digits import real_digits
from composefit.demo.frechet import frechet_distance

Loader: TypeAlias = DataLoader[list[Tensor]]
Better: TypeAlias = Literal["higher", "lower"]
Where: TypeAlias = str | Strategy  # a step is carried out

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # 0, the end of a line, pads it as well
MODULES = ("argparse.py", "ast.py", "inspect.py", "subprocess.py", "tarfile.py", "typing.py")


class Result(NamedTuple):
    """What a recipe has reached.

    Attributes:
        metric: measured on what was not trained on, after training.
        target: what it has to reach.
        better: whether a higher or a lower metric is better.
        control: the same metric where nothing was learned: it has to miss the target.
        name: of the metric.
    """

    metric: float
    target: float
    better: Better
    control: float
    name: str

    def reaches(self, metric: float) -> bool:
        """Whether this metric would be enough."""
        return metric >= self.target if self.better == "higher" else metric <= self.target

    def __str__(self) -> str:
        relation = "at least" if self.better == "higher" else "at most"
        return (
            f"{self.name} {self.metric:.4g} (target: {relation} {self.target:.4g}; "
            f"control: {self.control:.4g})"
        )


def run(main: Callable[..., Result]) -> None:
    """Run a recipe from the command line; the exit status is 1 if it misses its target."""
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__)
    parser.add_argument("--strategy", default="auto", help="auto, single, threads, ...")
    parser.add_argument("--devices", default="auto", help="how many: threads on a CPU, or GPUs")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run at all?")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a PNG of what was learned")
    given = vars(parser.parse_args())
    picture = given.pop("picture")
    if picture is None:
        result = main(**given)
    else:
        from _pictures import record  # and matplotlib, for this alone

        result = record(main, sys.modules[main.__module__], picture, **given)
    print(result)
    sys.exit(not given["quick"] and not result.reaches(result.metric))


watchers: list[Callback] = []  # who looks on while a recipe trains, to draw its picture


def trainer(
    strategy: Where,
    devices: int | str,
    *,
    callbacks: Callback | Sequence[Callback] = (),
    **arguments: Any,
) -> Trainer:
    """A trainer that leaves no files behind, and shows a bar where somebody looks."""
    own = [callbacks] if isinstance(callbacks, Callback) else callbacks
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "callbacks": [*own, *watchers],
    }
    return Trainer(strategy=strategy, devices=devices, seed=0, **quiet | arguments)


def measure(
    fitter: Trainer,
    module: LoopModule,
    batches: Loader,
    test: Loader,
    name: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Result:
    """Test what is untrained, fit, and test again: what the module logs as "metric"."""
    (control,) = fitter.test(module, test, verbose=False)
    fitter.fit(module, batches)
    (learned,) = fitter.test(module, test, verbose=False)
    measured = learned["metric"], control["metric"]
    if at_least is not None:
        return Result(measured[0], at_least, "higher", measured[1], name)
    assert at_most is not None
    return Result(measured[0], at_most, "lower", measured[1], name)


def loader(*columns: Tensor, batch_size: int, shuffle: bool = True) -> Loader:
    """Batches of these tensors' rows."""
    rows: Any = TensorDataset(*columns)
    return DataLoader(rows, batch_size, shuffle=shuffle)


# -- digits ----------------------------------------------------------------------------------------


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) from -1 to 1 and labels (n,): 1,397 to train on, 400 to test with."""
    images, labels = real_digits()
    return (images[400:], labels[400:]), (images[:400], labels[:400])


def draw_digits(
    fitter: Trainer, module: LoopModule, batches: Loader, *noise: int, target: float
) -> Result:
    """Fit, and measure the Fréchet distance, in pixels, from what it makes of noise to digits.

    Args:
        fitter: of the fit.
        module: makes images (n, 1, 8, 8) of normal noise (n, *noise) when it is called.
        batches: to train on.
        noise: its shape for one image.
        target: the largest distance that will do.
    """
    real = real_digits()[0].flatten(1)
    inputs = torch.randn(1000, *noise, generator=torch.Generator().manual_seed(0))

    def distance() -> float:
        made = fitter.predict(module, DataLoader(inputs, 500))  # type: ignore[arg-type]
        return frechet_distance(torch.cat(made or []).float().cpu().flatten(1), real)

    untrained = distance()
    fitter.fit(module, batches)
    return Result(distance(), target, "lower", untrained, "Fréchet distance")


def norm(kind: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm, in which samples do not meet."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(4, channels)


# -- text ------------------------------------------------------------------------------------------


def lines_of_code(length: int) -> tuple[Tensor, Tensor]:
    """Lines of the standard library as characters (n, length), 0 at their ends: train and test."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / name).read_text("utf-8") for name in MODULES)
    lines = [line for line in text.splitlines() if 8 <= len(line) < length and line.isascii()]
    ids = torch.zeros(len(lines), length, dtype=torch.int64)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = torch.tensor(list(line.encode())).sub(31).clamp(min=1)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return ids[1000:], ids[:1000]
