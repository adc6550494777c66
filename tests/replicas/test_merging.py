import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from composefit.replicas import Replica, differing_buffer, merge
from tests.replicas.modules import VECTOR


class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("queue", torch.zeros(3))


def test_statistics_may_differ_and_other_buffers_may_not():
    owner = Queue()
    replicas = [Replica(owner), Replica(owner)]
    for i, replica in enumerate(replicas):
        replica.module.encoder(VECTOR * (i + 1))
    assert differing_buffer(owner, replicas) is None
    for i, replica in enumerate(replicas):
        replica.module.queue[0] = i
    name, reason = differing_buffer(owner, replicas)
    assert name == "queue" and reason == "shards 0 and 1 hold different values"
    before = owner.encoder[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"queue cannot be merged.*Once.*running_statistics"):
        merge(owner, replicas, [1, 1])
    assert torch.equal(owner.encoder[1].running_mean, before)


def _by_data(module, value):
    module.queue.data.fill_(value)


def _in_place(module, value):
    module.queue.fill_(value)


def _assigned(module, value):
    module.queue = torch.full((3,), value)


def _reshaped(module, value):
    module.queue = torch.full((3 + int(value),), value)


def _batch_normed(module, value):
    x = torch.full((2, 3), value)
    nn.functional.batch_norm(x, module.queue, torch.ones(3), training=True)


WRITES = [_by_data, _in_place, _assigned, _reshaped, _batch_normed]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("steps", [1, 5])
def test_every_way_to_write_a_buffer_is_seen(write, steps):
    owner = Queue()
    replicas = [Replica(owner) for _ in range(2)]
    for _ in range(steps):  # the same for every step
        for replica in replicas:
            replica.refresh()
            write(replica.module, 1.0)
        assert differing_buffer(owner, replicas) is None
        merge(owner, replicas, [1, 1])
    assert torch.equal(owner.queue, replicas[0].module.queue)
    for value, replica in enumerate(replicas):
        replica.refresh()
        write(replica.module, float(value))
    assert differing_buffer(owner, replicas)[0] == "queue"


def test_a_write_by_one_shard_only_is_seen():
    owner = Queue()
    replicas = [Replica(owner) for _ in range(3)]
    replicas[2].module.queue.add_(1)
    assert differing_buffer(owner, replicas)[1] == "shards 0 and 2 hold different values"


def test_nan_written_alike_is_alike():
    owner = Queue()
    replicas = [Replica(owner) for _ in range(2)]
    for replica in replicas:
        replica.module.queue.fill_(math.nan)
    assert differing_buffer(owner, replicas) is None
    merge(owner, replicas, [1, 1])
    assert owner.queue.isnan().all()


def test_buffers_that_appear_and_vanish_in_all_shards_do_so_on_the_owner():
    owner = Queue()
    replicas = [Replica(owner) for _ in range(2)]
    for replica in replicas:
        replica.module.register_buffer("cache", torch.ones(2), persistent=False)
        del replica.module.queue
    merge(owner, replicas, [1, 1])
    assert torch.equal(owner.cache, torch.ones(2)) and not hasattr(owner, "queue")
    assert "cache" not in owner.state_dict()
    replicas[0].module.register_buffer("late", torch.ones(1))
    assert differing_buffer(owner, replicas) == (
        "late",
        "shard 0 has torch.float32 (1,), shard 1 has no tensor",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_become_the_weighted_mean_of_changes(dtype):
    owner = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    owner.to(dtype)
    weights = [5, 2, 1]
    replicas = [Replica(owner) for _ in weights]
    names = [name for name, _ in owner.named_buffers()]
    assert len(names) == 6
    for step in range(3):
        start = {name: b.double().clone() for name, b in owner.named_buffers()}
        expected = dict(start)
        for i, replica in enumerate(replicas):
            replica.refresh()
            x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(10 * step + i))
            replica.module(x.to(dtype) * (i + 1))
            for name, buffer in replica.module.named_buffers():
                change = buffer.double() - start[name]
                expected[name] = expected[name] + weights[i] / 8 * change
        merge(owner, replicas, weights)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.0}[dtype]
        for name, buffer in owner.named_buffers():
            rounded = expected[name].to(buffer.dtype)  # once, and not at every operation
            torch.testing.assert_close(buffer, rounded, rtol=tolerance, atol=0)
        assert owner[0].num_batches_tracked == step + 1


def test_counts_that_differ_are_rounded():
    owner = nn.BatchNorm1d(3)
    replicas = [Replica(owner), Replica(owner)]
    for _ in range(3):
        replicas[0].module(VECTOR)
    merge(owner, replicas, [1, 3])
    assert owner.num_batches_tracked == 1  # 0.75
    assert owner.num_batches_tracked.dtype is torch.int64


def test_unwritten_statistics_stay_bitwise_what_they_were():
    owner = nn.BatchNorm1d(64)
    owner.running_mean.normal_()
    owner.eval()
    before = owner.running_mean.clone()
    replicas = [Replica(owner) for _ in range(3)]
    merge(owner, replicas, [1, 1, 1])  # thirds do not add up to one
    assert torch.equal(owner.running_mean, before)


def test_what_a_hook_writes_to_the_owner_during_the_step_is_kept():
    owner = Queue()
    replicas = [Replica(owner) for _ in range(2)]
    owner.encoder[1].running_mean.add_(3.0)  # as an EMA hook after the update does
    owner.queue.data.fill_(5.0)
    merge(owner, replicas, [1, 1])
    assert torch.equal(owner.encoder[1].running_mean, torch.full((3,), 3.0))
    assert torch.equal(owner.queue, torch.full((3,), 5.0))
    for replica in replicas:
        replica.refresh()
        replica.module.queue.fill_(1.0)
    owner.queue.fill_(2.0)
    with pytest.raises(ValueError, match="queue was written by the shards, and since then on"):
        merge(owner, replicas, [1, 1])


def test_declared_running_statistics_merge_as_means():
    class Codebook(nn.Module):
        running_statistics = ("mean",)

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.mean.data.mul_(0.5).add_(0.5 * x)
            self.count += 1

    owner = nn.Sequential(Codebook())
    replicas = [Replica(owner) for _ in range(2)]
    for i, replica in enumerate(replicas):
        replica.module(float(i))
    assert differing_buffer(owner, replicas) is None
    merge(owner, replicas, [1, 3])
    assert torch.equal(owner[0].mean, torch.full((3,), 0.375))
    assert owner[0].count == 1


def test_a_declared_statistic_that_begins_as_none_is_no_statistic_yet():
    class Lazy(nn.Module):
        running_statistics = ("mean",)

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", None)

    owner = Lazy()
    replicas = [Replica(owner) for _ in range(2)]
    for value, replica in enumerate(replicas):
        replica.module.mean = torch.full((3,), float(value))
    assert differing_buffer(owner, replicas)[0] == "mean"
    replicas[0].module.mean.fill_(1.0)
    merge(owner, replicas, [1, 1])
    assert torch.equal(owner.mean, torch.ones(3))
    for value, replica in enumerate(replicas):
        replica.refresh()
        replica.module.mean.fill_(float(value))
    merge(owner, replicas, [1, 1])
    assert torch.equal(owner.mean, torch.full((3,), 0.5))


def test_merging_is_reproducible_bit_by_bit():
    def run():
        torch.manual_seed(0)
        owner = nn.BatchNorm1d(64)
        replicas = [Replica(owner) for _ in range(5)]
        for replica in replicas:
            replica.module(torch.randn(7, 64))
        merge(owner, replicas, [7, 7, 7, 7, 3])
        return owner.running_var

    assert all(torch.equal(run(), run()) for _ in range(5))


def test_spectral_norm_vectors_that_all_shards_wrote_alike_are_taken_over():
    torch.manual_seed(0)
    owner = parametrizations.spectral_norm(nn.Linear(3, 3))
    reference = parametrizations.spectral_norm(nn.Linear(3, 3))
    reference.load_state_dict(owner.state_dict())
    replicas = [Replica(owner) for _ in range(2)]
    for replica, half in zip(replicas, VECTOR.chunk(2), strict=True):
        replica.module(half)
    merge(owner, replicas, [2, 2])
    reference(VECTOR)
    for (name, a), b in zip(owner.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [0, 0], [1, -1], [math.nan, 1]])
def test_weights_must_fit(weights):
    owner = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="one weight for each of 2 replicas"):
        merge(owner, [Replica(owner), Replica(owner)], weights)
