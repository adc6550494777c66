"""Distillation: a small network learns from a large one of a digit that it has never seen.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015, arXiv:1503.02531).
Reference: github.com/haitongli/knowledge-distillation-pytorch.
The images to learn from hold no 3, as in section 3 of the paper; labels alone cannot tell of it.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule

TEMPERATURE = 4.0


class Classifier(LoopModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        self.network = nn.Sequential(*layers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=3e-3)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.log("metric", (self.network(images).argmax(1) == labels).double().mean())


class Student(Classifier):
    """`hard` is the weight of the labels."""

    def __init__(self, teacher: nn.Module, width: int = 48, hard: float = 0.1) -> None:
        super().__init__(width)
        self.teacher, self.hard = teacher.requires_grad_(False), hard

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        scores = self.network(images)
        told = (self.teacher(images) / TEMPERATURE).log_softmax(1)
        ours = (scores / TEMPERATURE).log_softmax(1)
        soft = F.kl_div(ours, told, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(scores, labels)
        return (1 - self.hard) * TEMPERATURE**2 * soft + self.hard * hard


def build(quick: bool = False, hard: float = 0.1) -> tuple[Student, Loader]:
    (images, labels), _ = digits()
    torch.manual_seed(0)
    seen = labels != 3
    student = Student(Classifier(256).network, hard=hard)
    return student, loader(images[seen], labels[seen], batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    (images, labels), unseen = digits()
    student, batches = build()
    unguided, _ = build(hard=1.0)

    def accuracy(module: LoopModule, batches: Loader) -> float:
        fitter = trainer(strategy, devices, max_epochs=1 if quick else 40)
        fitter.fit(module, batches)
        (found,) = fitter.test(module, loader(*unseen, batch_size=400), verbose=False)
        return found["metric"]

    teacher = Classifier(256)
    accuracy(teacher, loader(images, labels, batch_size=64))
    student.teacher.load_state_dict(teacher.network.state_dict())
    learned, control = accuracy(student, batches), accuracy(unguided, batches)
    return Result(learned, 0.93, "higher", control, "accuracy")


if __name__ == "__main__":
    run(main)
