"""What each driver rule's handling is, as a patch that takes it out, and tests that then fail.

The rules are those of the driver, by number:

1. gradients are dense tensors of their own
2. stale and used-up graphs raise
3. all gradients of a yield are checked before any optimizer steps; clipping; float16
4. modes are a step's own; a shard keeps its worker
5. buffers start from the step's and merge
6. shards run on replicas
7. scattered tensors have version counters of their own
8. every shard draws from a stream of its own
9. one graph at a time; weights
10. what a step does wrong raises; every shard is closed
11. parameter hooks, and parameters read anew
12. the state after a fault
13. gradients as values, and losses as functions
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A patch of the sources.

    Attributes:
        rule: the number of the rule.
        what: the handling that the patch takes out.
        file: the source, below `src/composefit`.
        old: text that occurs in it exactly once.
        new: what replaces it.
        tests: what pytest is given, below `tests`; one of these has to fail.
    """

    rule: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LOCKSTEP = "lockstep/test_"
THREADS = "strategies/test_thread_data_parallel.py::test_"
GRADIENTS = "language/test_gradients.py"
FUNCTIONS = "language/test_functions.py"

MUTANTS = (
    # -- 1 -------------------------------------------------------------------------------------
    Mutant(
        1,
        "a gradient takes its parameter's strides",
        "lockstep/gradients.py",
        "            gradient.stride() != parameter.stride()\n            or _references",
        "            _references",
        (
            f"{LOCKSTEP}gradients.py::test_channels_last_gradients_take_their_parameters_strides",
            f"{LOCKSTEP}gradients.py::test_an_expanded_gradient_can_be_added_to",
        ),
    ),
    Mutant(
        1,
        "a gradient that somebody holds is copied",
        "lockstep/gradients.py",
        "            or _references(gradient) > _OWN_REFERENCES\n",
        "",
        (
            f"{LOCKSTEP}gradients.py::test_a_gradient_that_a_function_keeps_is_not_overwritten",
            f"{LOCKSTEP}gradients.py::test_what_a_backward_starts_with_is_not_overwritten",
        ),
    ),
    Mutant(
        1,
        "two gradients in one buffer are parted",
        "lockstep/gradients.py",
        "        _part_overlapping(owned)\n    return owned",
        "        pass\n    return owned",
        (f"{LOCKSTEP}gradients.py::test_overlapping_views_of_one_buffer_do_not_share_it",),
    ),
    Mutant(
        1,
        "overlaps with any earlier gradient count, not only with the last",
        "lockstep/gradients.py",
        "        end = max(end, stop)",
        "        end = stop",
        (f"{LOCKSTEP}gradients.py::test_overlapping_views_of_one_buffer_do_not_share_it",),
    ),
    Mutant(
        1,
        "what only a later shard has is made its own",
        "lockstep/gradients.py",
        "            (total[i],) = own([summand], [parameters[i]])",
        "            total[i] = summand",
        (f"{LOCKSTEP}gradients.py::test_a_summand_that_comes_later_is_made_its_own",),
    ),
    # -- 2 -------------------------------------------------------------------------------------
    Mutant(
        2,
        "a step moves its parameters' version counters",
        "lockstep/stepper.py",
        "            torch.autograd.graph.increment_version(changed)\n"
        "            self.places.stepped(changed)\n            self.hooks",
        "            self.places.stepped(changed)\n            self.hooks",
        (f"{LOCKSTEP}stepper.py::test_a_loss_older_than_an_update_of_its_weights_names_the_yield",),
    ),
    Mutant(
        2,
        "a recomputation with newer weights raises",
        "lockstep/guards.py",
        "        return _Watch(changed) if changed else nullcontext()",
        "        return nullcontext()",
        (f"{LOCKSTEP}guards.py::test_checkpointed_weights_updated_since_raise",),
    ),
    Mutant(
        2,
        "the errors of autograd name the yields",
        "lockstep/guards.py",
        "_FREED.search(str(error))",
        "False",
        (f"{LOCKSTEP}guards.py::test_a_graph_used_up_by_an_update_names_the_yield",),
    ),
    # -- 3 -------------------------------------------------------------------------------------
    Mutant(
        3,
        "every gradient is checked before any optimizer steps",
        "lockstep/stepper.py",
        "                raise self._error(name, parameters, found, losses.get(name), step)\n",
        "                raise self._error(name, parameters, found, losses.get(name), step)\n"
        "            self._apply(name, parameters, found, None, step)\n",
        (f"{LOCKSTEP}stepper.py::test_simultaneous_updates_all_wait_for_the_check",),
    ),
    Mutant(
        3,
        "an infinite float16 gradient skips every name of its update",
        "lockstep/stepper.py",
        "        finite = not self.found.item()\n",
        "        finite = True\n",
        (f"{LOCKSTEP}stepper.py::test_an_infinite_float16_gradient_skips_all_names",),
    ),
    Mutant(
        3,
        "gradients are unscaled before they are clipped",
        "lockstep/stepper.py",
        "inverse = self.one if name in given else self.scales[name].inverse()",
        "inverse = self.one",
        (
            f"{LOCKSTEP}stepper.py::test_float16_is_torchs_grad_scaler_and_autocast",
            f"{LOCKSTEP}stepper.py::test_a_hook_sees_unscaled_gradients_not_yet_clipped",
        ),
    ),
    Mutant(
        3,
        "each optimizer is clipped",
        "lockstep/stepper.py",
        "        elif limit is not None:\n",
        "        elif False:\n",
        (f"{LOCKSTEP}stepper.py::test_each_optimizer_is_clipped_by_its_own_rule",),
    ),
    Mutant(
        3,
        "gradients are cleared after the step",
        "lockstep/stepper.py",
        "            for parameter in parameters:\n                parameter.grad = None\n",
        "            pass\n",
        (f"{LOCKSTEP}stepper.py::test_a_parameter_that_no_shard_reached_keeps_none",),
    ),
    # -- 4 -------------------------------------------------------------------------------------
    Mutant(
        4,
        "modes are compared at every yield",
        "lockstep/shard.py",
        "            if after != before:\n",
        "            if False:\n",
        (f"{LOCKSTEP}guards.py::test_a_mode_left_open_across_a_yield_raises_at_the_yield",),
    ),
    Mutant(
        4,
        "grad mode is set at every resume",
        "lockstep/shard.py",
        "            torch._C._set_grad_enabled(training)\n            before",
        "            before",
        (
            f"{LOCKSTEP}guards.py::test_steps_have_gradients_wherever_they_are_called_from",
            f"{LOCKSTEP}guards.py::test_validation_has_none_in_any_shard",
        ),
    ),
    Mutant(
        4,
        "the caller's modes are carried into the workers",
        "lockstep/driver.py",
        "            with self._ambient.entered():",
        "            if True:",
        (f"{LOCKSTEP}guards.py::test_the_callers_modes_are_those_of_every_shard",),
    ),
    Mutant(
        4,
        "autocast is entered around every resume",
        "lockstep/shard.py",
        "        if autocast is not None:\n            autocast.__enter__()",
        "        if autocast is not None and self.generator is None:\n"
        "            autocast.__enter__()",
        (f"{LOCKSTEP}guards.py::test_autocast_surrounds_every_resume_and_nothing_else",),
    ),
    Mutant(
        4,
        "a shard keeps its worker for life",
        "lockstep/driver.py",
        "            lanes.setdefault(shard.lane, []).append(shard)",
        "            lane = (shard.lane + len(self.history)) % self.lanes.lanes\n"
        "            lanes.setdefault(lane, []).append(shard)",
        (f"{LOCKSTEP}shard.py::test_a_shard_keeps_its_worker",),
    ),
    # -- 5 -------------------------------------------------------------------------------------
    Mutant(
        5,
        "what shards did to buffers is merged after the step",
        "lockstep/driver.py",
        "            merge(self.owner, replicas, weights)",
        "            pass",
        (f"{LOCKSTEP}driver.py::test_statistics_are_the_weighted_mean_of_the_shards_changes",),
    ),
    Mutant(
        5,
        "a shard's samples are its weight in the merge",
        "lockstep/driver.py",
        "weights = [float(shard.samples) for shard in self.shards if not shard.spare]\n",
        "weights = [1.0 for shard in self.shards if not shard.spare]\n",
        (f"{LOCKSTEP}driver.py::test_statistics_are_the_weighted_mean_of_the_shards_changes",),
    ),
    Mutant(
        5,
        "every shard starts from the step's buffers",
        "lockstep/driver.py",
        "            shard.replica.refresh()\n",
        "            shard.replica.refresh() if self.number == 0 else None\n",
        (
            f"{LOCKSTEP}driver.py::test_statistics_are_the_weighted_mean_of_the_shards_changes",
            f"{LOCKSTEP}driver.py::test_attributes_set_between_steps_reach_the_shards",
        ),
    ),
    Mutant(
        5,
        "buffers that differ raise before the update",
        "lockstep/driver.py",
        "        self._check_buffers()\n",
        "",
        (f"{LOCKSTEP}driver.py::test_a_buffer_that_shards_write_differently_raises",),
    ),
    # -- 6 -------------------------------------------------------------------------------------
    Mutant(
        6,
        "a shard runs on a replica",
        "lockstep/driver.py",
        "replica.module, replica, ",
        "self.owner, replica, ",
        (
            f"{LOCKSTEP}driver.py::test_what_a_child_sets_in_its_forward_stays_in_its_shard",
            f"{THREADS}functional_call_swaps_parameters_of_its_own_shard_only",
        ),
    ),
    Mutant(
        6,
        "setting an attribute of a replicated module raises",
        "module.py",
        '        if state.get("_replica"):\n',
        "        if False:\n",
        (f"{LOCKSTEP}driver.py::test_setting_an_attribute_of_the_module_names_once",),
    ),
    Mutant(
        6,
        "a function given to Once is bound to the owner",
        "lockstep/barrier.py",
        "                replica.owner_of(function)\n",
        "                function\n",
        (
            f"{LOCKSTEP}driver.py::test_once_writes_for_all_shards_in_sample_order",
            f"{LOCKSTEP}driver.py::test_once_gives_a_closure_the_module_itself",
        ),
    ),
    Mutant(
        6,
        "replicas read the owner anew after each Once",
        "lockstep/barrier.py",
        "            replica.refresh(within_step=True)",
        "            pass",
        (f"{LOCKSTEP}driver.py::test_once_writes_for_all_shards_in_sample_order",),
    ),
    Mutant(
        6,
        "parametrize.cached is refused in threads",
        "strategies/thread_data_parallel.py",
        "            parametrize._cache = _NO_CACHE\n",
        "            pass\n",
        (f"{LOCKSTEP}guards.py::test_parametrize_cached_is_refused_under_threads",),
    ),
    # -- 7 -------------------------------------------------------------------------------------
    Mutant(
        7,
        "scattered tensors are no views of one another",
        "tree/cutting.py",
        "    parts = [part.data for part in value.split(sizes, dim)]",
        "    parts = list(value.split(sizes, dim))",
        (
            f"{LOCKSTEP}scatter.py::test_what_a_shard_writes_in_place_does_not_break",
            f"{THREADS}an_in_place_operation_in_one_shard_leaves_the_others_graphs_alone",
        ),
    ),
    # -- 8 -------------------------------------------------------------------------------------
    Mutant(
        8,
        "torch's own draws come from the shard's stream",
        "lockstep/shard.py",
        "        if draws is not None:\n            draws.__enter__()",
        "        draws = None\n        if draws is not None:\n            draws.__enter__()",
        (f"{LOCKSTEP}driver.py::test_each_shard_draws_from_a_stream_of_its_own",),
    ),
    Mutant(
        8,
        "a recomputation enters the stream of its forward",
        "random/recompute.py",
        "                contexts.enter_context(drawing_from(generator))",
        "                pass",
        ("random/test_recompute.py::test_recomputation_in_another_thread_draws_from_the_stream",),
    ),
    Mutant(
        8,
        "re-entrant checkpointing is refused",
        "random/recompute.py",
        "    if current_generator() is not None or _guarded.guard is not None:\n",
        "    if False:\n",
        (f"{LOCKSTEP}guards.py::test_reentrant_checkpointing_is_refused",),
    ),
    Mutant(
        8,
        "draws from Python's and NumPy's global generators are found",
        "lockstep/driver.py",
        "self._generators.fingerprint() != self._fingerprint:",
        "False:",
        (f"{LOCKSTEP}driver.py::test_global_generators_are_refused_where_shards_run",),
    ),
    Mutant(
        8,
        "a step leaves the default generator as it found it",
        "lockstep/streams.py",
        "            generator.set_state(state)",
        "            pass",
        (f"{LOCKSTEP}shard.py::test_a_steps_own_draws_leave_the_default_generator_alone",),
    ),
    # -- 9 -------------------------------------------------------------------------------------
    Mutant(
        9,
        "of a loss whose gradient is taken nothing keeps the graph",
        "updates.py",
        "            self.losses[name] = loss.detach()",
        "            pass",
        (f"{LOCKSTEP}backward.py::test_one_graph_at_a_time_is_held",),
    ),
    Mutant(
        9,
        "a returned loss is not kept",
        "lockstep/shard.py",
        "            del value  # of a returned loss nothing but its gradient is to stay\n",
        "            self.output = value\n",
        (f"{LOCKSTEP}backward.py::test_one_graph_at_a_time_is_held",),
    ),
    Mutant(
        9,
        "shards weigh their samples",
        "lockstep/backward.py",
        "        return (self.samples[shard.index], self.total_samples)",
        "        return (1, len(self.samples))",
        (f"{LOCKSTEP}backward.py::test_every_kind_of_loss_is_that_of_the_whole_batch",),
    ),
    Mutant(
        9,
        "a Mean is divided by the weights of all shards",
        "lockstep/backward.py",
        "                gradients.scale_(found, self.total_samples / denominator)",
        "                pass",
        (f"{LOCKSTEP}backward.py::test_every_kind_of_loss_is_that_of_the_whole_batch",),
    ),
    Mutant(
        9,
        "gradients of what was gathered go back to every shard, the last gather first",
        "lockstep/crossings.py",
        "    for crossing in reversed(crossings):",
        "    for crossing in crossings:",
        (f"{LOCKSTEP}crossings.py::test_gathers_nest",),
    ),
    # -- 10 ------------------------------------------------------------------------------------
    Mutant(
        10,
        "a stray StopIteration raises",
        "lockstep/shard.py",
        "                if self.generator is None:\n                    raise _stray",
        "                if False:\n                    raise _stray",
        (f"{LOCKSTEP}shard.py::test_a_stray_stop_iteration_does_not_end_training_in_silence",),
    ),
    Mutant(
        10,
        "shards that disagree raise",
        "lockstep/messages.py",
        "            raise disagreement(shards)",
        "            pass",
        (f"{LOCKSTEP}driver.py::test_shards_that_disagree_raise_with_each_ones_yield",),
    ),
    Mutant(
        10,
        "a helper that is called and dropped raises",
        "lockstep/shard.py",
        "        if helper is not None:\n",
        "        if False:\n",
        (f"{LOCKSTEP}shard.py::test_a_helper_that_nobody_runs_is_an_error",),
    ),
    Mutant(
        10,
        "every shard is closed, in its own worker",
        "lockstep/driver.py",
        "            self._each(Shard.close)\n",
        "            pass\n",
        (f"{LOCKSTEP}shard.py::test_when_one_shard_raises_the_others_are_closed",),
    ),
    Mutant(
        10,
        "an interrupt waits until the workers have ended",
        "strategies/thread_data_parallel.py",
        "            except KeyboardInterrupt as error:\n",
        "            except ZeroDivisionError as error:\n",
        (f"{THREADS}run_returns_only_when_every_task_has_ended",),
    ),
    # -- 11 ------------------------------------------------------------------------------------
    Mutant(
        11,
        "post-accumulate hooks run, on the total",
        "lockstep/stepper.py",
        "                hook(parameter)\n",
        "                pass\n",
        (f"{LOCKSTEP}stepper.py::test_post_accumulate_hooks_run_once_on_the_total",),
    ),
    Mutant(
        11,
        "tensor hooks are refused with several shards",
        "lockstep/driver.py",
        "                guards.refuse_hooks(found, name)",
        "                pass",
        (f"{LOCKSTEP}stepper.py::test_tensor_hooks_on_parameters_are_refused",),
    ),
    Mutant(
        11,
        "parameters are read anew in each step",
        "lockstep/driver.py",
        "        self._lists.clear()\n",
        "",
        (f"{LOCKSTEP}stepper.py::test_what_is_unfrozen_between_steps_is_trained_from_then_on",),
    ),
    # -- 12 ------------------------------------------------------------------------------------
    Mutant(
        12,
        "gradients of a step that failed are dropped",
        "lockstep/driver.py",
        "        self.backward.end()\n",
        "",
        (f"{LOCKSTEP}shard.py::test_nothing_of_a_failed_step_is_in_the_next",),
    ),
    Mutant(
        12,
        "the note lists the updates that were done",
        "lockstep/messages.py",
        "updates done before it: {done}",
        "updates done",
        (f"{LOCKSTEP}shard.py::test_the_state_after_a_fault_is_that_of_the_last_completed",),
    ),
    # -- 13 ------------------------------------------------------------------------------------
    Mutant(
        13,
        "what a shard writes into its gradients no other sees",
        "updates.py",
        "None if g is None else g.clone() for g in own",
        "g for g in own",
        (f"{GRADIENTS}::test_what_one_shard_writes_into_its_gradients_no_other_sees",),
    ),
    Mutant(
        13,
        "given gradients are copied before they are clipped",
        "lockstep/barrier.py",
        "gradient.clone() for gradient in own",
        "gradient.detach() for gradient in own",
        (f"{GRADIENTS}::test_given_gradients_step_the_optimizer_and_stay_what_they_are",),
    ),
    Mutant(
        13,
        "given gradients that differ between shards are refused",
        "updates.py",
        "                _refuse_difference(name, same)\n",
        "",
        (f"{GRADIENTS}::test_gradients_that_differ_between_shards_are_an_error",),
    ),
    Mutant(
        13,
        "given gradients have no loss scale",
        "lockstep/stepper.py",
        "self.one if name in given else self.scales[name].inverse()",
        "self.scales[name].inverse()",
        (f"{GRADIENTS}::test_given_gradients_are_not_divided_by_the_loss_scale",),
    ),
    Mutant(
        13,
        "gradients that are asked for come unscaled",
        "lockstep/barrier.py",
        "            lock.stepper.unscale(key, found)\n",
        "            pass\n",
        (f"{GRADIENTS}::test_gradients_come_unscaled_under_float16",),
    ),
    Mutant(
        13,
        "a shard's stream is rewound before each evaluation",
        "lockstep/rewinding.py",
        "                generator.set_state(state)\n",
        "                pass\n",
        (f"{FUNCTIONS}::test_every_evaluation_draws_the_same",),
    ),
    Mutant(
        13,
        "so is self.random",
        "lockstep/rewinding.py",
        "        self.shard.random.rewind(self._random)\n",
        "",
        (f"{FUNCTIONS}::test_every_evaluation_draws_the_same",),
    ),
    Mutant(
        13,
        "buffers are put back before each evaluation",
        "lockstep/rewinding.py",
        "                    buffer.copy_(value)\n",
        "",
        (f"{FUNCTIONS}::test_buffers_move_once_however_often_the_loss_is_evaluated",),
    ),
    Mutant(
        13,
        "rebound ones too",
        "lockstep/rewinding.py",
        "            own.update(self.kept)\n",
        "            pass\n",
        (f"{FUNCTIONS}::test_buffers_move_once_however_often_the_loss_is_evaluated",),
    ),
    Mutant(
        13,
        "every evaluation is clipped",
        "lockstep/stepper.py",
        "        stepper._clip(self.named, self.parameters)\n",
        "",
        (f"{FUNCTIONS}::test_every_evaluation_is_clipped_and_hooks_run_once",),
    ),
    Mutant(
        13,
        "weights go back where a later evaluation fails",
        "lockstep/stepper.py",
        "                    parameter.copy_(value)\n",
        "                    pass\n",
        (
            f"{FUNCTIONS}::test_what_a_later_evaluation_raises_is_the_users_own_and_training_goes_on",
        ),
    ),
)
