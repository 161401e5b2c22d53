"""Which process of which job this is: tables of environments; and two processes that join."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc,job-2.svc,job-3.svc", "TPU_WORKER_ID": "2"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
}
EXPLICIT = {
    "V4JAX_COORDINATOR": "10.0.0.2:1234",
    "V4JAX_PROCESS_INDEX": "1",
    "V4JAX_PROCESS_COUNT": "2",
}
METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\n",
}


class Found(NamedTuple):
    """Variables, flags and metadata → what they say."""

    variables: dict
    expected: Hosts
    flags: dict = {}  # noqa: RUF012
    metadata: dict = {}  # noqa: RUF012


FOUND = {
    "nothing": Found({}, Hosts()),
    "flags": Found(
        {},
        Hosts("explicit", 0, 2, "h:1"),
        {"coordinator": "h:1", "process_index": 0, "process_count": 2},
    ),
    "variables": Found(EXPLICIT, Hosts("explicit", 1, 2, "10.0.0.2:1234")),
    "flags win": Found(EXPLICIT, Hosts("explicit", 0, 2, "10.0.0.2:1234"), {"process_index": 0}),
    "index of an Indexed Job": Found(
        EXPLICIT | {"V4JAX_PROCESS_INDEX": "", "JOB_COMPLETION_INDEX": "0"},
        Hosts("explicit", 0, 2, "10.0.0.2:1234"),
    ),
    "an Indexed Job alone joins nothing": Found({"JOB_COMPLETION_INDEX": "3"}, Hosts()),
    "explicitly one": Found({}, Hosts("explicit"), {"process_count": 1}),
    "explicit before SLURM": Found(SLURM | EXPLICIT, Hosts("explicit", 1, 2, "10.0.0.2:1234")),
    "SLURM": Found(SLURM, Hosts("SLURM", 3, 4, "node07:50851")),
    "SLURM, GPUs in common": Found(
        SLURM
        | {
            "SLURM_STEP_TASKS_PER_NODE": "2(x1),1(x2)",
            "SLURM_LOCALID": "1",
            "CUDA_VISIBLE_DEVICES": "0,1",
        },
        Hosts("SLURM", 3, 4, "node07:50851", (1,)),
    ),
    "SLURM, a GPU of its own": Found(
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"},
        Hosts("SLURM", 3, 4, "node07:50851"),
    ),
    "SLURM, one task": Found(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Hosts("SLURM")),
    "SLURM, interactive shell": Found(
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Hosts("SLURM")
    ),
    "in the batch script of SLURM": Found(SLURM | {"SLURM_STEP_NODELIST": ""}, Hosts()),
    "GKE": Found(GKE, Hosts("GKE TPU", 2, 4, "job-0.svc:8482")),
    "GKE, addresses with ports": Found(
        {"TPU_PROCESS_ADDRESSES": "x:8471,y:8471", "TPU_WORKER_ID": "1"},
        Hosts("GKE TPU", 1, 2, "x:8482"),
    ),
    "GKE, two slices": Found(GKE | SLICES, Hosts("GKE TPU", 6, 8, "first.svc:8482")),
    "GKE, one host": Found(
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Hosts("GKE TPU")
    ),
    "Cloud TPU, three slices": Found(
        {}, Hosts("Cloud TPU", 5, 6, "10.0.0.9:8482"), metadata=METADATA
    ),
    "Cloud TPU, one slice": Found(
        {},
        Hosts("Cloud TPU", 1, 2, "h0:8482"),
        metadata={"agent-worker-number": "1", "worker-network-endpoints": "h0,h1"},
    ),
    "Cloud TPU, one host": Found(
        {},
        Hosts("Cloud TPU"),
        metadata={"agent-worker-number": "0", "worker-network-endpoints": "h0"},
    ),
    "no Cloud TPU, says libtpu": Found({"TPU_SKIP_MDS_QUERY": "1"}, Hosts(), metadata=METADATA),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND.keys())
def test_found(case):
    hosts = find_hosts(case.variables, **case.flags, read_metadata=case.metadata.get)
    assert hosts == case.expected


NODES = {
    "node7": "node7",
    "node7,other": "node7",
    "node[07-09,12],other": "node07",
    "r[1-2]n[3,5]": "r1n3",
    "gpu-a[010]": "gpu-a010",
}


@pytest.mark.parametrize("nodes, first", NODES.items())
def test_first_node_is_the_coordinator(nodes, first):
    hosts = find_hosts(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert hosts.coordinator.split(":")[0] == first


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
    "half of SLURM": (
        {"SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": "1"},
        {},
        "SLURM_STEP_NODELIST is set but SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID are missing",
    ),
    "SLURM contradicts itself": (SLURM | {"SLURM_PROCID": "4"}, {}, "SLURM_PROCID must be from 0"),
    "GKE without index": (
        GKE | {"TPU_WORKER_ID": ""},
        {},
        "TPU_WORKER_HOSTNAMES is set but TPU_WORKER_ID is missing",
    ),
    "GKE contradicts itself": (
        GKE | {"TPU_WORKER_ID": "4"},
        {},
        "TPU_WORKER_ID must be below the number of workers, 4, got 4",
    ),
    "half of several slices": (
        GKE | {"MEGASCALE_NUM_SLICES": "2"},
        {},
        "MEGASCALE_NUM_SLICES is set but MEGASCALE_SLICE_ID, MEGASCALE_COORDINATOR_ADDRESS are",
    ),
    "slice too large": (
        GKE | SLICES | {"MEGASCALE_SLICE_ID": "2"},
        {},
        "MEGASCALE_SLICE_ID must be below MEGASCALE_NUM_SLICES = 2, got 2",
    ),
}


@pytest.mark.parametrize("variables, flags, message", BAD.values(), ids=BAD.keys())
def test_contradictions_are_named(variables, flags, message):
    with pytest.raises(ConfigError, match=message):
        find_hosts(variables, **flags)


INDICES = {
    "Kubernetes": ({"JOB_COMPLETION_INDEX": "7"}, 7),
    "SLURM array": ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"}, 2),
    "SLURM": ({"SLURM_PROCID": "1"}, 1),
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
