"""Whole configurations to batches: shares, order, epochs, resuming, and any number of hosts."""

import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest

from v4jax.config import DataConfig, SourceConfig
from v4jax.config.loading import build
from v4jax.errors import ConfigError, DataError
from v4jax.tokenizer import load_tokenizer
from v4jax.training.batch import PADDING
from v4jax.training.data import Loader, merge_states

BYTE = load_tokenizer("byte")
CHATS, TEXTS, LENGTH = 40, 12, 256


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Conversations and texts that say which they are; one line of the conversations is torn."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    lines = []
    for i in range(CHATS):
        answer = f"chat {i} " + "a" * int(random.integers(1, 180))
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    lines.insert(7, '{"messages": [')
    (folder / "chat.jsonl").write_text("\n".join(lines))
    for i in range(TEXTS):
        (folder / f"{i:02}.txt").write_text(f"text {i} " + "t" * int(random.integers(1, 600)))
    return folder


@pytest.fixture
def config(corpus):
    chat = SourceConfig("chat", (str(corpus / "chat.jsonl"),), weight=3)
    text = SourceConfig("text", tuple(map(str, sorted(corpus.glob("*.txt")))))
    return DataConfig(
        (chat, text), length=LENGTH, batch=4, lookahead=4, on_bad_record="skip", prefetch=0
    )


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for field in ("tokens", "weights", "begin"):
            assert (getattr(batch, field) == getattr(other, field)).all()


def documents_of(batches):
    """Returns the texts of all documents in the rows of `batches`."""
    texts = []
    for batch in batches:
        for tokens, begin in zip(batch.tokens, batch.begin, strict=True):
            starts = np.unique(begin[begin != PADDING])
            texts += [BYTE.decode(tokens[begin == start]) for start in starts]
    return texts


def test_shapes(config):
    batch = next(Loader(config, BYTE))
    assert batch.tokens.shape == batch.weights.shape == batch.begin.shape == (4, LENGTH)
    assert (batch.tokens.dtype, batch.begin.dtype) == (np.int32, np.int32)
    assert batch.weights.dtype == np.float32


@pytest.mark.parametrize("prefetch", [0, 3])
def test_goes_on_exactly_from_anywhere(config, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    loader = Loader(config, BYTE)
    states, batches = [], []
    for _ in range(7):
        states.append(json.dumps(loader.state()))
        batches += take(loader, 1)
    for i, state in enumerate(states):
        again = Loader(config, BYTE)
        take(again, i % 3)  # a position is restored into a used loader as well
        again.restore(json.loads(state))
        assert json.dumps(again.state()) == state
        assert_equal(take(again, 7 - i), batches[i:])
        assert again.state() == loader.state() and again.counts() == loader.counts()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_sees(config, hosts):
    alone = Loader(config, BYTE)
    loaders = [Loader(config, BYTE, shard_index=i, shard_count=hosts) for i in range(hosts)]
    for _ in range(10):
        batch, parts = next(alone), [next(loader) for loader in loaders]
        assert all(part.tokens.shape == (4 // hosts, LENGTH) for part in parts)
        for field in ("tokens", "weights", "begin"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert (joined == getattr(batch, field)).all()
    assert merge_states([loader.state() for loader in loaders]) == alone.state()


def test_goes_on_with_another_number_of_hosts(config):
    alone = Loader(config, BYTE)
    pair = [Loader(config, BYTE, shard_index=i, shard_count=2) for i in range(2)]
    take(alone, 5), [take(loader, 5) for loader in pair]
    state = json.loads(json.dumps(merge_states([loader.state() for loader in pair])))
    four = [Loader(config, BYTE, shard_index=i, shard_count=4) for i in range(4)]
    for loader in four:
        loader.restore(state)
    parts = [next(loader).tokens for loader in four]
    assert (np.concatenate(parts) == next(alone).tokens).all()
    with pytest.raises(DataError, match=r"lacks rows 2, 3 of the batch; join the states of all"):
        Loader(config, BYTE).restore(pair[0].state())


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_give_every_record_that_often(config, packing):
    sources = tuple(dataclasses.replace(source, weight=1.0) for source in config.sources)
    config = dataclasses.replace(config, sources=sources, epochs=2, packing=packing)
    loader = Loader(config, BYTE)
    batches = list(loader)
    texts = documents_of(batches)
    for kind, count in (("chat", CHATS), ("text", TEXTS)):
        for i in range(count):
            assert sum(f"{kind} {i} " in text for text in texts) == 2
    counts = loader.counts()
    assert counts.skipped == 2 and counts.documents == len(texts)
    assert counts.tokens == sum((batch.begin != PADDING).sum() for batch in batches)
    assert loader.report() == (
        f"data: {counts.documents} documents, {counts.tokens:,} tokens, rows "
        f"{100 * counts.fill:.1f} % full, 2 bad records skipped"
    )


def test_epochs_of_two_hosts(config):
    """One host's rows end before the other's; with padding, both have the rows of one host."""
    sources = tuple(dataclasses.replace(source, weight=1.0) for source in config.sources)
    config = dataclasses.replace(config, sources=sources, epochs=1)
    pair = [Loader(config, BYTE, shard_index=i, shard_count=2) for i in range(2)]
    whole, parts = list(Loader(config, BYTE)), [list(loader) for loader in pair]
    counts = [len(part) for part in parts]
    assert min(counts) < max(counts) == len(whole)
    assert counts == [loader.count() for loader in pair]
    for loader, part in zip(pair, parts, strict=True):
        part += [loader.padding] * (len(whole) - len(part))
    for batch, *rows in zip(whole, *parts, strict=True):
        jax.tree.map(
            lambda array, *rows: np.testing.assert_array_equal(array, np.concatenate(rows)),
            batch,
            *rows,
        )


@pytest.mark.parametrize("packing", [True, False])
def test_shares_of_a_mixture(config, packing):
    config = dataclasses.replace(config, packing=packing)
    batches = take(Loader(config, BYTE), 40)
    for lane in range(config.batch):  # in every row by itself
        rows = [
            dataclasses.replace(b, begin=b.begin[lane:][:1], tokens=b.tokens[lane:][:1])
            for b in batches
        ]
        texts = documents_of(rows)
        chats = sum("chat " in text for text in texts)
        firsts = sum("text " in text for text in texts)  # later parts of a split text have no name
        # Three of four records drawn are conversations; one of their 41 is torn.
        assert chats / (chats + firsts) == pytest.approx(3 / 4, abs=0.06)


def test_order_comes_from_the_seed(config):
    one, other = (dataclasses.replace(config, seed=seed) for seed in (1, 2))
    assert_equal(take(Loader(one, BYTE), 3), take(Loader(one, BYTE), 3))
    with pytest.raises(AssertionError):
        assert_equal(take(Loader(one, BYTE), 3), take(Loader(other, BYTE), 3))


def test_order_of_the_files_without_shuffling(config):
    options = dict(shuffle=False, packing=False, length=1024, sources=config.sources[1:])
    texts = documents_of(take(Loader(dataclasses.replace(config, **options), BYTE), 6))
    names = [int(text.split("text ")[1].split()[0]) for text in texts]
    assert names == [*range(TEXTS), *range(TEXTS)]


def test_every_epoch_has_its_own_order(config):
    config = dataclasses.replace(config, packing=False, batch=1, sources=config.sources[:1])
    texts = documents_of(take(Loader(config, BYTE), 2 * CHATS))
    first, second = texts[:CHATS], texts[CHATS:]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_record_is_fatal_where_it_is_read(config, corpus, prefetch):
    config = dataclasses.replace(config, on_bad_record="error", prefetch=prefetch)
    stopped = Loader(config, BYTE)
    with pytest.raises(DataError, match=r"chat\.jsonl, line 8: is no JSON"):
        take(stopped, 100)
    # The position is that of the last batch given: with bad records skipped it goes on there.
    skipping = Loader(dataclasses.replace(config, on_bad_record="skip"), BYTE)
    take(skipping, stopped.counts().rows // config.batch)
    assert stopped.state() == skipping.state()


def test_the_position_of_other_data_is_refused(config):
    state = Loader(config, BYTE).state()
    other = dataclasses.replace(config, seed=5, length=512)
    message = r"was saved for other data: length was 256 and is 512; seed was 0 and is 5; restore"
    with pytest.raises(DataError, match=message):
        Loader(other, BYTE).restore(state)


# {what is wrong: (changes to the configuration, shards, what the message must say)}
BROKEN = {
    "shard": ({}, (2, 2), r"shard_index must be between 0 and shard_count - 1 = 1, got 2"),
    "batch": ({}, (0, 3), r"data\.batch must be a multiple of the number of hosts, 3, got 4"),
}


@pytest.mark.parametrize(("changes", "shards", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_shards(config, changes, shards, message):
    config = dataclasses.replace(config, sources=config.sources[:1], **changes)
    with pytest.raises(ConfigError, match=message):
        Loader(config, BYTE, shard_index=shards[0], shard_count=shards[1])


def test_from_a_config_file(config, corpus):
    written = ml_collections.ConfigDict(
        dict(
            sources=(dict(kind="chat", paths=[str(corpus / "chat.jsonl")]),),
            length=LENGTH,
            batch=4,
            on_bad_record="skip",
        )
    )
    loader = Loader(build(DataConfig, written, "data"), BYTE)
    assert next(loader).tokens.shape == (4, LENGTH)
    loader.close()
