"""`DataParallel`: a module that runs its forward and its backward in parallel, in any loop."""

from composefit.data_parallel.wrapper import DataParallel

__all__ = ["DataParallel"]
