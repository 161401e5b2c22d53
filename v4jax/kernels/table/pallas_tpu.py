"""Writing entries on TPU into a table that is transposed in memory, with entries along lanes.

XLA lays out stored arrays whose rows do not fill registers as [l, b, c, w], and the kernels read
them in this layout (`attention.entries_tpu`). XLA's scatter and slices need consecutive rows: they
would transpose the whole stack before each write and back after it, in every layer. This kernel
takes the transposed array, changes the tiles of 128 entries that it must, and returns it in the
same memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from v4jax.kernels.dispatch import Target
from v4jax.kernels.tpu import LANES

WORD_BYTES = 4  # what the kernel selects by
Stored = dict[str, jax.Array]


def supported(stored: Stored) -> str | None:
    """Returns why the kernel cannot write these arrays in place, or None."""
    if len(stored) == 1:
        return "rows without scales are stored whole and lie after each other"
    capacity = next(iter(stored.values())).shape[2]
    if capacity % LANES:
        return f"entries must divide by {LANES}, there is room for {capacity}"
    for name, array in stored.items():
        row_bytes = array.shape[3] * array.dtype.itemsize
        if row_bytes % WORD_BYTES:
            return f"{name}: a row must be whole words of {WORD_BYTES} bytes, it has {row_bytes}"
    return None


def write(
    stored: Stored,
    layer: Int[Array, ""],
    rows: Stored,
    first: Int[Array, "b"],
    count: Int[Array, "b"],
    *,
    target: Target,
) -> Stored:
    """Returns arrays [l, b, w, c] with rows [b, n, c] written from place `first` on in one layer.

    Args:
      rows: in the arrays' dtypes.
      first: place of row 0; rows whose place is outside 0 … w−1 are dropped.
      count: how many rows are real, 0 … n.
    """
    names = sorted(stored)
    batch, given = rows[names[0]].shape[:2]
    blocks = stored[names[0]].shape[2] // LANES
    steps = (given + LANES - 2) // LANES + 1  # tiles that so many rows may touch
    first = first.astype(jnp.int32)
    tile = jnp.clip(first // LANES, 0, blocks - 1)
    lane = jnp.arange(steps * LANES, dtype=jnp.int32)
    row = jnp.clip((tile * LANES - first)[:, None] + lane, 0, given - 1)[..., None]
    fresh = [jnp.take_along_axis(rows[name], row, axis=1).swapaxes(1, 2) for name in names]
    turned = [stored[name].swapaxes(2, 3) for name in names]

    def spec_of_fresh(array):
        return pl.BlockSpec((1, array.shape[1], LANES), lambda b, i, *_: (b, 0, i))

    def spec_of_stored(array):
        def index(b, i, layer, tile, *_):
            return (layer[0], b, 0, jnp.minimum(tile[b] + i, blocks - 1))

        return pl.BlockSpec((1, 1, array.shape[2], LANES), index)

    scalars = (
        jnp.asarray(layer, jnp.int32)[None],
        tile,
        first,
        count.astype(jnp.int32),
    )
    specs = [spec_of_stored(x) for x in turned]
    written = pl.pallas_call(
        functools.partial(_body, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, steps),
            in_specs=[*map(spec_of_fresh, fresh), *specs],
            out_specs=specs,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in turned],
        input_output_aliases={len(scalars) + len(fresh) + i: i for i in range(len(turned))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=target.interpret,
        name="table_write",
    )(*scalars, *fresh, *turned)
    return {name: x.swapaxes(2, 3) for name, x in zip(names, written, strict=True)}


def _body(blocks, layer_ref, tile_ref, first_ref, count_ref, *refs):
    """One tile of 128 entries of one sequence.

    prefetch: layer [1]; tile, first, count [b]. input: of each array fresh rows [1, c, 128], each
    at the lane of its place, then what is stored [1, 1, c, 128]. output: the same, changed.
    """
    del layer_ref
    arrays = len(refs) // 3
    sequence, step = pl.program_id(0), pl.program_id(1)
    tile = tile_ref[sequence] + step
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = tile * LANES + lane - first_ref[sequence]
    real = (row >= 0) & (row < count_ref[sequence])

    # Steps behind the last tile have its buffers still, and nothing to write.
    @pl.when(tile < blocks)
    def _():
        for i in range(arrays):
            fresh, old, out = (refs[i + arrays * part] for part in range(3))
            words = [pltpu.bitcast(x, jnp.int32) for x in (fresh[0], old[0, 0])]
            out[0, 0] = pltpu.bitcast(jnp.where(real, *words), out.dtype)
