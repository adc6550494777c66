"""FullySharded: sums of gradients, updates and state, rank by rank against one whole process."""

from __future__ import annotations

import pickle
from collections.abc import MutableMapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from composefit.strategies.fully_sharded import FullySharded
from composefit.strategies.sharding import internals
from tests.ranks.pool import RankPool
from tests.ranks.sharded_cases import run_case

BOUND = 1e-10
MOVED = 1e-3


def same(found: dict[str, Any]) -> None:
    assert found["worst"] <= BOUND, found
    assert found["moved"] > MOVED, found


@pytest.mark.parametrize(
    "name",
    [
        "critic_first",
        "generator_first",
        "three_critic_steps_on_one_fake",
        "clipped_by_the_norm_over_all_ranks",
        "units_within_children",
        "activation_checkpointing",
        "with_adam",
        "weights_freed_after_each_forward",
        "an_evaluation_in_inference_mode_before_the_training",
        "parameters_that_are_unfrozen_later",
        "an_in_place_operation_on_what_a_unit_returns",
        "recurrent_shards_in_time",
        "a_sum_that_travels_at_another_time_than_weights",
    ],
)
def test_the_parameters_are_those_of_the_plain_loop(two_ranks: RankPool, name: str) -> None:
    for found in two_ranks.run(run_case, name):
        same(found)


@pytest.mark.full
@pytest.mark.parametrize("name", ["critic_first", "shards_in_time", "gradient_penalty"])
def test_the_parameters_are_those_of_the_plain_loop_in_four_ranks(
    four_ranks: RankPool, name: str
) -> None:
    for found in four_ranks.run(run_case, name):
        same(found)


def test_an_update_sends_gradients_of_its_own_optimizer_only(two_ranks: RankPool) -> None:
    """The critic has 9 x 5 + 9 + 6 x 9 + 6 + 6 + 1 numbers, the generator 7 x 3 + 7 + 5 x 7 + 5."""
    (counts, *_) = [found["counts"] for found in two_ranks.run(run_case, "critic_first")]
    for name, numbers in (("critic", 121), ("generator", 68)):
        assert counts[name]["reduce_scatter_single"] == 1
        # Rows are padded to a multiple of the ranks; two flags for each rank travel along.
        padding = {"critic": 5 + 1 + 6 + 1, "generator": 3 + 1 + 7 + 1}[name]
        assert counts[name]["reduce_scatter_single numbers"] == numbers + padding + 4
        assert "all_reduce" not in counts[name]


def test_each_unit_sends_its_gradients_by_itself(two_ranks: RankPool) -> None:
    (counts, *_) = [found["counts"] for found in two_ranks.run(run_case, "units_within_children")]
    assert counts["critic"]["reduce_scatter_single"] == 3
    assert counts["generator"]["reduce_scatter_single"] == 2


@pytest.mark.parametrize(
    "name",
    [
        "shared_encoder_and_whole_parameters",
        "both_at_once",
        "shards_in_time",
        "shards_in_time_at_once",
    ],
)
def test_parameters_of_several_children_and_of_none_stay_whole(
    two_ranks: RankPool, name: str
) -> None:
    for found in two_ranks.run(run_case, name):
        same(found)
        assert found["whole"] == ["actor.0.weight", "scale", "shift"]


def test_accumulation_sends_once_per_update(two_ranks: RankPool) -> None:
    once, *_ = two_ranks.run(run_case, "both_at_once")
    twice, *_ = two_ranks.run(run_case, "shards_in_time_at_once")
    for name in ("reduce_scatter_single", "reduce_scatter_single numbers", "all_reduce numbers"):
        assert once["counts"][0][name] == twice["counts"][0][name]


def test_a_gradient_penalty_keeps_the_weights_it_goes_through_until_the_update(
    two_ranks: RankPool,
) -> None:
    for found in two_ranks.run(run_case, "gradient_penalty"):
        same(found)
        assert (found["held"], found["after"]) == (3, 0)


@pytest.mark.parametrize(
    "name", ["a_penalty_of_old_weights_raises", "a_stale_graph_raises_and_the_next_step_runs"]
)
def test_a_graph_of_old_weights_raises(two_ranks: RankPool, name: str) -> None:
    for found in two_ranks.run(run_case, name):
        assert "modified by an inplace operation" in found["raised"]


def test_a_checkpointed_graph_of_old_weights_raises(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "a_recomputed_stale_graph_raises"):
        assert found["raised"] == "StaleGraphError"


def test_a_parameter_that_no_rank_reaches_gets_no_gradient(two_ranks: RankPool) -> None:
    """Also where one is reached by another rank, or for the first time after it was not."""
    for found in two_ranks.run(run_case, "a_parameter_that_only_one_rank_reaches"):
        assert found["worst"] <= BOUND
        usual, without = [False, False, True], [False, True, True]
        assert found["nones"] == [usual, without, usual, usual]


def test_a_rank_without_samples_takes_part_with_weight_zero(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "a_rank_without_samples"):
        same(found)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "mixed_precision"):
        assert found["leaf"] == "torch.bfloat16"
        assert found["output"] == found["own"] == "torch.float32"
        assert 1e-6 < found["worst"] < 0.02  # close, and not the same
        assert found["moved"] > 0.01


def test_whole_state_is_on_rank_zero_and_goes_on_bit_by_bit(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "whole_state_and_back"):
        assert found == {"rank zero alone": True, "equal": True}


def test_a_released_module_is_an_ordinary_one_with_its_own_parameters(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "released"):
        same(found)
        assert found["hidden"] == [0, 0]
        assert found["as before"]
        assert found["back"]
        assert found["same"]
        assert found["left"]


def test_norms_limits_and_faults_are_those_of_all_ranks(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "norms_and_nonfinite"):
        assert found["off"] < 1e-12
        assert found["largest"] == 0.01
        assert found["found"] == 1.0


def test_between_steps_a_module_shows_its_sharded_parameters(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "parameters_at_hooks_are_the_sharded_ones"):
        assert found == {"before": False, "after": True, "largest": 0.01, "seen": True}


def test_what_is_written_into_gathered_weights_raises(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "written_while_gathered"):
        assert "was written while it was gathered" in found["raised"]


def test_weights_gathered_without_gradients_do_not_stay(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "the_weights_of_an_evaluation_do_not_stay"):
        assert found == {"other": True, "back": True}


def test_optimizers_step_rows_as_they_step_whole_parameters(two_ranks: RankPool) -> None:
    for found in two_ranks.run(run_case, "every_elementwise_optimizer"):
        assert max(found["worst"].values()) < 1e-12, found
        assert all(found["cut"].values())


# -- what can be seen in one process ---------------------------------------------------------------


def test_fsdp_has_what_is_reached_into() -> None:
    """If this fails, torch has renamed a private part of FSDP2 that `sharding.internals` uses.

    Look for the new name in torch/distributed/fsdp/_fully_shard: of the unsharded parameter (the
    leaf of the graph, whose gradient autograd takes), of the groups in a module's state, of a
    group's training state. If the leaf is no longer one object for good, `ShardedParameter.leaf`
    must be read anew after each gathering, and its version counter be moved then.
    """
    from torch.distributed import _composable_state
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state

    param, group = vars(_fsdp_param.FSDPParam), vars(_fsdp_param_group.FSDPParamGroup)
    assert {"init_unsharded_param", "unsharded_param", "to_sharded"} <= param.keys()
    assert "_unsharded_param" in _fsdp_param.FSDPParam.unsharded_param.fget.__code__.co_names
    assert {"is_sharded", "_to_sharded", "post_backward"} <= group.keys()
    assert {"reshard_after_backward", "_all_gather_comm", "_training_state"} <= set(
        _fsdp_param_group.FSDPParamGroup.__init__.__code__.co_names
    )
    assert "_fsdp_param_groups" in _fsdp_state.FSDPState.__init__.__code__.co_names
    assert {"unshard", "reshard", "reset_iter_state", "_get_fsdp_state"} <= vars(FSDPModule).keys()
    assert internals.TrainingState.IDLE is not None
    assert isinstance(_composable_state._module_state_mapping, MutableMapping)


def test_a_policy_that_cannot_be_meant_raises() -> None:
    for wrong in ("blocks", 1.5, [3], [], True):
        with pytest.raises(TypeError, match="expects a size in parameters"):
            FullySharded(2, policy=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of parameters from 1, got 0"):
        FullySharded(2, policy=0)


def test_a_precision_that_is_none_raises() -> None:
    for wrong in ("bf16", torch.int32, 16):
        with pytest.raises(TypeError, match=r"expects a dtype such as torch\.bfloat16"):
            FullySharded(2, mixed_precision=wrong)  # type: ignore[arg-type]


def test_a_strategy_can_be_sent_to_other_processes() -> None:
    strategy = pickle.loads(pickle.dumps(FullySharded(2, policy=nn.Linear, timeout=7)))
    assert (strategy.processes, strategy.policy, strategy.timeout) == (2, nn.Linear, 7)
    assert len(strategy._groups) == 0
