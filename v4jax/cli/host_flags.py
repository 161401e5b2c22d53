"""The flags of a verb that runs one model on several hosts: which process of the job this is.

Clusters that JAX recognizes (Cloud TPU, GKE TPU, Slurm, Open MPI) need none of them.
"""

import signal
import threading
from typing import Any


def define_host_flags(flags: Any, values: Any) -> None:
    """Defines the flags that say which process this is."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT where process 0 of several processes listens. Found automatically on Cloud TPU, "
        "GKE TPU, Slurm and Open MPI.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_index", None, "Which process this is, from 0.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_count", None, "How many processes the job has.", flag_values=values
    )


def find_hosts(values: Any) -> Any:
    """Returns the Hosts that flags and environment describe. Starts nothing."""
    from v4jax.parallel import hosts

    return hosts.find_hosts(
        coordinator=values.coordinator,
        process_index=values.process_index,
        process_count=values.process_count,
    )


def start_hosts(values: Any) -> Any:
    """Joins the processes of the job, before any use of a device, and returns the Hosts."""
    from v4jax.parallel import hosts

    return hosts.start_hosts(find_hosts(values))


def start_serving(values: Any) -> Any:
    """Joins the processes that serve one model, as `start_hosts`, and compares their commands.

    SIGTERM and ctrl-C end each process as they would end a single one.

    Raises:
      ConfigError: the processes were given different flags.
    """
    from v4jax.errors import ConfigError
    from v4jax.parallel.agreement import gather_json

    hosts = start_hosts(values)
    if hosts.count == 1:
        return hosts
    if threading.current_thread() is threading.main_thread():
        # JAX now handles SIGTERM, and would only note it.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    given = values.flag_values_dict()
    for name in ("coordinator", "process_index", "process_count"):
        del given[name]
    commands = gather_json(given)
    for process, command in enumerate(commands):
        for name, first in commands[0].items():
            if command[name] != first:
                raise ConfigError(
                    f"--{name} is {first!r} for process 0 and {command[name]!r} for process "
                    f"{process}, which are to serve one model; give all of them the same flags. "
                    "Separate jobs, each with its part of the input, take --shard=auto/COUNT"
                )
    return hosts
