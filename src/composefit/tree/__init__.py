"""Nested batches: how many samples they hold, and cutting, moving and joining them.

A batch is whatever a loader gives: a tensor, or dicts, lists, tuples, named tuples, dataclasses
and objects around tensors. Which of its parts hold one entry per sample is decided by this rule:

* A **tensor** or NumPy array holds its samples along ``dim``. One without any dimension is
  replicated: every part gets its own copy.
* ``str``, ``bytes``, numbers, ``None``, enum members, dtypes, devices and sizes are
  **replicated**.
* A mapping, a named tuple and a dataclass are **structure**: their values are cut, their type
  is kept.
* A list or tuple is the one case that has two readings, structure or one item per sample:

  1. All items are tensors, with the same size along ``dim``: structure, always. ``[x, y]``, which
     is what ``torch.utils.data.default_collate`` makes of pairs, stays a pair, also in a batch of
     two samples.
  2. All items are tensors whose sizes differ: samples, as many as the list is long.
  3. Other items: structure if everything in them that counts samples counts the batch's number
     of samples, as in ``(x, {"mask": mask}, 7)``; otherwise samples, as in ``["a", "b", "c"]``
     or in a list of one dict per image. An empty list is replicated.

  Samples must be as many as the batch has; a list of any other length is an error.

The batch's number of samples is what the leaves that have one reading say (tensors, and lists read
by 1 and 2); only if there are none, what the lists of rule 3 hold. Leaves that disagree are an
error that names both.

    >>> import torch
    >>> cut({"image": torch.zeros(3, 8), "name": ["a", "b", "c"], "step": 7}, [2, 1])[1]
    {'image': tensor([[0., 0., 0., 0., 0., 0., 0., 0.]]), 'name': ['c'], 'step': 7}
    >>> boxes = [{"box": torch.zeros(5, 4)}, {"box": torch.zeros(2, 4)}, {"box": torch.zeros(0, 4)}]
    >>> [len(part["boxes"]) for part in cut({"label": torch.arange(3), "boxes": boxes}, [2, 1])]
    [2, 1]

Rules 1 and 3 look at sizes, so a list of samples whose sizes happen to agree reads as structure
(images of three channels, say). Where that can be, say what is meant: ``Samples`` is a list of one
item per sample, whatever the items are,

    >>> images = Samples([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)])
    >>> [len(part) for part in cut(images, [1, 1])]
    [1, 1]

and types of one's own can be registered with ``samples_of`` and ``split``. What is too much for
that goes into ``LoopModule.batch_size`` and ``LoopModule.scatter_batch``.
"""

from composefit.tree.counting import batch_size
from composefit.tree.cutting import cut
from composefit.tree.joining import join
from composefit.tree.mapping import map_tensors, tensors
from composefit.tree.moving import move
from composefit.tree.registry import samples_of, split
from composefit.tree.sizes import even_sizes, shard_sizes
from composefit.tree.structure import Samples

__all__ = [
    "Samples",
    "batch_size",
    "cut",
    "even_sizes",
    "join",
    "map_tensors",
    "move",
    "samples_of",
    "shard_sizes",
    "split",
    "tensors",
]
