"""The processes of a job: how many there are, which one this is, and joining them.

`find_hosts` asks the flags, the variables V4JAX_…, and then JAX, which recognizes Cloud TPU, GKE
TPU, Slurm and Open MPI. It starts nothing. `start_hosts` connects the processes through
`jax.distributed`, before anything uses a device.

A job that gives each process its own documents joins nothing: `find_job_index` says which part of
the input is this process's (`v4jax batch --shard`).
"""

import dataclasses
import math
import os
import re
import socket
import threading
import time
from collections.abc import Mapping

from v4jax import log
from v4jax.errors import ConfigError, V4JaxError

START_SECONDS = 300.0  # machines of one job rarely start within the same minute
ARRAY_VARIABLE = "SLURM_ARRAY_TASK_ID"  # the same for all processes of a task
_INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", ARRAY_VARIABLE, "SLURM_PROCID")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """One process among those of a job.

    Attributes:
      environment: "explicit", the cluster that JAX found ("Slurm", "GkeTpu", …) or "one process".
      index, count: this is process `index`, from 0, of `count`.
      coordinator: host:port where process 0 listens; empty for one process.
      local_devices: GPUs of this machine that belong to this process; empty: all.
    """

    environment: str = "one process"
    index: int = 0
    count: int = 1
    coordinator: str = ""
    local_devices: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.count == 1:
            return "one process"
        process = f"process {self.index} of {self.count} ({self.environment})"
        return f"{process}, coordinator {self.coordinator}"


def find_hosts(
    *,
    coordinator: str | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Hosts:
    """Returns which process of which job this is. Starts nothing.

    Each value comes from the argument, else from the variable V4JAX_COORDINATOR,
    V4JAX_PROCESS_INDEX or V4JAX_PROCESS_COUNT, else from the cluster that JAX finds. Where one is
    explicit, an Indexed Job of Kubernetes may leave the index to JOB_COMPLETION_INDEX.

    Raises:
      ConfigError: a value is missing, malformed or contradicts another; the message names it.
    """
    coordinator = coordinator or os.environ.get("V4JAX_COORDINATOR") or None
    index = _or_variable(process_index, "V4JAX_PROCESS_INDEX")
    count = _or_variable(process_count, "V4JAX_PROCESS_COUNT")
    if count == 1 and not index:
        return Hosts("explicit")
    if index is None and (coordinator or count is not None):
        index = _or_variable(None, "JOB_COMPLETION_INDEX")
    given = {"coordinator": coordinator, "process_index": index, "process_count": count}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return _check(Hosts("explicit", index, count, coordinator))
    found = _ask_jax()
    if found.count > 1:
        index = found.index if index is None else index
        count = found.count if count is None else count
        coordinator = coordinator or found.coordinator
        return _check(Hosts(found.environment, index, count, coordinator, found.local_devices))
    if len(missing) < 3:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: several "
            "processes need coordinator (HOST:PORT), process_index and process_count, as flags or "
            "as the variables V4JAX_COORDINATOR, V4JAX_PROCESS_INDEX and V4JAX_PROCESS_COUNT"
        )
    return found


def start_hosts(hosts: Hosts, *, timeout_seconds: float = START_SECONDS) -> Hosts:
    """Joins the processes of a job and logs which one this is. One process joins nothing.

    It has to come before the first use of a device. A second call does nothing.

    Raises:
      V4JaxError: the coordinator did not come in time, or a device has been used already. When
        another process does not come, JAX ends this one; a warning says why.
    """
    if hosts.count == 1:
        return hosts
    import jax

    if not jax.distributed.is_initialized():
        if hosts.index:
            _wait_for_coordinator(hosts, timeout_seconds)
        # When another process does not come, JAX ends this one from within and names no remedy.
        # This warning comes a moment earlier.
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
                local_device_ids=hosts.local_devices or None,
                cluster_detection_method="deactivate",  # `find_hosts` has asked
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

    Kubernetes gives it in JOB_COMPLETION_INDEX (Jobs with `completionMode: Indexed`), Slurm in
    SLURM_ARRAY_TASK_ID (sbatch --array) or, without an array, in SLURM_PROCID.

    Raises:
      ConfigError: no variable says it, or one is no index.
    """
    variables = os.environ if variables is None else variables
    name = find_index_variable(variables)
    if name is not None:
        return _to_number(name, variables[name])
    raise ConfigError(
        f"none of {', '.join(_INDEX_VARIABLES)} is set, so this process does not know which part "
        "of the job it is; say it, as in --shard=3/16"
    )


def find_index_variable(variables: Mapping[str, str] | None = None) -> str | None:
    """Returns the variable that `find_job_index` reads; None where there is none."""
    variables = os.environ if variables is None else variables
    return next((name for name in _INDEX_VARIABLES if variables.get(name)), None)


def _ask_jax() -> Hosts:
    """Returns what JAX's own cluster detection says, before `jax.distributed` acts on it.

    `jax.distributed.initialize` would ask the same classes, but cannot be asked without joining.
    Kubernetes is left out: an index of its Indexed Jobs may be a part of the input (`--shard`), and
    asking its API takes a package and a permission.
    """
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or cluster is clusters.K8sCluster:
            continue
        name = cluster.__name__.removesuffix("Cluster")
        try:
            if not cluster.is_env_present():
                continue
            count = cluster.get_process_count()
            if name == "Slurm" and "SLURM_STEP_NUM_TASKS" in os.environ:
                # In an interactive shell the other count is that of tasks not yet started.
                count = int(os.environ["SLURM_STEP_NUM_TASKS"])
            if count == 1:
                return Hosts(name)
            index, local_index = cluster.get_process_id(), cluster.get_local_process_id()
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(math.ceil(START_SECONDS), port)
        except Exception as error:  # the classes raise whatever a bad variable leads to
            raise ConfigError(
                f"JAX found the cluster {name} but cannot tell which process this is "
                f"({type(error).__name__}: {error}); give --coordinator, --process_index and "
                "--process_count"
            ) from error
        if name == "Slurm":
            address = (
                _first_node(os.environ["SLURM_STEP_NODELIST"]) + address[address.rindex(":") :]
            )
        return Hosts(name, index, count, address, _choose_devices(local_index))
    return Hosts()


def _choose_devices(local_index: int | None) -> tuple[int, ...]:
    """Returns the GPUs of one of the processes on this machine; empty: all it can see.

    JAX by itself gives every process of Slurm and Open MPI one GPU. Here a process that is alone on
    its machine, or sees only a GPU of its own, takes all that it sees.
    """
    # Slurm's value is such as 2(x3),1: two tasks on each of three nodes, one on the next.
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", tasks)
    shares_machine = any(int(count) > 1 for count in re.findall(r"(?:^|,)(\d+)", tasks))
    sees_several = "," in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    return (local_index,) if local_index is not None and shares_machine and sees_several else ()


def _first_node(nodes: str) -> str:
    """Returns the first of `node7`, `node7,other`, `node[07-09,12],other` or `r[1-2]n[3-4]`.

    JAX (0.12) stops at the first bracket, and would name the last of these `r1`.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _check(hosts: Hosts) -> Hosts:
    if hosts.count < 1:
        raise ConfigError(f"process_count must be at least 1, got {hosts.count}")
    if not 0 <= hosts.index < hosts.count:
        raise ConfigError(
            f"process_index must be from 0 to {hosts.count - 1}, as process_count is "
            f"{hosts.count} ({hosts.environment}); got {hosts.index}"
        )
    host, _, port = hosts.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            "coordinator must be HOST:PORT of process 0, such as 10.0.0.2:8482; got "
            f"{hosts.coordinator!r}"
        )
    return hosts


def _or_variable(value: int | None, name: str) -> int | None:
    text = os.environ.get(name)
    return _to_number(name, text) if value is None and text else value


def _to_number(name: str, text: str) -> int:
    if not re.fullmatch(r"\s*[0-9]+\s*", text):
        raise ConfigError(f"{name} must be a number from 0, got {text.strip()!r}")
    return int(text)


def _wait_for_coordinator(hosts: Hosts, timeout_seconds: float) -> None:
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
