"""Reading the collectives off a compiled program's text."""

from v4jax.planning.collectives import Collective, count_collectives

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
