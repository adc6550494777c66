"""Modules, and the check that a replica runs like its owner."""

import functools
import weakref
from collections import namedtuple

import torch
from torch import nn

from composefit.replicas import Replica


def assert_runs_like(owner, *inputs, replica=None):
    """The owner and a replica give the same output and gradients, at the same parameters."""
    replica = replica or Replica(owner)
    parameters = [p for p in owner.parameters() if p.requires_grad]
    results = []
    for module in (replica.module, owner):
        torch.manual_seed(3)
        output = module(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        gradients = torch.autograd.grad(output.square().sum(), parameters)
        results.append((output.detach(), gradients))
    (output, gradients), (expected, expected_gradients) = results
    assert torch.equal(output, expected)
    assert len(gradients) == len(expected_gradients) > 0
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(ours, theirs)
    return replica


class Blocks(nn.Module):
    """Refers to its modules by every other route."""

    Pair = namedtuple("Pair", "first second")

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.blocks = [self.stem, self.norm]
        self.nested = {"a": (self.layers[0], [self.layers[1]]), self.norm: "norm"}
        self.pair = Blocks.Pair(self.stem, 2)
        object.__setattr__(self, "hidden", self.norm)
        self.stem.__dict__["parent"] = self
        self.up = weakref.ref(self)
        self.method = self.norm.forward
        self.part = functools.partial(self.apply_all, self.norm, scale=2.0)
        self.function = lambda x: self.stem(x) + 1
        self.outputs = []

    def apply_all(self, norm, x, scale):
        return norm(x) * scale

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.nested["a"][0](x) + self.nested["a"][1][0](x)
        x = self.hidden(x) + self.method(x) + self.part(x) + self.function(x)
        return self.stem.parent.norm(x) + self.pair.first(x) + self.up().norm(x)


VECTOR = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
