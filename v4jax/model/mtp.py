"""Multi-token prediction: one more block that predicts the token after the next."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from v4jax.cache import LayerMemory
from v4jax.config import Layer, ModelConfig, Numerics
from v4jax.kernels.scaled_matmul import matmul
from v4jax.model.block import Block
from v4jax.model.context import Context
from v4jax.model.draft import run_rows
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare
from v4jax.quant.formats import round_to


class MTP(nnx.Module):
    """Joins the last streams with the next token's embedding and runs one window block.

    Embedding and head are the main model's. Position t pairs the streams of token t with token t+1
    and predicts token t+2; the context's tokens are therefore the shifted ones.

    Source: spec B.15.
    """

    def __init__(self, declare: Declare, config: ModelConfig, layer: Layer, numerics: Numerics):
        d, eps = config.hidden_size, config.rms_norm_eps
        self.config, self.layer, self.numerics = config, layer, numerics
        self.embed_norm = RMSNorm(declare, d, "embed", eps)
        self.stream_norm = RMSNorm(declare, d, "embed", eps)
        self.embed_projection = declare.matrix("fp8", (d, d), ("embed", "embed_in"))
        self.stream_projection = declare.matrix("fp8", (d, d), ("embed", "embed_in"))
        self.block = Block(declare, config, layer, numerics)
        self.collapse = HyperHead(declare, config)
        self.norm = RMSNorm(declare, d, "embed", eps)

    def __call__(
        self,
        streams: Float[Array, "b t n d"],
        embedded: Float[Array, "b t d"],
        context: Context,
        memory: LayerMemory,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t n d"], LayerMemory]:
        """Returns the normed vectors for the shared head, the block's streams, and the memory."""
        streams, memory = self.block(self._join(streams, embedded, context), context, memory)
        return self.norm(self.collapse(streams, context.target)), streams, memory

    def context_keys(
        self, streams: Float[Array, "b t n d"], embedded: Float[Array, "b t d"], context: Context
    ) -> Float[Array, "b t c"]:
        """Returns the keys by which later positions see these ones, not rounded yet.

        They follow from the main model's streams alone: the block need not run for them.
        """
        joined = self._join(streams, embedded, context)
        x, _ = self.block.attention_hyper(joined, context.target)
        return self.block.attention.project_keys(self.block.attention_norm(x), context)

    def draft(
        self,
        streams: Float[Array, "b r n d"],
        embedded: Float[Array, "b r d"],
        keys: Float[Array, "b k c"],
        seen: Bool[Array, "b k"],
        context: Context,
    ) -> Float[Array, "b r d"]:
        """Returns the normed vectors of one position, given the context's keys.

        Args:
          keys, seen: as of `run_rows`.
        """
        joined = self._join(streams, embedded, context)
        streams = run_rows(self.block, joined, keys, seen, context)
        return self.norm(self.collapse(streams, context.target))

    def _join(self, streams, embedded, context: Context) -> Float[Array, "b t n d"]:
        """Returns the block's input: the streams of tokens, and the embeddings of the next ones."""
        rounds = self.numerics.quantize_activations
        options = {"quantize_activations": rounds, "target": context.target}
        embedded = matmul(self.embed_norm(embedded), self.embed_projection.get_value(), **options)
        history = matmul(self.stream_norm(streams), self.stream_projection.get_value(), **options)
        joined = embedded[:, :, None].astype(jnp.float32) + history.astype(jnp.float32)
        return round_to(joined, history.dtype)
