"""`view_layers`: what every layer of a model computed for whole sequences, to be looked at."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from v4jax.cache.formats import entry_format, index_format
from v4jax.kernels.table import EntryTable
from v4jax.model.context import make_context
from v4jax.model.passes import open_streams
from v4jax.model.stack import full_sequence
from v4jax.model.transformer import Transformer
from v4jax.model.weights import materialize
from v4jax.parallel import WEIGHTS, Axes, on_shards
from v4jax.parallel.context_parallel import plan_call

_TABLES = ("entries", "index_keys")  # of all tokens, on every device of a sequence
_BY_HEAD = ("queries", "log_mass")  # [b, t, h, …], heads split
_FLAT = ("router_ids", "router_scores")  # [b·t, …]


def view_layers(
    model: Transformer, tokens: Int[Array, "b t"], *, dense: bool = False
) -> list[dict[str, Any]]:
    """Returns what each main layer shows by `Context.show`, first layer first; also on a mesh.

    Every layer shows `streams` [b, t, n, d], the hidden state behind it. Attention shows `queries`,
    `log_mass` and `entries`; the indexer `index_queries`, `index_weights`, `index_keys` and
    `selected`; the router `router_ids` and `router_scores`, [b·t, …].

    Everything is kept, on a mesh whole on every device: this is for sequences of some thousand
    tokens and small models.

    Args:
      dense: CSA layers attend to every visible entry; what the indexer selects is shown all the
        same.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    reports, plan = _run(model, tokens, dense), model.config.stack_plan
    layers = [reports[f"stack.prefix.{i}"] for i in range(plan.prefix)]
    for repeat in range(plan.repeats):
        for place in range(plan.period):
            stacked = reports[f"stack.period.{place}"]
            layers.append(jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked))
    layers += [reports[f"stack.suffix.{i}"] for i in range(plan.suffix)]
    numbers = model.config, model.numerics
    formats = entry_format(*numbers), index_format(*numbers)
    stored_as = dict(zip(_TABLES, (found.unpacked for found in formats), strict=True))
    return [
        {name: _finish(name, x, tokens.shape, stored_as) for name, x in layer.items()}
        for layer in layers
    ]


def _finish(name: str, x: Array | None, shape: tuple[int, int], stored_as: dict) -> Any:
    """Returns a value as code of a layer has it, without the padding of the call."""
    if x is None:
        return None
    if name in _TABLES:
        return EntryTable(stored_as[name].encode(x[None]), jnp.int32(0), stored_as[name])
    x = x[:, : shape[1]]
    return x.reshape(-1, *x.shape[2:]) if name in _FLAT else x


@functools.partial(jax.jit, static_argnames="dense")
def _run(model: Transformer, tokens, dense: bool) -> dict[str, dict[str, Any]]:
    batch, count = tokens.shape
    call = plan_call(model.layout, model.config, batch, count, extends=False)
    view = functools.partial(_view, dense=dense, target=model.target)
    inputs = (WEIGHTS, P("batch", "tokens"), P("batch"))
    run = on_shards(view, model.layout, call.tokens, inputs, P())
    return run((model.embed, model.stack), call.pad(tokens), jnp.full(batch, count, jnp.int32))


def _view(axes: Axes, weights, tokens, end, dense: bool, target) -> dict[str, dict[str, Any]]:
    embedding, stack = weights
    start = jnp.zeros_like(end) + axes.offset("tokens", tokens.shape[1])
    ropes = {layer.rope for layer in stack.config.layers}
    context = make_context(tokens, start, end, ropes, target, dense=dense, axes=axes)
    streams = open_streams(context, embedding, stack)

    def run_layer(block, streams, layer):
        memory = full_sequence(stack.config, stack.numerics, layer, context)
        observed, seen = context.observe()
        streams, _ = materialize(axes, block, target)(streams, observed, memory)
        shown = seen | {"streams": streams}
        return streams, {name: _gather(axes, name, x, tokens.shape) for name, x in shown.items()}

    return stack.run(streams, run_layer)[1]


def _gather(axes: Axes, name: str, x: Any, shape: tuple[int, int]) -> Array | None:
    """Returns a value of all sequences, tokens and heads, [b, …]; tables as plain vectors."""
    if x is None:
        return None
    if name in _TABLES:
        return axes.all_gather(x.block(jnp.int32(0), x.capacity), "batch", 0)
    x = x.reshape(*shape, *x.shape[1:]) if name in _FLAT else x
    x = axes.all_gather(x, "heads", 2) if name in _BY_HEAD else x
    return axes.all_gather(axes.all_gather(x, "tokens", 1), "batch", 0)
