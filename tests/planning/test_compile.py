"""Reading a compiled program's text; what cannot be compiled; one small step for a real chip."""

import pytest

from v4jax.errors import UnsupportedError
from v4jax.planning import ahead_of_time, compile, memory
from v4jax.planning.compile import Collective

from .plans import work

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

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%below, body=%layer
  %v = (s32[]) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %u = (s32[]) while(%t), condition=%unknown, body=%inner
  %f = f32[8]{0} fusion(%x), kind=kCustom, calls=%rows
}
"""


def test_collectives_of_a_text():
    assert compile.count_collectives(TEXT) == [
        Collective("all-gather", 20, 20 * 64 * 8 * 2),
        Collective("all-reduce", 20, 20 * 4 * 8 * 4),
        Collective("collective-permute", 4, 4 * 32),
        Collective("reduce-scatter", 1, 64),
    ]


REFUSED = {
    "gpu": (("h100-8", "expert=8"), "needs a TPU topology, got h100:8"),
    "training": (
        ("v6e-16", "expert=16", "train"),
        "no training step to compile; use --regime=prefill or decode",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_compiled(arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        compile.compile_step(work(*arguments))


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.skipif(
    ahead_of_time.why_unavailable() is not None, reason=str(ahead_of_time.why_unavailable())
)
def test_decode_of_nano_on_a_mesh():
    plan = work("v6e-4", "expert=2,context=2", model="nano", context=16384, batch=2)
    compiled = compile.compile_step(plan)
    held = memory.count_bytes(plan)
    arguments = sum(held.weights.values()) + sum(held.cache.values())
    # The compiler pads small arrays to whole tiles, so it needs more than their bytes.
    assert arguments <= compiled.argument_bytes < 2 * arguments
    assert {item.kind for item in compiled.collectives} == {"all-reduce", "all-gather"}
    assert "compiler's statements" in compile.as_text(compiled, held)
