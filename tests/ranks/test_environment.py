"""Which job a process is started for, as its environment tells."""

import pytest

from composefit.ranks.environment import Job, found_job

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}

# As srun sets them for the fourth task of six on three machines, two on each.
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[01-02,7]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


def test_a_plain_process_has_no_job() -> None:
    assert found_job({"PATH": "/bin"}) is None


def test_torchrun_names_rank_and_place() -> None:
    assert found_job(dict(TORCHRUN)) == Job(3, 4, 1, 2, "torchrun")


def test_a_launch_of_this_package_is_told_from_torchrun() -> None:
    job = found_job({**TORCHRUN, "TORCHELASTIC_RUN_ID": "composefit-1f"})
    assert job is not None
    assert job.launcher == "composefit"


def test_variables_set_by_hand_need_no_local_rank() -> None:
    variables = {k: TORCHRUN[k] for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert found_job(variables) == Job(3, 4, 0, 1, "environment")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    variables = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=rf"{name} is not: start the job with torchrun or srun"):
        found_job(variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK=4 is no rank of WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is no rank of LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 of WORLD_SIZE=4"),
        ({"RANK": "three"}, "RANK='three' is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is no number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' is no number"),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found_job({**TORCHRUN, **change})


# -- SLURM -------------------------------------------------------------------------------------


def test_a_task_of_srun_is_a_rank_and_torch_is_told() -> None:
    variables = dict(SLURM)
    assert found_job(variables) == Job(3, 6, 1, 2, "slurm")
    told = {key: variables[key] for key in TORCHRUN if key in variables}
    assert told.pop("MASTER_PORT").isdecimal()
    assert told == {
        "RANK": "3",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu01",
    }


def test_asked_again_it_is_the_same_job() -> None:
    variables = dict(SLURM)
    assert found_job(variables) == found_job(variables)


def test_all_tasks_of_a_step_agree_on_the_port_and_others_have_another() -> None:
    ports = []
    for change in ({}, {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, {"SLURM_JOB_ID": "1234568"}):
        variables = {**SLURM, **change}
        found_job(variables)
        ports.append(int(variables["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2]
    assert all(1024 < port < 32768 for port in ports)


def test_an_address_that_is_given_stays() -> None:
    variables = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "777"}
    found_job(variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "777")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[01-03,7],login", "gpu01"),
        ("rack[2-3]n[008-010]", "rack2n008"),
        ("n[5],m[1-2]", "n5"),
        ("a-b[3,9].site", "a-b3.site"),
    ],
)
def test_the_first_of_a_list_of_nodes_is_where_rank_0_is(nodes: str, first: str) -> None:
    variables = {**SLURM, "SLURM_STEP_NODELIST": nodes}
    found_job(variables)
    assert variables["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("2(x3),1", "3", 1), ("4", "0", 4), ("1,3", "1", 3), ("", "0", 2)]
)
def test_tasks_of_this_machine_are_counted(tasks: str, node: str, here: int) -> None:
    job = found_job({**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node})
    assert job is not None
    assert job.local_size == here


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None},  # the shell of sbatch or salloc
        {"SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {"SLURM_STEP_ID": "4294967291"},  # the batch script's own
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash in a job of six
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": None},
    ],
)
def test_a_shell_within_a_job_is_no_rank(change: dict[str, str | None]) -> None:
    merged = {**SLURM, **change}
    variables = {key: value for key, value in merged.items() if value is not None}
    assert found_job(variables) is None
    assert "RANK" not in variables


def test_torchrun_within_a_step_counts_more_than_the_step() -> None:
    assert found_job({**SLURM, **TORCHRUN}) == Job(3, 4, 1, 2, "torchrun")


def test_a_step_that_does_not_say_which_task_this_is_is_refused() -> None:
    variables = {key: value for key, value in SLURM.items() if key != "SLURM_PROCID"}
    with pytest.raises(ValueError, match="SLURM_PROCID is not set: start it with srun"):
        found_job(variables)
