"""`HybridCache`: what a batch of sequences keeps between calls, and one layer's view of it.

Per layer a ring of the last `sliding_window` key-values; per compressed layer its entries,
contiguous per sequence, and the raw rows of its unfinished window; on CSA layers index keys and the
same for the index compressor. Arrays are stacked over the layers of a kind, [l, b, …], and written
in place, so that the stack scans and no call copies what it does not touch. Which rows are real
follows from `lengths` alone: a slot whose length is 0 is a fresh slot.

Source: spec C.1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from v4jax.cache import ring
from v4jax.cache.entries import CompressorRows
from v4jax.cache.formats import entry_format, index_format
from v4jax.config import Layer, LayerKind, ModelConfig, Numerics
from v4jax.errors import CacheError
from v4jax.kernels import Target, table
from v4jax.kernels.table import EntryTable
from v4jax.parallel import ONE_DEVICE, Axes
from v4jax.parallel.context_parallel import rows_before
from v4jax.parallel.global_arrays import values_of
from v4jax.parallel.weight_sharding import name_of
from v4jax.quant import EntryFormat
from v4jax.shapes import ceil_div, round_up

WINDOW, CSA, HCA, INDEX, DRAFT = "window", "csa", "hca", "index", "draft"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridCache:
    """State of `batch` sequences.

    lengths [b]: tokens each sequence has consumed.
    stored: name → stored arrays [l, b, rows, …]; "window" rings, "csa" and "hca" entries, "index"
      keys; "draft" rings of the context keys that the stages of a draft module, or an MTP block,
      see.
    unfinished: name → [l, b, rows, 2, z] float32, rings of raw (value, gate) rows of the last one
      (HCA) or two (CSA) windows; absent for "window". "draft": [1, b, rows, n, d], a ring of the
      last tokens' streams, whose keys an MTP block makes with the token that follows.
    capacity: tokens a sequence may reach.
    spare: rows of every ring beyond those that a query needs, so that as many tokens can be taken
      back.
    """

    lengths: Int[Array, "b"]
    stored: dict[str, dict[str, jax.Array]]
    unfinished: dict[str, jax.Array]
    capacity: int = dataclasses.field(metadata={"static": True})
    entry_format: EntryFormat = dataclasses.field(metadata={"static": True})
    index_format: EntryFormat = dataclasses.field(metadata={"static": True})
    spare: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def batch(self) -> int:
        """Number of sequences (slots)."""
        return self.lengths.shape[0]

    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def reset(self, slots: jax.Array) -> "HybridCache":
        """Returns a cache whose marked slots (bool [b]) are empty and ready for another sequence.

        Raises:
          CacheError: `slots` is no boolean mask of length batch.
        """
        slots = _as_array(slots)
        if slots.shape != (self.batch,) or slots.dtype != np.bool_:
            raise CacheError(
                f"slots must be a boolean mask of shape [{self.batch}], "
                f"got {slots.dtype}{list(slots.shape)}; mark with True what is to be emptied"
            )
        return dataclasses.replace(self, lengths=jnp.where(slots, 0, self.lengths))

    def take_back(self, lengths: Int[Array, "b"]) -> "HybridCache":
        """Returns a cache in which every sequence has its first `lengths` tokens only.

        Drafts that were appended and rejected go away so: rows that they wrote are overwritten
        before anything reads them.

        Args:
          lengths: at most `spare` tokens fewer than the last call left.

        Raises:
          CacheError: a sequence would grow, or lose more tokens than the rings can give back.
        """
        lengths = jnp.asarray(lengths, jnp.int32)
        if not any(isinstance(x, jax.core.Tracer) for x in (lengths, self.lengths)):
            removed = values_of(self.lengths) - np.asarray(lengths)
            if removed.min() < 0 or removed.max() > self.spare:
                raise CacheError(
                    f"take_back may remove 0 … {self.spare} tokens, got {removed.tolist()}; "
                    "verify at most as many drafts as the draft module has rows"
                )
        return dataclasses.replace(self, lengths=lengths)

    def take(self, indices: jax.Array) -> "HybridCache":
        """Returns a cache whose slot i is a copy of slot indices[i]: forks, or picks sequences.

        Raises:
          CacheError: `indices` is no integer vector, or one of them is no slot.
        """
        indices = _as_array(indices)
        if indices.ndim != 1 or not indices.size or not jnp.issubdtype(indices.dtype, jnp.integer):
            raise CacheError(
                f"indices must be an integer vector, got {indices.dtype}{list(indices.shape)}; "
                "name a slot of this cache for every slot of the new one"
            )
        if not isinstance(indices, jax.core.Tracer) and (
            (indices < 0).any() or (indices >= self.batch).any()
        ):
            raise CacheError(f"indices must be slots 0 … {self.batch - 1}, got {indices.tolist()}")

        def pick(array):
            return jnp.take(array, indices, axis=1)

        return dataclasses.replace(
            self,
            lengths=self.lengths[indices],
            stored=jax.tree.map(pick, self.stored),
            unfinished=jax.tree.map(pick, self.unfinished),
        )

    def repeat(self, count: int) -> "HybridCache":
        """Returns a cache with `count` copies of every slot side by side: slot i copies i // count.

        On a mesh every device copies what it holds; nothing is sent.

        Raises:
          CacheError: `count` is not positive.
        """
        if count < 1:
            raise CacheError(f"count must be at least 1, got {count}; it says how many copies")
        on_mesh = isinstance(getattr(self.lengths, "sharding", None), NamedSharding)
        shardings = jax.tree.map(lambda x: x.sharding, self) if on_mesh else None
        return jax.jit(_repeat, static_argnums=1, out_shardings=shardings)(self, count)

    def check_fits(self, config: ModelConfig, numerics: Numerics, entry_shards: int = 1) -> None:
        """Raises unless these are the arrays that `init_cache` makes for the model.

        Raises:
          CacheError: the cache belongs to another model or to other numerics, or a call with
            `donate=True` has used its buffers.
        """
        leaves, structure = jax.tree.flatten(self)
        held = (x for x in leaves if not isinstance(x, jax.core.Tracer))
        if any(isinstance(x, jax.Array) and x.is_deleted() for x in held):
            raise CacheError(
                "the cache was donated to an earlier call, which reused its buffers; go on with "
                "the cache that the call returned, or leave donate=True away"
            )
        capacity = min(self.capacity, config.max_position_embeddings)
        sizes = self.batch, capacity, entry_shards
        wanted, wanted_structure = _wanted_leaves(config, numerics, *sizes)
        shapes = [(x.shape, x.dtype) for x in leaves]
        if structure != wanted_structure or shapes != wanted:
            wanted = _describe(_abstract_cache(config, numerics, *sizes))
            mine = _describe(self)
            name = next(n for n in {**mine, **wanted} if mine.get(n) != wanted.get(n))
            raise CacheError(
                "the cache belongs to another model or to other numerics: its "
                f"{name} is {mine.get(name)}, the model needs {wanted.get(name)}; make it with "
                "this model's init_cache"
            )


def _repeat(cache: HybridCache, count: int) -> HybridCache:
    def repeat(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[: axis + 1], count, *x.shape[axis + 1 :])
        merged = (*x.shape[:axis], -1, *x.shape[axis + 1 :])
        return jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape).reshape(merged)

    return dataclasses.replace(
        cache,
        lengths=repeat(cache.lengths, 0),
        stored=jax.tree.map(lambda x: repeat(x, 1), cache.stored),
        unfinished=jax.tree.map(lambda x: repeat(x, 1), cache.unfinished),
    )


@functools.lru_cache(maxsize=64)
def _wanted_leaves(config: ModelConfig, numerics: Numerics, *sizes: int):
    leaves, structure = jax.tree.flatten(_abstract_cache(config, numerics, *sizes))
    return [(x.shape, x.dtype) for x in leaves], structure


def _abstract_cache(config: ModelConfig, numerics: Numerics, *sizes: int):
    return jax.eval_shape(lambda: init_cache(config, numerics, *sizes))


def _describe(cache: HybridCache) -> dict[str, str]:
    """Returns {attribute: its value, or dtype and shape}."""
    static = {
        "capacity": str(cache.capacity),
        "entry format": f"{cache.entry_format.kind} of {cache.entry_format.channels}",
        "index format": f"{cache.index_format.kind} of {cache.index_format.channels}",
    }
    arrays = {
        name_of(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(cache)
    }
    return static | arrays


def _as_array(values) -> np.ndarray | jax.Array:
    return values if isinstance(values, jax.Array) else np.asarray(values)


def cache_axes(cache: HybridCache) -> HybridCache:
    """Returns the cache with the logical axes of every array in its place, as `PartitionSpec`s.

    Rings and unfinished windows are small, and whole on every device of a sequence.
    """
    rings, entries = P(None, "batch"), P(None, "batch", "entries")
    return dataclasses.replace(
        cache,
        lengths=P("batch"),
        stored={
            name: jax.tree.map(
                lambda _, axes=rings if name in (WINDOW, DRAFT) else entries: axes, arrays
            )
            for name, arrays in cache.stored.items()
        },
        unfinished=jax.tree.map(lambda _: rings, cache.unfinished),
    )


def init_cache(
    config: ModelConfig, numerics: Numerics, batch: int, max_tokens: int, entry_shards: int = 1
) -> HybridCache:
    """Returns empty caches for `batch` sequences of up to `max_tokens` tokens.

    Args:
      entry_shards: devices over which the entries of a sequence are split; the room is rounded
        up to a multiple.

    Raises:
      CacheError: `batch` or `max_tokens` is out of range.
    """
    for name, size in (("batch", batch), ("max_tokens", max_tokens)):
        if not isinstance(size, int | np.integer) or isinstance(size, bool):
            raise CacheError(f"{name} must be an integer, got {size!r}")
    batch, max_tokens = int(batch), int(max_tokens)
    if batch < 1:
        raise CacheError(f"batch must be at least 1, got {batch}")
    if not 1 <= max_tokens <= config.max_position_embeddings:
        raise CacheError(
            f"max_tokens must be 1 … max_position_embeddings = {config.max_position_embeddings}, "
            f"got {max_tokens}"
        )
    entries, index = entry_format(config, numerics), index_format(config, numerics)
    spare = config.draft_tokens
    window = config.sliding_window + spare
    stored = {WINDOW: entries.zeros(config.num_hidden_layers, batch, window)}
    unfinished = {}
    if config.draft is not None:
        stored[DRAFT] = entries.zeros(config.draft.stages, batch, window)
    elif spare:
        stored[DRAFT] = entries.zeros(1, batch, window)
        shape = (1, batch, spare + 1, config.hc_mult, config.hidden_size)
        unfinished[DRAFT] = jnp.zeros(shape, numerics.activation_dtype)
    for name, kind in ((CSA, LayerKind.CSA), (HCA, LayerKind.HCA)):
        layers = [layer for layer in config.layers if layer.kind is kind]
        if not layers:
            continue
        count, layer = len(layers), layers[0]
        capacity = round_up(max(max_tokens // layer.ratio, 1), entry_shards)
        rows, series = (2 * layer.ratio, 2) if layer.overlaps else (layer.ratio, 1)
        rows += spare
        stored[name] = entries.zeros(count, batch, capacity)
        unfinished[name] = jnp.zeros((count, batch, rows, 2, series * config.head_dim), jnp.float32)
        if kind is LayerKind.CSA:
            stored[INDEX] = index.zeros(count, batch, capacity)
            shape = (count, batch, rows, 2, series * config.index_head_dim)
            unfinished[INDEX] = jnp.zeros(shape, jnp.float32)
    lengths = jnp.zeros(batch, jnp.int32)
    return HybridCache(lengths, stored, unfinished, max_tokens, entries, index, spare)


def store_draft_keys(
    axes: Axes, cache: HybridCache, keys: list[Array], start: Array, end: Array
) -> HybridCache:
    """Returns the cache with the context keys of positions start … end−1, one array a stage.

    Args:
      start, end: as `ring.append`.
    """
    rings = cache.stored[DRAFT]
    for stage, vectors in enumerate(keys):
        new = cache.entry_format.encode(vectors)
        rings = jax.tree.map(
            lambda r, fresh, stage=stage: ring.append(axes, r, jnp.int32(stage), fresh, start, end),
            rings,
            new,
        )
    return dataclasses.replace(cache, stored=cache.stored | {DRAFT: rings})


def draft_keys(cache: HybridCache, end: Int[Array, "b"], count: int) -> tuple[list[Array], Array]:
    """Returns the `count` context keys before `end`, [b, k, c] a stage, and which exist [b, k]."""
    rings = cache.stored[DRAFT]
    stages = next(iter(rings.values())).shape[0]
    keys = [
        cache.entry_format.decode(
            {k: ring.ordered(r, jnp.int32(stage), end, count) for k, r in rings.items()}
        )
        for stage in range(stages)
    ]
    return keys, end[:, None] - count + jnp.arange(count) >= 0


def store_streams(
    axes: Axes, cache: HybridCache, streams: Array, start: Array, end: Array
) -> HybridCache:
    """Returns the cache with the last streams of the tokens at start … end−1."""
    rings = ring.append(axes, cache.unfinished[DRAFT], jnp.int32(0), streams, start, end)
    return dataclasses.replace(cache, unfinished=cache.unfinished | {DRAFT: rings})


def streams_before(cache: HybridCache, end: Int[Array, "b"]) -> Array:
    """Returns the streams of the token before `end`, [b, 1, n, d]."""
    return ring.ordered(cache.unfinished[DRAFT], jnp.int32(0), end, 1)


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a `HybridCache` during a call; implements `LayerMemory`.

    `layer_index` counts all layers, `kind_index` the layers of this kind; both may be traced
    (scanned layers).
    """

    cache: HybridCache
    layer: Layer
    layer_index: jax.Array
    kind_index: jax.Array
    start: jax.Array
    end: jax.Array
    target: Target
    axes: Axes = ONE_DEVICE

    def append_window(self, key_values):
        """See `LayerMemory.append_window`."""
        stored_as, rings = self.cache.entry_format, self.cache.stored[WINDOW]
        new = stored_as.encode(key_values)
        history = jax.tree.map(
            lambda r, fresh: rows_before(
                self.axes, fresh, ring.ordered(r, self.layer_index, self.start, self._held(r))
            ),
            rings,
            new,
        )
        rows = jax.tree.map(lambda old, fresh: jnp.concatenate([old, fresh], axis=1), history, new)
        rings = jax.tree.map(
            lambda r, fresh: ring.append(
                self.axes, r, self.layer_index, fresh, self.start, self.end
            ),
            rings,
            new,
        )
        return stored_as.decode(rows), self._store(WINDOW, rings)

    def append_rows(self, which, values, gates):
        """See `LayerMemory.append_rows`."""
        name, ratio, tokens = self._name(which), self.layer.ratio, values.shape[1]
        rings = self.cache.unfinished[name]
        new = jnp.stack([values, gates], axis=2).astype(jnp.float32)
        kept = ring.ordered(rings, self.kind_index, self.start, self._held(rings))
        history = rows_before(self.axes, new, kept)
        # The rows of all windows touched begin where the unfinished window does (with overlap, one
        # window before) and end with the last window that the call can complete.
        before = ratio if self.layer.overlaps else 0
        windows = ceil_div(tokens, ratio)
        size = before + windows * ratio
        phase_b = self.start % ratio
        padding = windows * ratio - tokens
        rows = jnp.concatenate([history, new], axis=1)
        rows = jnp.pad(rows, [(0, 0), (0, padding), (0, 0), (0, 0)])
        first_b = history.shape[1] - before - phase_b
        rows = jax.vmap(lambda r, f: jax.lax.dynamic_slice_in_dim(r, f, size))(rows, first_b)
        first_window = self.start // ratio
        end = self.end
        if self.axes.size("tokens") > 1:
            end = jnp.minimum(end, self.start + tokens)
        result = CompressorRows(
            rows[:, :, 0],
            rows[:, :, 1],
            first_window,
            completed=end // ratio - first_window,
            positions=(first_window[:, None] + jnp.arange(windows)) * ratio,
        )
        rings = ring.append(self.axes, rings, self.kind_index, new, self.start, self.end)
        cache = dataclasses.replace(self.cache, unfinished={**self.cache.unfinished, name: rings})
        return result, dataclasses.replace(self, cache=cache)

    def append_entries(self, which, vectors, rows):
        """See `LayerMemory.append_entries`; unfinished windows are left out.

        Every device gets the entries of all shards of the tokens, and keeps those whose place is in
        its shard of the cache. Shards are whole windows; all entries are therefore contiguous.
        """
        name = self._name(which)
        stored_as = self.cache.index_format if which == "index" else self.cache.entry_format
        capacity = next(iter(self.cache.stored[name].values())).shape[2]  # on this device
        gather = functools.partial(self.axes.all_gather, name="tokens", axis=1)
        first = gather(rows.first_window[:, None])[:, 0]
        completed = gather(jnp.maximum(rows.completed, 0)[:, None]).sum(1)
        stored = table.write(
            self.cache.stored[name],
            self.kind_index,
            jax.tree.map(gather, stored_as.encode(vectors)),
            first - self.axes.offset("entries", capacity),
            completed,
            target=self.target,
        )
        return self._table(stored, stored_as), self._store(name, stored)

    def _held(self, rings) -> int:
        """Returns the rows of a ring that a query needs."""
        return rings.shape[2] - self.cache.spare

    def _table(self, stored, stored_as) -> EntryTable:
        """Returns the entries that attention reads: all, or in decoding those of this device."""
        if self.axes.size("entries") == self.axes.size("read_entries"):
            return EntryTable(stored, self.kind_index, stored_as)

        def read(array):
            layer = jax.lax.dynamic_index_in_dim(array, self.kind_index, keepdims=True)
            return self.axes.all_gather(layer, "entries", 2)

        return EntryTable(jax.tree.map(read, stored), jnp.int32(0), stored_as)

    def _name(self, which: str) -> str:
        if which == "index":
            return INDEX
        return CSA if self.layer.kind is LayerKind.CSA else HCA

    def _store(self, name, stored) -> "LayerCache":
        cache = dataclasses.replace(self.cache, stored={**self.cache.stored, name: stored})
        return dataclasses.replace(self, cache=cache)
