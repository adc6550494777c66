"""What a plan says, compared with what the step says and with numbers worked out by hand."""

import inspect
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from composefit import (
    Distributed,
    Gather,
    LoopModule,
    OptimizerConfig,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
    Trainer,
)
from composefit.explain import Plan
from tests.explain.steps import GAN, Contrastive, Everything, Plain

FLOAT = 4  # bytes


def plan_of(module: LoopModule, samples: int, strategy: Strategy, **arguments: Any) -> Plan:
    trainer = Trainer(strategy=strategy, seed=0, **arguments)
    return trainer.explain(module, torch.randn(samples, 3), show=False)


def single(shards: int = 1) -> SingleDevice:
    return SingleDevice("cpu", shards=shards)


def lines_of(kind: type[LoopModule], method: str, *words: str) -> list[int]:
    """Where these words stand in a method's source."""
    lines, first = inspect.getsourcelines(getattr(kind, method))
    return [first + next(i for i, line in enumerate(lines) if word in line) for word in words]


# -- effects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [single(), single(3), ThreadDataParallel(2)])
def test_effects_come_in_the_order_of_the_step_with_its_lines(strategy: Strategy) -> None:
    plan = plan_of(Everything(), 7, strategy)
    assert [b.effect for b in plan.barriers] == ["Reduce", "Once", "Gradient", "Update"]
    assert [b.label for b in plan.barriers] == ["Mean", "Once move", "Gradient size", "optimizer"]
    assert {b.file for b in plan.barriers} == {inspect.getsourcefile(Everything)}
    # A helper's yield is where it is written; a loss that is returned stands at its function.
    (reduced,) = lines_of(Everything, "measured", "yield from Mean")
    once, gradient, step = lines_of(Everything, "training_step", "Once", "Gradient", "def ")
    assert [b.line for b in plan.barriers] == [reduced, once, gradient, step]
    assert [b.returned for b in plan.barriers] == [False, False, False, True]


def test_a_returned_loss_is_the_update_of_its_function() -> None:
    (barrier,) = plan_of(Plain(), 4, single()).barriers
    assert (barrier.effect, barrier.label, barrier.returned) == ("Update", "optimizer", True)
    assert [barrier.line] == lines_of(Plain, "training_step", "def training_step")


def test_a_step_without_an_update_has_no_effect() -> None:
    class Nothing(Plain):
        def training_step(self, batch: Tensor) -> None:  # type: ignore[override]
            return None

    plan = plan_of(Nothing(), 4, single())
    assert plan.barriers == ()
    assert "none: the step returned without an update" in str(plan)


def test_the_step_is_that_of_the_number_asked_for() -> None:
    class Alternating(GAN):
        def training_step(self, batch: Tensor) -> Any:
            name = "generator" if self.global_step % 5 == 4 else "critic"
            yield {name: self.critic(self.generator(batch[:, :2])).mean()}

    trainer = Trainer(strategy=single(), seed=0)
    labels = [
        trainer.explain(Alternating(), torch.randn(4, 3), step=step, show=False).barriers[0].label
        for step in (0, 3, 4, 9)
    ]
    assert labels == ["critic", "critic", "generator", "generator"]


def test_of_a_trained_module_it_is_the_step_that_comes_next() -> None:
    module, trainer = Plain(), Trainer(strategy=single(), max_epochs=1, logger=False)
    trainer.fit(module, [torch.randn(4, 3) for _ in range(3)])
    assert trainer.explain(module, torch.randn(4, 3), show=False).step == 3
    assert trainer.explain(Plain(), torch.randn(4, 3), show=False).step == 0


# -- what is updated -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [single(), single(3), ThreadDataParallel(2)])
def test_updates_tell_parameters_and_which_of_them_get_a_gradient(strategy: Strategy) -> None:
    critic, generator = (b.taken[0] for b in plan_of(GAN(), 7, strategy).barriers)
    assert (critic.name, critic.kind, critic.parameters, critic.reached) == ("critic", "SGD", 2, 2)
    assert critic.numbers == 3 + 1 and critic.bytes == critic.gradient_bytes == 4 * FLOAT
    assert (generator.kind, generator.parameters, generator.reached) == ("Adam", 3, 2)
    assert generator.numbers == 6 + 3 + 5
    assert (generator.bytes, generator.gradient_bytes) == (14 * FLOAT, 9 * FLOAT)
    assert critic.loss == generator.loss == "sample mean"


def test_clipping_is_each_optimizers_own() -> None:
    class Clipped(GAN):
        def configure_optimizers(self) -> dict[str, Any]:
            found: dict[str, Any] = dict(super().configure_optimizers())
            found["critic"] = OptimizerConfig(
                found["critic"], gradient_clip_val=0.5, gradient_clip_algorithm="value"
            )
            return found

    plan = plan_of(Clipped(), 6, single(), gradient_clip_val=2.0)
    assert [b.taken[0].clipping for b in plan.barriers] == ["value 0.5", "norm 2"]


def test_a_loss_that_is_a_function_tells_how_often_it_was_evaluated() -> None:
    class Newton(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3, max_eval=100)

        def training_step(self, batch: Tensor) -> Any:
            self.calls += 1
            return super().training_step(batch)

        calls = 0

    module = Newton()
    (barrier,) = plan_of(module, 6, single()).barriers
    counted = Trainer(strategy=single(), logger=False)
    counted.step(module, [torch.randn(6, 3)])
    assert barrier.taken[0].evaluations == module.calls > 1


def test_a_sparse_gradient_counts_its_numbers_and_their_places() -> None:
    class Embedding(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Embedding(10, 2, sparse=True)

        def training_step(self, batch: Tensor) -> Tensor:
            adjacency = torch.eye(len(batch)).to_sparse()
            rows = torch.sparse.mm(
                adjacency, self.net(torch.arange(3).repeat(len(batch), 1)).sum(1)
            )
            return rows.square().mean()

    (taken,) = plan_of(Embedding(), 2, single()).barriers[0].taken
    assert (taken.reached, taken.bytes) == (1, 20 * FLOAT)
    assert 3 * (2 * FLOAT + 8) <= taken.gradient_bytes <= 6 * (2 * FLOAT + 8)


def test_what_hooks_set_up_before_a_training_is_there() -> None:
    class Late(Plain):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = nn.Linear(3, 2)

        def on_fit_start(self) -> None:
            self.factor = 2.0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seen = batch.shape

        def training_step(self, batch: Tensor) -> Tensor:
            assert self.seen == (4, 3) and self.trainer is not None
            assert self.trainer.optimizers["optimizer"].parameters()
            return self.factor * self.net(batch).square().mean()

    module = Late()
    assert plan_of(module, 4, single()).barriers[0].taken[0].numbers == 8
    assert not hasattr(module, "net") and not hasattr(module, "factor")


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("strategy", [single(), single(3), ThreadDataParallel(2)])
def test_samples_of_the_shards_add_up_to_each_batch(strategy: Strategy, accumulate: int) -> None:
    plan = plan_of(GAN(), 8, strategy, accumulate_grad_batches=accumulate)
    assert len(plan.parts) == accumulate * strategy.lanes
    for batch in range(accumulate):
        assert sum(p.samples or 0 for p in plan.parts if p.batch == batch) == 8
    assert plan.lanes == strategy.lanes
    assert {part.lane for part in plan.parts} == set(range(strategy.lanes))


def test_micro_batches_follow_one_another_in_their_lane() -> None:
    plan = plan_of(GAN(), 10, ThreadDataParallel(2), microbatch_size=2)
    assert [p.samples for p in plan.of_lane(0)] == [2, 2, 1]
    assert [p.samples for p in plan.of_lane(1)] == [2, 2, 1]


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Plain, GAN, Contrastive, Everything])
@pytest.mark.parametrize("strategy", [single(), single(3), ThreadDataParallel(2)])
def test_what_shards_do_does_not_overlap_in_a_lane(
    module: type[LoopModule], strategy: Strategy
) -> None:
    plan = plan_of(module(), 8, strategy, accumulate_grad_batches=2)
    for lane in range(plan.lanes):
        spans = [span for span in plan.spans if span.lane == lane]
        assert spans[0].start >= plan.ready or lane
        assert all(span.start <= span.end for span in spans)
        for before, after in pairwise(spans):
            assert before.end <= after.start
        assert 0 < spans[-1].end <= plan.duration
        assert 0 <= plan.waiting(lane) < plan.duration


@pytest.mark.parametrize("strategy", [single(), single(3), ThreadDataParallel(2)])
def test_no_shard_goes_on_before_all_have_arrived(strategy: Strategy) -> None:
    plan = plan_of(Everything(), 8, strategy)
    ends = 0.0
    for i, barrier in enumerate(plan.barriers):
        arriving = [s for s in plan.spans if s.leads_to == i and s.kind == "forward"]
        assert {s.shard for s in arriving} == {part.index for part in plan.parts}
        assert max(s.end for s in arriving) <= barrier.start <= barrier.end
        assert min(s.start for s in arriving) >= ends
        ends = barrier.end
    assert ends <= plan.duration


def test_gradients_are_taken_at_the_yield_but_after_a_gather_at_the_barrier() -> None:
    plan = plan_of(GAN(), 8, single(2))
    taken = [s for s in plan.spans if s.kind == "backward"]
    assert len(taken) == 2 * 2
    assert all(s.end <= plan.barriers[s.leads_to].start for s in taken)
    plan = plan_of(Contrastive(), 8, single(2))
    taken = [s for s in plan.spans if s.kind == "backward"]
    assert {s.leads_to for s in taken} == {1}
    barrier = plan.barriers[1]
    assert all(barrier.start <= s.start and s.end <= barrier.end for s in taken)


# -- memory ----------------------------------------------------------------------------------------


def test_kept_are_the_steps_own_tensors_and_not_the_batch() -> None:
    plan = plan_of(GAN(), 8, single(2), accumulate_grad_batches=2)
    fake = 2 * 8 * 3 * FLOAT  # in all shards of both batches
    assert [[(k.name, k.bytes) for k in b.kept] for b in plan.barriers] == [[("fake", fake)]] * 2


def test_what_a_helper_keeps_counts_and_what_has_two_names_once() -> None:
    first, *_, last = plan_of(Everything(), 8, single()).barriers
    assert {k.name: k.bytes for k in first.kept} == {"y": 8 * FLOAT, "inner": 8 * 3 * FLOAT}
    assert last.kept == ()  # a step that has returned keeps nothing
    gathered = plan_of(Contrastive(), 8, single(2)).barriers[1]
    assert {k.name: k.bytes for k in gathered.kept} == {
        "z": 8 * 4 * FLOAT,
        "everything": 8 * 4 * FLOAT,  # the shards share it
    }


def test_memory_between_steps_is_parameters_buffers_and_optimizers_state() -> None:
    plan = plan_of(GAN(), 8, single())
    parameters, adam = 4 + 14, 2 * 9 + 2  # two moments and a count of steps for each reached
    assert plan.resident == (parameters + adam) * FLOAT


def test_what_is_alive_at_a_yield_holds_what_is_kept_and_the_peak_no_less() -> None:
    plan = plan_of(GAN(), 50, single(2))
    first = plan.barriers[0]
    assert first.held is not None and plan.peak is not None
    assert sum(k.bytes for k in first.kept) <= first.held <= plan.peak


# -- between ranks ---------------------------------------------------------------------------------


def test_one_process_sends_nothing() -> None:
    assert plan_of(GAN(), 8, ThreadDataParallel(2)).crosses == 0


def test_ranks_send_the_gradients_that_exist_in_a_ring() -> None:
    plan = plan_of(GAN(), 8, Distributed(4, "cpu"))
    assert plan.ranks == 4 and sum(p.samples or 0 for p in plan.parts) == 8 // 4
    critic, generator = plan.barriers
    assert critic.crosses == 2 * 3 * (4 * FLOAT) // 4
    assert generator.crosses == 2 * 3 * (9 * FLOAT) // 4  # not the unused parameter's
    assert plan.crosses == critic.crosses + generator.crosses
    assert "rank 0 of 4" in plan.notes[0]


def test_in_a_job_its_size_counts_and_nobody_waits_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**job, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(strategy=Distributed(accelerator="cpu"), seed=0)
    plan = trainer.explain(GAN(), torch.randn(8, 3))
    assert plan.ranks == 4 and [part.samples for part in plan.parts] == [2]
    assert capsys.readouterr().out == ""  # rank 0 alone prints


def test_gathered_rows_cross_there_and_their_gradients_back() -> None:
    plan = plan_of(Contrastive(), 8, Distributed(2, "cpu"))
    gather, update = plan.barriers
    rows = 8 * 4 * FLOAT  # of all ranks
    assert gather.crosses == rows // 2
    weights = (3 * 4 + 4) * FLOAT
    assert update.crosses == weights + rows  # 2 (n - 1) / n of both
    inner = SingleDevice("cpu", shards=2)
    plan = plan_of(Contrastive(), 8, Distributed(2, "cpu", per_process=inner))
    assert [b.crosses for b in plan.barriers] == [rows // 2, weights + rows]


def test_labels_that_are_gathered_have_no_gradient_to_send_back() -> None:
    class Labelled(Contrastive):
        def training_step(self, batch: Tensor) -> Any:
            everything, _ = yield from Gather(batch)
            yield (self.encoder(batch).mean() - everything.mean()).square()

    gather, update = plan_of(Labelled(), 8, Distributed(2, "cpu")).barriers
    assert gather.crosses == 8 * 3 * FLOAT // 2
    assert update.crosses == (3 * 4 + 4) * FLOAT


def test_a_loss_that_is_a_function_sends_its_gradients_at_every_evaluation() -> None:
    class Newton(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    (barrier,) = plan_of(Newton(), 8, Distributed(2, "cpu")).barriers
    (taken,) = barrier.taken
    assert taken.crosses == taken.evaluations * (2 * 3 + 2) * FLOAT


def test_sharded_ranks_scatter_gradients_and_gather_weights() -> None:
    from composefit.strategies.fully_sharded import FullySharded

    plan = plan_of(GAN(), 8, FullySharded(2, accelerator="cpu"))
    critic, generator = plan.barriers
    assert critic.crosses == (4 + 4) * FLOAT // 2
    assert generator.crosses == (9 + 14) * FLOAT // 2
    assert any("keeps its part" in note for note in plan.notes)


# -- what it prints --------------------------------------------------------------------------------


def test_layers_that_couple_samples_are_named() -> None:
    (found,) = plan_of(Everything(), 8, single()).coupling
    assert (found.name, found.kind) == ("net.1", "BatchNorm1d")
    assert plan_of(GAN(), 8, single()).coupling == ()


def test_operations_between_samples_are_named_with_their_line_or_layer() -> None:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / (x.std(0) + 1)

    class Coupled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Normalised()

        def training_step(self, batch: Tensor) -> Any:
            z = self.net(self.layer(batch))
            return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    found = plan_of(Coupled(), 11, single()).coupling
    assert ("layer", "Normalised") in [(one.name, one.kind) for one in found]
    (line,) = lines_of(Coupled, "training_step", "cross_entropy")
    (compared,) = (one for one in found if "compares" in one.why)
    assert (compared.name, compared.kind) == ("", f"test_plan.py:{line}")


def test_what_is_gathered_does_not_couple_the_samples_of_a_shard() -> None:
    assert plan_of(Contrastive(), 11, single()).coupling == ()


def test_it_prints_what_it_has_found(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        strategy=ThreadDataParallel(2), accumulate_grad_batches=2, gradient_clip_val=1.0, seed=0
    )
    plan = trainer.explain(GAN(), torch.randn(8, 3))
    printed = capsys.readouterr().out
    assert printed.strip() == str(plan).strip()
    line = lines_of(GAN, "training_step", '"critic"')[0]
    for words in (
        "GAN: one step in",
        "ThreadDataParallel, 8 = 2 threads x 4",
        "4 = 2 in space x 2 in time, 4 samples each",
        "2 loader batches",
        "norm 1",
        f"steps.py:{line}",
        "critic (SGD)",
        "2 of 3",
        "fake 192 B",
        "only through effects",
    ):
        assert words in printed, words


def test_many_effects_of_one_line_are_one_row() -> None:
    class Long(GAN):
        def training_step(self, batch: Tensor) -> Any:
            for _ in range(30):
                yield {"critic": self.critic(batch).mean()}

    text = str(plan_of(Long(), 4, single()))
    assert text.count("critic (SGD)") == 1
    assert "30 times" in text


def test_a_table_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(plan_of(GAN(), 8, single()))
    assert "critic" in console.file.getvalue()  # type: ignore[attr-defined]
