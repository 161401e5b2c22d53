"""The lightning indexer: scores compressed entries cheaply and selects the best for each query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from v4jax.cache import LayerMemory
from v4jax.cache.formats import index_format
from v4jax.config import Layer, ModelConfig, Numerics
from v4jax.kernels.rotation import rotate
from v4jax.kernels.scaled_matmul import matmul
from v4jax.model import attend
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.parameters import Declare
from v4jax.quant.formats import round_to

# Scores of queries, keys and head weights up to these sizes cannot overflow: 128 channels and 64
# heads make at most 2^40 · 2^40 · 2^7 (Hadamard rotations) · 2^7 · 2^20 · 2^6 = 2^120.
_LARGEST_VECTOR, _LARGEST_WEIGHT = 2.0**40, 2.0**20


class Indexer(nnx.Module):
    """Selects `index_topk` entries per query; its own compressor makes the index keys.

    Selection only: scores do not enter the attention, and no gradient of the language-model loss
    reaches here. Nor does a gradient leave: what trains the scores ends at the indexer's inputs.

    Source: spec B.9.
    """

    def __init__(self, declare: Declare, config: ModelConfig, layer: Layer, numerics: Numerics):
        heads, width = config.index_n_heads, config.index_head_dim
        self.config, self.layer, self.numerics = config, layer, numerics
        self.query_up = declare.matrix(
            "fp8", (heads * width, config.q_lora_rank), ("index_heads", "query_rank")
        )
        self.head_weights = declare.matrix(
            "bfloat16", (heads, config.hidden_size), ("index_heads", "embed")
        )
        self.compressor = Compressor(declare, config, layer, width, "index")

    def __call__(
        self,
        x: Float[Array, "b t d"],
        query_latent: Float[Array, "b t r"],
        context: Context,
        memory: LayerMemory,
    ) -> tuple[Int[Array, "b t k"], Bool[Array, "b t"], LayerMemory]:
        """Appends the tokens' index keys and selects entries.

        Returns:
          The selected ids (−1: none); whether all numbers behind the token's scores are finite,
          which a selection does not show; the memory.
        """
        heads, width = self.config.index_n_heads, self.config.index_head_dim
        x, query_latent = jax.lax.stop_gradient((x, query_latent))
        queries = matmul(
            query_latent,
            self.query_up.get_value(),
            quantize_activations=self.numerics.quantize_activations,
            target=context.target,
        )
        queries_btix = queries.reshape(*queries.shape[:2], heads, width)
        angles = context.rotations[self.layer.rope]
        queries_btix = rotate(queries_btix, *angles, target=context.target)
        weights_bti = matmul(x, self.head_weights[...], target=context.target).astype(jnp.float32)
        new_keys_bwx, rows, memory = self.compressor.pool(x, context, memory)
        # Before they are rounded: FP4 has no code for what is no number.
        finite_bt = _are_finite(queries_btix, weights_bti, new_keys_bwx, rows)
        # They round like the keys.
        queries_btix = index_format(self.config, self.numerics).round(queries_btix)
        weights_bti = round_to(weights_bti * (width**-0.5 * heads**-0.5), x.dtype)
        keys, memory = memory.append_entries("index", new_keys_bwx, rows)
        selected = attend.select(
            context,
            queries_btix,
            weights_bti,
            keys,
            ratio=self.layer.ratio,
            count=self.config.index_topk,
        )
        context.show(
            index_queries=queries_btix,
            index_weights=weights_bti,
            index_keys=keys,
            selected=selected,
        )
        return selected, finite_bt | ~context.real, memory


def _are_finite(queries_btix, weights_bti, new_keys_bwx, rows) -> Bool[Array, "b t"]:
    """Returns which tokens' scores are finite, as far as this call's numbers decide it.

    A key belongs to a whole sequence: a bad one spoils all tokens of the call that made it.
    """
    windows = jnp.arange(new_keys_bwx.shape[1])
    keys_bw = jnp.all(jnp.abs(new_keys_bwx) <= _LARGEST_VECTOR, axis=-1)
    keys_b1 = jnp.all(keys_bw | (windows >= rows.completed[:, None]), axis=1, keepdims=True)
    queries_bt = jnp.all(jnp.abs(queries_btix) <= _LARGEST_VECTOR, axis=(2, 3))
    return keys_b1 & queries_bt & jnp.all(jnp.abs(weights_bti) <= _LARGEST_WEIGHT, axis=-1)
