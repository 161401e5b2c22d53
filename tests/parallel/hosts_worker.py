"""One of several processes: joins, and sums over the devices of all.

python hosts_worker.py TIMEOUT_SECONDS                    which process it is say the variables
python hosts_worker.py --coordinator=… --process_index=…  or the flags of the command line
"""

import sys

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.cli import hosts as cli
from v4jax.cli.flags import define, read
from v4jax.cli.hosts import HostFlags
from v4jax.errors import V4JaxError
from v4jax.parallel import make_mesh
from v4jax.parallel.hosts import find_hosts, start_hosts


def main() -> None:
    """Joins twice (the second time does nothing) and prints what the devices sum to."""
    try:
        for _ in range(2):
            if sys.argv[1].startswith("--"):
                values = flags.FlagValues()
                define(HostFlags, values)
                cli.start_hosts(read(HostFlags, values, values(sys.argv)[1:], "no words"))
            else:
                start_hosts(find_hosts(), timeout_seconds=float(sys.argv[1]))
    except V4JaxError as error:
        sys.exit(f"v4jax: error: {error}")
    mesh = make_mesh(data=len(jax.devices()))
    over_data = PartitionSpec("data")
    numbers = np.arange(1.0, len(jax.devices()) + 1, dtype=np.float32)
    shares = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, over_data), lambda place: numbers[place]
    )
    total = jax.jit(
        jax.shard_map(
            lambda share: jax.lax.psum(share, "data"),
            mesh=mesh,
            in_specs=over_data,
            out_specs=PartitionSpec(),
        )
    )(shares)
    here = float(total.addressable_data(0)[0])
    print(f"{here} of {len(jax.devices())} devices, {len(jax.local_devices())} here")


if __name__ == "__main__":
    main()
