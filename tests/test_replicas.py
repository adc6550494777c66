"""Replicas: everything that runs on the owner runs on a replica, and nothing leaks between them.

The check throughout is the owner itself: the same inputs through the owner and through a replica
give the same outputs, and gradients arrive at the very same Parameter objects.
"""

import functools
import gc
import math
import threading
import types
import warnings
import weakref
from collections import namedtuple

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score

from composefit.replicas import Replica, differing_buffer, merge


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


def old_norm(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args)


# --------------------------------------------------------------------------------------------
# Kinds of modules


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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, x):
        return self.encoder(self.attention(x, x, x)[0])


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(3) * i) for i in (1, 2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
        self.shared = nn.Linear(3, 3)
        self.tied = self.shared

    def forward(self, x):
        for weight in self.weights:
            x = x * weight
        return self.tied(self.shared(x)) + self.named["a"]


class Uncopyable(nn.Module):
    """deepcopy raises on every one of its attributes."""

    __slots__ = ("lock", "__private")  # noqa: RUF023

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.lock = threading.Lock()
        self.__private = (i for i in range(3))
        self.generator = torch.Generator()
        self.counter = (i for i in range(3))
        self.activation = self.linear(torch.ones(2, 3))  # not a leaf

    def forward(self, x):
        with self.lock:
            return self.linear(x) * float(self.__private is not None)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        doubled = {name: p * 2 for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, doubled, (x,)) + self.inner(x)


VECTOR = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
SERIES = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))

MODULES = {
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), VECTOR),
    "references by every route": (Blocks, VECTOR),
    "parameter lists and shared modules": (Lists, VECTOR),
    "attention": (Attention, SERIES),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), SERIES),
    "gru": (lambda: nn.GRU(4, 3), SERIES),
    "lock, generator, activation, slots": (Uncopyable, VECTOR),
    "functional_call": (Functional, VECTOR),
    "new weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), VECTOR),
    "new spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), VECTOR),
    "old weight norm": (lambda: old_norm(nn.utils.weight_norm, nn.Linear(3, 3)), VECTOR),
    "old spectral norm": (lambda: old_norm(nn.utils.spectral_norm, nn.Linear(3, 3)), VECTOR),
    "old weight norm on an lstm": (
        lambda: old_norm(nn.utils.weight_norm, nn.LSTM(4, 3), "weight_hh_l0"),
        SERIES,
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_replica_runs_like_its_owner(kind):
    make, x = MODULES[kind]
    torch.manual_seed(0)
    owner = make()
    owner.train()
    replica = assert_runs_like(owner, x)
    replica.refresh()
    assert_runs_like(owner, x, replica=replica)
    assert all(a is b for a, b in zip(owner.parameters(), replica.module.parameters(), strict=True))


@pytest.mark.parametrize("kind", MODULES)
def test_a_forward_on_a_replica_leaves_the_owner_alone(kind):
    make, x = MODULES[kind]
    owner = make()
    replica = Replica(owner)
    before = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    attributes = {
        name: {
            key: (value, list(value) if isinstance(value, list) else None)
            for key, value in vars(module).items()
        }
        for name, module in owner.named_modules()
    }
    replica.module(x)
    for name, buffer in owner.named_buffers():
        assert torch.equal(buffer, before[name])
    for name, module in owner.named_modules():
        for key, (value, items) in attributes[name].items():
            assert vars(module)[key] is value
            if items is not None:
                assert all(a is b for a, b in zip(value, items, strict=True))


def test_shards_in_threads_do_not_disturb_each_other():
    owner = old_norm(nn.utils.weight_norm, nn.LSTM(4, 3), "weight_hh_l0")
    owner = nn.ModuleDict({"lstm": owner, "functional": Functional()})
    replicas = [Replica(owner) for _ in range(4)]

    def run(module, seed):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        y = module["lstm"](x)[0].flatten(0, 1)
        loss = module["functional"](y).square().sum()
        return torch.autograd.grad(loss, list(owner.parameters()))

    expected = [run(Replica(owner).module, seed) for seed in range(4)]
    found = [[] for _ in replicas]

    def work(i):
        for _ in range(30):
            found[i].append(run(replicas[i].module, i))

    for replica in replicas:
        replica.refresh()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, runs in enumerate(found):
        assert len(runs) == 30
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, expected[i], strict=True))


# --------------------------------------------------------------------------------------------
# References


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


def test_containers_without_modules_stay_shared():
    owner = Blocks()
    copy = Replica(owner).module
    copy.outputs.append(1)
    assert owner.outputs == [1]


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


# --------------------------------------------------------------------------------------------
# Refresh


def test_refresh_reads_attributes_flags_parameters_and_buffers_anew():
    owner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    replica = Replica(owner)
    owner.eval()
    owner[1].eps = 0.5
    owner[0].weight = nn.Parameter(torch.eye(3))
    owner[1].running_mean.fill_(2.0)
    owner[1].running_var = torch.full((3,), 4.0)
    owner[0].register_buffer("late", torch.ones(2), persistent=False)
    replica.refresh()
    copy = replica.module
    assert not copy.training and copy[1].eps == 0.5
    assert copy[0].weight is owner[0].weight
    assert torch.equal(copy(VECTOR), owner(VECTOR))
    assert torch.equal(copy[0].late, torch.ones(2)) and copy[0].late is not owner[0].late
    assert "late" not in copy.state_dict() and list(copy.state_dict()) == list(owner.state_dict())
    del owner[0].late
    del owner[1].eps
    replica.refresh()
    assert not hasattr(copy[0], "late") and not hasattr(copy[1], "eps")


def test_refresh_drops_what_a_forward_has_set():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)
            self.h = None

        def forward(self, x):
            self.h = self.cell(x)
            self.extra = nn.Linear(1, 1)
            self.cell.register_buffer("cache", x)
            self.cell.other = 1
            return self.h

    owner = Recurrent()
    replica = Replica(owner)
    copy = replica.module
    copy(VECTOR)
    assert copy.h is not None
    replica.refresh()
    assert replica.module is copy
    assert copy.h is None and not hasattr(copy, "extra") and not hasattr(copy.cell, "other")
    assert not hasattr(copy.cell, "cache") and not hasattr(owner.cell, "cache")


def test_refresh_follows_shapes_and_dtypes_of_buffers():
    owner = nn.Module()
    owner.register_buffer("queue", torch.zeros(2))
    replica = Replica(owner)
    owner.queue.data = torch.arange(6.0).reshape(2, 3)
    replica.refresh()
    assert torch.equal(replica.module.queue, owner.queue)
    owner.double()
    replica.refresh()
    assert replica.module.queue.dtype is torch.float64
    owner.queue.data.mul_(2)  # moves no version counter
    replica.refresh()
    assert torch.equal(replica.module.queue, owner.queue)
    owner.queue = None
    replica.refresh()
    assert replica.module.queue is None


def test_refresh_follows_added_replaced_and_removed_modules():
    owner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    replica = Replica(owner)
    kept = replica.module[0]
    owner[1] = nn.BatchNorm1d(3)
    owner.append(nn.Linear(3, 2))
    assert_runs_like(owner, VECTOR, replica=_refreshed(replica))
    assert replica.module[0] is kept
    del owner[2]
    parametrizations.weight_norm(owner[0])
    assert_runs_like(owner, VECTOR, replica=_refreshed(replica))
    parametrize.remove_parametrizations(owner[0], "weight")
    assert_runs_like(owner, VECTOR, replica=_refreshed(replica))


def _refreshed(replica):
    replica.refresh()
    return replica


@pytest.mark.parametrize("length", [0, 100])
def test_modules_appended_to_a_plain_list_are_found(length):
    owner = nn.Sequential(nn.Linear(3, 3))
    owner.items = [torch.zeros(1)] * length
    replica = Replica(owner)
    assert replica.module.items is owner.items
    owner.items.append(owner[0])
    replica.refresh()
    assert replica.module.items[-1] is replica.module[0]
    owner.fresh = [nn.BatchNorm1d(3)]
    replica.refresh()
    assert replica.module.fresh[0] is not owner.fresh[0]
    owner.items.pop()
    replica.refresh()
    assert replica.module.items is owner.items


def test_a_refresh_within_a_step_takes_over_only_what_the_owner_changed():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
            self.register_buffer("queue", torch.ones(3))
            self.register_buffer("other", torch.ones(3))
            self.center = 0

    owner = Step()
    replica = Replica(owner)
    copy = replica.module
    loss = (copy.net(VECTOR) * copy.other).sum()
    copy.net.h = "set by a forward"
    copy.net[0].register_forward_hook(lambda m, i, o: None)
    copy.net[1].num_batches_tracked.add_(5)
    owner.queue.data[0] = 7.0  # moves no version counter
    owner.center = 3
    owner.net.extra = nn.Linear(1, 1)
    replica.refresh(within_step=True)
    assert copy.queue[0] == 7 and copy.center == 3 and copy.net.h == "set by a forward"
    assert len(copy.net[0]._forward_hooks) == 1
    assert copy.net.extra is not owner.net.extra
    assert copy.net.extra(torch.ones(1, 1)).requires_grad
    assert copy.net[1].num_batches_tracked == 6
    loss.backward()  # would raise if a buffer in its graph had been written
    owner.net[1].reset_running_stats()
    replica.refresh(within_step=True)
    assert copy.net[1].num_batches_tracked == 0
    replica.refresh()
    assert not hasattr(copy.net, "h")


def test_a_tree_that_changes_while_it_is_read_raises():
    class Restless(dict):
        __hash__ = None

        def __eq__(self, other):
            return False

        def __ne__(self, other):
            return True

    owner = nn.Sequential(nn.Linear(1, 1))
    owner._modules = Restless(owner._modules)
    with pytest.raises(RuntimeError, match="Sequential's modules keep changing while they are"):
        Replica(owner)


def test_a_buffer_under_two_names_stays_one_tensor():
    owner = nn.Module()
    owner.register_buffer("a", torch.zeros(2))
    owner.child = nn.Module()
    owner.child.register_buffer("b", owner.a)
    copy = Replica(owner).module
    assert copy.a is copy.child.b and copy.a is not owner.a


def test_a_buffer_that_requires_a_gradient_is_shared():
    owner = nn.Linear(3, 3)
    owner.register_buffer("scale", torch.ones(3, requires_grad=True))
    replica = Replica(owner)
    (gradient,) = torch.autograd.grad((replica.module.scale * 2).sum(), owner.scale)
    assert torch.equal(gradient, torch.full((3,), 2.0))
    merge(owner, [replica], [1])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_buffers_and_inference_mode_work():
    owner = nn.Module()
    owner.register_buffer("adjacency", torch.eye(3).to_sparse())
    owner.register_buffer("rows", torch.eye(3).to_sparse_csr())
    with torch.inference_mode():
        owner.register_buffer("born_in_inference", torch.ones(3))
        replicas = [Replica(owner), Replica(owner)]
        replicas[0].refresh()
    for _ in range(3):
        for replica in replicas:
            replica.refresh()
        assert differing_buffer(owner, replicas) is None
        merge(owner, replicas, [1, 1])
        kept = replicas[0].module.adjacency
    replicas[0].refresh()
    assert replicas[0].module.adjacency is kept  # not cloned again and again
    assert torch.equal(kept.to_dense(), torch.eye(3))
    assert not replicas[0].module.born_in_inference.is_inference()
    for replica in replicas:
        replica.module.adjacency = torch.ones(2, 2).to_sparse()
        replica.module.rows = torch.ones(2, 2).to_sparse_csr()
    merge(owner, replicas, [1, 1])
    for name in ("adjacency", "rows"):
        assert torch.equal(getattr(owner, name).to_dense(), torch.ones(2, 2))
        for value, replica in enumerate(replicas):
            replica.refresh()
            sparse = torch.full((2, 2), float(value)).to_sparse()
            setattr(replica.module, name, sparse if name == "adjacency" else sparse.to_sparse_csr())
        assert differing_buffer(owner, replicas)[0] == name
        for replica in replicas:
            replica.refresh()


def test_replicas_and_owners_are_collected():
    owner = Blocks()
    replica = Replica(owner)
    gone = weakref.ref(replica.module.norm)
    del replica
    gc.collect()
    assert gone() is None


# --------------------------------------------------------------------------------------------
# Refusals


def test_a_lazy_module_must_run_first():
    owner = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"1\.weight is not initialised yet.*run one forward"):
        Replica(owner)
    owner(VECTOR)
    replica = assert_runs_like(owner, VECTOR)
    owner.append(nn.LazyLinear(2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.weight is not initialised yet"):
            replica.refresh()
    copy = replica.module
    owner(VECTOR)
    assert_runs_like(owner, VECTOR, replica=_refreshed(replica))
    assert replica.module is copy
    with pytest.raises(ValueError, match="running_mean is not initialised"):
        Replica(nn.LazyBatchNorm1d(affine=False))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_with_buffers_is_refused_and_a_frozen_one_shared():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    owner = nn.Module()
    owner.critic = torch.jit.script(net)
    with pytest.raises(TypeError, match=r"critic is a scripted module with buffers.*freeze"):
        Replica(owner)
    owner.critic = torch.jit.freeze(torch.jit.script(net.eval()))
    assert torch.equal(Replica(owner).module.critic(VECTOR), owner.critic(VECTOR))


# --------------------------------------------------------------------------------------------
# torch.compile


class Counting:
    """A backend that counts compilations."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        return graph.forward


class Body(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + 1


@pytest.mark.parametrize("how", ["wrapped", "in place", "root", "method"])
def test_compiled_modules_run_on_the_replica(how):
    torch._dynamo.reset()
    backend = Counting()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(nn.Linear(3, 3), nn.BatchNorm1d(3))
            if how == "wrapped":
                self.body = torch.compile(self.body, backend=backend)
            elif how == "in place":
                self.body.compile(backend=backend)
            elif how == "method":
                self.fast = torch.compile(self.slow, backend=backend)

        def slow(self, x):
            return self.body(x)

        def forward(self, x):
            return self.fast(x) if how == "method" else self.body(x)

    owner = Net()
    root = torch.compile(owner, backend=backend) if how == "root" else owner
    replicas = [Replica(root) for _ in range(12)]  # more than torch recompiles
    for replica in replicas:
        assert_runs_like(root, VECTOR, replica=replica)
        body = owner.body._orig_mod if how == "wrapped" else owner.body
        assert body[1].num_batches_tracked > 0
    once = backend.compiled
    norms = [m for m in replicas[0].module.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms and all(norm.num_batches_tracked == 1 for norm in norms)
    for replica in replicas:
        replica.refresh()
        replica.module(VECTOR)
    assert backend.compiled == once > 0


# --------------------------------------------------------------------------------------------
# owner_of


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


# --------------------------------------------------------------------------------------------
# differing_buffer and merge


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


# --------------------------------------------------------------------------------------------
# torchmetrics

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
