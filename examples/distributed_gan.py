"""GAN training in two processes: `gan_training.py`, and one line differs.

Started plainly it launches them; `torchrun --nproc-per-node 2 distributed_gan.py` does the same.
"""

from gan_training import main

from composefit import Distributed

if __name__ == "__main__":
    print(f"mean distance from the circle {main(Distributed(processes=2)):.3f}")
