"""What cannot be compiled; one small step for a real chip."""

import pytest

from v4jax.errors import UnsupportedError
from v4jax.planning import compile, memory

from .plans import work


def test_no_compiler_for_gpus():
    with pytest.raises(UnsupportedError, match="needs a TPU topology, got h100:8"):
        compile.compile_step(work("h100-8", "expert=8"))


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_decode_of_nano_on_a_mesh():
    plan = work("v6e-4", "expert=2,context=2", model="nano", context=16384, batch=2)
    compiled = compile.compile_step(plan)
    held = memory.count_bytes(plan)
    # The step reads no weights of drafts. The compiler pads small arrays to whole tiles: it needs
    # more than the bytes of the others.
    arguments = held.arguments - sum(held.drafts.values())
    assert arguments <= compiled.argument_bytes < 2 * arguments
    assert {item.kind for item in compiled.collectives} == {"all-reduce", "all-gather"}
    assert "compiler's statements" in compile.as_text(compiled, held)
