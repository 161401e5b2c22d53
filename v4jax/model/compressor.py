"""The compressor: turns every window of tokens into one entry (or one index key)."""

from flax import nnx
from jaxtyping import Array, Float

from v4jax.cache import LayerMemory
from v4jax.cache.entries import CompressorRows
from v4jax.config import Layer, ModelConfig
from v4jax.kernels import compressor as kernel
from v4jax.kernels.rotation import rotate
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.table import EntryTable
from v4jax.model.context import Context
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare
from v4jax.model.rope import rotation
from v4jax.quant.formats import round_to


class Compressor(nnx.Module):
    """Projects tokens to values and gates, pools each window, normalizes and rotates the entry.

    Everything up to the pooled vector is float32, whatever the numerics. The position of an
    entry is that of its own window's first token within its document.

    Source: spec B.7 (HCA), B.8 (CSA: two series, windows overlap).
    """

    def __init__(
        self, declare: Declare, config: ModelConfig, layer: Layer, channels: int, which: str
    ):
        width = 2 * channels if layer.overlaps else channels
        self.layer, self.which = layer, which
        self.key_value = declare.matrix("bfloat16", (width, config.hidden_size), ("entry", "embed"))
        self.gate = declare.matrix("bfloat16", (width, config.hidden_size), ("entry", "embed"))
        self.position_bias = declare.constant(
            "float32", 0.0, (layer.ratio, width), ("slot", "entry")
        )
        self.norm = RMSNorm(declare, channels, "entry", config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, memory: LayerMemory
    ) -> tuple[EntryTable, LayerMemory]:
        """Appends the tokens; returns all entries so far and the memory."""
        entries_bwc, rows, memory = self.pool(x, context, memory)
        return memory.append_entries(self.which, entries_bwc, rows)

    def pool(
        self, x: Float[Array, "b t d"], context: Context, memory: LayerMemory
    ) -> tuple[Float[Array, "b w c"], CompressorRows, LayerMemory]:
        """Returns the entries of the windows that the tokens touch, not rounded to their format.

        Only `rows.completed` of them are entries; the memory does not have them yet.
        """
        values_btz = matmul_float32(x, self.key_value[...], target=context.target)
        gates_btz = matmul_float32(x, self.gate[...], target=context.target)
        rows, memory = memory.append_rows(self.which, values_btz, gates_btz)
        pooled_bwc = kernel.pool(
            rows.values,
            rows.gates,
            self.position_bias[...],
            rows.first_window,
            overlaps=self.layer.overlaps,
            begin=rows.begin,
        )
        normed_bwc = self.norm(round_to(pooled_bwc, x.dtype))
        angles = rotation(self.layer.rope, rows.positions)
        return rotate(normed_bwc, *angles, target=context.target), rows, memory
