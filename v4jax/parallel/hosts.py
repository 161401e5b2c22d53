"""The processes of a job: who else is there, which of them this one is, and joining them.

`find_hosts` reads what the job's launcher left behind and touches nothing; `start_hosts` then
connects the processes through `jax.distributed`, before anything uses a device. The environments,
first match wins:

    explicit     --coordinator, --process_index, --process_count, or the variables of the same names
                 V4JAX_COORDINATOR, …; an Indexed Job of Kubernetes may leave the index to
                 JOB_COMPLETION_INDEX
    SLURM        a step that srun started (in the batch script itself a process is alone)
    GKE TPU      TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_… of several slices
    Cloud TPU    the metadata server, asked only where there are TPU chips
    one process  none of these

A job that gives every index its own documents has nothing to join: `find_job_index` says which
index this process is (`v4jax batch --shard`).
"""

import dataclasses
import glob
import math
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from v4jax import log
from v4jax.errors import ConfigError, V4JaxError

PORT = 8482  # of the coordinator, where the environment names only its host
START_SECONDS = 300.0  # machines of one job rarely start within the same minute
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_METADATA_SECONDS = 5.0
ARRAY_VARIABLE = "SLURM_ARRAY_TASK_ID"  # the same for all processes of a task
_INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", ARRAY_VARIABLE, "SLURM_PROCID")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """One process among those of a job.

    Attributes:
      environment: where this was read, as in the module's list.
      index, count: this process is number `index`, from 0, of `count`.
      coordinator: host:port where process 0 listens; empty for one process.
      local_devices: the accelerators of this machine that belong to this process; None: all.
    """

    environment: str = "one process"
    index: int = 0
    count: int = 1
    coordinator: str = ""
    local_devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.count == 1:
            return "one process"
        place = f"process {self.index} of {self.count} ({self.environment})"
        return f"{place}, coordinator {self.coordinator}"


def find_hosts(
    variables: Mapping[str, str] | None = None,
    *,
    coordinator: str | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    read_metadata: Callable[[str], str | None] | None = None,
) -> Hosts:
    """Returns which process of which job this is. Starts nothing.

    Args:
      variables: the environment; by default that of the process.
      coordinator, process_index, process_count: flags; they win over the variables.
      read_metadata: attribute of a Cloud TPU machine → its value, None where there is none.

    Raises:
      ConfigError: the environment contradicts itself or lacks something; the message names it.
    """
    variables = os.environ if variables is None else variables
    return (
        _find_explicit(variables, coordinator, process_index, process_count)
        or _find_slurm(variables)
        or _find_gke(variables)
        or _find_cloud_tpu(variables, read_metadata or _read_metadata)
        or Hosts()
    )


def start_hosts(hosts: Hosts, *, timeout_seconds: float = START_SECONDS) -> Hosts:
    """Joins the processes of a job and logs once which one this is; one process joins nothing.

    Has to come before the first use of a device. A second call does nothing.

    Raises:
      V4JaxError: the coordinator did not come in time, or a device has been used already. Where
        another process does not come, JAX ends this one; a warning says why.
    """
    if hosts.count == 1:
        return hosts
    import jax

    if not jax.distributed.is_initialized():
        if hosts.index:
            _wait_for(hosts, timeout_seconds)
        # Where another process does not come, JAX ends this one from within, and what it prints
        # names no remedy. So that is said a moment before.
        missing = TimeoutError("another process did not come")
        warning = threading.Timer(
            timeout_seconds, lambda: log.warning(_explain(hosts, timeout_seconds, missing))
        )
        warning.daemon = True
        warning.start()
        try:
            jax.distributed.initialize(
                hosts.coordinator,
                hosts.count,
                hosts.index,
                local_device_ids=hosts.local_devices,
                cluster_detection_method="deactivate",  # `find_hosts` has decided
                initialization_timeout=math.ceil(timeout_seconds) + 1,
            )
        except (RuntimeError, ValueError) as error:
            raise V4JaxError(_explain(hosts, timeout_seconds, error)) from error
        finally:
            warning.cancel()
    log.once(f"hosts: {hosts}")
    return hosts


def find_job_index(variables: Mapping[str, str] | None = None) -> int:
    """Returns which of a job's independent parts this process is, counted from 0.

    Kubernetes gives it in JOB_COMPLETION_INDEX (Jobs with `completionMode: Indexed`), SLURM in
    SLURM_ARRAY_TASK_ID (sbatch --array) or, without an array, in SLURM_PROCID.

    Raises:
      ConfigError: no variable says it, or one is no index.
    """
    variables = os.environ if variables is None else variables
    name = find_index_variable(variables)
    if name is not None:
        return _number(variables, name)
    raise ConfigError(
        f"none of {', '.join(_INDEX_VARIABLES)} is set, so this process does not know which part "
        "of the job it is; say it, as in --shard=3/16"
    )


def find_index_variable(variables: Mapping[str, str] | None = None) -> str | None:
    """Returns the variable that `find_job_index` reads; None where there is none."""
    variables = os.environ if variables is None else variables
    return next((name for name in _INDEX_VARIABLES if variables.get(name)), None)


def _find_explicit(
    variables: Mapping[str, str], coordinator: str | None, index: int | None, count: int | None
) -> Hosts | None:
    coordinator = coordinator or variables.get("V4JAX_COORDINATOR") or ""
    if count is None and variables.get("V4JAX_PROCESS_COUNT"):
        count = _number(variables, "V4JAX_PROCESS_COUNT")
    if index is None and variables.get("V4JAX_PROCESS_INDEX"):
        index = _number(variables, "V4JAX_PROCESS_INDEX")
    if not coordinator and index is None and count is None:
        return None
    if index is None and variables.get("JOB_COMPLETION_INDEX"):
        index = _number(variables, "JOB_COMPLETION_INDEX")
    if count == 1 and not index:
        return Hosts("explicit")
    given = {"coordinator": coordinator, "process_index": index, "process_count": count}
    missing = [name for name, value in given.items() if value in (None, "")]
    if missing:
        raise ConfigError(
            f"{_both(missing)} missing: several processes need coordinator (HOST:PORT), "
            "process_index and process_count, as flags or as the variables V4JAX_COORDINATOR, "
            "V4JAX_PROCESS_INDEX and V4JAX_PROCESS_COUNT"
        )
    return _check(Hosts("explicit", index, count, coordinator), "process_index", "process_count")


def _find_slurm(variables: Mapping[str, str]) -> Hosts | None:
    if not variables.get("SLURM_STEP_NODELIST"):
        return None
    # The step's own number; that of the job counts tasks of an interactive shell not yet started.
    tasks = "SLURM_STEP_NUM_TASKS" if variables.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    names = ("SLURM_JOB_ID", "SLURM_PROCID", tasks, "SLURM_LOCALID")
    _require(variables, "SLURM_STEP_NODELIST", names)
    job, index, count, local = (_number(variables, name) for name in names)
    if count == 1:
        return Hosts("SLURM")
    host = _first_node(variables["SLURM_STEP_NODELIST"])
    port = 49152 + job % 16384  # of the dynamic ports; jobs that share a node rarely share it
    # Tasks of one machine that all see all of its GPUs take one each, in their order.
    visible = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = (local,) if len(visible) > 1 and _tasks_a_node(variables) > 1 else None
    hosts = Hosts("SLURM", index, count, f"{host}:{port}", devices)
    return _check(hosts, "SLURM_PROCID", tasks)


def _find_gke(variables: Mapping[str, str]) -> Hosts | None:
    name = "TPU_PROCESS_ADDRESSES"
    if not variables.get(name):
        name = "TPU_WORKER_HOSTNAMES"
    if not variables.get(name):
        return None
    _require(variables, name, ("TPU_WORKER_ID",))
    workers = [worker.split(":")[0] for worker in variables[name].split(",")]
    return _join_slices("GKE TPU", workers, _number(variables, "TPU_WORKER_ID"), variables)


def _find_cloud_tpu(
    variables: Mapping[str, str], read_metadata: Callable[[str], str | None]
) -> Hosts | None:
    if variables.get("TPU_SKIP_MDS_QUERY"):  # libtpu's own way of saying: this is no Cloud TPU
        return None
    values = {"TPU_WORKER_ID": read_metadata("agent-worker-number")}
    endpoints = read_metadata("worker-network-endpoints")
    if values["TPU_WORKER_ID"] is None or not endpoints:
        return None
    for line in (read_metadata("tpu-env") or "").splitlines():  # lines such as KEY: 'value'
        key, _, value = line.partition(":")
        if key.strip().startswith("MEGASCALE_"):
            values[key.strip()] = value.strip().strip("'\"")
    values |= {name: value for name, value in variables.items() if name.startswith("MEGASCALE_")}
    # An endpoint is a host, or name:id:host.
    workers = [worker.split(":")[-1] for worker in endpoints.split(",")]
    return _join_slices("Cloud TPU", workers, _number(values, "TPU_WORKER_ID"), values)


def _join_slices(
    environment: str, workers: list[str], worker: int, variables: Mapping[str, str]
) -> Hosts:
    """Counts processes slice by slice, each slice's in the order of its workers."""
    slices, this, first = 1, 0, workers[0]
    if variables.get("MEGASCALE_NUM_SLICES"):
        names = ("MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
        _require(variables, "MEGASCALE_NUM_SLICES", names)
        slices = _number(variables, "MEGASCALE_NUM_SLICES")
        this = _number(variables, "MEGASCALE_SLICE_ID")
        first = variables["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0]
        if this >= slices:
            raise ConfigError(
                f"MEGASCALE_SLICE_ID must be below MEGASCALE_NUM_SLICES = {slices}, got {this}"
            )
    if worker >= len(workers):
        raise ConfigError(
            f"TPU_WORKER_ID must be below the number of workers, {len(workers)}, got {worker}"
        )
    count = slices * len(workers)
    if count == 1:
        return Hosts(environment)
    return Hosts(environment, this * len(workers) + worker, count, f"{first}:{PORT}")


def _check(hosts: Hosts, index_name: str, count_name: str) -> Hosts:
    if hosts.count < 1:
        raise ConfigError(f"{count_name} must be at least 1, got {hosts.count}")
    if not 0 <= hosts.index < hosts.count:
        raise ConfigError(
            f"{index_name} must be from 0 to {hosts.count - 1}, as {count_name} is {hosts.count}; "
            f"got {hosts.index}"
        )
    host, _, port = hosts.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"coordinator must be HOST:PORT of process 0, such as 10.0.0.2:{PORT}; got "
            f"{hosts.coordinator!r}"
        )
    return hosts


def _require(variables: Mapping[str, str], found: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not variables.get(name)]
    if missing:
        raise ConfigError(
            f"{found} is set but {_both(missing)} missing; set what is missing, or take away "
            f"{found} to run one process"
        )


def _both(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _number(variables: Mapping[str, str], name: str) -> int:
    value = str(variables[name]).strip()
    if not re.fullmatch(r"[0-9]+", value):
        raise ConfigError(f"{name} must be a number from 0, got {value!r}")
    return int(value)


def _first_node(nodes: str) -> str:
    """Returns the first of `node7`, `node7,other`, `node[07-09,12],other` or `r[1-2]n[3-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _tasks_a_node(variables: Mapping[str, str]) -> int:
    # Such as 2(x3),1: two tasks on each of three nodes, one on the next.
    counts = variables.get("SLURM_STEP_TASKS_PER_NODE") or "1"
    return max(int(count) for count in re.findall(r"(?:^|,)(\d+)", counts))


def _read_metadata(key: str) -> str | None:
    if not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return None
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _wait_for(hosts: Hosts, timeout_seconds: float) -> None:
    """Waits until process 0 listens.

    JAX would wait as well, but its message names neither the address nor the reason.
    """
    host, _, port = hosts.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise V4JaxError(_explain(hosts, timeout_seconds, error)) from error
        time.sleep(0.2)


def _explain(hosts: Hosts, timeout_seconds: float, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "before any JAX" in reason:
        return f"{hosts}: start_hosts has to come before the first use of a device"
    if hosts.index == 0:
        remedy = (
            f"process 0 has to be able to listen on port {hosts.coordinator.rpartition(':')[2]}, "
            f"and all {hosts.count} processes have to start; look at the logs of the others"
        )
    else:
        remedy = (
            "process 0 has to be running there and the port open between the machines; look at "
            "its log, and at the firewall"
        )
    return f"{hosts}: not joined within {timeout_seconds:g} s ({reason}); {remedy}"
