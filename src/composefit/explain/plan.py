"""`Plan`: what one training step does, as it was measured."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType

from composefit.checkpoint import replacing
from composefit.explain import picture, table


@dataclass(frozen=True, slots=True)
class Part:
    """One shard of the step.

    Attributes:
        index: its place in sample order.
        lane: the worker it runs on; shards of one lane follow one another.
        batch: of which loader batch of the step it is cut, from 0.
        samples: how many it holds; None where nobody can tell.
    """

    index: int
    lane: int
    batch: int
    samples: int | None


@dataclass(frozen=True, slots=True)
class Taken:
    """What one effect takes gradients of: an optimizer's update, or a key of `Gradient`.

    Attributes:
        name: the optimizer's, or the key.
        kind: the optimizer's class; empty where nothing is stepped.
        parameters: tensors that gradients are taken with respect to.
        numbers: numbers in them.
        bytes: bytes of them.
        reached: how many of the tensors get a gradient.
        gradient_bytes: bytes of these gradients.
        loss: what is reduced over the shards: the terms of the loss, or `"gradients given"`.
        evaluations: how often the loss was evaluated: more than once where it is a function.
        clipping: `"norm 1.0"`, or empty.
        crosses: bytes that each rank sends for it.
    """

    name: str
    kind: str
    parameters: int
    numbers: int
    bytes: int
    reached: int
    gradient_bytes: int
    loss: str
    evaluations: int = 1
    clipping: str = ""
    crosses: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """A local variable of the step that lives across a yield.

    Attributes:
        name: the variable.
        bytes: of the tensors it holds, over all shards here; those of the batch and parameters
            aside, and each tensor under its first name only.
    """

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """An effect: what all shards do together.

    Attributes:
        effect: its class: `"Update"`, `"Gather"`, `"Once"`, `"Reduce"`, `"Gradient"`.
        label: it in a few words.
        file: the user's file.
        line: the line of the yield there; where a loss is returned, that of the function.
        returned: the loss was returned, not yielded.
        taken: for each optimizer or key.
        crosses: bytes that each rank sends to the others, those of `taken` included.
        kept: what the step keeps across it.
        held: bytes of tensors alive beyond those before the step, graphs included, when all shards
            had arrived; None where it could not be measured.
        start: when the last shard arrived, in ms since the step began.
        end: when the first shard went on, or the step ended.
    """

    effect: str
    label: str
    file: str
    line: int
    returned: bool
    taken: tuple[Taken, ...]
    crosses: int
    kept: tuple[Kept, ...]
    held: int | None
    start: float
    end: float

    @property
    def where(self) -> str:
        """`file.py:12`, the file without its folders."""
        return f"{os.path.basename(self.file)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a shard's work.

    Attributes:
        shard: whose, by its index.
        lane: where.
        kind: `"forward"`: the step's own code; `"backward"`: its gradients are taken;
            `"evaluation"`: a loss that is a function, evaluated again.
        start: in ms since the step began.
        end: the same.
        leads_to: the effect that it comes before, or happens at, by its place.
    """

    shard: int
    lane: int
    kind: str
    start: float
    end: float
    leads_to: int


@dataclass(frozen=True, slots=True)
class Coupling:
    """A layer in which the samples of a shard meet other than through an effect.

    Attributes:
        name: of the layer in the module; empty for the step's own code.
        kind: its class, or the operation.
        why: in a few words.
    """

    name: str
    kind: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What one training step does: printed it is a table, saved a picture.

    Attributes:
        module: the module's class.
        strategy: the strategy's class, and how it cuts the step's samples.
        step: the number of the step, `self.global_step` in it.
        ranks: processes; the plan is that of rank 0.
        lanes: workers of this process.
        concurrent: they work at the same time.
        sharded: parameters are cut over the ranks.
        device: where it was measured.
        precision: as in `Trainer(precision=)`.
        accumulate: loader batches in the step.
        microbatch: the most samples of a shard, or None.
        parts: the shards.
        barriers: the effects in their order.
        spans: what was measured; none of one lane overlap.
        ready: when the batch was cut, in ms since the step began.
        duration: of the whole step, in ms.
        resident: bytes before the step: parameters, buffers and the optimizers' state.
        peak: the most bytes that tensors held at one moment beyond that; None where it could not
            be measured.
        coupling: layers in which samples meet.
        notes: what else should be known.
    """

    module: str
    strategy: str
    step: int
    ranks: int
    lanes: int
    concurrent: bool
    sharded: bool
    device: str
    precision: str
    accumulate: int
    microbatch: int | None
    parts: tuple[Part, ...]
    barriers: tuple[Barrier, ...]
    spans: tuple[Span, ...]
    ready: float
    duration: float
    resident: int
    peak: int | None
    coupling: tuple[Coupling, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def crosses(self) -> int:
        """Bytes that each rank sends to the others in the step."""
        return sum(barrier.crosses for barrier in self.barriers)

    def waiting(self, lane: int) -> float:
        """How long a lane has nothing to do, in ms."""
        return self.duration - sum(s.end - s.start for s in self.spans if s.lane == lane)

    def of_lane(self, lane: int) -> Sequence[Part]:
        """The shards that follow one another in a lane."""
        return [part for part in self.parts if part.lane == lane]

    def svg(self) -> str:
        """The picture: shards as lanes, effects as barriers across them, to scale in time.

        One SVG document that loads nothing, 900 units wide, for light and dark surroundings.
        """
        return picture.draw(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture into a file, which is replaced as a whole.

        Args:
            path: usually `something.svg`.

        Returns:
            Where it was written.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(path)
        with replacing(target) as file:
            file.write(self.svg().encode())
        return target

    def __rich__(self) -> RenderableType:
        return table.render(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        with console.capture() as capture:
            console.print(table.render(self))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())
