from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import Trainer
from composefit.callbacks import PredictionWriter
from tests.callbacks.fake import Pair, SteppedTrainer, batches


def predict(trainer: SteppedTrainer, loaders: list[list[Any]], step: Any) -> None:
    trainer.stage = "predict"
    trainer.call("on_predict_start")
    for index, loader in enumerate(loaders):
        for i, batch in enumerate(loader):
            trainer.call("on_predict_batch_end", step(batch), batch, i, index)
    trainer.call("on_predict_epoch_end")


def double(batch: Tensor) -> Tensor:
    return batch * 2


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)["predictions"]


def test_each_batch_is_written_as_it_comes(tmp_path):
    batches = [torch.arange(3.0), torch.arange(2.0)]
    predict(SteppedTrainer(tmp_path, PredictionWriter(tmp_path / "out")), [batches], double)
    names = ["predictions-0-000000.pt", "predictions-0-000001.pt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name, batch in zip(names, batches, strict=True):
        assert torch.equal(load(tmp_path / "out" / name), 2 * batch)


def test_all_are_written_at_the_end(tmp_path):
    writer = PredictionWriter(tmp_path, "epoch")
    trainer = SteppedTrainer(tmp_path, writer)
    predict(trainer, [[torch.zeros(2), torch.ones(1)]], double)
    assert [x.tolist() for x in load(tmp_path / "predictions.pt")] == [[0.0, 0.0], [2.0]]
    # A second run knows nothing of the first.
    predict(trainer, [[torch.ones(1)]], double)
    assert [x.tolist() for x in load(tmp_path / "predictions.pt")] == [[2.0]]


def test_several_loaders_are_told_apart(tmp_path):
    writer = PredictionWriter(tmp_path, "batch_and_epoch")
    predict(SteppedTrainer(tmp_path, writer), [[torch.zeros(1)], [torch.ones(1)]], double)
    assert load(tmp_path / "predictions-1-000000.pt").tolist() == [2.0]
    assert [[x.tolist() for x in one] for one in load(tmp_path / "predictions.pt")] == [
        [[0.0]],
        [[2.0]],
    ]


def test_an_override_is_told_where_the_samples_are(tmp_path):
    seen = []

    class Mine(PredictionWriter):
        def write_on_batch_end(
            self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx
        ):
            seen.append((batch_indices, batch_idx, dataloader_idx))

        def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
            seen.append((len(predictions), batch_indices))

    trainer = SteppedTrainer(tmp_path, Mine(tmp_path, "batch_and_epoch"))
    predict(trainer, [[torch.zeros(2), torch.zeros(1)]], double)
    assert seen == [([0, 1], 0, 0), ([2], 1, 0), (2, [[0, 1], [2]])]
    assert list(tmp_path.iterdir()) == []


def test_batches_that_do_not_tell_their_size_have_no_places(tmp_path):
    seen = []

    class Mine(PredictionWriter):
        def write_on_batch_end(
            self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx
        ):
            seen.append(batch_indices)

    trainer = SteppedTrainer(tmp_path, Mine(tmp_path))
    predict(trainer, [[3, torch.zeros(2)]], lambda batch: None)
    assert seen == [None, None]


def test_a_part_of_a_large_tensor_is_written_without_the_rest(tmp_path):
    writer = PredictionWriter(tmp_path)
    predict(SteppedTrainer(tmp_path, writer), [[torch.zeros(500_000)]], lambda batch: batch[:1])
    assert (tmp_path / "predictions-0-000000.pt").stat().st_size < 10_000


def test_tensors_of_a_graph_and_nested_ones_are_written(tmp_path):
    weight = torch.ones(2, requires_grad=True)
    writer = PredictionWriter(tmp_path)
    trainer = SteppedTrainer(tmp_path, writer)
    predict(trainer, [[torch.ones(2)]], lambda batch: {"score": weight * batch, "id": ["a", "b"]})
    found = load(tmp_path / "predictions-0-000000.pt")
    assert found["id"] == ["a", "b"] and not found["score"].requires_grad


def test_what_a_safe_load_could_not_read_is_refused(tmp_path):
    trainer = SteppedTrainer(tmp_path, PredictionWriter(tmp_path))
    with pytest.raises(TypeError, match=r'state\["predictions"\]'):
        predict(trainer, [[torch.ones(1)]], lambda batch: object())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{"exception": RuntimeError()}, {"is_global_zero": False}])
def test_after_a_fault_and_on_other_ranks_nothing_is_written(tmp_path, state):
    trainer = SteppedTrainer(tmp_path, PredictionWriter(tmp_path, "batch_and_epoch"), **state)
    predict(trainer, [[torch.ones(1)]], double)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["single", "threads"])
def test_in_a_run_files_are_those_of_a_single_device(tmp_path, strategy):
    class Predicting(Pair):
        def predict_step(self, batch: Tensor) -> Tensor:
            return self.critic(batch)

    module = Predicting()
    trainer = Trainer(
        strategy=strategy,
        callbacks=PredictionWriter(tmp_path / "out", "batch_and_epoch"),
        logger=False,
        enable_progress_bar=False,
    )
    assert trainer.predict(module, batches(), return_predictions=False) is None
    expected = [module.critic(batch).detach() for batch in batches()]
    written = load(tmp_path / "out" / "predictions.pt")
    assert len(written) == 6
    for i, (one, batch) in enumerate(zip(written, expected, strict=True)):
        torch.testing.assert_close(one, batch, rtol=0, atol=1e-15)
        torch.testing.assert_close(load(tmp_path / "out" / f"predictions-0-{i:06d}.pt"), one)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder comes first, PredictionWriter"):
        PredictionWriter("epoch", "predictions")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'batch', 'epoch' or 'batch_and_epoch', got 'step'"):
        PredictionWriter(tmp_path, "step")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output_dir must be a path, got 3"):
        PredictionWriter(3)  # type: ignore[arg-type]
