"""Strategies: how a step is carried out."""

from composefit.strategies.base import Strategy
from composefit.strategies.choice import choose
from composefit.strategies.distributed import Distributed, MultiGPU
from composefit.strategies.single_device import SingleDevice
from composefit.strategies.thread_data_parallel import ThreadDataParallel

__all__ = ["Distributed", "MultiGPU", "SingleDevice", "Strategy", "ThreadDataParallel", "choose"]
