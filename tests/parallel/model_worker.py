"""One model over all devices of a job: read, prefill, decode.

python model_worker.py FOLDER OUTPUT    which process this is say the variables V4JAX_…

Every process makes the same calls. Process 0 writes what came out; `run` is also what a single
process with as many devices does.
"""

import sys

import jax
import numpy as np

import v4jax
from v4jax.checkpoint import safetensors_file
from v4jax.parallel import make_mesh
from v4jax.parallel.hosts import find_hosts, start_hosts

MESH = dict(data=2, expert=2, context=2)  # of two processes with four devices, `data` spans both
CALLS = ((512, (512, 389)), (1, (1, 1)), (1, (1, 0)))  # tokens of a call, real ones per sequence
IDS = np.random.RandomState(0).randint(0, 256, (2, 600))


def run(folder: str) -> dict[str, np.ndarray]:
    """Returns the logits of every call's real tokens, by call and sequence."""
    from jax.experimental import multihost_utils

    model = v4jax.load(folder, mesh=make_mesh(**MESH))
    cache, done, found = model.init_cache(2, 1024), np.zeros(2, int), {}
    for number, (width, counts) in enumerate(CALLS):
        tokens = np.zeros((2, width), np.int32)
        for slot, count in enumerate(counts):
            tokens[slot, :count] = IDS[slot, done[slot] : done[slot] + count]
        logits, cache = model.extend(tokens, cache, np.array(counts), donate=True)
        logits = multihost_utils.process_allgather(logits, tiled=True)
        found |= {f"{number}.{slot}": logits[slot, :count] for slot, count in enumerate(counts)}
        done += counts
    return found


def main() -> None:
    """Joins the others, runs, and writes on process 0."""
    start_hosts(find_hosts(), timeout_seconds=60)
    read, read_bytes = 0, safetensors_file.read_bytes

    def count(file, offset, out):
        nonlocal read
        read += len(out)
        read_bytes(file, offset, out)

    safetensors_file.read_bytes = count
    found = run(sys.argv[1])
    print(f"read {read} bytes of the checkpoint")
    if jax.process_index() == 0:
        np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
