"""Tiles of tokens × heads, and small tools shared by the attention kernels."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.table import DOCUMENT_UNIT
from v4jax.kernels.tpu import LANES, PACKED_ROWS
from v4jax.shapes import ceil_div, round_up

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call. Row r of a tile is token r // heads, head r % heads.

    Documents begin at multiples of `DOCUMENT_UNIT` tokens: a tile belongs to one document.
    """

    tokens: int  # of one tile
    tiles: int  # of one sequence
    heads: int
    channels: int
    window: int
    ratio: int
    units: int = 0  # of a sequence whose rows hold several documents

    @property
    def rows(self) -> int:
        """Rows of one tile."""
        return self.tokens * self.heads

    @property
    def recent_rows(self) -> int:
        """Raw key-values that one tile reads; those that none of its queries see are masked."""
        return self.window + round_up(self.tokens, PACKED_ROWS)

    def pad(self, queries, recent):
        """Returns queries and recent, padded to what all tiles read."""
        padding = self.tiles * self.tokens - queries.shape[1]
        queries = jnp.pad(queries, [(0, 0), (0, padding), (0, 0), (0, 0)])
        padding += self.recent_rows - self.window - self.tokens
        return queries, jnp.pad(recent, [(0, 0), (0, padding), (0, 0)])

    def positions(self, first, rows):
        """Returns the positions of rows (an int32 array) of the tile that starts at `first`."""
        return first + (rows >> (self.heads.bit_length() - 1))


def unit_begins(begin):
    """Returns (scalars,): where the document of every unit begins, [b · units]; () without."""
    return () if begin is None else (begin[:, ::DOCUMENT_UNIT].reshape(-1).astype(jnp.int32),)


def tile_begin(plan, begin_ref, sequence, tile):
    """Returns the position at which the document of a tile begins, of scalars `unit_begins`.

    `plan` says how many `tokens` a tile has and how many `units` a sequence; 0 units: one document.
    """
    if not plan.units:
        return 0
    unit = jnp.minimum(divide(tile * plan.tokens, DOCUMENT_UNIT), plan.units - 1)
    return begin_ref[sequence * plan.units + unit]


def make_plan(call: Call, inputs: Inputs, tile_rows: int, multiple: int = 1) -> Plan:
    """Returns tiles of `tile_rows` rows, a multiple of them; or one tile if there are fewer."""
    _, tokens, heads, channels = inputs.queries.shape
    whole = max(LANES // heads, 1)
    tile = min(tile_rows // heads, round_up(tokens, whole))
    if inputs.begin is not None:
        tile = min(tile, DOCUMENT_UNIT)
    tiles = ceil_div(tokens, tile)
    if tiles > 1:
        tiles = round_up(tiles, multiple)
    units = 0 if inputs.begin is None else ceil_div(tokens, DOCUMENT_UNIT)
    return Plan(tile, tiles, heads, channels, call.window, call.ratio, units)


def why_not(queries, recent, window: int) -> str | None:
    """Returns why queries and window cannot be cut into such tiles, or None."""
    _, _, heads, channels = queries.shape
    if queries.dtype != recent.dtype or queries.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries and recent must both be bfloat16 or float32, got {queries.dtype}"
    if channels % LANES:
        return f"channels must divide by {LANES}, got {channels}"
    if heads & (heads - 1) or not 8 <= heads <= LANES:
        return f"heads must be a power of two from 8 to {LANES}, got {heads}"
    if window % LANES and window % PACKED_ROWS:
        return f"window must divide by {PACKED_ROWS}, got {window}"
    return None


def window_seen(plan: Plan, positions, keys, begin):
    """Returns the window mask of positions and key positions, two int32 arrays of one shape."""
    distance = positions - keys
    return (distance >= 0) & (distance < plan.window) & (keys >= begin)


def entries_seen(plan: Plan, layout, positions, entries, begin):
    """Returns the mask of entries: they exist, and their tokens lie from `begin` to the query."""
    seen = (entries + 1) * plan.ratio <= positions + 1
    if plan.units:
        seen &= entries >= divide(begin, plan.ratio)
    if layout.capacity % layout.block:
        seen &= entries < layout.capacity
    return seen


def divide(numerator, denominator: int):
    """Returns the quotient of non-negative integers, which needs no sign."""
    return jax.lax.div(numerator, jnp.int32(denominator))


def dot(left, right, *, transpose=False):
    """Returns left · right (or rightᵀ) in float32; float32 operands keep their precision."""
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, contract, precision=precision, preferred_element_type=jnp.float32
    )
