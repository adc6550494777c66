"""The right cause is named, first, with the line that does it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Gradient, Grads, LoopModule, Mean, SingleDevice, Step, ThreadDataParallel
from composefit.check import CheckReport
from composefit.trainer import Trainer
from tests.check.wrong import WRONG, Advantages, KeepsState, Net, TokenMean, labelled, texts


def checked(module: LoopModule, batch: Any, strategy: Any = None) -> CheckReport:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(strategy=strategy or SingleDevice("cpu"), logger=False, **quiet)
    return trainer.check(module, batch, show=False)


def line(where: str) -> str:
    file, _, number = where.rpartition(":")
    return Path(file).read_text("utf-8").splitlines()[int(number) - 1]


@pytest.mark.parametrize("name", WRONG)
def test_cause_is_named_with_its_line(name: str) -> None:
    make, batch, cause, text = WRONG[name]
    report = checked(make(), batch())
    found = next(iter(report.optimizers.values()))
    assert not report.ok
    assert found.difference is not None
    assert found.difference > 1e-3
    assert found.causes[0].name == cause
    assert found.causes[0].instead
    assert found.causes[0].where is not None
    assert text in line(found.causes[0].where)


@pytest.mark.parametrize("name", ["ignore_index", "BatchNorm", "buffer", "Python's draw", "VICReg"])
def test_the_same_is_named_where_shards_run_side_by_side(name: str) -> None:
    make, batch, cause, _ = WRONG[name]
    report = checked(make(), batch(), ThreadDataParallel(2))
    assert "2 threads" in report.shards
    assert next(iter(report.optimizers.values())).causes[0].name == cause


def test_state_that_a_step_hands_on_is_found_though_gradients_agree() -> None:
    report = checked(KeepsState(), labelled())
    assert report.optimizers["optimizer"].difference == pytest.approx(0, abs=1e-12)
    (cause,) = report.state
    assert cause.name == "Python state written in the step"
    assert cause.module == "memory"
    assert cause.where is not None
    assert "self.state = after.detach()" in line(cause.where)
    assert not report.ok


class KeepsLast(Net):
    """What is stored and never read is nobody's harm."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.net.register_forward_hook(self.keep)

    def keep(self, net: nn.Module, given: Any, out: Tensor) -> None:
        self.seen.append(out)
        vars(self.net)["last"] = out

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def test_what_is_stored_for_later_use_is_no_cause() -> None:
    assert checked(KeepsLast(), labelled()).ok


class OneOfTwo(LoopModule):
    """One optimizer's loss is right, the other's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.actor, self.critic = nn.Linear(8, 4), nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor]) -> Step:
        x, action = batch
        h = self.encoder(x).tanh()
        value = self.critic(h)[:, 0]
        yield {"critic": F.mse_loss(value, x[:, 0])}
        gain = x[:, 0] - self.critic(self.encoder(x).tanh())[:, 0].detach()
        gain = gain - gain.mean()
        losses = F.cross_entropy(self.actor(h.detach()), action, reduction="none")
        yield {"actor": (losses * gain).mean()}

    def configure_optimizers(self) -> Any:
        return {
            "critic": SGD([*self.encoder.parameters(), *self.critic.parameters()], lr=0.1),
            "actor": SGD(self.actor.parameters(), lr=0.1),
        }


def test_only_the_optimizer_that_differs_has_a_cause() -> None:
    report = checked(OneOfTwo(), labelled())
    assert report.optimizers["critic"].causes == []
    assert report.optimizers["critic"].difference == pytest.approx(0, abs=1e-12)
    assert report.optimizers["actor"].causes[0].name == "minibatch statistics"
    assert report.optimizers["actor"].parameter in ("actor.weight", "actor.bias")


class TwoFaults(LoopModule):
    """Each optimizer's loss is wrong in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def training_step(self, batch: list[Tensor]) -> Step:
        x, y = batch
        yield {"first": F.cross_entropy(self.first(x), y, ignore_index=0)}
        yield {"second": F.mse_loss(self.second(x), x[:, :4]).sqrt()}

    def configure_optimizers(self) -> Any:
        both = {"first": self.first, "second": self.second}
        return {name: SGD(net.parameters(), lr=0.1) for name, net in both.items()}


def test_a_cause_belongs_to_the_optimizers_whose_loss_depends_on_it() -> None:
    report = checked(TwoFaults(), labelled())
    assert [cause.name for cause in report.optimizers["first"].causes] == ["token mean"]
    assert [cause.name for cause in report.optimizers["second"].causes] == ["RMSE"]


class Repaired(TokenMean):
    def training_step(self, batch: Tensor) -> Any:
        loss = super().training_step(batch)
        return Mean.of(loss, (batch[:, 1:] != 0).sum())


def test_a_mean_of_a_library_with_its_weight_is_right() -> None:
    assert checked(Repaired(), texts()).ok


class OneOfThree(Repaired):
    """A right mean over tokens, a right draw for all shards, and a root."""

    def training_step(self, batch: Tensor) -> Any:
        keep = self.random.shared.bernoulli(1, 12, p=0.5)
        root = (self.embedding(batch) * keep).square().mean().sqrt()
        return super().training_step(batch) + root


def test_what_is_right_is_no_cause_of_what_is_wrong_beside_it() -> None:
    report = checked(OneOfThree(), texts())
    assert [cause.name for cause in report.optimizers["optimizer"].causes] == ["RMSE"]


class RepairedAdvantages(Net):
    def training_step(self, batch: list[Tensor]) -> Step:
        x, action = batch
        n, advantage = len(x), x[:, 0]
        advantage = advantage - (yield from Mean(advantage.sum(), n))
        variance = yield from Mean(advantage.square().sum(), n)
        chosen = self.net(x).log_softmax(1).gather(1, action[:, None])[:, 0]
        yield -(chosen * advantage / variance.sqrt()).mean()


def test_what_the_report_says_instead_is_right() -> None:
    assert not checked(Advantages(), labelled()).ok
    assert checked(RepairedAdvantages(), labelled()).ok


class Surgery(Net):
    """Gradients by hand, of a loss that is wrong."""

    def training_step(self, batch: list[Tensor]) -> Step:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y, ignore_index=0)
        found = yield from Gradient({"loss": loss}, wrt=self.net.parameters())
        yield Grads(found["loss"], loss=loss)


def test_gradients_by_hand_have_the_cause_of_the_losses_they_were_made_of() -> None:
    report = checked(Surgery(), labelled())
    assert [cause.name for cause in report.optimizers["optimizer"].causes] == ["token mean"]


class FunctionOfTokens(Net):
    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return lambda: F.cross_entropy(self.net(x), y, ignore_index=0)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def test_a_loss_that_is_a_function_has_causes_too() -> None:
    report = checked(FunctionOfTokens(), labelled())
    assert [cause.name for cause in report.optimizers["optimizer"].causes] == ["token mean"]


class Mysterious(Net):
    """Depends on the number of samples, by no operation."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y) * (2 - 1 / len(x))


def test_what_is_not_recognised_is_said_to_be_unknown() -> None:
    report = checked(Mysterious(), labelled())
    assert [cause.name for cause in report.optimizers["optimizer"].causes] == ["unknown"]


class UnlikeSizes(TokenMean):
    """Sequences with time first, and a label for each."""

    def training_step(self, batch: list[Tensor]) -> Any:
        sequences, labels = batch
        return F.cross_entropy(self.head(sequences.mean(0)), labels)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)


def test_a_batch_whose_sizes_disagree_may_have_time_first() -> None:
    batch = [torch.randn(11, 14, 6), torch.randint(4, (14,))]
    report = checked(UnlikeSizes(), batch)
    assert report.optimizers["optimizer"].causes[0].name == "time-first batch"
    assert "11 samples" in report.optimizers["optimizer"].causes[0].detail


class Pairs(Net):
    def training_step(self, batch: dict[str, Tensor]) -> Any:
        return self.net(torch.cat([x.flatten(1) for x in batch.values()])).square().mean()


def test_a_batch_of_unlike_sizes_is_named_as_what_cannot_be_cut() -> None:
    report = checked(Pairs(), {"x": torch.randn(5, 6), "y": torch.randn(7, 3, 2)})
    assert report.optimizers["optimizer"].causes[0].name == "batch that cannot be cut"
