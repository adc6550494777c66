"""Watching the GAN learn: after every epoch a distance to real digits and which digits appear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composefit import Callback, Trainer
from composefit.demo.digits import CLASSES
from composefit.demo.frechet import frechet_distance
from composefit.demo.models import GAN, NOISE, Classifier


@dataclass(frozen=True)
class Measurement:
    """What the ruler says of some images.

    Attributes:
        distance: Fréchet distance to the reference half of the real digits.
        classes: (n,), int64, which digit the classifier sees in each image.
    """

    distance: float
    classes: Tensor

    @property
    def counts(self) -> list[int]:
        """How many images show each digit, 0 to 9."""
        return torch.bincount(self.classes, minlength=CLASSES).tolist()


class Ruler:
    """Measures images against one half of the real digits; the other half gives the floor.

    The floor is what even real digits measure, since two finite halves are never alike. For
    comparable figures measure as many images as `size`: the distance grows as samples get fewer.

    Args:
        classifier: a trained one.
        images: all real digits, (n, 1, 8, 8), in random order.
    """

    def __init__(self, classifier: Classifier, images: Tensor) -> None:
        self.classifier = classifier.eval()
        half = len(images) // 2
        self.size = len(images) - half
        with torch.no_grad():
            self._reference = classifier.features(images[:half])
        self.real = self.measure(images[half:])

    @property
    def floor(self) -> float:
        """The distance of the other half of the real digits."""
        return self.real.distance

    @torch.no_grad()
    def measure(self, images: Tensor) -> Measurement:
        """Measure images (n, 1, 8, 8)."""
        features = self.classifier.features(images)
        distance = frechet_distance(self._reference, features)
        return Measurement(distance, self.classifier.head(features).argmax(1))


class Watch(Callback):
    """Measures the GAN before training and after every epoch, always from the same noise.

    Args:
        ruler: what to measure with.
        epochs: how many will be trained.

    Attributes:
        history: a measurement for epoch 0 (nothing trained yet), 1, ...
        losses: the mean losses of epoch 1, 2, ...; network -> one each.
        pictures: epoch -> images (n, 1, 8, 8), for a few epochs, the first and the last among them.
    """

    def __init__(self, ruler: Ruler, epochs: int) -> None:
        self.ruler = ruler
        self.noise = torch.randn(ruler.size, NOISE, generator=torch.Generator().manual_seed(0))
        self.history: list[Measurement] = []
        self.losses: dict[str, list[float]] = {"critic": [], "generator": []}
        self.pictures: dict[int, Tensor] = {}
        self._kept = picture_epochs(epochs)

    def on_fit_start(self, trainer: Trainer, module: GAN) -> None:
        """Measure what random weights write."""
        self._measure(module)

    def on_train_epoch_end(self, trainer: Trainer, module: GAN) -> None:
        """Measure, and log the distance."""
        self._measure(module)
        module.log(
            "frechet", self.history[-1].distance, prog_bar=True, on_step=False, on_epoch=True
        )
        for name, values in self.losses.items():
            values.append(trainer.callback_metrics[name].item())

    @torch.no_grad()
    def _measure(self, module: GAN) -> None:
        epoch = len(self.history)
        images = module(self.noise)
        self.history.append(self.ruler.measure(images))
        if epoch in self._kept:
            self.pictures[epoch] = images


def picture_epochs(epochs: int, count: int = 5) -> list[int]:
    """Epochs whose pictures show the learning: the start, the end, and early ones more densely.

    >>> picture_epochs(80)
    [0, 1, 3, 9, 27, 80]
    >>> picture_epochs(2)
    [0, 1, 2]
    """
    return sorted({0, *(round(epochs ** (i / (count - 1))) for i in range(count))})
