"""On CUDA: the allocator's memory, and times that wait for the device."""

from itertools import pairwise

import pytest
import torch

from composefit import SingleDevice, Trainer
from tests.explain.steps import GAN

pytestmark = pytest.mark.gpu


def test_memory_is_the_allocators_and_spans_do_not_overlap() -> None:
    module = GAN()
    trainer = Trainer(strategy=SingleDevice("cuda", shards=2), seed=0)
    plan = trainer.explain(module, torch.randn(64, 3), show=False)
    assert plan.device.startswith("cuda") and next(module.parameters()).device.type == "cpu"
    assert plan.peak is not None and plan.barriers[0].held is not None
    # The allocator deals in blocks of 512 bytes.
    assert plan.peak >= plan.barriers[0].held >= 64 * 3 * 4
    spans = sorted(plan.spans, key=lambda span: span.start)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert spans[-1].end <= plan.duration
