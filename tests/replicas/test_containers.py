"""Lists, dicts and sets of the modules: the shard's own in a step, and what comes back of them."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import nn

from composefit.replicas import Replica, merge


class Keeping(nn.Module):
    """A module with containers as plain attributes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.outputs = ["first"]
        self.names = {"a"}
        self.features = {"old": 0}
        self.counts = defaultdict(int)

    def forward(self, x):
        return self.net(x)


def replicas_of(owner):
    found = [Replica(owner), Replica(owner)]
    return found, [replica.module for replica in found]


def test_what_shards_append_comes_back_in_shard_order():
    owner = Keeping()
    replicas, (a, b) = replicas_of(owner)
    for step in range(2):
        for replica in replicas:
            replica.refresh()
        b.outputs.append(("b", step))  # as if its thread had been the first
        a.outputs.append(("a", step))
        b.outputs += [("b again", step)]
        a.names.add("both")
        b.names.add(step)
        merge(owner, replicas, [1, 1])
    steps = [[("a", i), ("b", i), ("b again", i)] for i in range(2)]
    assert owner.outputs == ["first", *steps[0], *steps[1]]
    assert owner.names == {"a", "both", 0, 1}


def test_other_changes_are_the_shards_own_and_end_with_the_step():
    owner = Keeping()
    replicas, (a, b) = replicas_of(owner)
    a.features["h"] = 1
    a.counts["x"] += 1
    a.names.discard("a")
    a.outputs.clear()
    a.outputs += ["other", "things"]
    assert (b.features, b.counts, b.names, b.outputs) == ({"old": 0}, {}, {"a"}, ["first"])
    merge(owner, replicas, [1, 1])
    assert (owner.features, owner.counts, owner.names) == ({"old": 0}, {}, {"a"})
    assert owner.outputs == ["first"]
    replicas[0].refresh()
    assert (a.features, a.counts, a.outputs) == ({"old": 0}, {}, ["first"])
    assert type(a.counts) is defaultdict


def test_within_a_step_what_the_owner_changes_is_seen_and_nothing_is_lost():
    owner = Keeping()
    replicas, (a, b) = replicas_of(owner)
    a.outputs.append("a")
    a.features["h"] = 1
    a.names.add("b")
    owner.outputs.append("owner")
    owner.features["old"] = 2
    owner.names.add("owner")
    for replica in replicas:
        replica.refresh(within_step=True)
    assert a.outputs == ["first", "owner", "a"] and b.outputs == ["first", "owner"]
    assert a.features == {"old": 2, "h": 1} and b.features == {"old": 2}
    assert a.names == {"a", "b", "owner"} and b.names == {"a", "owner"}
    owner.outputs = ["new"]
    for replica in replicas:
        replica.refresh(within_step=True)
    a.outputs.append("a")
    merge(owner, replicas, [1, 1])
    assert owner.outputs == ["new", "a"] and owner.names == {"a", "b", "owner"}


def keep(store, module, arguments, output):
    store.append(output)


@pytest.mark.parametrize("held_by", ["closure", "partial", "self"])
def test_forward_hooks_write_into_the_shards_own(held_by):
    owner = Keeping()
    store = owner.outputs
    hooks = {
        "closure": lambda module, arguments, output: store.append(output),
        "partial": partial(keep, store),
        "self": lambda module, arguments, output: owner.outputs.append(output),
    }
    owner.net.register_forward_hook(hooks[held_by])
    replicas, copies = replicas_of(owner)
    for _ in range(2):
        for i, (replica, copy) in enumerate(zip(replicas, copies, strict=True)):
            replica.refresh()
            out = copy(torch.full((1, 2), float(i)))
            assert copy.outputs[-1] is out
    assert owner.outputs == ["first"]


def test_one_list_under_two_names_stays_one():
    owner = Keeping()
    owner.net.stored = owner.outputs
    replicas, (copy, _) = replicas_of(owner)
    assert copy.net.stored is copy.outputs
    copy.net.stored.append(1)
    merge(owner, replicas, [1, 1])
    assert owner.outputs == ["first", 1]


def test_a_method_of_a_list_is_rebound_to_the_owners():
    owner = Keeping()
    replica = Replica(owner)
    replica.owner_of(replica.module.outputs.append)("once")
    assert owner.outputs == ["first", "once"]


def test_long_tables_stay_shared():
    owner = Keeping()
    owner.table = {i: i for i in range(20_000)}
    assert Replica(owner).module.table is owner.table


def test_containers_that_the_owner_has_no_more_are_forgotten():
    owner = Keeping()
    replica = Replica(owner)
    for _ in range(5):
        owner.outputs = []
        replica.refresh()
    assert len(replica.containers) == 4
