"""Every mesh that does not fit the model, the slice or the tokens."""

import pytest

from v4jax.errors import ConfigError
from v4jax.planning import programs

from .plans import work


def test_shares_of_a_device():
    decode = work("v6e-16", "data=2,expert=4,context=2")
    assert (decode.local_batch, decode.local_tokens, decode.parts("read_entries")) == (2, 1, 8)
    prefill = work("v6e-16", "data=2,expert=4,context=2", "prefill")
    assert (prefill.chunk, prefill.local_tokens) == (8 * 1024, 1024)
    train = work("v5p:4x4x8", "data=8,expert=16", "train", context=4096, batch=128)
    assert (train.chunk, train.local_batch, train.local_tokens) == (4096, 16, 256)
    assert (decode.storage, train.storage) == ("released", "bfloat16")


BROKEN = {
    "devices": (
        ("v6e-16", "expert=8"),
        r"must multiply to the 16 devices of v6e:4x4, got expert 8 = 8",
    ),
    "two devices a chip": (
        ("tpu7x-8", "expert=4"),
        r"must multiply to the 8 devices .*each of its 4 chips is 2 devices",
    ),
    "experts": (
        ("v5p:2x3x4", "expert=24"),
        r"mesh.expert = 24 does not divide model.n_routed_experts = 256; "
        r"sizes that would do: \[1, 2, 4, 8, 16, 32, 64, 128, 256\]",
    ),
    "groups": (
        ("v6e-16", "tensor=16"),
        r"mesh.tensor = 16 does not divide model.o_groups = 8; sizes that would do: \[1, 2, 4, 8\]",
    ),
    "batch": (
        ("v6e-16", "data=16"),
        r"mesh.data = 16 does not divide a batch of 4; sizes that would do: \[1, 2, 4\]",
    ),
}


@pytest.mark.parametrize("arguments, message", BROKEN.values(), ids=BROKEN.keys())
def test_meshes_that_do_not_divide(arguments, message):
    with pytest.raises(ConfigError, match=message):
        work(*arguments)


OPTIONS = {
    "context": (dict(context=1 << 21), r"context must be 1 … max_position_embeddings = 1048576"),
    "no sequences": (dict(batch=0), "batch must be at least 1"),
    "chunk": (
        dict(regime="prefill", chunk=1000),
        r"mesh.context · mesh.expert = 16 does not divide 1000 tokens .* windows of 128",
    ),
    "sequence": (
        dict(regime="train", context=1024),
        r"does not divide 1024 tokens .*sizes that would do: \[1, 2, 4, 8\]",
    ),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        work("v6e-16", "expert=16", **options)


def test_blocks_of_scales_stay_whole():
    """A share of a quantized weight is whole blocks of its scales."""
    with pytest.raises(ConfigError, match=r"axis 'heads' of .* in whole blocks of 128"):
        programs.sharded_weights(work("v6e-4", "tensor=2,expert=2", model="nano", batch=2))
