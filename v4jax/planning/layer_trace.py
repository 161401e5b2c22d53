"""One layer of each kind, traced as a device of the mesh runs it: its memory and its collectives.

The layer runs under the rules of the mesh (`parallel.shard.on_shards`) on a mesh without devices,
with the chip's kernels. What the trace holds and sends is read off, not computed from formulas.
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from v4jax.cache import init_cache
from v4jax.cache.hybrid import LayerCache, cache_axes
from v4jax.config import Layer, ModelConfig, Numerics
from v4jax.kernels import dispatch
from v4jax.model.block import Block
from v4jax.model.context import make_context
from v4jax.model.parameters import Declare
from v4jax.model.stack import full_sequence
from v4jax.model.weights import materialize
from v4jax.parallel.axes import Tokens
from v4jax.parallel.expert_parallel import even_rounds
from v4jax.parallel.layout import Layout
from v4jax.parallel.shard import WEIGHTS, entry_shards, on_shards
from v4jax.parallel.weight_sharding import annotate_shardings
from v4jax.planning.liveness import peak_bytes
from v4jax.planning.workload import Workload, abstract_mesh

# Primitive → what it is called in reports.
_COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "permute",
}


@dataclasses.dataclass(frozen=True)
class Message:
    """What one device puts into one collective: its operand, before anything is exchanged."""

    kind: str
    axes: tuple[str, ...]
    operand_bytes: int


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """A layer on one device: bytes at its fullest moment, and its collectives with their number."""

    layers: int
    peak_bytes: int
    messages: tuple[tuple[Message, int], ...]


def trace_layers(work: Workload) -> list[LayerTrace]:
    """Returns a trace for each kind of layer; routers and MTP blocks differ too little to count."""
    kinds: dict[tuple, list[Layer]] = {}
    trained = work.config.mtp_layers if work.regime == "train" else ()
    for layer in (*work.config.layers, *trained):
        kinds.setdefault((layer.kind, layer.ratio), []).append(layer)
    traces = []
    for layers in kinds.values():
        size, messages = _trace(
            *(work.config, work.numerics, layers[-1], work.mesh, work.regime, work.storage),
            *(work.training == "lora", work.batch, work.chunk, work.context),
            work.topology.chip.platform,
        )
        traces.append(LayerTrace(len(layers), size, messages))
    return traces


@functools.lru_cache(maxsize=512)
def _trace(
    config: ModelConfig,
    numerics: Numerics,
    layer: Layer,
    mesh: tuple[tuple[str, int], ...],
    regime: str,
    storage: str,
    frozen: bool,
    batch: int,
    tokens: int,
    context: int,
    platform: str,
) -> tuple[int, tuple[tuple[Message, int], ...]]:
    trains, split = regime == "train", "whole" if regime == "decode" else "split"
    layout = Layout(abstract_mesh(dict(mesh)), "train" if trains else "serve")

    def build():
        return Block(Declare(config, storage, nnx.Rngs(0)), config, layer, numerics)

    block = annotate_shardings(nnx.eval_shape(build), layout)
    width = (batch, tokens, config.hc_mult, config.hidden_size)
    streams = jax.ShapeDtypeStruct(width, jnp.dtype(numerics.activation_dtype))
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    with dispatch.compiling_for(platform):
        if trains:
            program = _training(layout, layer, numerics, frozen)
            traced = jax.make_jaxpr(program)(block, streams, ids)
        else:
            start = jax.ShapeDtypeStruct((batch,), jnp.int32)
            shards = entry_shards(layout)
            cache = jax.eval_shape(lambda: init_cache(config, numerics, batch, context, shards))
            program = _extending(layout, split, layer, cache)
            traced = jax.make_jaxpr(program)(block, streams, ids, start, cache)
    messages = collections.Counter()
    axes = (layout.array_axes(name, split) for name in ("batch", "tokens"))
    devices = math.prod(map(layout.size, axes))
    rounds = even_rounds(batch * tokens // devices * config.num_experts_per_tok)
    _collect(traced.jaxpr, layout, 1, rounds, messages)
    return peak_bytes(traced), tuple(messages.items())


def _extending(layout: Layout, split: Tokens, layer: Layer, cache):
    def run(axes, block, streams, ids, start, cache):
        end = start + ids.shape[1] * axes.size("tokens")
        first = start + axes.offset("tokens", ids.shape[1])
        context = make_context(ids, first, end, {layer.rope}, axes=axes)
        memory = LayerCache(cache, layer, jnp.int32(0), jnp.int32(0), first, end, axes)
        streams, memory = materialize(axes, block)(streams, context, memory)
        return streams, memory.cache

    tokens, axes = P("batch", "tokens"), cache_axes(cache)
    inputs = (WEIGHTS, tokens, tokens, P("batch"), axes)
    return on_shards(run, layout, split, inputs, (tokens, axes))


def _training(layout: Layout, layer: Layer, numerics: Numerics, frozen: bool):
    """Returns a program of one layer's forward and backward pass, as if its input were kept."""
    tokens = P("batch", "tokens")

    def run(axes, block, streams, ids):
        config = block.attention.config
        start = jnp.zeros(ids.shape[0], jnp.int32) + axes.offset("tokens", ids.shape[1])
        end = start + ids.shape[1]
        context = make_context(ids, start, end, {layer.rope}, axes=axes)
        memory = full_sequence(config, numerics, layer, context)
        return materialize(axes, block)(streams, context, memory)[0]

    forward = on_shards(run, layout, "split", (WEIGHTS, tokens, tokens), tokens)

    def gradients(block, streams, ids):
        if frozen:
            out, pull = jax.vjp(lambda streams: forward(block, streams, ids), streams)
            return pull(out)
        graph, trained, rest = nnx.split(block, nnx.Param, ...)

        def of_trained(trained, streams):
            return forward(nnx.merge(graph, trained, rest), streams, ids)

        out, pull = jax.vjp(of_trained, trained, streams)
        return pull(out)

    return gradients


def _collect(jaxpr, layout: Layout, times: int, rounds: int, messages: collections.Counter) -> None:
    """Adds what a program sends; `rounds`: of the loop that sends to the experts."""
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        if name in _COLLECTIVES:
            message = _describe(_COLLECTIVES[name], equation, layout)
            if message is not None:
                messages[message] += times
        elif name == "scan":
            _collect(p["jaxpr"].jaxpr, layout, times * p["length"], rounds, messages)
        elif name == "cond":
            # Only an uneven load takes a branch that sends more: count the one that sends least.
            branches = []
            for branch in p["branches"]:
                branches.append(collections.Counter())
                _collect(branch.jaxpr, layout, times, rounds, branches[-1])
            messages.update(min(branches, key=_size))
        elif name == "while":
            _collect(p["body_jaxpr"].jaxpr, layout, times * rounds, rounds, messages)
        elif name != "pallas_call":
            for inner in _bodies(p):
                _collect(inner, layout, times, rounds, messages)


def _describe(kind: str, equation, layout: Layout) -> Message | None:
    axes = equation.params.get("axes", equation.params.get("axis_name"))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    axes = tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)
    operands = equation.invars if kind != "all-to-all" else equation.invars[:1]
    size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in operands)
    return Message(kind, axes, size) if axes else None


def _size(messages: collections.Counter) -> int:
    return sum(message.operand_bytes * count for message, count in messages.items())


def _bodies(parameters: dict):
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
