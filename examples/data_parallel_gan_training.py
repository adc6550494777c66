"""Data-parallel GAN training: `gan_training.py`, and one line differs."""

from gan_training import main

from composefit import ThreadDataParallel

if __name__ == "__main__":
    print(f"mean distance from the circle {main(ThreadDataParallel(threads=2)):.3f}")
