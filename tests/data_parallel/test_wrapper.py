import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from composefit.data_parallel import DataParallel
from composefit.strategies import SingleDevice, ThreadDataParallel
from tests.data_parallel.conftest import Parallel, Seen


class Function(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Out(NamedTuple):
    rows: Tensor
    best: Tensor


def test_outputs_keep_their_structure_and_the_order_of_samples(parallel: Parallel) -> None:
    def forward(x: Tensor, scale: float, *, mask: Tensor, names: list[str]):
        out = Out(x * scale, x.argmax(1))
        return {"out": out, "list": [mask, (x[:, 0], None)], "names": names, "scale": scale}

    x, mask, names = torch.randn(7, 3), torch.arange(7), list("abcdefg")
    found = parallel(Function(forward), 3)(x, 2.0, mask=mask, names=names)
    expected = forward(x, 2.0, mask=mask, names=names)
    assert found.pop("names") == expected.pop("names")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert type(found["out"]) is Out


def test_outputs_without_dimensions_are_stacked(parallel: Parallel) -> None:
    found = parallel(Function(lambda x: x.sum()))(torch.tensor([1.0, 2.0, 4.0]))
    assert found.tolist() == [3.0, 4.0]


def test_fewer_samples_than_threads_make_fewer_shards(parallel: Parallel) -> None:
    net = parallel(Seen(), 4)
    x = torch.randn(3, 1)
    assert torch.equal(net(x), x)
    assert len(net.forwards) == 3


def test_a_single_sample_is_a_plain_call(parallel: Parallel) -> None:
    net = parallel(Seen(), 4)
    x = torch.randn(1, 2, requires_grad=True)
    assert "_Seen" in type(net(x).grad_fn).__name__
    assert net.forwards == ["MainThread"]


def test_samples_that_belong_together_stay_in_one_shard(parallel: Parallel) -> None:
    inner = Function(lambda x: torch.tensor(float(len(x))))
    inner.samples_per_group = 2
    assert parallel(inner)(torch.zeros(6, 1)).tolist() == [4.0, 2.0]


def test_samples_may_be_along_the_modules_batch_dim(parallel: Parallel) -> None:
    inner = nn.LSTM(2, 3)
    inner.batch_dim = 1
    x = torch.randn(4, 5, 2, requires_grad=True)
    (found, state), (expected, expected_state) = parallel(inner)(x), inner(x)
    torch.testing.assert_close((found, state), (expected, expected_state))
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_arguments_that_disagree_are_named(parallel: Parallel) -> None:
    with pytest.raises(
        ValueError, match=r'batch\[0\] has 4 samples, but batch\["y"\] has 5'
    ) as found:
        parallel(Function(lambda x, y: x))(torch.zeros(4), y=torch.zeros(5))
    assert "DataParallel(Function)" in found.value.__notes__[0]


def test_a_call_without_arguments_is_a_plain_one(parallel: Parallel) -> None:
    assert parallel(Function(lambda: 3))() == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_reach_every_shard(parallel: Parallel, mode) -> None:
    found = []

    def forward(x: Tensor) -> Tensor:
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return net(x)

    net = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    with mode():
        out = parallel(Function(forward))(x)
        assert found == [(False, torch.is_inference_mode_enabled())] * 2
    assert not out.requires_grad
    assert out.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(out, net(x).detach())


def test_autocast_reaches_every_shard(parallel: Parallel) -> None:
    found = []

    def forward(x: Tensor) -> Tensor:
        out = net(x)
        found.append(out.dtype)
        return out

    net = nn.Linear(3, 2).float()
    wrapped = parallel(Function(forward))
    x = torch.randn(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = wrapped(x), net(x)
    assert found == [torch.bfloat16] * 2
    assert torch.equal(out, expected)
    gradients = [
        torch.autograd.grad(y.float().square().sum(), net.weight)[0] for y in (out, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


def test_a_device_context_reaches_every_shard(parallel: Parallel) -> None:
    net = parallel(Function(lambda x: torch.zeros(len(x)).device.type))
    with torch.device("meta"):
        assert net(torch.zeros(4, device="cpu")) == "meta"


def test_the_modules_mode_is_that_of_its_replicas(parallel: Parallel) -> None:
    net = parallel(nn.Sequential(nn.Dropout(0.5)))
    x = torch.ones(6, 50)
    assert (net(x) == 0).any()
    net.eval()
    assert not net.module.training
    assert torch.equal(net(x), x)


def test_running_statistics_are_the_weighted_mean_of_the_shards(parallel: Parallel) -> None:
    net = parallel(nn.BatchNorm1d(2, momentum=0.25))
    x = torch.randn(7, 2)
    net(x)
    means = x[:4].mean(0) * 4 / 7 + x[4:].mean(0) * 3 / 7
    torch.testing.assert_close(net.running_mean, 0.25 * means, rtol=1e-13, atol=1e-13)
    assert int(net.num_batches_tracked) == 1


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += x.max()
        return x + self.count


def test_a_buffer_that_all_shards_write_alike_is_taken_over(parallel: Parallel) -> None:
    net = parallel(Counter())
    net(torch.ones(4))
    assert net(torch.ones(4)).tolist() == [3.0] * 4
    assert float(net.count) == 2


def test_a_buffer_that_shards_write_differently_is_an_error(parallel: Parallel) -> None:
    net = parallel(Counter())
    with pytest.raises(ValueError, match="count"):
        net(torch.arange(4.0))
    assert float(net.count) == 0
    assert net(torch.ones(4)).tolist() == [2.0] * 4


def test_dropout_repeats_after_manual_seed_and_differs_between_calls_and_shards(
    parallel: Parallel,
) -> None:
    net = parallel(nn.Dropout(0.5), 3)
    x = torch.ones(6, 40)

    def two() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return net(x), net(x)

    first, again = two(), two()
    assert all(map(torch.equal, first, again))
    assert not torch.equal(*first)
    assert len({tuple(rows.flatten().tolist()) for rows in first[0].split(2)}) == 3


def test_a_module_without_draws_leaves_the_default_generator_alone(parallel: Parallel) -> None:
    net = parallel(nn.Linear(3, 3))
    state = torch.get_rng_state()
    net(torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), state)
    parallel(nn.Dropout())(torch.ones(4, 3))
    assert not torch.equal(torch.get_rng_state(), state)


def test_an_error_is_the_users_own_with_a_note_of_the_shard(parallel: Parallel) -> None:
    def forward(x: Tensor) -> Tensor:
        if 5 in x:
            raise KeyError("my own")
        return x

    net = parallel(Function(forward), 3)
    with pytest.raises(KeyError, match="my own") as found:
        net(torch.arange(6))
    (note,) = found.value.__notes__
    assert note == "shard 2 of 3 (thread composefit-lane-2), forward of DataParallel(Function)"
    assert found.traceback[-1].name == "forward"
    assert net(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_of_several_errors_the_first_shards_is_raised(parallel: Parallel) -> None:
    def forward(x: Tensor) -> Tensor:
        raise ValueError(f"sample {int(x[0])}")

    net = parallel(Function(forward), 4)
    for _ in range(5):
        with pytest.raises(ValueError, match="sample 0"):
            net(torch.arange(4))


# -- transparency ----------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_names_and_keys_are_those_of_the_module(parallel: Parallel) -> None:
    net = network()
    wrapped = parallel(net)
    assert list(wrapped.state_dict()) == list(net.state_dict())
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert dict(getattr(wrapped, names)()) == dict(getattr(net, names)())
    assert wrapped.get_parameter("0.weight") is net[0].weight


def test_a_plain_checkpoint_loads_into_the_wrapper_and_back(parallel: Parallel) -> None:
    source, target = network(), network()
    wrapped = parallel(target)
    wrapped.load_state_dict(source.state_dict())
    assert torch.equal(target[0].weight, source[0].weight)
    network().load_state_dict(wrapped.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        wrapped.load_state_dict({})


def test_a_wrapper_inside_another_module_is_transparent_too(parallel: Parallel) -> None:
    plain = nn.ModuleDict({"net": network(), "head": nn.Linear(3, 1)})
    holder = nn.ModuleDict({"net": parallel(network()), "head": nn.Linear(3, 1)})
    assert list(holder.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in holder.named_parameters()] == [n for n, _ in plain.named_parameters()]
    holder.load_state_dict(plain.state_dict())
    assert torch.equal(holder["net"].module[0].weight, plain["net"][0].weight)


def test_attributes_and_methods_are_the_modules(parallel: Parallel) -> None:
    net = network()
    net.scale, net.double_it = 2, lambda x: 2 * x
    wrapped = parallel(net)
    assert wrapped.scale == 2
    assert wrapped.double_it(4) == 8
    wrapped.scale = 5
    assert net.scale == 5
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
        _ = wrapped.nothing


def test_setting_an_attribute_reaches_the_replicas(parallel: Parallel) -> None:
    inner = Function(lambda x: x * inner.factor)
    inner.factor = 1.0
    wrapped = parallel(inner)
    wrapped(torch.ones(2))
    wrapped.factor = 3.0
    assert wrapped(torch.ones(2)).tolist() == [3.0, 3.0]


def test_conversion_and_freezing_reach_the_module(parallel: Parallel) -> None:
    net = network()
    wrapped = parallel(net).float()
    assert net[0].weight.dtype is torch.float32
    wrapped.requires_grad_(False)
    assert not wrapped(torch.ones(4, 2, dtype=torch.float32)).requires_grad


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_wrapper_of_its_own(parallel: Parallel, copied) -> None:
    wrapped = parallel(nn.Sequential(nn.Linear(2, 2), Seen()))
    x = torch.randn(4, 2)
    expected = wrapped(x)
    twin = copied(wrapped)
    assert torch.equal(twin(x), expected)
    assert len(twin.module[1].forwards) == 4  # two of the original, copied, and its own
    twin(x).sum().backward()
    assert twin.module[0].weight.grad is not None
    assert wrapped.module[0].weight.grad is None
    twin.close()


def test_hooks_on_the_wrapper_see_the_whole_batch(parallel: Parallel) -> None:
    wrapped, seen = parallel(nn.Identity()), []
    wrapped.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    wrapped(torch.zeros(6, 1))
    assert seen == [6]


def test_another_module_may_take_the_place_of_the_wrapped_one(parallel: Parallel) -> None:
    wrapped = parallel(nn.Linear(2, 2))
    wrapped(torch.ones(4, 2))
    wrapped.module = nn.Linear(2, 5)
    assert torch.equal(wrapped(torch.ones(4, 2)), wrapped.module(torch.ones(4, 2)))


# -- inside other things ---------------------------------------------------------------------------


def test_a_wrapper_inside_a_wrapped_module_runs_as_a_part_of_its_shard(parallel: Parallel) -> None:
    seen = Seen()
    wrapped = parallel(nn.Sequential(parallel(seen)))
    x = torch.randn(6, 1)
    assert torch.equal(wrapped(x), x)
    assert len(seen.forwards) == 2


WRAPPED: list[DataParallel] = []


class Again(nn.Module):
    """Calls the wrapper that it is in, by a way that a replica cannot see."""

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return WRAPPED[-1](x + 1, depth - 1) if depth else x


def test_a_forward_may_call_its_own_wrapper(parallel: Parallel) -> None:
    WRAPPED.append(parallel(Again()))
    assert WRAPPED[-1](torch.zeros(4), 3).tolist() == [3.0] * 4
    WRAPPED.clear()


def test_a_wrapper_in_a_strategys_shards_runs_as_a_part_of_them(parallel: Parallel) -> None:
    seen = Seen()
    wrapped = parallel(nn.Sequential(seen, nn.Linear(1, 1)))
    strategy = ThreadDataParallel(2)
    x = torch.randn(6, 1)
    loss, found = strategy.gradient(lambda net, x: net(x).square().mean(), wrapped, x)
    assert len(seen.forwards) == 2
    expected = wrapped.module(x).square().mean()
    torch.testing.assert_close(loss, expected.detach())
    for a, b in zip(found, torch.autograd.grad(expected, wrapped.parameters()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrapper_in_a_strategys_only_shard_runs_in_parallel(parallel: Parallel) -> None:
    seen = Seen()
    net = nn.Sequential(parallel(nn.Sequential(nn.Linear(1, 2), seen)), nn.Linear(2, 1))
    x = torch.randn(6, 1)
    _, found = SingleDevice("cpu").gradient(lambda net, x: net(x).square().mean(), net, x)
    assert len(set(seen.forwards)) == len(set(seen.backwards)) == 2
    expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_shards_of_a_strategy_may_share_a_wrapper_that_is_not_theirs(parallel: Parallel) -> None:
    net, feature = nn.Linear(3, 1), parallel(nn.Linear(2, 3))
    x = torch.randn(12, 2)
    with ThreadDataParallel(3) as strategy:
        for _ in range(5):
            loss, _ = strategy.gradient(lambda net, x: net(feature(x)).mean(), net, x)
            torch.testing.assert_close(loss, net(feature.module(x)).mean().detach())


def test_a_strategy_may_take_the_place_of_threads(parallel: Parallel) -> None:
    seen = Seen()
    net = DataParallel(seen, strategy=SingleDevice("cpu", shards=3))
    net(torch.zeros(6, 1))
    assert seen.forwards == ["MainThread"] * 3


def test_wrong_arguments_are_errors_that_say_so() -> None:
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got function"):
        DataParallel(lambda x: x)
    with pytest.raises(ValueError, match=r"threads=.* expects a positive number, got 0"):
        DataParallel(nn.Identity(), 0)
    with pytest.raises(ValueError, match="either threads or a strategy, got both"):
        DataParallel(nn.Identity(), 2, strategy=SingleDevice("cpu"))
