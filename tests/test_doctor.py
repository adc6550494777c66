"""`composefit doctor`: what it finds, on machines made up here, and how it says so."""

import copy
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from composefit import cli, doctor
from composefit.doctor import Facts, because, memory_limit, nvidia_driver, quota_of_cores, rows

ROOT = Path(__file__).parents[1]

FACTS: Facts = {
    "versions": {"python": "3.12.1", "composefit": "1.0", "torch": "2.13.0"},
    "machine": {
        "system": "Linux",
        "cores": 64,
        "usable_cores": 16,
        "quota_cores": None,
        "memory": 64 * 2**30,
        "memory_limit": None,
        "shared_memory": 32 * 2**30,
        "torch_threads": 16,
        "omp_num_threads": None,
    },
    "gpus": {
        "built_for": "CUDA 12.8",
        "driver": "570.86",
        "devices": [{"name": "NVIDIA H100", "memory": 80 * 2**30, "capability": "9.0"}],
    },
    "backends": {"gloo": True, "nccl": "2.27.5", "ucc": False},
    "launcher": {"name": None, "rank": None, "size": None, "problem": None, "variables": []},
    "extras": {"demo": True, "wandb": False},
    "strategy": {"auto": "SingleDevice", "device": "cuda", "why": "there is one GPU"},
}


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Facts:
    """What the command finds, to be changed by a test."""
    made_up = copy.deepcopy(FACTS)
    monkeypatch.setattr(doctor, "examine", lambda: made_up)
    return made_up


def said(facts: Facts, section: str, what: str) -> str:
    (answer,) = [a for s, w, a in rows(facts) if (s, w) == (section, what)]
    return answer


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# -- the command -----------------------------------------------------------------------------------


def test_json_is_all_that_was_found_and_nothing_else(
    facts: Facts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_json_of_this_machine_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(FACTS)
    assert found["versions"]["torch"] == torch.__version__
    assert 1 <= found["machine"]["usable_cores"] <= found["machine"]["cores"]
    assert found["strategy"]["auto"] and found["strategy"]["why"]


def test_where_there_is_no_terminal_it_is_plain_lines(
    facts: Facts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'strategy: "auto": SingleDevice on cuda, since there is one GPU' in lines
    assert all(line.isascii() and line.count(": ") >= 2 for line in lines)


def test_in_a_terminal_it_is_a_table_that_fits(facts: Facts) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    assert doctor.doctor(console=console) == 0
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "─" in printed and "\x1b[" in printed
    plain = Console(file=io.StringIO(), width=60)
    plain.print(doctor._table(facts))
    shown = plain.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 60 for line in shown.splitlines())
    for words in ("NVIDIA H100", "SingleDevice on cuda", "16 of 64"):
        assert words in shown


def test_its_status_says_that_a_trainer_could_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> None:
        raise ValueError("RANK is set, WORLD_SIZE is not")

    monkeypatch.setattr(doctor, "choose", refuse)
    assert cli.main(["doctor"]) == 1
    assert '"auto": ! ValueError: RANK is set, WORLD_SIZE is not' in capsys.readouterr().out


# -- the words -------------------------------------------------------------------------------------


def test_a_gpu_is_named_with_its_memory_and_capability(facts: Facts) -> None:
    assert said(facts, "GPUs", "0") == "NVIDIA H100, 80.0 GiB, compute capability 9.0"
    assert said(facts, "GPUs", "driver") == "570.86"
    assert said(facts, "back ends", "in this torch") == "gloo, nccl 2.27.5"
    assert said(facts, "back ends", "not in it") == "ucc"


@pytest.mark.parametrize(
    ("built_for", "cause"),
    [("CPU", "this torch is built for the CPU"), ("CUDA 12.8", "CUDA_VISIBLE_DEVICES hides them")],
)
def test_a_driver_without_a_gpu_that_torch_can_use_is_a_problem(
    facts: Facts, built_for: str, cause: str
) -> None:
    facts["gpus"] |= {"devices": [], "built_for": built_for}
    found = said(facts, "GPUs", "found")
    assert found.startswith("! none") and cause in found
    facts["gpus"]["driver"] = None
    assert said(facts, "GPUs", "found") == "none"


def test_a_quota_below_the_cores_is_a_problem_that_says_what_to_set(facts: Facts) -> None:
    assert said(facts, "machine", "cores") == "16 of 64 may be used by this process"
    facts["machine"]["quota_cores"] = 2.5
    found = said(facts, "machine", "cores")
    assert found.startswith("! ") and "OMP_NUM_THREADS=3" in found
    facts["machine"]["quota_cores"] = 16.0
    assert not said(facts, "machine", "cores").startswith("!")


def test_memory_says_what_a_container_may_use_of_it(facts: Facts) -> None:
    assert said(facts, "machine", "memory") == "64.0 GiB"
    facts["machine"]["memory_limit"] = 2**30
    assert said(facts, "machine", "memory") == "64.0 GiB, of which this process may use 1.0 GiB"


def test_a_container_with_too_little_shared_memory_is_a_problem(facts: Facts) -> None:
    assert said(facts, "machine", "shared memory") == "32.0 GiB"
    facts["machine"]["shared_memory"] = 64 * 2**20
    assert said(facts, "machine", "shared memory").startswith("! 64 MiB: too little")


def test_a_missing_extra_comes_with_the_command_that_brings_it(facts: Facts) -> None:
    assert said(facts, "extras", "demo") == "yes"
    assert said(facts, "extras", "wandb") == 'no: pip install "composefit[wandb]"'


def test_a_job_is_named_with_its_launcher_and_rank(facts: Facts) -> None:
    facts["launcher"] |= {"name": "torchrun", "rank": 3, "size": 8}
    assert said(facts, "launcher", "found") == "torchrun: rank 3 of 8"
    facts["launcher"]["problem"] = "RANK is set, WORLD_SIZE is not"
    assert said(facts, "launcher", "found") == "! RANK is set, WORLD_SIZE is not"


GPU = {"name": "NVIDIA H100", "memory": 80 * 2**30, "capability": "9.0"}
ALONE = FACTS["launcher"]


@pytest.mark.parametrize(
    ("launcher", "devices", "cuda", "words"),
    [
        (ALONE, [], False, "no GPU that torch can use"),
        (ALONE, [GPU], True, "one accelerator that torch can use (NVIDIA H100)"),
        (ALONE, [GPU] * 4, True, "4 GPUs, each of which gets a process"),
        (ALONE | {"name": "slurm", "rank": 5, "size": 8}, [GPU], True, "rank 5 of 8 (slurm)"),
        (ALONE | {"name": "torchrun", "rank": 0, "size": 1}, [GPU], True, "rank 0 of 1 (torchrun)"),
    ],
)
def test_the_reason_for_a_strategy_names_what_decides_it(
    launcher: dict[str, Any], devices: list[dict[str, Any]], cuda: bool, words: str
) -> None:
    assert words in because(launcher, devices, cuda)


# -- the finding -----------------------------------------------------------------------------------


def test_the_quota_of_version_2_is_the_smallest_on_the_way_up(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/mine/cpu.max": "max 100000\n",
            "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/jobs/mine/memory.max": "4096\n",
            "sys/fs/cgroup/jobs/memory.max": "max\n",
        },
    )
    assert quota_of_cores(root) == 1.5
    assert memory_limit(root) == 4096


def test_the_quota_of_version_1_is_read_from_its_controllers(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/box\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "8192\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert quota_of_cores(root) == 3.0
    assert memory_limit(root) == 8192


def test_a_container_that_sees_its_group_as_the_root_has_its_quota(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/path/of/the/host\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
        },
    )
    assert quota_of_cores(root) == 2.0


def test_without_a_quota_none_is_found(tmp_path: Path) -> None:
    assert quota_of_cores(tmp_path) is None
    assert memory_limit(tmp_path) is None
    unlimited = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
    assert quota_of_cores(write(tmp_path, unlimited)) is None


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ],
)
def test_the_driver_is_read_from_what_the_kernel_says(tmp_path: Path, line: str) -> None:
    assert nvidia_driver(tmp_path) is None
    assert nvidia_driver(write(tmp_path, {"proc/driver/nvidia/version": line})) == "570.86.15"


def test_a_job_that_makes_no_sense_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def inconsistent(_: object) -> None:
        raise RuntimeError("RANK is set, WORLD_SIZE is not")

    monkeypatch.setattr(doctor, "found_job", inconsistent)
    assert doctor._launcher()["problem"] == "RANK is set, WORLD_SIZE is not"


def test_of_a_launchers_variables_the_values_stay_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "found_job", lambda _: None)
    monkeypatch.setenv("SLURM_JOB_USER", "somebody")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    found = doctor._launcher()
    assert {"SLURM_JOB_USER", "MASTER_ADDR"} <= set(found["variables"])
    assert "somebody" not in json.dumps(found) and "10.0.0.7" not in json.dumps(found)


def test_the_extras_are_those_that_a_user_can_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_developers = {"docs", "tests", "benchmarks", "examples", "recipes"}
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - of_developers
