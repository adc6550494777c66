"""Does taking gradients for the named network only pay? The DCGAN step against the tutorial's loop.

PyTorch's DCGAN tutorial scaled to 32 x 32, batch 64, Adam (2e-4, betas 0.5 and 0.999): its loop
with `detach`, `zero_grad` and `backward` computes the critic's weight gradients in the generator's
update, too, and throws them away. One torch thread.
"""

from __future__ import annotations

from models import GAN, WORKLOADS
from overhead import COMPOSEFIT, composefit, contestants_for, lightning_gan
from timing import arguments, console, machine, overhead_table, race


def main() -> None:
    options = arguments(str(__doc__), rounds=20, one_thread=True)
    steps = 4 if options.quick else 10
    work = WORKLOADS["DCGAN"]
    assert isinstance(work, GAN)
    contestants = contestants_for(
        work,
        {
            COMPOSEFIT: lambda: composefit(work),
            "Lightning, manual optimization, one self.log": lambda: lightning_gan(work),
        },
        options.clock,
    )
    result = race(contestants, rounds=options.rounds, steps=steps)
    console.print(
        overhead_table(
            "A step of the DCGAN", result, targets={COMPOSEFIT: 0.97}, clock=options.clock
        ),
        machine("lightning"),
    )


if __name__ == "__main__":
    main()
