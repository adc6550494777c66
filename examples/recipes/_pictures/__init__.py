"""The picture of each recipe: `python examples/recipes/NAME.py --picture FILE` draws it.

The recipes themselves know nothing of it. A `Picture` is what is looked at while a recipe trains,
and how that is drawn when it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _common import Result, watchers

from . import features, gradients, images, labels, played, text
from .drawing import figure, save
from .picture import Picture, Recorded
from .recording import Recorder

PICTURES = {
    "dcgan": Picture(images.samples, images.drawn_digits, every=100, height=1.75),
    "wgan_gp": Picture(images.wasserstein, images.distances, every=20, also={"fresh": False}),
    "stylegan2": Picture(images.mixed_styles, images.drawn_digits, height=2.2),
    "cyclegan": Picture(images.translated, height=1.35),
    "vqgan": Picture(images.copies, height=1.5),
    "diffusion": Picture(images.denoised, height=2.2),
    "simclr": Picture(features.embedding, features.features, height=2.9),
    "moco": Picture(features.embedding, features.features, height=2.9),
    "byol": Picture(features.embedding, features.features, height=2.9),
    "dino": Picture(features.embedding, features.features, height=2.9),
    "clip": Picture(features.image_and_text, features.similarities, height=2.9),
    "language_model": Picture(text.written, text.bits_of_lines, every=10),
    "lora": Picture(text.adapted, text.code_and_prose, every=10),
    "mixture_of_experts": Picture(text.loads, text.experts, every=10),
    "distillation": Picture(labels.student_and_control, labels.recall, every=22),
    "fixmatch": Picture(labels.labels_and_guesses, labels.confidence, every=10),
    "tbptt": Picture(text.carried, text.bits_by_place, every=2),
    "multitask_pcgrad": Picture(gradients.two_tasks, gradients.tasks, every=25),
    "sam": Picture(gradients.sharpness, gradients.accuracy, every=11),
    "pinn": Picture(gradients.burgers, gradients.equation_error, every=5),
    "ppo": Picture(played.poles, played.balance, every=4),
    "sac": Picture(played.pendulums, played.swung, every=50),
}


def record(main: Callable[..., Result], recipe: ModuleType, path: Path, **given: Any) -> Result:
    """Run a recipe and draw its picture; its result stands in the file as its description.

    Args:
        main: of the recipe.
        recipe: its file.
        path: of the picture, a PNG.
        given: arguments of `main`.
    """
    picture = PICTURES[Path(str(recipe.__file__)).stem]
    recorder = Recorder(partial(picture.look, recipe), picture.every)
    watchers.append(recorder)
    try:
        result = main(**given)
        if picture.also:
            main(**given, **picture.also)
    finally:
        watchers.remove(recorder)
    drawn = figure(picture.height)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for run in recorder.runs:
            run.module.eval()
        picture.draw(drawn, Recorded(recipe, recorder.runs, result))
    save(drawn, path, str(result))
    return result
