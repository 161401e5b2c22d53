"""The DSpark draft module: the next few tokens at once, from the target's own streams.

    taps of the target's layers → context keys, one ring of them a stage      (in the target's pass)
    [last token, noise, noise, …] → stages → one vector a row → logits        (one pass a draft)
    logits + Markov head of the token before → token, row by row

Source: spec dspark 2.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from v4jax.cache.formats import entry_format
from v4jax.config import ModelConfig, Numerics
from v4jax.kernels import Target
from v4jax.kernels.scaled_matmul import matmul, matmul_float32
from v4jax.kernels.softmax import MASKED, Partial, finish, partial_weights
from v4jax.model.block import Block
from v4jax.model.context import Context
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.norm import RMSNorm
from v4jax.model.parameters import Declare
from v4jax.model.speculation import Choice, Drafts
from v4jax.quant.formats import round_to


class Drafter(nnx.Module):
    """Stages that see the target's last window of context keys, and heads for all rows at once.

    Embedding and head are the target's. A stage is a block of a window layer whose queries all see
    the same keys: those of the context and of every row of the draft.
    """

    def __init__(self, declare: Declare, config: ModelConfig, numerics: Numerics):
        d, eps, draft = config.hidden_size, config.rms_norm_eps, config.draft
        self.config, self.numerics = config, numerics
        taps, vocab = d * len(draft.target_layer_ids), (config.vocab_size, draft.markov_rank)
        self.context_projection = declare.matrix("fp8", (d, taps), ("embed", "embed_in"))
        self.context_norm = RMSNorm(declare, d, "embed", eps)
        self.stages = nnx.List(
            Block(declare, config, layer, numerics) for layer in config.draft_layers
        )
        self.collapse = HyperHead(declare, config)
        self.norm = RMSNorm(declare, d, "embed", eps)
        self.markov_embed = declare.matrix("bfloat16", vocab, ("vocab", "markov_rank"))
        self.markov_head = declare.matrix("bfloat16", vocab, ("vocab", "markov_rank"))
        self.confidence_head = declare.matrix(
            "bfloat16", (1, d + draft.markov_rank), ("confidence", "embed_in")
        )

    def context_keys(
        self, taps: Float[Array, "b t l d"], context: Context
    ) -> list[Float[Array, "b t c"]]:
        """Returns the keys by which the stages see tokens of the target, one array a stage."""
        options = {
            "quantize_activations": self.numerics.quantize_activations,
            "target": context.target,
        }
        joined = taps.reshape(*taps.shape[:2], -1)
        x = self.context_norm(matmul(joined, self.context_projection.get_value(), **options))
        return [stage.attention.project_keys(x, context) for stage in self.stages]

    def __call__(
        self,
        embedded: Float[Array, "b r d"],
        keys: list[Float[Array, "b k c"]],
        seen: Bool[Array, "b k"],
        context: Context,
    ) -> Float[Array, "b r d"]:
        """Returns the vector of every row, before the norm.

        Args:
          embedded: embeddings of the last token and of the noise tokens.
          keys: of the context, one array a stage; `seen` says which of them exist.
        """
        streams = self.open_streams(embedded)
        for stage, context_keys in zip(self.stages, keys, strict=True):
            streams = self.run_stage(stage, streams, context_keys, seen, context)
        return self.collapse(streams, context.target)

    def open_streams(self, embedded: Float[Array, "b r d"]) -> Float[Array, "b r n d"]:
        """Returns the residual streams of the rows before the first stage."""
        shape = (*embedded.shape[:2], self.config.hc_mult, embedded.shape[-1])
        return jnp.broadcast_to(embedded[:, :, None], shape)

    def run_stage(
        self,
        stage: Block,
        streams: Float[Array, "b r n d"],
        keys: Float[Array, "b k c"],
        seen: Bool[Array, "b k"],
        context: Context,
    ) -> Float[Array, "b r n d"]:
        """Returns the streams after one stage; arguments as `__call__`."""
        return run_rows(stage, streams, keys, seen, context)

    def read_logits(
        self, x: Float[Array, "b r d"], head: Array, target: Target
    ) -> Float[Array, "b r v"]:
        """Returns the rows' logits before the Markov head corrects them, float32."""
        return matmul_float32(self.norm(x), head, target=target)

    def correct(
        self,
        logits: Float[Array, "... v"],
        before: Float[Array, "... k"],
        target: Target,
        wide: Float[Array, "v k"] | None = None,
    ) -> Float[Array, "... v"]:
        """Returns rows' logits with the tokens before them in view.

        Args:
          before: the rows of `markov_embed` of these tokens.
          wide: `markov_head` in float32, as `matmul_float32` takes it.
        """
        return logits + matmul_float32(before, self.markov_head[...], wide, target=target)

    def estimate(
        self, x: Float[Array, "... d"], before: Float[Array, "... k"], target: Target
    ) -> Float[Array, "..."]:
        """Returns the logit of the estimate that a row's token is accepted; `before` as above."""
        joined = jnp.concatenate([x, before.astype(x.dtype)], axis=-1)
        return matmul_float32(joined, self.confidence_head[...], target=target)[..., 0]

    def choose_tokens(
        self,
        x: Float[Array, "b r d"],
        logits: Float[Array, "b r v"],
        last: Int[Array, "b"],
        choice: Choice,
        target: Target,
    ) -> Drafts:
        """Returns the tokens of all rows, each chosen with the one before it in view.

        Args:
          last: the token before the first row's.
        """
        chosen, corrected, confidence = [], [], []
        for row in range(logits.shape[1]):
            before_br = self.markov_embed[...][last]
            scores = self.correct(logits[:, row], before_br, target)
            confidence.append(self.estimate(x[:, row], before_br, target))
            last = choice.choose(scores, row)
            chosen.append(last)
            corrected.append(scores)
        return Drafts(*(jnp.stack(rows, axis=1) for rows in (chosen, corrected, confidence)))


def run_rows(
    block: Block,
    streams: Float[Array, "b r n d"],
    keys: Float[Array, "b k c"],
    seen: Bool[Array, "b k"],
    context: Context,
) -> Float[Array, "b r n d"]:
    """Returns the streams after a block of a window layer whose rows all see the same keys.

    Args:
      keys: of the context; `seen` says which of them exist. Rows also see the keys of all rows.
    """
    attention, config = block.attention, block.attention.config

    def attend(x):
        _, queries_brhc = attention.project_queries(x, context)
        own = entry_format(config, attention.numerics).round(attention.project_keys(x, context))
        keys_bkc = jnp.concatenate([keys, own], axis=1).astype(jnp.float32)
        seen_bk = jnp.concatenate([seen, jnp.ones(own.shape[:2], bool)], axis=1)
        scores = jnp.einsum("brhc,bkc->brhk", queries_brhc.astype(jnp.float32), keys_bkc)
        scores = jnp.where(seen_bk[:, None, None], scores * config.head_dim**-0.5, MASKED)
        maximum, mass, weights = partial_weights(scores)
        partial = Partial(maximum, mass, jnp.einsum("brhk,bkc->brhc", weights, keys_bkc))
        attended, _ = finish(partial, attention.sink[...])
        return attention.project_output(round_to(attended, queries_brhc.dtype), context), None

    return block.run(streams, context, attend)[0]


def tap_streams(config: ModelConfig, taps: Array, streams: Array, layer_index: Array) -> Array:
    """Returns `taps` [b, t, l, d] with the mean of a layer's output streams, if it is tapped."""
    ids = config.draft.target_layer_ids
    slots = [ids.index(i) if i in ids else -1 for i in range(config.num_hidden_layers)]
    slot = jnp.asarray(slots, jnp.int32)[layer_index]

    def write(taps):
        mean = round_to(streams.astype(jnp.float32).mean(axis=2), taps.dtype)
        return jax.lax.dynamic_update_index_in_dim(taps, mean, slot, axis=2)

    return jax.lax.cond(slot >= 0, write, lambda taps: taps, taps)
