"""What makes two runs the same: their configuration, the weights they began with, and their data.

A checkpoint holds its run's identity, a value for each field. Where it goes on, every field must be
the same, but for those that change nothing that is computed and those a caller allows.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.config.json_keys import did_you_mean
from v4jax.config.run import TrainConfig
from v4jax.errors import CheckpointError, ConfigError
from v4jax.model.draw import mix
from v4jax.parallel import Layout
from v4jax.training.data.sources import find_source_files

# Fields of a run that may change: where and how it is computed, how long, what is said of it.
FREE = (
    "output", "steps", "mesh", "remat", "keep", "offload", "checkpoint", "evaluation",
    "max_skipped", "log_every", "report_to", "data.prefetch", "data.on_bad_record",
)  # fmt: skip
WHOLE_FILE = 64 << 20  # bytes up to which all of a file is read
BLOCK = 1 << 20  # bytes; of a larger file 64 blocks in equal distances are read


def describe_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the identity of a configuration alone: field → value, as JSON gives it back.

    A folder and files may move: `model`, `lora.start` and `paths` are left to the digests.
    """
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if path in FREE or path in ("model", "lora.start") or path.endswith("].paths"):
            return
        if isinstance(value, dict):
            if path:
                found[path] = "given"  # in place of None
            for name, part in value.items():
                walk(part, f"{path}.{name}" if path else name)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found[path] = f"{len(value)} given"
            for i, part in enumerate(value):
                walk(part, f"{path}[{i}]")
        else:
            found[path] = value

    walk(json.loads(json.dumps(dataclasses.asdict(config), default=str)), "")
    return found


def digest_arrays(arrays: Mapping[str, Any], layout: Layout | None = None) -> str:
    """Returns a digest of all elements of named weights as stored, the same on every mesh."""
    everywhere = layout and NamedSharding(layout.mesh, P())
    digest = jax.jit(_digest_array, out_shardings=everywhere)
    # A weight that came quantized is values and scales.
    found = jax.tree_util.tree_leaves_with_path(dict(arrays))
    # One at a time: on CPUs, sums over processes that run at once can wait for each other for ever.
    named = {jax.tree_util.keystr(path): jax.device_get(digest(x)).tolist() for path, x in found}
    return hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest_array(array: jax.Array) -> jax.Array:
    """Returns two words: sums, which have no order, over elements mixed with their places."""
    width = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    places = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(array.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        places = places * jnp.uint32(size) + along
    mixed = mix(bits + mix(places))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), mix(mixed ^ places).sum(dtype=jnp.uint32)])


def digest_data(config: TrainConfig) -> dict[str, str]:
    """Returns a digest of the files of each source, whatever their names."""
    return {
        f"data.sources[{i}].paths": _digest_files(find_source_files(source))
        for i, source in enumerate(config.data.sources)
        if source.paths
    }


def _digest_files(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= WHOLE_FILE:
                while block := file.read(BLOCK):
                    digest.update(block)
                continue
            for i in range(64):
                file.seek(i * (size - BLOCK) // 63)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def check_allowed(allowed: Iterable[str], config: TrainConfig) -> None:
    """Raises ConfigError for a field that is in no identity, with the nearest one."""
    fields = {*describe_config(config), "model"}
    fields |= {f"data.sources[{i}].paths" for i in range(len(config.data.sources))}
    for name in allowed:
        if not any(_covers(name, field) for field in fields):
            raise ConfigError(
                f"allow_changed: {name!r} is no field that is compared{did_you_mean(name, fields)}"
            )


def find_changes(
    stored: Mapping[str, Any], found: Mapping[str, Any], allowed: Iterable[str], place: Any
) -> list[str]:
    """Returns the fields that differ and may.

    Fields of one side only come from another version of this code.

    Raises:
      CheckpointError: another field differs.
    """
    differ = [name for name in found if name in stored and stored[name] != found[name]]
    refused = [name for name in differ if not any(_covers(one, name) for one in allowed)]
    if refused:
        said = "; ".join(
            f"train.{name} {_named(name)}was {stored[name]!r} and is {found[name]!r}"
            for name in refused
        )
        raise CheckpointError(
            f"{place} belongs to another run: {said}. Restore that, choose another output, or "
            f"give --allow_changed={','.join(refused)} if it is meant"
        )
    return differ


def _covers(allowed: str, field: str) -> bool:
    return field == allowed or field.startswith((f"{allowed}.", f"{allowed}["))


def _named(field: str) -> str:
    if field == "model":
        return "(a digest of the weights that the run begins with) "
    return "(a digest of what the files hold) " if field.endswith(".paths") else ""
