"""Which process of which job this is: tables of environments; and two processes that join."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from v4jax.errors import ConfigError, V4JaxError
from v4jax.parallel.hosts import Hosts, find_hosts, find_job_index, start_hosts

WORKER = Path(__file__).with_name("hosts_worker.py")
ROOT = Path(__file__).parents[2]

SLURM = {
    "SLURM_JOB_ID": "100003",
    "SLURM_STEP_NODELIST": "node[07-09,12],other",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
SLURM_FOUND = Hosts("Slurm", 3, 4, "node07:63139")
GKE = {  # JAX asks the metadata server for MEGASCALE_… that are not there
    "TPU_WORKER_HOSTNAMES": "localhost,b,c,d",
    "TPU_WORKER_ID": "2",
    "MEGASCALE_NUM_SLICES": "",
    "MEGASCALE_SLICE_ID": "",
    "MEGASCALE_COORDINATOR_ADDRESS": "",
}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
EXPLICIT = {
    "V4JAX_COORDINATOR": "10.0.0.2:1234",
    "V4JAX_PROCESS_INDEX": "1",
    "V4JAX_PROCESS_COUNT": "2",
}
FOUND = {
    "nothing": ({}, {}, Hosts()),
    "flags": (
        {},
        {"coordinator": "h:1", "process_index": 0, "process_count": 2},
        Hosts("explicit", 0, 2, "h:1"),
    ),
    "variables": (EXPLICIT, {}, Hosts("explicit", 1, 2, "10.0.0.2:1234")),
    "flags win": (EXPLICIT, {"process_index": 0}, Hosts("explicit", 0, 2, "10.0.0.2:1234")),
    "index of an Indexed Job": (
        EXPLICIT | {"V4JAX_PROCESS_INDEX": "", "JOB_COMPLETION_INDEX": "0"},
        {},
        Hosts("explicit", 0, 2, "10.0.0.2:1234"),
    ),
    "an Indexed Job alone joins nothing": (
        {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {},
        Hosts(),
    ),
    "explicitly one": (SLURM, {"process_count": 1}, Hosts("explicit")),
    "explicit before Slurm": (SLURM | EXPLICIT, {}, Hosts("explicit", 1, 2, "10.0.0.2:1234")),
    "Slurm": (SLURM, {}, SLURM_FOUND),
    "Slurm, another coordinator": (SLURM, {"coordinator": "h:1"}, Hosts("Slurm", 3, 4, "h:1")),
    "Slurm, nodes with two numbers": (
        SLURM | {"SLURM_STEP_NODELIST": "r[1-2]n[3,5]"},
        {},
        Hosts("Slurm", 3, 4, "r1n3:63139"),
    ),
    "Slurm, GPUs in common": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x1),1(x2)", "CUDA_VISIBLE_DEVICES": "0,1"},
        {},
        Hosts("Slurm", 3, 4, "node07:63139", (0,)),
    ),
    "Slurm, a GPU of its own": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"},
        {},
        SLURM_FOUND,
    ),
    "Slurm, one task": (SLURM | {"SLURM_NTASKS": "1"}, {}, Hosts("Slurm")),
    "Slurm, interactive shell": (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}, Hosts("Slurm")),
    "in the batch script of Slurm": (
        {name: value for name, value in SLURM.items() if "STEP" not in name},
        {},
        Hosts(),
    ),
    "Open MPI": (OPEN_MPI, {}, Hosts("Ompi", 1, 2, "10.96.0.1:62624", (1,))),
    "GKE": (GKE, {}, Hosts("GkeTpu", 2, 4, "localhost:8482")),
    "GKE, two slices": (GKE | SLICES, {}, Hosts("GkeTpu", 6, 8, "localhost:8482")),
    "GKE, one host": (
        GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {},
        Hosts("GkeTpu"),
    ),
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, in place of those that this machine has; JAX believes it sees TPU chips."""

    def set_variables(variables: dict[str, str]) -> None:
        for name in os.environ:
            if name.startswith(("V4JAX_", "SLURM_", "OMPI_", "JOB_", "TPU_WORKER", "MEGASCALE_")):
                monkeypatch.delenv(name)
        for name, value in ({"TPU_SKIP_MDS_QUERY": "1"} | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)

    return set_variables


@pytest.mark.parametrize("variables, flags, expected", FOUND.values(), ids=FOUND.keys())
def test_found(environment, variables, flags, expected):
    environment(variables)
    assert find_hosts(**flags) == expected


BAD = {
    "no coordinator": ({}, {"process_index": 0, "process_count": 2}, "coordinator is missing"),
    "only a coordinator": (
        {"V4JAX_COORDINATOR": "h:1"},
        {},
        r"process_index, process_count are missing: several processes need coordinator ",
    ),
    "no port": (EXPLICIT, {"coordinator": "h"}, "must be HOST:PORT of process 0, .* got 'h'"),
    "index too large": (EXPLICIT, {"process_index": 2}, "process_index must be from 0 to 1"),
    "no processes": (EXPLICIT, {"process_count": 0}, "process_count must be at least 1, got 0"),
    "no number": (
        EXPLICIT | {"V4JAX_PROCESS_COUNT": "two"},
        {},
        "V4JAX_PROCESS_COUNT must be a number from 0, got 'two'",
    ),
    "Slurm contradicts itself": (
        SLURM | {"SLURM_PROCID": "4"},
        {},
        r"process_index must be from 0 to 3, as process_count is 4 \(Slurm\); got 4",
    ),
    "GKE without index": (
        GKE | {"TPU_WORKER_ID": ""},
        {},
        r"JAX found the cluster GkeTpu but cannot tell .* \(ValueError: .*; give --coordinator, ",
    ),
}


@pytest.mark.parametrize("variables, flags, message", BAD.values(), ids=BAD.keys())
def test_contradictions_are_named(environment, variables, flags, message):
    environment(variables)
    with pytest.raises(ConfigError, match=message):
        find_hosts(**flags)


INDICES = {
    "Kubernetes": ({"JOB_COMPLETION_INDEX": "7"}, 7),
    "Slurm array": ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"}, 2),
    "Slurm": ({"SLURM_PROCID": "1"}, 1),
}


@pytest.mark.parametrize("variables, index", INDICES.values(), ids=INDICES.keys())
def test_job_index(variables, index):
    assert find_job_index(variables) == index


def test_job_index_nobody_says():
    with pytest.raises(ConfigError, match=r"JOB_COMPLETION_INDEX, .* say it, as in --shard=3/16"):
        find_job_index({})


def test_one_process_joins_nothing():
    assert start_hosts(Hosts()) == Hosts()


def test_used_device_comes_too_late():
    import jax

    jax.devices()
    with pytest.raises(V4JaxError, match="start_hosts has to come before the first use"):
        start_hosts(Hosts("explicit", 0, 2, "localhost:1"))


def test_unreachable_coordinator():
    """Nobody listens: the message has address, time and what to look at."""
    address = f"localhost:{_free_port()}"
    expected = (
        rf"process 1 of 2 \(explicit\), coordinator {address}: not joined within 0.3 s "
        r"\(.*refused\); process 0 has to be running there and the port open"
    )
    with pytest.raises(V4JaxError, match=expected):
        start_hosts(Hosts("explicit", 1, 2, address), timeout_seconds=0.3)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _start(*arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), *arguments]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    return subprocess.Popen(
        command,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _name(index: int, port: int) -> dict[str, str]:
    """Returns the variables of one of two processes."""
    return {
        "V4JAX_COORDINATOR": f"localhost:{port}",
        "V4JAX_PROCESS_INDEX": str(index),
        "V4JAX_PROCESS_COUNT": "2",
    }


@pytest.mark.slow
def test_two_processes_sum_over_eight_devices():
    port = _free_port()
    flags = [f"--coordinator=localhost:{port}", "--process_index=1", "--process_count=2"]
    workers = [_start("60", **_name(0, port)), _start(*flags)]  # both ways of saying it
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    # Every device holds its number from 1; the sum of eight is 36, on each process the same.
    said = [out.splitlines()[-1] for out, _ in outputs]
    assert said == ["36.0 of 8 devices, 4 here"] * 2
    said = [err.count("hosts: process 0 of 2 (explicit)") for _, err in outputs]
    assert said == [1, 0]  # process 0 speaks, once though joined twice


@pytest.mark.slow
def test_a_process_that_does_not_come():
    worker = _start("2", **_name(0, _free_port()))
    _, err = worker.communicate(timeout=120)
    assert worker.returncode != 0
    assert "warning: process 0 of 2 (explicit), " in err
    assert "not joined within 2 s (another process did not come)" in err
    assert "all 2 processes have to start; look at the logs of the others" in err
