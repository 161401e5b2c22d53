"""One layer: attention and experts, each between a collapse and an expansion of the streams."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from v4jax.cache import LayerMemory
from v4jax.config import Layer, ModelConfig, Numerics
from v4jax.model.attention import Attention
from v4jax.model.context import Context
from v4jax.model.hyper_connections import HyperConnection
from v4jax.model.moe import MoE
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare


class Block(nnx.Module):
    """mHC → norm → attention → mHC, then mHC → norm → experts → mHC (spec A.1).

    What training may keep instead of computing it again has a name (`config.run.BLOCK_TAGS`).
    """

    def __init__(self, declare: Declare, config: ModelConfig, layer: Layer, numerics: Numerics):
        config = layer.adjust(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention_hyper = HyperConnection(declare, config)
        self.attention_norm = RMSNorm(declare, width, "embed", eps)
        self.attention = Attention(declare, config, layer, numerics)
        self.moe_hyper = HyperConnection(declare, config)
        self.moe_norm = RMSNorm(declare, width, "embed", eps)
        self.moe = MoE(declare, config, layer.router, numerics)

    def __call__(
        self, streams: Float[Array, "b t n d"], context: Context, memory: LayerMemory
    ) -> tuple[Float[Array, "b t n d"], LayerMemory]:
        return self.run(streams, context, lambda x: self.attention(x, context, memory))

    def run(
        self, streams: Float[Array, "b t n d"], context: Context, attend: Callable
    ) -> tuple[Float[Array, "b t n d"], Any]:
        """Runs the block with `attend` as its attention: normed x → output and its memory."""
        streams = checkpoint_name(streams, "streams")
        x, mix = self.attention_hyper(streams, context.target)
        with jax.named_scope("attention"):
            output, memory = attend(self.attention_norm(x))
            output = checkpoint_name(output, "attention_output")
        streams, x, mix = self.moe_hyper.expand_mix(output, streams, mix, context.target)
        with jax.named_scope("moe"):
            output = self.moe(self.moe_norm(x), context)
            output = checkpoint_name(output, "moe_output")
        return self.moe_hyper.expand(output, streams, mix), memory
