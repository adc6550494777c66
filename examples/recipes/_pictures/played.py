"""What a policy has learned to do."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import BLUE, ORANGE, SEQUENTIAL, curves, dress, field, level
from .picture import Recorded


def balance(recipe: Any, module: Any) -> tuple[float, Tensor]:
    """Moments that a pole stays up; and the angles of ten poles, NaN once they have fallen."""
    up = recipe.time_up(module)
    state, alive, angles = torch.zeros(10, 4), torch.ones(10, dtype=torch.bool), []
    for _ in range(200):
        state, failed = recipe.push(state, module(state)[0].sample())
        alive &= ~failed
        angles.append(torch.where(alive, state[:, 2].rad2deg(), torch.nan))
    return up, torch.stack(angles)


def poles(drawn: Figure, found: Recorded) -> None:
    """Returns over what was played, and ten poles before and after."""
    left, *panels = drawn.subplots(1, 3, width_ratios=(1.3, 1, 1))
    (run,) = found.runs
    played = [step * 64 * 32 / 1000 for step in run.steps]
    curves(left, {"PPO": (played, [up for up, _ in run.seen])}, (BLUE,))
    level(left, found.result.target, "target")
    level(left, found.result.control, "control: untrained")
    left.set_ylim(0, 205)
    dress(left, "how long the pole stays up", "moments played, thousands", "moments, of 200")
    seconds = [0.02 * (i + 1) for i in range(200)]
    for panel, (_, angles), title in zip(
        panels, (run.seen[0], run.seen[-1]), ("ten poles, untrained", "trained"), strict=True
    ):
        panel.plot(seconds, angles.numpy(), color=BLUE, linewidth=0.7, alpha=0.8)
        panel.set(ylim=(-12.5, 12.5), xlim=(0, 4))
        dress(panel, title, "seconds", "" if panel is panels[1] else "angle, degrees")


def swung(recipe: Any, module: Any) -> float:
    found: float = recipe.mean_return(module)
    return found


def pendulums(drawn: Figure, found: Recorded) -> None:
    """Returns over what was played; and the critics' judgement, with the way of a few pendulums."""
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.25))
    (run,) = found.runs
    recipe, module = found.recipe, cast(Any, run.module)
    curves(left, {"SAC": ([step * 16 / 1000 for step in run.steps], run.seen)}, (BLUE,))
    level(left, found.result.target, "target", at="top left")
    level(left, found.result.control, "control: untrained", at="bottom right")
    dress(left, "return of 200 moments", "moments played, thousands", "mean reward, summed")
    angles, speeds = torch.linspace(-math.pi, math.pi, 120), torch.linspace(-8, 8, 100)
    state = recipe.seen(torch.cartesian_prod(angles, speeds))
    action, _ = module.act(state, torch.zeros(len(state), 1))
    worth = module.judge(module.critics, state, action).amin(0).view(120, 100)
    field(right, worth, (-180, 180, -8, 8), cmap=SEQUENTIAL.reversed())
    world, path = torch.tensor([[math.pi, 0.5], [2.5, 0.0], [-2.0, -1.0]]), []
    for _ in range(120):
        path.append(world)
        world, _ = recipe.swing(world, module.act(recipe.seen(world), torch.zeros(3, 1))[0])
    ways = torch.stack(path)
    turned = ((ways[..., 0] + math.pi) % (2 * math.pi) - math.pi).rad2deg()
    for way, speed in zip(turned.T, ways[..., 1].T, strict=True):
        jump = way.diff(prepend=way[:1]).abs() > 180
        right.plot(way.masked_fill(jump, torch.nan), speed, color=ORANGE, linewidth=1.2)
        right.plot(way[:1], speed[:1], "o", color=ORANGE, markersize=3.5)
    right.set_xticks((-180, -90, 0, 90, 180))
    dress(
        right, "worth by the critics, and three ways up", "angle, degrees; 0 is up", "speed, rad/s"
    )
