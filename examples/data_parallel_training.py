"""Data-parallel training: the module of `regular_training.py`, another strategy."""

from regular_training import main

from composefit import ThreadDataParallel

if __name__ == "__main__":
    print(f"accuracy {main(ThreadDataParallel(threads=2)):.3f}")
