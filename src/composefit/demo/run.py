"""The demo from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from composefit import SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.demo.digits import batches, real_digits
from composefit.demo.measure import Ruler, Watch
from composefit.demo.models import GAN, Classifier
from composefit.demo.pictures import save_curves, save_samples
from composefit.demo.report import summary


@contextmanager
def _one_thread_inside_torch() -> Iterator[None]:
    """These images are too small to share out within an operation.

    On cores that others use too, torch's own threads spend their time waiting for each other:
    100 samples/s instead of 4,000.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread_inside_torch()
def run(
    strategy: Literal["single", "threads"] = "threads",
    threads: int | None = None,
    epochs: int = 64,
    accumulate: int = 1,
    seed: int = 0,
    out: Path = Path("runs/demo"),
) -> None:
    """Train a GAN on handwritten digits, measure it, and leave pictures behind.

    Args:
        strategy: shards side by side on threads, or everything on one.
        threads: how many; None for the cores that this process may use.
        epochs: passes over the 1,797 digits.
        accumulate: loader batches of 128 digits in a step.
        seed: of weights, noise and order.
        out: the folder for `samples.png`, `curves.png`, `metrics.csv` and `report.html`; made if
            need be.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    # A logger continues a table that is there; each demo is a run of its own.
    (out / "metrics.csv").unlink(missing_ok=True)
    images, labels = real_digits()
    console.print(f"{len(images):,} handwritten digits; first a classifier, to measure with ...")
    ruler = Ruler(trained_classifier(_strategy(strategy, threads)), images)

    torch.manual_seed(seed)
    gan = GAN()
    watch = Watch(ruler, epochs)
    trainer = Trainer(
        strategy=_strategy(strategy, threads),
        accumulate_grad_batches=accumulate,
        max_epochs=epochs,
        callbacks=watch,
        enable_checkpointing=False,
        default_root_dir=out,
        log_every_n_steps=5,
        seed=seed,
    )
    trainer.fit(gan, batches(images, labels, batch_size=128, seed=seed))

    save_samples(out / "samples.png", watch.pictures, watch.history[-1].classes, (images, labels))
    distances = [measured.distance for measured in watch.history]
    save_curves(out / "curves.png", watch.losses, distances, ruler.floor)
    console.print(summary(ruler, watch.history))
    trainer.report(out / "report.html")
    for name in ("samples.png", "curves.png", "metrics.csv", "report.html"):
        console.print(out / name, soft_wrap=True)
    console.print(f"\n{_other_way(strategy)}", highlight=False, markup=False)


def trained_classifier(strategy: Strategy) -> Classifier:
    """A classifier of real digits; always from the same seed, so that the ruler stays the same."""
    torch.manual_seed(0)
    classifier = Classifier()
    Trainer(
        strategy=strategy,
        max_epochs=12,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        seed=0,
    ).fit(classifier, batches(*real_digits(), batch_size=128, seed=0))
    return classifier


def _strategy(name: Literal["single", "threads"], threads: int | None) -> Strategy:
    return SingleDevice() if name == "single" else ThreadDataParallel(threads)


def _other_way(strategy: Literal["single", "threads"]) -> str:
    """The one line that differs when the same module runs under the other strategy."""
    ways = {"threads": "ThreadDataParallel()", "single": "SingleDevice()"}
    other: Literal["single", "threads"] = "single" if strategy == "threads" else "threads"
    return (
        f"The same module under another strategy, composefit demo --strategy {other}:\n"
        f"- Trainer(strategy={ways[strategy]}, ...)\n"
        f"+ Trainer(strategy={ways[other]}, ...)"
    )
