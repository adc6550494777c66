"""Replicas: everything that runs on the owner runs on a replica, and nothing leaks between them.

The check throughout is the owner itself: the same inputs through the owner and through a replica
give the same outputs, and gradients arrive at the very same Parameter objects.
"""

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from composefit.replicas import Replica, differing_buffer, merge
from tests.replicas.modules import VECTOR, Blocks, assert_runs_like


def old_norm(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args)


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
    assert not any(item is replica.module[0] for item in replica.module.items)
    owner.items.append(owner[0])
    replica.refresh()
    assert replica.module.items[-1] is replica.module[0]
    owner.fresh = [nn.BatchNorm1d(3)]
    replica.refresh()
    assert replica.module.fresh[0] is not owner.fresh[0]
    owner.items.pop()
    replica.refresh()
    assert len(replica.module.items) == length
    assert all(a is b for a, b in zip(replica.module.items, owner.items, strict=True))


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
