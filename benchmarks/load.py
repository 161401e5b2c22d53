"""Peak host memory and speed of reading and writing a checkpoint.

    python -m benchmarks.load                      about 1 GiB, released formats
    python -m benchmarks.load --gib=4 --keep=big

A checkpoint of random bytes is written. A fresh process then reads it and writes it again, and its
peak resident memory is compared with the model's size.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import machine

MIB = 2**20


def make_config(gib: float):
    """Returns a configuration of about `gib` as released, most of it in routed experts."""
    from v4jax.config import ModelConfig
    from v4jax.config.loading import build
    from v4jax.config.models import tiny

    config = tiny.get_config()
    config.update(
        dict(
            hidden_size=1024,
            num_hidden_layers=9,
            compress_ratios=(0, *(4, 128) * 4, 0),
            num_attention_heads=16,
            head_dim=128,
            q_lora_rank=512,
            o_groups=4,
            o_lora_rank=256,
            moe_intermediate_size=512,
            n_routed_experts=max(4, round(120 * gib)),
        )
    )
    return build(ModelConfig, config, "model")


def write_random(config, folder: pathlib.Path, shard_bytes: int = 256 * MIB) -> int:
    """Writes a released checkpoint of random bytes; returns the bytes of its tensors."""
    from v4jax.checkpoint import hf_writer
    from v4jax.checkpoint.hf_folder import INDEX_NAME
    from v4jax.checkpoint.safetensors_file import encode_header
    from v4jax.config import get_numerics
    from v4jax.config.to_hf import model_config_to_hf
    from v4jax.model import abstract_transformer

    folder.mkdir(parents=True, exist_ok=True)
    model = abstract_transformer(config, get_numerics("released"))
    pieces = hf_writer.plan_pieces(model, "released")
    files = hf_writer.name_files(hf_writer.plan_shards(list(pieces.values()), shard_bytes))
    random, total = np.random.default_rng(0), 0
    for name, contents in files.items():
        header, tensors = encode_header(contents)
        with open(folder / name, "wb") as file:
            file.write(header)
            for tensor in tensors:
                values = random.integers(0, 100, tensor.nbytes, np.uint8)
                if tensor.dtype == "I64":  # a routing table: expert ids
                    values = np.zeros(tensor.nbytes, np.uint8)
                file.write(values.tobytes())
                total += tensor.nbytes
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config)))
    (folder / INDEX_NAME).write_text(json.dumps(hf_writer.build_index(files)))
    return total


def measure(folder: pathlib.Path, output: pathlib.Path | None = None) -> dict:
    """Reads (and writes) in this process; returns seconds, and peak bytes above the start."""
    import jax

    from v4jax.checkpoint import census, read_model, total, write_model
    from v4jax.config import get_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.model import abstract_transformer

    # What every run needs before the first weight: the backend, compiled code, the abstract model.
    abstract_transformer(load_model_config("tiny"), get_numerics("released"))
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    before = peak_bytes()
    # An accelerator takes the arrays away: what the host needs then is what stays here.
    read_model(folder, put=lambda path, array: jax.device_put(np.zeros(1)))
    host_peak_bytes = peak_bytes() - before
    start = time.perf_counter()
    model = read_model(folder)
    result = {
        "host_peak_bytes": host_peak_bytes,
        "read_seconds": time.perf_counter() - start,
        "read_peak_bytes": peak_bytes() - before,
        "model_bytes": total(census(model)).memory_bytes,
        "largest_bytes": max(entry.memory_bytes for entry in census(model)),
    }
    if output is not None:
        start = time.perf_counter()
        write_model(model, output)
        result["write_seconds"] = time.perf_counter() - start
        result["write_peak_bytes"] = peak_bytes() - before
    return result


def peak_bytes() -> int:
    """Returns the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_elsewhere(folder: pathlib.Path, output: pathlib.Path | None = None) -> dict:
    """As `measure`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load", f"--measure={folder}"]
    command += [f"--output={output}"] if output else []
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--keep", type=pathlib.Path, help="folder that keeps the checkpoint")
    parser.add_argument("--measure", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.output)))
        return
    work = pathlib.Path(tempfile.mkdtemp())
    try:
        folder = options.keep or work / "checkpoint"
        if not (folder / "config.json").exists():
            write_random(make_config(options.gib), folder)
        result = measure_elsewhere(folder, work / "again")
    finally:
        shutil.rmtree(work)
    size = result["model_bytes"]
    gigaflops = machine.product_rate() / 1e9
    print(f"{machine.describe()}, float32 products {gigaflops:.0f} GFLOP/s")
    print(f"model              {size / MIB:8,.0f} MiB")
    print(f"largest parameter  {result['largest_bytes'] / MIB:8,.0f} MiB")
    print(
        f"host peak of an accelerator, whose memory holds the arrays: "
        f"{result['host_peak_bytes'] / MIB:,.0f} MiB"
    )
    for verb in ("read", "write"):
        peak, seconds = result[f"{verb}_peak_bytes"], result[f"{verb}_seconds"]
        print(
            f"peak after {verb:<7} {peak / MIB:8,.0f} MiB = {peak / size:.2f} × model, "
            f"{seconds:.1f} s, {size / MIB / seconds:,.0f} MiB/s, "
            f"{size / MIB / seconds / gigaflops:.1f} MiB per GFLOP of the products"
        )


if __name__ == "__main__":
    main()
