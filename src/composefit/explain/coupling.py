"""Where the samples of a shard meet other than through effects, so that its size matters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from composefit.check.copies import copied_batch
from composefit.check.cutting import unevenly
from composefit.check.recording import record
from composefit.check.trace import BATCH_NORM, CONTRASTIVE, NORM, STATISTICS, Event, Trace
from composefit.explain.plan import Coupling
from composefit.module import LoopModule
from composefit.optimizers import NamedOptimizer
from composefit.precision import Precision
from composefit.strategies import SingleDevice

# What an operation between samples is, for a reader; other events are of how losses are weighed,
# which the check is about.
_WHY = {
    BATCH_NORM: "normalises over each shard's samples",
    CONTRASTIVE: "compares each shard's samples with one another",
    NORM: "takes one norm of each shard's samples",
    STATISTICS: "uses statistics of each shard's samples",
}


def coupling_layers(
    module: LoopModule,
    batch: Any,
    optimizers: Mapping[str, NamedOptimizer],
    precision: Precision,
    device: torch.device,
) -> list[Coupling]:
    """BatchNorm as it is in training, and what a traced step shows besides.

    Args:
        module: a copy: a step of it is run once more, its weights staying as they are.
        batch: where it can be cut, its first shard is followed through the step's operations.
        optimizers: of the copy.
        precision: of the batch.
        device: where both are.
    """
    found = [
        Coupling(name, type(layer).__name__, _why(layer))
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training
    ]
    found += _of_events(_events(module, batch, optimizers, precision, device))
    return list(dict.fromkeys(found))


def _why(layer: nn.Module) -> str:
    if isinstance(layer, nn.SyncBatchNorm):
        return "normalises over the samples of all ranks"
    return _WHY[BATCH_NORM]


def _events(
    module: LoopModule,
    batch: Any,
    optimizers: Mapping[str, NamedOptimizer],
    precision: Precision,
    device: torch.device,
) -> list[Event]:
    """What the losses depend on; nothing where the step cannot be run in two shards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the step warns of, it has warned of before
        traced = record(
            module,
            optimizers,
            copied_batch(batch),
            SingleDevice(device, shards=2),
            precision=precision,
            scatter=unevenly,
            tracer=Trace.of_shard,
        )
    if traced.error is not None or not traced.shards:
        return []
    return [event for taken in traced.shards[0].taken for event in taken.events]


def _of_events(events: list[Event]) -> Iterator[Coupling]:
    for event in events:
        if event.kind not in _WHY or event.kind == BATCH_NORM:  # found by their classes
            continue
        name, _, kind = (event.module or "self").partition(" ")
        if name == "self":  # the step's own code
            name, kind = "", os.path.basename(event.where or event.operation)
        yield Coupling(name, kind.strip("()"), _WHY[event.kind])
