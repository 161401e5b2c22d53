"""The layers: single blocks, a scanned period that is compiled once, single blocks again."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4jax.cache import FullSequence, HybridCache
from v4jax.cache.formats import entry_format, index_format
from v4jax.cache.hybrid import LayerCache
from v4jax.config import Layer, LayerKind, ModelConfig, Numerics
from v4jax.kernels.stacked import Stacked
from v4jax.model.block import Block
from v4jax.model.context import Context
from v4jax.model.draft import tap_streams
from v4jax.model.experts import Experts
from v4jax.model.parameters import Declare, Storage
from v4jax.model.weights import materialize, used_as_stored


class Stack(nnx.Module):
    """All main layers; `ModelConfig.stack_plan` says which block stands where.

    Blocks of `period` hold the parameters of all repeats on a leading axis: layer = prefix +
      repeat·period + place.
    """

    def __init__(
        self, config: ModelConfig, numerics: Numerics, storage: Storage, rngs: nnx.Rngs | None
    ):
        plan, layers = config.stack_plan, config.layers
        self.config, self.numerics = config, numerics

        def blocks(first: int, count: int, repeats: int | None) -> nnx.List:
            declare = Declare(config, storage, rngs, repeats)
            return nnx.List(
                Block(declare, config, layers[first + i], numerics) for i in range(count)
            )

        self.prefix = blocks(0, plan.prefix, None)
        self.period = blocks(plan.prefix, plan.period, plan.repeats)
        self.suffix = blocks(config.num_hidden_layers - plan.suffix, plan.suffix, None)

    def __call__(
        self,
        streams: Float[Array, "b t n d"],
        context: Context,
        taps: Float[Array, "b t l d"] | None = None,
    ) -> tuple[Float[Array, "b t n d"], Array | None]:
        """Returns the streams after all layers of sequences that start at position 0.

        Args:
          taps: filled with what the draft module reads, and returned as well; None: nothing is.
        """

        def run(block, carry, layer, layer_index):
            streams, taps = carry
            memory = full_sequence(self.config, self.numerics, layer, context)
            block = materialize(context.axes, block, context.target)
            streams, _ = block(streams, context, memory)
            if taps is not None:
                taps = tap_streams(self.config, taps, streams, layer_index)
            return (streams, taps), None

        return self._run(run, (streams, taps), slice_experts=True)[0]

    def run(self, streams: Float[Array, "b t n d"], run_layer: Callable) -> tuple[Array, dict]:
        """Returns the streams after all layers, and what the layers reported.

        Args:
          run_layer: (block, streams, layer) → streams and a report, any pytree.

        Returns:
          Reports by the path of their block, such as "stack.period.0", where those of all repeats
          are stacked.
        """
        return self._run(lambda *arguments: run_layer(*arguments[:3]), streams, slice_experts=True)

    def extend(
        self,
        streams: Float[Array, "b t n d"],
        context: Context,
        cache: HybridCache,
        taps: Float[Array, "b t l d"] | None = None,
    ) -> tuple[Float[Array, "b t n d"], HybridCache, Array | None]:
        """Returns the streams of tokens that follow what `cache` holds, and the new cache.

        Args:
          taps: filled with what the draft module reads, and returned as well; None: nothing is.
        """

        def run(block, carry, layer, layer_index):
            streams, cache, taps = carry
            kind_index = kind_position(self.config.layers, layer.kind, layer_index)
            call = context.start, context.end, context.target, context.axes
            memory = LayerCache(cache, layer, layer_index, kind_index, *call)
            block = materialize(context.axes, block, context.target)
            streams, memory = block(streams, context, memory)
            if taps is not None:
                taps = tap_streams(self.config, taps, streams, layer_index)
            return (streams, memory.cache, taps), None

        slice_experts = not used_as_stored(context.axes, self.period)
        return self._run(run, (streams, cache, taps), slice_experts=slice_experts)[0]

    def _run(self, run: Callable, carry, *, slice_experts: bool):
        """Folds `run(block, carry, layer, layer_index)`, which also reports, over all layers.

        With `slice_experts` the scan slices every parameter of its step, which is what gradients
        and weights that `materialize` changes want. Without it, routed experts stay in their stack
        and are indexed where they are used.
        """
        plan, layers, reports = self.config.stack_plan, self.config.layers, {}
        for i, block in enumerate(self.prefix):
            carry, reports[f"stack.prefix.{i}"] = run(block, carry, layers[i], jnp.int32(i))
        if plan.repeats:

            def repeat(carry, scanned):
                number, blocks = scanned
                if not slice_experts:
                    blocks = take_repeat(self.period, number)
                found = {}
                for place, block in enumerate(blocks):
                    index = plan.prefix + number * plan.period + place
                    layer = layers[plan.prefix + place]
                    carry, found[f"stack.period.{place}"] = run(block, carry, layer, index)
                return carry, found

            numbers = jnp.arange(plan.repeats, dtype=jnp.int32)
            sliced = self.period if slice_experts else None
            carry, found = jax.lax.scan(repeat, carry, (numbers, sliced))
            reports |= found
        first = len(layers) - plan.suffix
        for i, block in enumerate(self.suffix):
            layer, index = layers[first + i], jnp.int32(first + i)
            carry, reports[f"stack.suffix.{i}"] = run(block, carry, layer, index)
        return carry, reports


def take_repeat(period: nnx.List, number: Array) -> nnx.List:
    """Returns the blocks of one repeat; routed experts as `Stacked`, not copied."""

    def take(node):
        if isinstance(node, Experts):
            return jax.tree.map(lambda stack: Stacked(stack, number), node)
        return jax.lax.dynamic_index_in_dim(node, number, keepdims=False)

    return jax.tree.map(take, period, is_leaf=lambda node: isinstance(node, Experts))


def kind_position(layers: tuple[Layer, ...], kind: LayerKind, index: Array) -> Array:
    """Returns the place of layer `index` (traced in a scan) among the layers of its kind."""
    before = list(itertools.accumulate((layer.kind is kind for layer in layers), initial=0))
    return jnp.asarray(before, jnp.int32)[index]


def full_sequence(
    config: ModelConfig, numerics: Numerics, layer: Layer, context: Context
) -> FullSequence:
    """Returns the memory of a layer for a call that starts at position 0."""
    return FullSequence(
        layer,
        config.sliding_window,
        entry_format(config, numerics),
        index_format(config, numerics),
        context.start,
        context.end,
        context.positions,
        context.document_begin,
        context.window_begin,
        context.axes,
    )
