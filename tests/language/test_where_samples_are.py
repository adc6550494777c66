"""Batches of every kind: law 1 against a loop by hand, and predictions joined in their order.

Time-first sequences, pairs that stay together, images with boxes, graphs of a type of their own,
packed sequences, and mappings and records around tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence, unpack_sequence

from composefit import Distributed, LoopModule, Mean, SingleDevice, Strategy, ThreadDataParallel
from composefit.lockstep.scatter import rows_of, scatter
from composefit.testing import assert_same_training
from composefit.tree import Samples, even_sizes, samples_of, split
from tests.lockstep.steps import F64, data, linear, trainer
from tests.ranks.pool import RankPool, closing_pools, pool

#: No number of shards divides them all; the smallest has fewer samples than there are shards.
SIZES = [7, 5, 2, 6, 3]


class Module(LoopModule):
    """Trained by plain gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@dataclass(frozen=True)
class Case:
    """What is trained, on what, what the loss of a whole batch is, and what is predicted of it."""

    make: Callable[[], Module]
    batch: Callable[[int, int], Any]  # of so many samples, seeded
    loss: Callable[[Any, Any], Tensor]
    predicted: Callable[[Any, Any], Any]
    sizes: Sequence[int] = tuple(SIZES)

    def batches(self) -> list[Any]:
        return [self.batch(size, seed) for seed, size in enumerate(self.sizes)]

    def by_hand(self, module: Any, batches: Sequence[Any]) -> Iterator[None]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
        for batch in batches:
            optimizer.zero_grad()
            self.loss(module, batch).backward()
            optimizer.step()
            yield


def integers(*shape: int, high: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# -- sequences ----------------------------------------------------------------------------------


def recurrent(rnn: nn.RNN, rows: Tensor) -> Tensor:
    """The states of one sequence, step by step."""
    state, states = torch.zeros(4, dtype=F64), []
    for x in rows:
        inside = rnn.weight_hh_l0 @ state + rnn.bias_hh_l0
        state = torch.tanh(rnn.weight_ih_l0 @ x + rnn.bias_ih_l0 + inside)
        states.append(state)
    return torch.stack(states)


class Recurrent(Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, dtype=F64)
        self.head = linear(4, 2)


class TimeFirst(Recurrent):
    """Everything in the batch is (time, sample)."""

    batch_dim = 1

    def training_step(self, batch: Any) -> Tensor:
        x, targets = batch
        states, _ = self.rnn(x)
        return (self.head(states)[..., 0] - targets).square().mean()

    def predict_step(self, batch: Any) -> Any:
        states, last = self.rnn(batch[0])
        return {"states": states, "scores": self.head(last[0])}


def time_first_loss(module: TimeFirst, batch: Any) -> Tensor:
    x, targets = batch
    losses = []
    for i in range(x.shape[1]):
        out = recurrent(module.rnn, x[:, i]) @ module.head.weight.T + module.head.bias
        losses.append((out[:, 0] - targets[:, i]).square().mean())
    return torch.stack(losses).mean()


def time_first_predicted(module: TimeFirst, batch: Any) -> Any:
    rows = [recurrent(module.rnn, batch[0][:, i]) for i in range(batch[0].shape[1])]
    scores = torch.stack([module.head(states[-1]) for states in rows])
    return {"states": torch.stack(rows, 1), "scores": scores}


class MixedSequences(Recurrent):
    """Sequences are (time, sample), their labels (sample,): which no `batch_dim` says."""

    def batch_size(self, batch: Any) -> int:
        return len(batch[1])

    def scatter_batch(self, batch: Any, n: int) -> list[Any]:
        x, labels = batch
        return list(zip(x.tensor_split(n, 1), labels.tensor_split(n), strict=True))

    def training_step(self, batch: Any) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.head(self.rnn(x)[1][0]), labels)

    def predict_step(self, batch: Any) -> Any:
        return self.head(self.rnn(batch[0])[1][0])


def last_scores(module: Recurrent, rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([module.head(recurrent(module.rnn, one)[-1]) for one in rows])


def mean_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    chances = [score.log_softmax(0)[i] for score, i in zip(scores, labels, strict=True)]
    return -torch.stack(chances).mean()


class Packed(Recurrent):
    def training_step(self, batch: Any) -> Tensor:
        packed, labels = batch
        return nn.functional.cross_entropy(self.head(self.rnn(packed)[1][0]), labels)

    def predict_step(self, batch: Any) -> Any:
        return self.head(self.rnn(batch[0])[1][0])


def packed_batch(samples: int, seed: int) -> Any:
    lengths = (integers(samples, high=5, seed=seed) + 1).tolist()
    rows = [data(n, 3, seed=100 * seed + i) for i, n in enumerate(lengths)]
    return pack_sequence(rows, enforce_sorted=False), integers(samples, high=2, seed=seed)


# -- samples that belong together ---------------------------------------------------------------


class Pairs(Module):
    """Rows 2i and 2i + 1 are two views of one thing."""

    samples_per_group = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)

    def training_step(self, x: Tensor) -> Tensor:
        y = self.net(x)
        assert len(y) % 2 == 0
        return (y[::2] * y[1::2]).sum(1).square().mean()

    def predict_step(self, x: Tensor) -> Tensor:
        y = self.net(x)
        out: Tensor = y[::2] * y[1::2]
        return out


def pairs_loss(module: Pairs, x: Tensor) -> Tensor:
    pairs = [module.net(x[i]) @ module.net(x[i + 1]) for i in range(0, len(x), 2)]
    return torch.stack(pairs).square().mean()


# -- detection ----------------------------------------------------------------------------------


class Detector(Module):
    """Lists of images of any size, and of dicts of boxes, as torchvision's models take them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=F64)

    def box(self, image: Tensor) -> Tensor:
        out: Tensor = self.conv(image[None])[0].mean((1, 2))
        return out

    def training_step(self, batch: Any) -> Mean:
        images, targets = batch
        assert len(images) == len(targets)
        assert all(image.shape[0] == 3 for image in images)
        losses = [
            (self.box(image) - target["boxes"]).abs().sum(1)
            for image, target in zip(images, targets, strict=True)
        ]
        every = torch.cat(losses)
        return Mean(every.sum(), len(every))

    def predict_step(self, batch: Any) -> Any:
        found = [
            {"boxes": self.box(image).expand(len(target["labels"]), 4), "labels": target["labels"]}
            for image, target in zip(*batch, strict=True)
        ]
        return type(batch[0])(found)


class PlainDetector(Detector):
    """The same where a batch is plain tuples, of which it says itself what they are."""

    def batch_size(self, batch: Any) -> int:
        return len(batch[0])

    def scatter_batch(self, batch: Any, n: int) -> list[Any]:
        ends = [0]
        for size in even_sizes(len(batch[0]), n):
            ends.append(ends[-1] + size)
        return [tuple(column[a:b] for column in batch) for a, b in pairwise(ends)]

    def predict_step(self, batch: Any) -> Any:
        return Samples(super().predict_step(batch))


def detection(samples: int, seed: int) -> list[Any]:
    """A row is an image and its target; one image in three has no box."""
    rows = []
    for i in range(samples):
        height, width = (integers(2, high=4, seed=50 * seed + i) + 5).tolist()
        boxes = data((i + seed) % 3, 4, seed=i)
        target = {"boxes": boxes, "labels": torch.full((len(boxes),), i)}
        rows.append((data(3, height, width, seed=70 * seed + i), target))
    return rows


def collated(samples: int, seed: int) -> list[Any]:
    return [Samples(column) for column in zip(*detection(samples, seed), strict=True)]


def tuples(samples: int, seed: int) -> Any:
    return tuple(zip(*detection(samples, seed), strict=True))


def detection_loss(module: Detector, batch: Any) -> Tensor:
    total, boxes = torch.zeros((), dtype=F64), 0
    for image, target in zip(*batch, strict=True):
        patches = image.unfold(1, 3, 1).unfold(2, 3, 1).flatten(1, 2).mean(1).flatten()
        found = module.conv.weight.flatten(1) @ patches + module.conv.bias
        for box in target["boxes"]:
            total = total + (found - box).abs().sum()
            boxes += 1
    return total / boxes


# -- graphs -------------------------------------------------------------------------------------


class Graphs:
    """What graph libraries make of a list of graphs: one large graph, and whose each node is."""

    def __init__(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> None:
        self.x, self.edge_index, self.batch, self.num_graphs = x, edge_index, batch, num_graphs

    def to(self, device: Any, **options: Any) -> Graphs:
        parts = (self.x, self.edge_index, self.batch)
        return Graphs(*(one.to(device, **options) for one in parts), self.num_graphs)

    @classmethod
    def of(cls, graphs: Sequence[tuple[Tensor, Tensor]]) -> Graphs:
        sizes = [len(x) for x, _ in graphs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        edges = [edge + start for (_, edge), start in zip(graphs, starts, strict=True)]
        owner = torch.arange(len(graphs)).repeat_interleave(torch.tensor(sizes))
        return cls(torch.cat([x for x, _ in graphs]), torch.cat(edges, 1), owner, len(graphs))

    def graphs(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for i in range(self.num_graphs):
            (nodes,) = (self.batch == i).nonzero(as_tuple=True)
            own = self.edge_index[:, self.batch[self.edge_index[0]] == i]
            found.append((self.x[nodes], own - nodes[0]))
        return found


class GraphNet(Module):
    """A message from every neighbour; the loss is a mean over nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)

    def batch_size(self, batch: Graphs) -> int:
        return batch.num_graphs

    def scatter_batch(self, batch: Graphs, n: int) -> list[Any]:
        graphs = batch.graphs()
        size = -(-len(graphs) // n)
        return [Graphs.of(graphs[i : i + size]) for i in range(0, len(graphs), size)]

    def nodes(self, batch: Graphs) -> Tensor:
        out: Tensor = self.net(batch.x)
        source, target = batch.edge_index
        return out.index_add(0, target, out[source])

    def training_step(self, batch: Graphs) -> Mean:
        losses = self.nodes(batch).square().sum(1)
        return Mean(losses.sum(), len(losses))

    def predict_step(self, batch: Graphs) -> Any:
        nodes = self.nodes(batch)
        of_graph = torch.zeros(batch.num_graphs, 2, dtype=F64).index_add(0, batch.batch, nodes)
        return {"graphs": of_graph, "nodes": nodes, "heads": (nodes, nodes[:, 0])}


def graphs_batch(samples: int, seed: int) -> Graphs:
    graphs = []
    for i in range(samples):
        nodes = 2 + (i + seed) % 4
        edges = integers(2, nodes + 1, high=nodes, seed=10 * seed + i)
        graphs.append((data(nodes, 3, seed=30 * seed + i), edges))
    return Graphs.of(graphs)


def node_by_node(module: GraphNet, batch: Graphs) -> list[Tensor]:
    """The outputs of each graph's nodes."""
    found = []
    for x, edges in batch.graphs():
        out = x @ module.net.weight.T + module.net.bias
        rows = []
        for node in range(len(x)):
            neighbours = [out[a] for a, b in edges.T.tolist() if b == node]
            rows.append(sum(neighbours, out[node]))
        found.append(torch.stack(rows))
    return found


def graphs_predicted(module: GraphNet, batch: Graphs) -> Any:
    found = node_by_node(module, batch)
    nodes = torch.cat(found)
    of_graph = torch.stack([one.sum(0) for one in found])
    return {"graphs": of_graph, "nodes": nodes, "heads": (nodes, nodes[:, 0])}


# -- records around tensors ---------------------------------------------------------------------


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "all"


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Table(dict[str, Tensor]):
    """A mapping with a size of its own, as tensordict's; it cannot be built of other values."""

    def __init__(self, size: int, **columns: Tensor) -> None:
        super().__init__(columns)
        self.size = size
        self.fixed = True

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise RuntimeError("its size is fixed")

    def rows(self, start: int, stop: int) -> Table:
        return Table(stop - start, **{key: value[start:stop].data for key, value in self.items()})


samples_of.register(Table, lambda table: table.size)


@split.register
def _(table: Table, sizes: Sequence[int]) -> list[Table]:
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [table.rows(a, b) for a, b in pairwise(ends)]


def columns(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)


class Regression(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)

    def training_step(self, batch: Any) -> Tensor:
        x, y = columns(batch)
        return (self.net(x) - y).square().mean()

    def predict_step(self, batch: Any) -> Any:
        return Pair(self.net(columns(batch)[0]), columns(batch)[1])


def regression_loss(module: Regression, batch: Any) -> Tensor:
    x, y = columns(batch)
    return (x @ module.net.weight.T + module.net.bias - y).square().sum() / y.numel()


def regression_predicted(module: Regression, batch: Any) -> Any:
    x, y = columns(batch)
    return Pair(x @ module.net.weight.T + module.net.bias, y)


def regression(kind: Callable[..., Any]) -> Case:
    def batch(samples: int, seed: int) -> Any:
        return kind(x=data(samples, 3, seed=seed), y=data(samples, 2, seed=seed + 50))

    return Case(Regression, batch, regression_loss, regression_predicted)


CASES: dict[str, Case] = {
    "time first": Case(
        TimeFirst,
        lambda n, seed: (data(4, n, 3, seed=seed), data(4, n, seed=seed + 50)),
        time_first_loss,
        time_first_predicted,
    ),
    "time first, labels sample first": Case(
        MixedSequences,
        lambda n, seed: (data(4, n, 3, seed=seed), integers(n, high=2, seed=seed)),
        lambda module, batch: mean_cross_entropy(last_scores(module, batch[0].unbind(1)), batch[1]),
        lambda module, batch: last_scores(module, batch[0].unbind(1)),
    ),
    "packed sequences": Case(
        Packed,
        packed_batch,
        lambda module, batch: mean_cross_entropy(
            last_scores(module, unpack_sequence(batch[0])), batch[1]
        ),
        lambda module, batch: last_scores(module, unpack_sequence(batch[0])),
    ),
    "pairs": Case(
        Pairs,
        lambda n, seed: data(n, 3, seed=seed),
        pairs_loss,
        lambda module, x: module.net(x[::2]) * module.net(x[1::2]),
        sizes=(10, 6, 4, 8),
    ),
    "detection": Case(
        Detector,
        collated,
        detection_loss,
        lambda module, batch: Detector.predict_step(module, batch),
    ),
    "detection, plain tuples": Case(
        PlainDetector,
        tuples,
        detection_loss,
        lambda module, batch: PlainDetector.predict_step(module, batch),
    ),
    "graphs": Case(
        GraphNet,
        graphs_batch,
        lambda module, batch: torch.cat(node_by_node(module, batch)).square().sum(1).mean(),
        graphs_predicted,
    ),
    "a dataclass": regression(Record),
    "a named tuple": regression(Pair),
    "a dict": regression(dict),
    "a mapping of a registered type": regression(
        lambda x, y: Table(len(x), x=x, y=y),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def strategies() -> list[Strategy]:
    return [SingleDevice("cpu"), SingleDevice("cpu", shards=3), ThreadDataParallel(2)]


def distributed() -> Strategy:
    return Distributed(accelerator="cpu", timeout=60)


def largest_difference(name: str, under: list[Strategy]) -> float:
    case = CASES[name]
    return assert_same_training(
        case.make,
        case.batches(),
        under,
        case.by_hand,
        accumulate=(1,) if name == "pairs" else (1, 2),
        microbatch_sizes=(None, 2),
    )


@every_case
def test_the_parameters_are_those_of_the_loop_by_hand(name: str) -> None:
    assert largest_difference(name, strategies()) <= 1e-10


def alike(found: Any, expected: Any) -> bool:
    """Of the same structure, with equal numbers up to rounding."""
    if isinstance(expected, Tensor):
        close = torch.allclose(found.to(F64), expected.detach().to(F64), rtol=1e-10, atol=1e-12)
        return found.shape == expected.shape and close
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[k], expected[k]) for k in found)
    same = type(found) is type(expected) and len(found) == len(expected)
    return same and all(map(alike, found, expected))


def predictions(name: str, strategy: Strategy, **options: Any) -> bool:
    case = CASES[name]
    torch.manual_seed(0)
    module, batches = case.make(), case.batches()
    found = trainer(strategy, **options).predict(module, batches)
    assert found is not None
    assert len(found) == len(batches)
    with torch.no_grad():
        expected = [case.predicted(module, batch) for batch in batches]
    return all(map(alike, found, expected))


@every_case
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_predictions_come_as_of_the_whole_batch(name: str, microbatch_size: int | None) -> None:
    for strategy in strategies():
        assert predictions(name, strategy, microbatch_size=microbatch_size)


@every_case
def test_what_is_logged_in_evaluation_is_the_mean_over_all(name: str) -> None:
    case = CASES[name]

    class Logs(case.make):  # type: ignore[name-defined, misc]
        def validation_step(self, batch: Any) -> None:
            self.log("loss", self.training_step(batch))

    for strategy in strategies():
        torch.manual_seed(0)
        module, (batch, *_) = Logs(), case.batches()
        (found,) = trainer(strategy).validate(module, [batch], verbose=False)
        assert found["loss"] == pytest.approx(case.loss(module, batch).item(), rel=1e-10)


# -- ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with closing_pools():
        yield pool(2)


def in_a_rank(names: list[str]) -> dict[str, tuple[float, bool]]:
    return {
        name: (largest_difference(name, [distributed()]), predictions(name, distributed()))
        for name in names
    }


def test_two_ranks_do_the_same(two_ranks: RankPool) -> None:
    for found in two_ranks.run(in_a_rank, list(CASES)):
        assert found.keys() == CASES.keys()
        assert max(difference for difference, _ in found.values()) <= 1e-10
        assert all(predicted for _, predicted in found.values()), found


# -- what is refused ----------------------------------------------------------------------------


class Counts(Module):
    """Counts its samples itself, and leaves the cutting to who knows it no better."""

    def batch_size(self, batch: Any) -> int:
        return int(batch.shape[1])


def test_a_module_that_counts_its_own_way_must_cut_its_own_way() -> None:
    with pytest.raises(ValueError, match=r"add up to the batch's 4 samples, got \[2, 1\]"):
        scatter(Counts(), torch.zeros(4, 3), 0, 2, None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda x, n: [x[:1], x[:1]], r"the batch's 5 samples together, got parts of \[1, 1\]"),
        (lambda x, n: list(x.split(1)), "at most n = 2 parts, got 5"),
        (lambda x, n: [], "at most n = 2 parts, got 0"),
        (lambda x, n: [x, x[:0]], "at least one sample, this one holds 0"),
    ],
)
def test_a_wrong_scatter_batch_is_told_under_every_strategy(parts: Any, message: str) -> None:
    class Wrong(Module):
        def scatter_batch(self, batch: Any, n: int) -> list[Any]:
            found: list[Any] = parts(batch, n)
            return found

    x = torch.zeros(5, 2)
    for cut in (lambda: scatter(Wrong(), x, 0, 2, None), lambda: rows_of(Wrong(), x, 0, 2)):
        with pytest.raises(ValueError, match=message) as caught:
            cut()
        if "at least" in message:
            assert any("that scatter_batch(batch, n) returned" in n for n in caught.value.__notes__)


def test_a_scatter_batch_that_ignores_the_micro_batch_size_is_told() -> None:
    class Uneven(Module):
        def scatter_batch(self, batch: Any, n: int) -> list[Any]:
            return [batch[:4], batch[4:]]

    with pytest.raises(
        ValueError, match=r"more than microbatch_size=3 samples.* parts of \[4, 1\]"
    ):
        scatter(Uneven(), torch.zeros(5, 2), 0, 1, 3)


def test_images_of_three_channels_in_a_plain_list_are_told_apart_from_their_targets() -> None:
    with pytest.raises(ValueError, match=r"batch\[0\]\[0\] has 3 samples, but batch\[1\] has 4"):
        scatter(Detector(), tuples(4, 1), 0, 2, None)


def test_a_batch_with_fewer_samples_than_shards_makes_fewer_shards() -> None:
    for name, case in CASES.items():
        size = 2
        module, batch = case.make(), case.batch(size, 0)
        with nullcontext(name):
            sizes = [part.samples for part in scatter(module, batch, 0, 5, None)]
            assert sizes == ([2] if name == "pairs" else [1, 1])


def test_padding_is_what_a_packed_sequence_stands_for() -> None:
    packed, _ = packed_batch(5, 3)
    assert isinstance(packed, PackedSequence)
    assert pad_sequence(unpack_sequence(packed)).shape[1] == samples_of(packed) == 5
