"""Reading collectives off a trace, and off a compiled program's text."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from v4jax.planning.collectives import (
    Collective,
    Message,
    count_collectives,
    trace_collectives,
)
from v4jax.planning.workload import abstract_mesh

MESH = abstract_mesh({"expert": 4})

# A loop of 20 rounds by its condition, one of 3 as stated, one of unknown length.
TEXT = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%below (state: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(20)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %go = pred[] compare(%counter, %bound), direction=LT
}

%layer (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sum = f32[4,8]{1,0:T(4,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %g = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%y), dimensions={0}
  %done = bf16[64,8]{1,0} all-gather-done(%g)
}

%inner (state: (s32[])) -> (s32[]) {
  ROOT %s = u8[2,16]{1,0} collective-permute(%z), source_target_pairs={{0,1}}
}

%unknown (state: (s32[])) -> pred[] {
  ROOT %go = pred[] get-tuple-element(%state), index=0
}

%rows (p: f32[8]) -> f32[8] {
  ROOT %r = f32[16]{0} reduce-scatter(%p), to_apply=%add
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %r = bf16[64,8]{1,0} all-reduce(%input), to_apply=%add
  ROOT %own = bf16[16,8]{1,0} dynamic-slice(%r, %first, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%below, body=%layer
  %v = (s32[]) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %u = (s32[]) while(%t), condition=%unknown, body=%inner
  %f = f32[8]{0} fusion(%x), kind=kCustom, calls=%rows
  %s = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_of_a_text():
    assert count_collectives(TEXT) == [
        Collective("all-gather", 20, 20 * 64 * 8 * 2),
        Collective("all-reduce", 20, 20 * 4 * 8 * 4),
        Collective("collective-permute", 4, 4 * 32),
        Collective("reduce-scatter", 2, 64 + 16 * 8 * 2),
    ]


def test_collectives_of_a_trace():
    """Operands of one device; loops by their length, or by the rounds given; the cheaper branch."""

    def permute(x, _=None):
        return jax.lax.ppermute(x, "expert", [(0, 1)]), None

    def exchange(x):
        return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)

    def gather(x):
        return jax.lax.all_gather(x, "expert").sum(0)

    def run(x):
        x = jax.lax.psum(x, ("expert", "data"))  # data has one device
        x = jax.lax.scan(permute, x, length=5)[0]
        x = jax.lax.while_loop(lambda x: x.sum() > 0, exchange, x)
        x = jax.lax.cond(x.sum() > 0, lambda x: gather(gather(x)), gather, x)
        return jax.lax.psum(x, "data")

    split = {"in_specs": P("expert"), "out_specs": P("expert"), "check_vma": False}
    mapped = jax.shard_map(run, mesh=MESH, **split)
    jaxpr = jax.make_jaxpr(mapped)(jnp.zeros((16, 8), jnp.bfloat16))
    size = 4 * 8 * 2
    assert trace_collectives(jaxpr, MESH.shape, rounds=3) == {
        Message("all-reduce", ("expert",), size): 1,
        Message("permute", ("expert",), size): 5,
        Message("all-to-all", ("expert",), size): 3,
        Message("all-gather", ("expert",), size): 1,
    }
