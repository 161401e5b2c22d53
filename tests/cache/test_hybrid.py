"""The cache's size is the published one, and misuse says what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.cache import init_cache
from v4jax.cache.hybrid import cache_axes
from v4jax.config.loading import load_model_config
from v4jax.config.numerics import FLOAT32, RELEASED
from v4jax.errors import CacheError
from v4jax.parallel import Layout, make_mesh
from v4jax.parallel.shard import make_arrays

MILLION = 1 << 20

# Specification C.3: bytes per token of entries and index keys, constant window bytes, and the
# unfinished windows (float32), which the published table leaves out.
PUBLISHED = {
    "v4_flash": dict(per_token=3514.25, windows=43 * 74752, unfinished=12.2e6, gib=3.4349),
    "v4_pro": dict(per_token=5031.4375, windows=61 * 74752, unfinished=18.7e6, gib=4.9178),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_are_the_published_ones(name):
    """Counted on the real cache arrays at 1,048,576 tokens (from shapes, nothing is allocated)."""
    config, published = load_model_config(name), PUBLISHED[name]
    cache = jax.eval_shape(lambda: init_cache(config, RELEASED, 1, MILLION))

    def count(tree):
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    # One row of every ring is spare, for a draft that is taken back; the MTP block has a ring too.
    windows, drafts = count(cache.stored["window"]), count(cache.stored["draft"])
    entries = count(cache.stored) - windows - drafts
    assert windows == published["windows"] * 129 // 128
    assert drafts == windows // config.num_hidden_layers
    assert entries == published["per_token"] * MILLION
    streams = count(cache.unfinished["draft"])
    assert streams == 2 * config.hc_mult * config.hidden_size * 2
    raw = [x for name, x in cache.unfinished.items() if name != "draft"]
    unfinished = sum(count(x) * (x.shape[2] - 1) / x.shape[2] for x in raw)
    assert unfinished == pytest.approx(published["unfinished"], rel=0.01)
    assert (published["windows"] + entries) / 2**30 == pytest.approx(published["gib"], abs=5e-5)
    assert cache.bytes() == count(cache)


def test_capacity_below_one_window():
    """A cache shorter than a compression window still has a place for entries to be masked."""
    cache = init_cache(load_model_config("tiny"), FLOAT32, 2, 3)
    assert cache.capacity == 3 and cache.stored["hca"]["values"].shape[2] == 1


def numbered(cache):
    """Returns the cache with another number in every element of its arrays."""
    return jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), cache)


@pytest.mark.parametrize("count", [1, 3])
def test_repeat_copies(count):
    cache = numbered(init_cache(load_model_config("tiny"), FLOAT32, 2, 300))
    before = jax.tree.map(np.array, cache)
    copies = cache.repeat(count)
    taken = cache.take(np.repeat(np.arange(2), count))
    assert jax.tree.all(jax.tree.map(np.array_equal, copies, taken))
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(copies)
    assert jax.tree.all(jax.tree.map(np.array_equal, cache, before)), "the copies shared buffers"


def test_repeat_sends_nothing_between_devices():
    """Slots over `data`, entries over `expert`: copies lie where their originals do."""
    config, layout = load_model_config("tiny"), Layout(make_mesh(data=2, expert=4))
    cache = make_arrays(lambda: init_cache(config, FLOAT32, 2, 300, 4), cache_axes, layout)
    copies = cache.repeat(2)
    assert copies.batch == 4
    for a, b in zip(jax.tree.leaves(copies), jax.tree.leaves(cache), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    shardings = jax.tree.map(lambda x: x.sharding, cache)
    program = jax.jit(lambda x: x.repeat(2), out_shardings=shardings).lower(cache).compile()
    assert not re.findall(r"all-\w+|collective-\w+", program.as_text())


BAD = {
    "no copy": (
        lambda c: init_cache(c, FLOAT32, 1, 8).repeat(0),
        "count must be at least 1, got 0",
    ),
    "no sequence": (lambda c: init_cache(c, FLOAT32, 0, 8), "batch must be at least 1, got 0"),
    "no token": (lambda c: init_cache(c, FLOAT32, 1, 0), "max_tokens must be 1 … "),
    "too long": (
        lambda c: init_cache(c, FLOAT32, 1, c.max_position_embeddings + 1),
        "max_position_embeddings = 1048576, got 1048577",
    ),
    "mask of another length": (
        lambda c: init_cache(c, FLOAT32, 2, 8).reset(np.array([True])),
        "slots must be a boolean mask of shape [2], got bool[1]",
    ),
    "indices for a mask": (
        lambda c: init_cache(c, FLOAT32, 2, 8).reset(np.array([0, 1])),
        "slots must be a boolean mask of shape [2], got int",
    ),
    "no such slot": (
        lambda c: init_cache(c, FLOAT32, 2, 8).take(np.array([0, 2])),
        "indices must be slots 0 … 1, got [0, 2]",
    ),
    "mask for indices": (
        lambda c: init_cache(c, FLOAT32, 2, 8).take(np.array([True, False])),
        "indices must be an integer vector, got bool[2]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse(case):
    call, message = BAD[case]
    with pytest.raises(CacheError) as error:
        call(load_model_config("tiny"))
    assert message in str(error.value)
