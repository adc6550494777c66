import functools
import types

import torch
from torch import nn

from composefit.replicas import Replica, merge
from tests.replicas.modules import VECTOR, Blocks, assert_runs_like


def test_references_point_into_the_replica():
    owner = Blocks()
    copy = Replica(owner).module
    assert copy.stem is not owner.stem
    assert copy.stem.weight is owner.stem.weight
    assert copy.blocks[0] is copy.stem and copy.blocks[1] is copy.norm
    assert copy.nested["a"][1][0] is copy.layers[1]
    assert copy.nested[copy.norm] == "norm"
    assert type(copy.pair) is Blocks.Pair and copy.pair.first is copy.stem
    assert copy.hidden is copy.norm and copy.stem.parent is copy and copy.up() is copy
    assert copy.method.__self__ is copy.norm
    assert copy.part.func.__self__ is copy and copy.part.args == (copy.norm,)
    assert copy.function.__closure__[0].cell_contents is copy
    assert owner.function.__closure__[0].cell_contents is owner


def test_a_container_shared_with_the_owner_is_not_the_copys_when_modules_are_keys():
    owner = nn.Sequential(nn.Linear(3, 3))
    owner.names = {owner[0]: "first"}
    owner.together = {owner[0]}
    copy = Replica(owner).module
    assert copy.names[copy[0]] == "first" and copy.together == {copy[0]}


def test_a_module_hidden_in_a_list_is_replicated_with_its_buffers():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)
            self._teacher = [nn.BatchNorm1d(3)]  # hidden from parameters()

        def forward(self, x):
            return self.net(x) + self._teacher[0](x)

    owner = Student()
    replica = Replica(owner)
    teacher = owner._teacher[0]
    replica.module(VECTOR)
    assert teacher.num_batches_tracked == 0
    assert replica.module._teacher[0].weight is teacher.weight
    merge(owner, [replica], [4])
    assert teacher.num_batches_tracked == 1


def test_a_deep_chain_of_modules_does_not_exhaust_the_stack():
    owner = nn.Linear(1, 1)
    for _ in range(3000):
        outer = nn.Module()
        outer.inner = owner
        owner = outer
    replica = Replica(owner)
    assert sum(1 for _ in _chain(replica.module)) == 3001


def _chain(module):
    while module is not None:
        yield module
        module = module._modules.get("inner")


def test_a_container_that_contains_itself_is_no_endless_loop():
    owner = Blocks()
    owner.blocks.append(owner.blocks)
    copy = Replica(owner).module
    assert copy.blocks[0] is copy.stem


def test_hooks_with_closures_and_bound_methods_act_on_the_replica():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.seen = None
            calls = 0

            def keep(module, inputs, output):
                nonlocal calls
                calls += 1
                self.seen = (module, output, calls)

            self.net.register_forward_hook(keep)
            self.net.register_forward_pre_hook(self.double)
            self.factor = 2.0

        def double(self, module, inputs):
            self.doubled = True
            return (inputs[0] * self.factor,)

        def forward(self, x):
            return self.net(x)

    owner = Watched()
    replica = assert_runs_like(owner, VECTOR)
    assert replica.module.seen[0] is replica.module.net
    assert owner.seen[0] is owner.net
    # A variable of the closure that is no module stays one variable.
    assert sorted((owner.seen[2], replica.module.seen[2])) == [1, 2]


def test_a_hook_that_a_forward_registers_stays_on_the_replica_and_goes_with_the_step():
    owner = nn.Sequential(nn.Linear(3, 3))
    replica = Replica(owner)
    handle = replica.module[0].register_forward_hook(lambda m, i, o: o * 0)
    assert not owner[0]._forward_hooks
    assert torch.count_nonzero(replica.module(VECTOR)) == 0
    replica.refresh()
    assert torch.equal(replica.module(VECTOR), owner(VECTOR))
    handle.remove()


def test_hooks_registered_and_removed_on_the_owner_follow_at_the_next_refresh():
    owner = nn.Sequential(nn.Linear(3, 3))
    replica = Replica(owner)
    handle = owner[0].register_forward_hook(lambda m, i, o: o * 2)
    replica.refresh()
    assert torch.equal(replica.module(VECTOR), owner(VECTOR))
    owner[0]._forward_hooks = type(owner[0]._forward_hooks)()  # another way to remove all
    replica.refresh()
    assert torch.equal(replica.module(VECTOR), owner(VECTOR))
    handle.remove()


def test_backward_hooks_run_on_the_replica():
    owner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    owner[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    assert_runs_like(owner, VECTOR)


def test_a_method_put_on_an_instance_is_bound_to_the_replica():
    owner = nn.Sequential(nn.Linear(3, 3))
    owner[0].forward = types.MethodType(
        lambda self, x: self.weight @ x.T + self.bias[:, None], owner[0]
    )
    replica = assert_runs_like(owner, VECTOR)
    assert replica.module[0].forward.__self__ is replica.module[0]


def test_overrides_are_the_roots_own_attributes():
    owner = Blocks()
    owner.context = "owner"
    replica = Replica(owner, {"context": "shard", "rank": 3})
    replica.refresh()
    replica.refresh(within_step=True)
    assert (replica.module.context, replica.module.rank) == ("shard", 3)
    assert owner.context == "owner" and not hasattr(owner, "rank")
    assert "rank" not in vars(replica.module.stem)


def test_owner_of_rebinds_methods_partials_closures_modules_and_buffers():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.register_buffer("queue", torch.zeros(3))

        def enqueue(self, x):
            self.queue.copy_(x)

        def closures(self):
            net, queue, total = self.net, self.queue, 0

            def count(x, me=self):
                nonlocal total
                total += 1
                return net, queue, me, total

            def again(n):
                return again(n - 1) if n else self

            return count, again

    owner = Step()
    replica = Replica(owner)
    copy = replica.module
    replica.owner_of(copy.enqueue)(torch.ones(3))
    assert owner.queue.sum() == 3 and copy.queue.sum() == 0
    replica.owner_of(functools.partial(copy.enqueue, torch.zeros(3)))()
    assert owner.queue.sum() == 0
    replica.owner_of(lambda x: copy.enqueue(x))(torch.ones(3))
    assert owner.queue.sum() == 3 and copy.queue.sum() == 0
    replica.owner_of(copy.queue.copy_)(torch.full((3,), 2.0))
    assert owner.queue.sum() == 6 and copy.queue.sum() == 0
    count, again = copy.closures()
    assert replica.owner_of(count)(0)[:3] == (owner.net, owner.queue, owner)
    assert count(0)[3] == 2  # one `total` for both
    assert replica.owner_of(again)(3) is owner and again(3) is copy
    assert replica.owner_of(copy.net) is owner.net
    assert replica.owner_of(copy.net.forward) == owner.net.forward


def test_owner_of_leaves_other_functions_alone():
    replica = Replica(nn.Linear(3, 3))
    plain = [print, len, torch.relu, functools.partial(print, 1), lambda: VECTOR, [].append]
    assert all(replica.owner_of(function) is function for function in plain)
