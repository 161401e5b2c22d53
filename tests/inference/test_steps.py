"""The two loops: any chunking reads the same, and writing stops where it must."""

import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.errors import CacheError
from v4jax.inference.request import SamplingOptions
from v4jax.inference.steps import decode, prefill

from .fake_model import FakeModel, expected_tokens

EOS = 257


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 100, 101])
def test_any_chunking_reads_the_same(chunk_tokens):
    model, sequences = FakeModel(), [list(range(100)), list(range(50, 57)), []]
    logits, cache = prefill(model, sequences, model.init_cache(4, 128), chunk_tokens=chunk_tokens)
    assert cache.lengths.tolist() == [100, 7, 0, 0]
    for row, sequence in zip(logits, sequences[:2], strict=False):
        whole, _ = model.extend(jnp.array([sequence]), model.init_cache(1, 128), logits="last")
        np.testing.assert_array_equal(row, whole[0])


def test_chunks_have_one_shape_and_are_reported():
    model, told = FakeModel(), []
    prefill(model, [range(100)], model.init_cache(1, 128), chunk_tokens=64, on_chunk=told.append)
    assert [call[:2] for call in model.calls] == [(1, 64), (1, 64)]
    assert told == [64, 36]


def write(
    prompts: list[list[int]],
    options: list[SamplingOptions],
    slots: int,
    *,
    drafts: int = 0,
    capacity: int = 256,
) -> list[list[list[int]]]:
    """Returns what is written after each prompt, step by step."""
    model = FakeModel(drafts=drafts)
    logits, cache = prefill(model, prompts, model.init_cache(slots, capacity), chunk_tokens=32)
    written: list[list[list[int]]] = [[] for _ in prompts]
    for step in decode(model, logits, cache, options, end_tokens=(EOS,), drafts=drafts):
        for blocks, tokens in zip(written, step, strict=True):
            blocks.extend([tokens] if tokens else [])
    return written


def join(blocks: list[list[int]]) -> list[int]:
    return [token for block in blocks for token in block]


def test_writing_is_the_models_greedy_choice():
    prompts = [[1, 2, 3], [9] * 40]
    options = [SamplingOptions(max_new_tokens=20), SamplingOptions(max_new_tokens=5)]
    written = write(prompts, options, slots=3)
    assert [*map(join, written)] == [
        expected_tokens(prompt, option.max_new_tokens)
        for prompt, option in zip(prompts, options, strict=True)
    ]


@pytest.mark.parametrize("drafts", [0, 4])
def test_writing_stops_at_eos(drafts):
    prompts = [[n] for n in range(60)]
    options = [SamplingOptions(max_new_tokens=100)] * 60
    blocks = write(prompts, options, slots=60, drafts=drafts)
    written = [*map(join, blocks)]
    sizes = {len(block) for each in blocks for block in each}
    assert sizes == set(range(1, drafts + 2)), "every number of drafts is accepted"
    assert written == [expected_tokens(prompt, 100) for prompt in prompts]
    assert sum(tokens[-1] == EOS for tokens in written) > 5  # the case does occur
    assert all(EOS not in tokens[:-1] for tokens in written)


def test_blocks_end_at_the_last_token_of_an_answer():
    """Answers of all lengths, in caches without any room to spare."""
    for length in range(1, 9):
        options = [SamplingOptions(max_new_tokens=length)] * 3
        prompts = [[n] * 40 for n in range(3)]
        blocks = write(prompts, options, slots=4, drafts=3, capacity=40 + length - 1)
        assert [*map(join, blocks)] == [expected_tokens(prompt, length) for prompt in prompts]


def test_drafted_samples_do_not_depend_on_company():
    options = [SamplingOptions(temperature=0.8, seed=s, max_new_tokens=20) for s in range(5)]
    together = write([[7, 8]] * 5, options, slots=6, drafts=3)
    assert len({tuple(join(blocks)) for blocks in together}) == 5
    assert max(len(block) for blocks in together for block in blocks) > 1
    for index in (0, 4):
        assert write([[7, 8]], [options[index]], slots=1, drafts=3) == [together[index]]


def test_the_last_token_is_not_read():
    model = FakeModel()
    logits, cache = prefill(model, [[1]], model.init_cache(1, 32), chunk_tokens=8)
    model.calls.clear()
    one = [SamplingOptions(max_new_tokens=1)]
    assert len(list(decode(model, logits, cache, one, end_tokens=(EOS,)))) == 1
    assert model.calls == []


def test_an_answer_without_room():
    model = FakeModel()
    for room, fits in ((5, True), (6, False)):  # the last token is written and not read
        logits, cache = prefill(model, [[1] * 12], model.init_cache(1, 16), chunk_tokens=16)
        options = [SamplingOptions(max_new_tokens=room)]
        steps = decode(model, logits, cache, options, end_tokens=(-1,))
        if fits:
            assert len(list(steps)) == room
        else:
            with pytest.raises(CacheError, match="12 tokens and an answer of up to 6 do not fit"):
                next(steps)
