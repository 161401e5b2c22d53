"""`view_layers`: what every layer of a model computed for whole sequences, to be looked at."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from v4jax.errors import ConfigError
from v4jax.model.context import make_context
from v4jax.model.passes import open_streams
from v4jax.model.stack import full_sequence
from v4jax.model.transformer import Transformer


def view_layers(
    model: Transformer, tokens: Int[Array, "b t"], *, dense: bool = False
) -> list[dict[str, Any]]:
    """Returns what each main layer shows by `Context.show`, first layer first.

    Attention shows `queries`, `log_mass` and `entries`; the indexer `index_queries`,
    `index_weights`, `index_keys` and `selected`; the router `router_ids` and `router_scores`.
    Everything is kept, so this is for sequences of some thousand tokens and small models.

    Args:
      dense: CSA layers attend to every visible entry; what the indexer selects is shown all the
        same.

    Raises:
      ConfigError: the model lies on a mesh.
    """
    if model.layout is not None:
        raise ConfigError(
            f"view_layers looks at a model on one device, got one on the mesh "
            f"{dict(model.layout.mesh.shape)}; load it without mesh="
        )
    reports, plan = _run(model, jnp.asarray(tokens, jnp.int32), dense), model.config.stack_plan
    layers = [reports[f"stack.prefix.{i}"] for i in range(plan.prefix)]
    for repeat in range(plan.repeats):
        for place in range(plan.period):
            stacked = reports[f"stack.period.{place}"]
            layers.append(jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked))
    return layers + [reports[f"stack.suffix.{i}"] for i in range(plan.suffix)]


@functools.partial(jax.jit, static_argnames="dense")
def _run(model: Transformer, tokens, dense: bool) -> dict[str, dict[str, Any]]:
    stack, (batch, count) = model.stack, tokens.shape
    start, end = jnp.zeros(batch, jnp.int32), jnp.full(batch, count, jnp.int32)
    ropes = {layer.rope for layer in stack.config.layers}
    context = make_context(tokens, start, end, ropes, dense=dense)
    streams = open_streams(context.axes, model.embed, tokens, stack)

    def run_layer(block, streams, layer):
        memory = full_sequence(stack.config, stack.numerics, layer, context)
        observed, seen = context.observe()
        streams, _ = block(streams, observed, memory)
        return streams, seen

    return stack.run(streams, run_layer)[1]
