"""The flags of a verb that runs one model on several hosts: which process of the job this is.

Where the environment says it (Cloud TPU, GKE, SLURM) none of them is needed.
"""

from typing import Any


def define_host_flags(flags: Any, values: Any) -> None:
    """Defines what says which process this is."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT where process 0 of a job of several listens. Found by itself on Cloud TPU, GKE "
        "and SLURM.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_index", None, "Which process this is, from 0.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_count", None, "How many processes the job has.", flag_values=values
    )


def start_hosts(values: Any) -> Any:
    """Joins the processes of the job and returns the Hosts; comes before any use of a device."""
    from v4jax.parallel import hosts

    return hosts.start_hosts(
        hosts.find_hosts(
            coordinator=values.coordinator,
            process_index=values.process_index,
            process_count=values.process_count,
        )
    )
