"""Taking gradients, making them ours, adding them up.

Gradients from `torch.autograd.grad` lack what `.grad` guarantees: two of them may share storage, be
expanded, have strides other than their parameter's, or be held by somebody else. Everything that is
later changed in place goes through `own` first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Parameter

Gradients = list["Tensor | None"]

# Looked up once: `own` runs at every update, for every parameter.
_STRIDED = torch.strided
_references = sys.getrefcount

# The call that torch.autograd.grad wraps: it saves some 30 us a step, a sixth of a tiny model's.
# Private: without it torch.autograd.grad itself does, and a test compares the two.
_run_backward = getattr(getattr(Variable, "_execution_engine", None), "run_backward", None)

# References to a gradient that nobody else holds, seen from inside `own`: the engine's tuple, the
# list and the variable there, and getrefcount's argument. (Iterating with zip would add one.)
_OWN_REFERENCES = 4

# References from C++ (a saved tensor, say) are counted apart from Python's; private, so optional.
_counts_uses = hasattr(Tensor, "_use_count")


def differentiate(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of `sum_i cotangents[i] * outputs[i]` with respect to `inputs`.

    As `torch.autograd.grad(..., allow_unused=True)`; outputs without a graph are left out.

    Args:
        outputs: tensors of any shape.
        cotangents: one for each output, of its shape.
        inputs: leaves or tensors of the graph.
        retain_graph: whether the graph can be walked again afterwards.
    """
    if len(outputs) != 1 or not outputs[0].requires_grad:
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not pairs:
            return (None,) * len(inputs)
        outputs, cotangents = zip(*pairs, strict=True)
    if not inputs:
        return ()
    if _run_backward is None:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=retain_graph, allow_unused=True
        )
    return _run_backward(  # type: ignore[no-any-return]
        tuple(outputs), tuple(cotangents), retain_graph, False, tuple(inputs), True, False
    )


def own(gradients: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> Gradients:
    """Make each a dense tensor of its own with its parameter's strides.

    What already is one stays as it is. Sparse gradients stay sparse; None stays None.
    """
    owned: Gradients = list(gradients)
    pointers: set[int] = set()
    kept = 0
    whole = True
    for i, parameter in enumerate(parameters):
        gradient = gradients[i]
        if gradient is None or gradient.layout is not _STRIDED:
            continue
        if (
            gradient.stride() != parameter.stride()
            or _references(gradient) > _OWN_REFERENCES
            or (_counts_uses and gradient._use_count() > 1)  # type: ignore[attr-defined]
        ):
            owned[i] = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
            continue
        kept += 1
        pointers.add(gradient.data_ptr())
        whole = whole and not gradient.storage_offset()
    # Each the start of a storage, and no two at one place: then none overlap.
    if not whole or len(pointers) < kept:
        _part_overlapping(owned)
    return owned


def _part_overlapping(owned: Gradients) -> None:
    """Copy gradients that share memory: one buffer, handed to two parameters."""
    spans = sorted(
        (g.data_ptr(), g.data_ptr() + g.nbytes, i)
        for i, g in enumerate(owned)
        if g is not None and g.layout is torch.strided
    )
    end = 0
    for start, stop, i in spans:
        if start < end:
            shared = owned[i]
            assert shared is not None
            owned[i] = shared.clone(memory_format=torch.preserve_format)
        end = max(end, stop)


def add_(total: Gradients, more: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> None:
    """Add `more` to `total` in place; what only `more` has is made its own first."""
    targets: list[Tensor] = []
    summands: list[Tensor] = []
    for i, summand in enumerate(more):
        if summand is None:
            continue
        target = total[i]
        if target is None:
            (total[i],) = own([summand], [parameters[i]])
        elif target.layout is summand.layout is torch.strided:
            targets.append(target)
            summands.append(summand)
        else:
            total[i] = target + summand
    if targets:
        torch._foreach_add_(targets, summands)


def scale_(gradients: Gradients, factor: float | Tensor) -> None:
    """Multiply in place."""
    dense = [g for g in gradients if g is not None and g.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, factor)
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.layout is not torch.strided:
            gradients[i] = gradient * factor


def values(gradients: Gradients) -> list[Tensor]:
    """The numbers of each gradient that there is: itself, or the values of a sparse one."""
    for gradient in gradients:
        if gradient is None or gradient.layout is not _STRIDED:
            break
    else:
        return cast("list[Tensor]", gradients)  # as nearly always
    return [
        g if g.layout is _STRIDED else g.coalesce()._values() for g in gradients if g is not None
    ]
