"""Does taking gradients for the named network only pay? The DCGAN step against the tutorial's loop.

PyTorch's DCGAN tutorial scaled to 32 x 32, batch 64, Adam (2e-4, betas 0.5 and 0.999): its loop
with `detach`, `zero_grad` and `backward` computes the critic's weight gradients in the generator's
update, too, and throws them away. One torch thread.
"""

from __future__ import annotations

import functools

from models import GAN, WORKLOADS
from overhead import lightning_gan
from timing import (
    CONTROL,
    Train,
    arguments,
    console,
    gather_contestants,
    in_process,
    machine,
    overhead_table,
    race,
)

COMPOSEFIT = "composefit"


def composefit(work: GAN) -> Train:
    import ours

    return functools.partial(ours.train, work, strategy="single")


def main() -> None:
    options = arguments(str(__doc__), rounds=20)
    steps = 4 if options.quick else 10
    work = WORKLOADS["DCGAN"]
    assert isinstance(work, GAN)
    batches = work.batches(4)
    contestants = gather_contestants(
        {
            "bare loop": lambda: in_process(work.train, batches, comparable=False),
            CONTROL: lambda: in_process(work.train, batches, comparable=False),
            COMPOSEFIT: lambda: in_process(composefit(work), batches, comparable=False),
            "Lightning, manual optimization": lambda: in_process(
                lightning_gan(work), batches, comparable=False
            ),
        }
    )
    result = race(contestants, rounds=options.rounds, steps=steps)
    console.print(
        overhead_table("A step of the DCGAN", result, targets={COMPOSEFIT: 0.97}),
        machine("lightning"),
    )


if __name__ == "__main__":
    main()
