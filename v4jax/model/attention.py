"""Attention: low-rank queries, one shared key-value per token, window, entries, sinks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax.cache import LayerMemory
from v4jax.config import Layer, LayerKind, ModelConfig, Numerics
from v4jax.kernels.rotation import rotate
from v4jax.kernels.scaled_matmul import contract, expand, matmul
from v4jax.model import attend
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.indexer import Indexer
from v4jax.model.norm import RMSNorm, rescale_stepwise
from v4jax.model.parameters import Declare
from v4jax.quant import ScaledArray


class Attention(nnx.Module):
    """Attends over the window and, by the layer's kind, over compressed entries.

    The same 512-vector is key and value; what a query may see comes from `memory`, so training,
    prefill and decode share this code. The output is rotated back by the query's position, which
    makes the value path relative.

    Source: spec B.4, B.10–B.12.
    """

    def __init__(self, declare: Declare, config: ModelConfig, layer: Layer, numerics: Numerics):
        d, h, c, r = (
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.q_lora_rank,
        )
        low = config.o_groups * config.o_lora_rank
        self.config, self.layer, self.numerics = config, layer, numerics
        self.query_down = declare.matrix("fp8", (r, d), ("query_rank", "embed"))
        self.query_norm = RMSNorm(declare, r, "query_rank", config.rms_norm_eps)
        self.query_up = declare.matrix("fp8", (h * c, r), ("heads", "query_rank"))
        self.key_value = declare.matrix("fp8", (c, d), ("head_dim", "embed"))
        self.key_value_norm = RMSNorm(declare, c, "head_dim", config.rms_norm_eps)
        self.sink = declare.constant("float32", 0.0, (h,), ("heads",))
        self.output_down = declare.matrix(
            "fp8", (low, config.group_width), ("heads", "group_width")
        )
        self.output_up = declare.matrix("fp8", (d, low), ("embed", "heads"))
        self.compressor = (
            None
            if layer.kind is LayerKind.WINDOW
            else Compressor(declare, config, layer, c, "entries")
        )
        self.indexer = (
            Indexer(declare, config, layer, numerics) if layer.kind is LayerKind.CSA else None
        )

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, memory: LayerMemory
    ) -> tuple[Float[Array, "b t d"], LayerMemory]:
        latent_btr, queries_bthc = self.project_queries(x, context)
        recent_bsc, memory = memory.append_window(self.project_keys(x, context))

        selected = entries = None
        if self.layer.kind is LayerKind.CSA:
            with jax.named_scope("indexer"):
                selected, finite_bt, memory = self.indexer(x, latent_btr, context, memory)
        if self.layer.kind is not LayerKind.WINDOW:
            with jax.named_scope("compressor"):
                entries, memory = self.compressor(x, context, memory)
        arguments = context, queries_bthc, recent_bsc, self.sink[...]
        options = {"window": self.config.sliding_window, "entries": entries}
        if self.layer.kind is LayerKind.CSA and not context.dense:
            with jax.named_scope("sparse_attention"):
                attended_bthc, log_mass_bth = attend.attend_selected(
                    *arguments, selected=selected, **options
                )
        else:
            weight = context.entry_weight if self.layer.kind is LayerKind.HCA else None
            with jax.named_scope("dense_attention"):
                attended_bthc, log_mass_bth = attend.attend_all(
                    *arguments, ratio=self.layer.ratio, entry_weight=weight, **options
                )
        context.show(queries=queries_bthc, log_mass=log_mass_bth, entries=entries)
        output = self.project_output(attended_bthc, context)
        if self.layer.kind is LayerKind.CSA:
            # A selection by scores that are no numbers looks like any other: it must show.
            output = jnp.where(finite_bt[..., None], output, jnp.nan)
        return output, memory

    def project_queries(
        self, x: Float[Array, "b t d"], context: Context
    ) -> tuple[Float[Array, "b t r"], Float[Array, "b t h c"]]:
        """Returns the normed latent vectors of x, and the rotated queries made of them."""
        latent_btr = self.query_norm(self._linear(x, self.query_down, context))
        queries_bthc = self._linear(latent_btr, self.query_up, context)
        queries_bthc = queries_bthc.reshape(*x.shape[:2], -1, self.config.head_dim)
        queries_bthc = rescale_stepwise(queries_bthc, self.config.rms_norm_eps)
        return latent_btr, self._rotate(queries_bthc, context)

    def project_keys(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t c"]:
        """Returns the rotated key-values of x, not rounded yet."""
        keys_btc = self.key_value_norm(self._linear(x, self.key_value, context))
        return self._rotate(keys_btc, context)

    def project_output(
        self, attended: Float[Array, "b t h c"], context: Context
    ) -> Float[Array, "b t d"]:
        """Rotates back; projects each group of heads to a low rank, then all to the model width."""
        attended_bthc = self._rotate(attended, context, inverse=True)
        width, rank = self.config.group_width, self.config.o_lora_rank
        grouped = attended_bthc.reshape(*attended_bthc.shape[:2], -1, width)
        weight = self.output_down.get_value()
        if isinstance(weight, ScaledArray):  # expanded without rounding its input, as published
            weight = expand(weight, grouped.dtype, target=context.target)
        weight_grk = weight.astype(grouped.dtype).reshape(-1, rank, width)
        low_btgr = contract("btgk,grk->btgr", grouped, weight_grk, target=context.target)
        low_btr = low_btgr.reshape(*low_btgr.shape[:2], -1)
        return context.axes.psum(self._linear(low_btr, self.output_up, context), "heads")

    def _linear(self, x, param, context):
        rounds = self.numerics.quantize_activations
        return matmul(x, param.get_value(), quantize_activations=rounds, target=context.target)

    def _rotate(self, x, context, inverse=False):
        angles = context.rotations[self.layer.rope]
        return rotate(x, *angles, inverse=inverse, target=context.target)
