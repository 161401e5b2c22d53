"""The processes of one job: which of them this is, and how they start together."""

import dataclasses
import signal
import threading
from typing import Any

from v4jax.config.ranges import within


@dataclasses.dataclass(frozen=True)
class HostFlags:
    """Which process of a job this is. Clusters that JAX recognizes need none of these flags.

    Attributes:
      coordinator: HOST:PORT where process 0 of several processes listens. Found automatically on
        Cloud TPU, GKE TPU, Slurm and Open MPI.
      process_index: Which process this is, from 0.
      process_count: How many processes the job has.
    """

    coordinator: str | None = None
    process_index: int | None = within(0, 1 << 20, None)
    process_count: int | None = within(1, 1 << 20, None)


def find_hosts(flags: HostFlags) -> Any:
    """Returns the Hosts that flags and environment describe. Starts nothing."""
    from v4jax.parallel import hosts

    return hosts.find_hosts(**dataclasses.asdict(flags))


def start_hosts(flags: HostFlags) -> Any:
    """Joins the processes of the job, before any use of a device, and returns the Hosts."""
    from v4jax.parallel import hosts

    return hosts.start_hosts(find_hosts(flags))


def start_serving(flags: Any) -> Any:
    """Joins the processes that serve one model, as `start_hosts`, and compares their commands.

    SIGTERM and ctrl-C end each process as they would end a single one.

    Args:
      flags: of a verb; the field `hosts` says which process this is.

    Raises:
      ConfigError: the processes were given different flags.
    """
    from v4jax.cli.flags import as_dict
    from v4jax.errors import ConfigError
    from v4jax.parallel.agreement import gather_json

    hosts = start_hosts(flags.hosts)
    if hosts.count == 1:
        return hosts
    if threading.current_thread() is threading.main_thread():
        # JAX now handles SIGTERM, and would only note it.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    commands = gather_json(as_dict(dataclasses.replace(flags, hosts=HostFlags())))
    for process, command in enumerate(commands):
        for name, first in commands[0].items():
            if command[name] != first:
                raise ConfigError(
                    f"--{name} is {first!r} for process 0 and {command[name]!r} for process "
                    f"{process}, which are to serve one model; give all of them the same flags. "
                    "Separate jobs, each with its part of the input, take --shard=auto/COUNT"
                )
    return hosts
