import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score

from composefit.replicas import Replica, merge
from tests.replicas.modules import VECTOR

SCORES = torch.rand(24, generator=torch.Generator().manual_seed(4))
TARGETS = (torch.rand(24, generator=torch.Generator().manual_seed(5)) > 0.5).long()
NO_RATE = "ignore:No (positive|negative) samples:UserWarning"  # in a shard of one sample
METRICS = {
    "sum": lambda: torchmetrics.SumMetric(),
    "mean": lambda: torchmetrics.MeanMetric(),
    "max": lambda: torchmetrics.MaxMetric(),
    "min": lambda: torchmetrics.MinMetric(),
    "cat": lambda: torchmetrics.CatMetric(),
    "accuracy": lambda: BinaryAccuracy(),
    "auroc": lambda: BinaryAUROC(),
    "mse": lambda: torchmetrics.MeanSquaredError(),
    "classwise": lambda: torchmetrics.wrappers.ClasswiseWrapper(
        torchmetrics.classification.MulticlassAccuracy(2, average=None)
    ),
    "composition": lambda: BinaryAccuracy() + BinaryF1Score(),
    "collection": lambda: torchmetrics.MetricCollection(
        [BinaryAccuracy(), BinaryF1Score(), BinaryAUROC()]
    ),
    "given groups": lambda: torchmetrics.MetricCollection(
        [BinaryAccuracy(), BinaryF1Score(), BinaryAUROC()],
        compute_groups=[["BinaryAccuracy", "BinaryF1Score"], ["BinaryAUROC"]],
    ),
}


def _arguments(kind, rows):
    if kind in ("sum", "mean", "max", "min", "cat"):
        return (SCORES[rows],)
    if kind == "classwise":
        return ((SCORES[rows] > 0.5).long(), TARGETS[rows])
    if kind == "mse":
        return SCORES[rows], TARGETS[rows].float()
    return SCORES[rows], TARGETS[rows]


@pytest.mark.filterwarnings(NO_RATE)
@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize("owner_first", [False, True])
def test_metrics_updated_in_shards_are_those_of_all_samples(kind, call, owner_first):
    owner = nn.Module()
    owner.metric = METRICS[kind]()
    reference = METRICS[kind]()
    replicas = [Replica(owner) for _ in range(3)]
    for step in range(2):
        if owner_first:  # in between, the owner is used itself
            owner.metric.update(*_arguments(kind, slice(20, 24)))
            reference.update(*_arguments(kind, slice(20, 24)))
            owner.metric.compute()  # remembered by torchmetrics until the next update
        bounds = [0, 1, 4, 10]
        for i, replica in enumerate(replicas):
            replica.refresh()
            rows = slice(10 * step + bounds[i], 10 * step + bounds[i + 1])
            getattr(replica.module.metric, call)(*_arguments(kind, rows))
        merge(owner, replicas, [1, 3, 6])
        reference.update(*_arguments(kind, slice(10 * step, 10 * step + 10)))
    found, expected = owner.metric.compute(), reference.compute()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    owner.metric.reset()
    replicas[0].refresh()
    replicas[0].module.metric.update(*_arguments(kind, slice(0, 5)))
    merge(owner, replicas[:1], [5])
    reference.reset()
    reference.update(*_arguments(kind, slice(0, 5)))
    torch.testing.assert_close(owner.metric.compute(), reference.compute(), rtol=1e-6, atol=1e-7)


def test_groups_of_a_collection_are_not_decided_by_one_shard():
    """A first sample on which both agree would have the second metric follow the first."""
    owner = nn.Module()
    owner.metrics = torchmetrics.MetricCollection(
        {"low": BinaryAccuracy(threshold=0.5), "high": BinaryAccuracy(threshold=0.9)}
    )
    groups = {key: list(value) for key, value in owner.metrics._groups.items()}
    replica = Replica(owner)
    for score in (0.95, 0.7):
        replica.module.metrics.update(torch.tensor([score]), torch.tensor([1]))
    merge(owner, [replica], [1])
    assert owner.metrics._groups == groups and not owner.metrics._groups_checked
    assert owner.metrics["low"].compute() == 1.0 and owner.metrics["high"].compute() == 0.5


def test_a_means_state_is_weighted_by_updates():
    class Running(torchmetrics.Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("level", torch.zeros(()), dist_reduce_fx="mean")

        def update(self, x):
            self.level = self.level + (x - self.level) / self._update_count

        def compute(self):
            return self.level

    owner = nn.Module()
    owner.metric = Running()
    owner.metric.update(1.0)
    replicas = [Replica(owner) for _ in range(3)]
    for x in (2.0, 6.0):
        replicas[0].module.metric.update(x)
    replicas[2].module.metric.update(3.0)
    merge(owner, replicas, [1, 1, 1])
    assert owner.metric.compute() == 3.0 and owner.metric.update_count == 4


def test_metric_states_that_cannot_be_merged_raise_and_nothing_changes():
    owner = nn.Module()
    owner.corr = torchmetrics.PearsonCorrCoef()
    owner.norm = nn.BatchNorm1d(3)
    replicas = [Replica(owner) for _ in range(2)]
    for replica in replicas:
        replica.module.corr.update(SCORES, TARGETS.float())
        replica.module.norm(VECTOR)
    with pytest.raises(ValueError, match=r"corr \(PearsonCorrCoef\).*Once\(self\.corr\.update"):
        merge(owner, replicas, [1, 1])
    assert owner.norm.num_batches_tracked == 0 and not owner.corr.update_called


def test_a_metric_that_counts_outside_its_states_raises():
    owner = nn.Module()
    owner.recent = torchmetrics.wrappers.Running(torchmetrics.SumMetric(), window=3)
    replica = Replica(owner)
    replica.module.recent.update(1.0)
    with pytest.raises(ValueError, match="update\\(\\) changes '_num_vals_seen'"):
        merge(owner, [replica], [1])


def test_a_refresh_within_a_step_keeps_a_shards_metric():
    owner = nn.Module()
    owner.metric = BinaryAccuracy()
    replica = Replica(owner)
    replica.module.metric.update(torch.ones(1), torch.ones(1))
    owner.metric.update(torch.ones(3), torch.zeros(3))  # as a function given to Once does
    replica.refresh(within_step=True)
    merge(owner, [replica], [1])
    assert owner.metric.compute() == 0.25
