"""The DSpark draft module against the specification's float64 program, and speculation with it."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from oracle import numpy_oracle
from oracle.test_oracles import J4_CONFIG

from v4jax.cache.hybrid import draft_keys
from v4jax.checkpoint import names
from v4jax.config.from_hf import model_config_from_hf
from v4jax.config.model import DraftConfig, LayerKind
from v4jax.config.numerics import FLOAT32
from v4jax.errors import CacheError, ConfigError, ShapeError
from v4jax.model.context import make_context
from v4jax.model.passes import open_streams
from v4jax.model.speculation import Drafts, accept_by_rejection
from v4jax.model.stack import full_sequence

DRAFT = DraftConfig(stages=3, target_layer_ids=(2, 3, 4), markov_rank=8, noise_token_id=95)
RAW = J4_CONFIG | {
    "compress_ratios": [*numpy_oracle.RATIOS[:-1], 0, 0, 0],
    "num_nextn_predict_layers": 1,  # as the released files say, with three stages
    "dspark_block_size": 5,
    "dspark_markov_rank": 8,
    "dspark_noise_token_id": 95,
    "dspark_target_layer_ids": [2, 3, 4],
}
CONFIG = model_config_from_hf(RAW)
TOKENS = np.arange(200)
IDS = (TOKENS * 37 + TOKENS**2 // 3) % numpy_oracle.V
PLACES = (0, 4, 127, 128, 150, 199)  # windows that are not full, just full, and full
QAT = dataclasses.replace(FLOAT32, name="qat", entry_format="fp8", index_format="fp4")
# Float32 through five layers and three stages, against float64; logits of deviation near 3.
FLOAT32_LOGITS = 2e-4
# A code of FP8 or FP4 may fall to its neighbour.
QAT_MEDIAN, QAT_MAX = 5e-3, 0.3


@pytest.fixture(scope="module")
def oracle():
    """The specification's program; the weights that it adds go away with the module."""
    before = dict(numpy_oracle.W)
    yield importlib.import_module("oracle.numpy_oracle_dspark")
    numpy_oracle.W.clear()
    numpy_oracle.W.update(before)
    del sys.modules["oracle.numpy_oracle_dspark"]  # which adds them again where it is next needed


@pytest.fixture(scope="module")
def tensors(oracle):
    wanted = {place.tensor for place in names.places(CONFIG)}
    return {
        name: value.astype(np.float32 if value.dtype == np.float64 else np.int64)
        for name, value in numpy_oracle.W.items()
        if name in wanted
    }


@pytest.fixture(scope="module")
def model(tensors):
    return small_models.load_tensors(tensors, RAW)


def read(model, tokens, cache=None):
    """Returns the logits of all tokens of one sequence [t, v], and its cache."""
    padded = np.zeros((1, len(IDS)), np.int32)
    padded[0, : len(tokens)] = tokens
    cache = model.init_cache(1, 512) if cache is None else cache
    logits, cache = model.extend(padded, cache, np.array([len(tokens)]))
    return np.asarray(logits[0, : len(tokens)]), cache


def check_drafts(oracle, model, *, median, largest):
    logits, taps = oracle.target(IDS)
    context = oracle.context(taps)
    for p in PLACES:
        last = int(logits[p].argmax())
        x, base = oracle.draft_hidden(context, p, last)
        tokens, corrected, _, confidence = oracle.markov(x, base, last)
        made, cache = read(model, IDS[: p + 1])
        assert made[-1].argmax() == last
        drafts = model.draft([last], cache)
        assert drafts.tokens[0].tolist() == tokens, p
        for ours, theirs in ((drafts.logits, corrected), (drafts.confidence, confidence)):
            difference = np.abs(np.asarray(ours[0]) - theirs)
            assert np.median(difference) < median and difference.max() < largest, p


def test_drafts_equal_the_specification(oracle, model):
    check_drafts(oracle, model, median=FLOAT32_LOGITS, largest=FLOAT32_LOGITS)


@pytest.mark.slow
def test_drafts_with_quantizers(oracle, tensors):
    """FP8 context keys and rows, FP4 index keys, on otherwise exact arithmetic."""
    numpy_oracle.QAT = True
    try:
        made = small_models.load_tensors(tensors, RAW, QAT)
        check_drafts(oracle, made, median=QAT_MEDIAN, largest=QAT_MAX)
    finally:
        numpy_oracle.QAT = False


def decode_greedily(model, prompt, count):
    logits, cache = read(model, prompt)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        logits, cache = model.extend([tokens[-1:]], cache, logits="last")
        tokens.append(int(logits[0].argmax()))
    return tokens


def speculate(model, prompt, count, propose):
    """Returns tokens of greedy speculation, and how many drafts each step accepted."""
    logits, cache = read(model, prompt)
    tokens, accepted = [int(logits[-1].argmax())], []
    while len(tokens) < count:
        drafts = propose(tokens, cache)
        verified, cache = model.verify(tokens[-1:], drafts, cache)
        right = int(verified.accepted[0])
        tokens += [*drafts.tokens[0, :right].tolist(), int(verified.following[0])]
        assert int(cache.lengths[0]) == len(prompt) + len(tokens) - 1
        accepted.append(right)
    return tokens[:count], accepted


def as_drafts(tokens):
    """Returns drafts of one sequence; greedy verification looks at the tokens alone."""
    shape = (1, len(tokens))
    logits = jnp.zeros((*shape, CONFIG.vocab_size))
    return Drafts(jnp.array([tokens], jnp.int32), logits, jnp.zeros(shape))


def test_greedy_speculation_equals_greedy_decoding(model):
    prompt = IDS[:160]
    expected = decode_greedily(model, prompt, 30)

    def by_module(tokens, cache):
        return model.draft(tokens[-1:], cache)

    assert speculate(model, prompt, 12, by_module)[0] == expected[:12]

    steps = []

    def by_knowledge(tokens, cache):
        """Right 1, 2, 3, 4, 5 and 0 times: every number of drafts is taken back."""
        steps.append(None)
        following = (expected + [0] * 9)[len(tokens) : len(tokens) + 5]
        wrong = len(steps) % 6
        guesses = [(t + (i == wrong)) % CONFIG.vocab_size for i, t in enumerate(following)]
        return as_drafts(guesses)

    tokens, accepted = speculate(model, prompt, 30, by_knowledge)
    assert tokens == expected
    assert set(accepted) == {0, 1, 2, 3, 4, 5}


def test_fewer_drafts(model):
    """Two rows are the first of five, and the tokens of a sequence may end within a block."""
    _, cache = read(model, IDS[:20])
    last = IDS[20:21]
    five, two = model.draft(last, cache), model.draft(last, cache, count=2)
    np.testing.assert_array_equal(two.tokens, five.tokens[:, :2])
    best = int(model.extend([last], cache, logits="last")[0][0].argmax())
    right = as_drafts([best, *[0] * 4])
    for length, accepted, consumed in ((0, 0, 0), (1, 0, 1), (2, 1, 2)):
        verified, longer = model.verify(last, right, cache, lengths=[length])
        assert verified.accepted.tolist() == [accepted]
        assert longer.lengths.tolist() == [20 + consumed]
        if length:
            assert int(verified.following[0]) == int(verified.logits[0, accepted].argmax())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Sampling by given uniform numbers, as the specification's program does it.

    closer: how much of the target's distribution is that of the draft.
    """

    drawing: jax.Array
    accepting: jax.Array
    last: jax.Array
    closer: jax.Array

    def choose(self, logits, row):
        return pick(distribution(logits), self.drawing[row])

    def accept(self, drafts, logits, counts):
        q, p = distribution(drafts.logits), distribution(logits)
        p = p.at[:, :-1].set((1 - self.closer) * p[:, :-1] + self.closer * q)
        accepted, left = accept_by_rejection(drafts.tokens, q, p, self.accepting[None], counts)
        return accepted, pick(left, self.last)


def distribution(logits, top_p=0.95):
    q = jax.nn.softmax(logits)
    order = jnp.argsort(-q, axis=-1, stable=True)
    sorted_q = jnp.take_along_axis(q, order, -1)
    kept = jnp.cumsum(sorted_q, -1) - sorted_q < top_p
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)
    q = jnp.where(kept, q, 0)
    return q / q.sum(-1, keepdims=True)


def pick(q, u):
    """Returns the first id whose cumulated mass exceeds u."""
    return jnp.sum(jnp.cumsum(q, -1) <= u, axis=-1).astype(jnp.int32)


def test_sampled_drafts_are_verified_as_specified(model):
    """The golden values of the specification's last table."""
    uniform = jnp.modf(0.6180339887498949 * jnp.arange(1, 64))[0]
    made, cache = read(model, IDS)
    last = [int(made[-1].argmax())]

    def given(accepting, last_uniform, closer):
        return Given(uniform[:5], accepting, last_uniform, jnp.float32(closer))

    drafts = model.draft(last, cache, given(uniform[5:10], uniform[10], 0))
    assert drafts.tokens[0].tolist() == [74, 9, 87, 48, 7]

    def verify(*numbers):
        verified, _ = model.verify(last, drafts, cache, given(*numbers))
        return int(verified.accepted[0]), int(verified.following[0])

    assert verify(uniform[5:10], uniform[10], 0) == (0, 68)
    closer = [verify(uniform[j : j + 5], uniform[j + 5], 0.5) for j in range(5, 45, 5)]
    expected = [(0, 68), (0, 68), (0, 86), (0, 15), (3, 19), (4, 19), (4, 25), (2, 25)]
    assert closer == expected
    assert verify(0 * uniform[:5], uniform[10], 0.5) == (5, 70)


def test_rejected_drafts_leave_no_trace(model):
    """Drafts and logits then are those of a cache that never had the rejected tokens."""
    _, clean = read(model, IDS[:140])
    _, cache = model.extend([IDS[140:146]], clean)
    for kept in range(1, 7):
        _, expected = read(model, IDS[140 : 140 + kept], clean)
        taken = cache.take_back(clean.lengths + kept)
        last = IDS[140 + kept : 141 + kept]
        for a, b in zip(model.draft(last, taken), model.draft(last, expected), strict=True):
            np.testing.assert_allclose(a, b, 0, FLOAT32_LOGITS)
        ours, theirs = (model.extend([last], c, logits="last")[0] for c in (taken, expected))
        np.testing.assert_allclose(ours, theirs, 0, FLOAT32_LOGITS)


def test_errors(model):
    _, cache = read(model, IDS[:20])
    with pytest.raises(CacheError, match=r"take_back may remove 0 … 5 tokens, got \[6\]"):
        cache.take_back([14])
    with pytest.raises(CacheError, match=r"got \[-1\]"):
        cache.take_back([21])
    with pytest.raises(CacheError, match="one token for each of 1 sequences, got 2"):
        model.draft([1, 2], cache)
    with pytest.raises(ShapeError, match="tokens must be ids 0 … 95"):
        model.draft([96], cache)
    with pytest.raises(ShapeError, match=r"last must have shape \[any\], got \[1, 1\]"):
        model.draft([[1]], cache)
    with pytest.raises(ConfigError, match=r"count must be 1 … 5, .* got 6"):
        model.draft([1], cache, count=6)
    with pytest.raises(CacheError, match=r"drafts must be 1 … 5 tokens, .* got 6"):
        model.verify([1], as_drafts([1] * 6), cache)
    with pytest.raises(ShapeError, match="lengths must be 0 … 3"):
        model.verify([1], as_drafts([1, 2]), cache, lengths=[4])
    plain = small_models.make_model(small_models.WINDOWS)
    with pytest.raises(ConfigError, match="neither draft module nor MTP block"):
        plain.draft([1], plain.init_cache(1, 8))


@pytest.fixture(scope="module")
def serial():
    """A model with an MTP block, whose drafts are those of whole sequences."""
    return small_models.make_model(small_models.make_config("csa hca", mtp=True))


def check_serial(model, tokens, cache, ahead):
    """Compares a draft behind what `cache` holds with the row of the whole sequence."""
    length = int(cache.lengths[0])
    drafts = model.draft(tokens[:, length], cache)
    assert drafts.tokens.shape == (len(tokens), 1) and drafts.confidence is None
    np.testing.assert_allclose(drafts.logits[:, 0], ahead[:, length - 1], 0, FLOAT32_LOGITS)
    np.testing.assert_array_equal(drafts.tokens[:, 0], drafts.logits[:, 0].argmax(-1))


def test_a_serial_block_drafts_what_it_predicts(serial):
    """In chunks, token by token, over the window's edge, and after drafts that were rejected."""
    tokens = np.concatenate([small_models.IDS[:2], small_models.IDS[2:]], axis=1)[:, :150]
    ahead, cache = serial.predict_ahead(tokens), serial.init_cache(2, 256)
    padded = np.zeros((2, 64), np.int32)
    for end in (1, 50, 100, 126, 127, 128, 129, 149):
        begin = int(cache.lengths[0])
        padded[:, : end - begin] = tokens[:, begin:end]
        _, cache = serial.extend(padded, cache, np.full(2, end - begin))
        check_serial(serial, tokens, cache, ahead)
    _, cache = serial.extend(tokens[:, :130], serial.init_cache(2, 256))
    for right in (False, True, False):
        begin = int(cache.lengths[0])
        following = tokens[:, begin + 1] if right else tokens[:, begin + 1] + 1
        verified, longer = serial.verify(
            tokens[:, begin], Drafts(following[:, None], jnp.zeros((2, 1, 320)), None), cache
        )
        assert verified.logits.shape == (2, 2, 320)
        # Whatever greedy acceptance says: the sequence goes on as the tokens do.
        cache = dataclasses.replace(longer, lengths=jnp.full(2, begin + 1 + right))
        check_serial(serial, tokens, cache, ahead)


@pytest.mark.parametrize("kind", [{"mtp": True}, {"draft": small_models.DRAFT}], ids=str)
def test_drafts_on_a_mesh(kind):
    """After a prefill whose tokens are split over four devices, and a step whose are not."""
    config = small_models.make_config("window", **kind)
    model = small_models.make_model(config)
    split = small_models.on_mesh(model, data=2, expert=2, context=2)
    tokens = np.tile(small_models.IDS, (1, 5))[:2, :530]

    def draft(model):
        cache = model.init_cache(2, 640)
        _, cache = model.extend(tokens[:, :520], cache, np.array([520, 515]), logits="last")
        first = model.draft(tokens[:, 520], cache)
        _, cache = model.extend(tokens[:, 520:521], cache, logits="last")
        return first.logits, model.draft(tokens[:, 521], cache).logits

    for ours, expected in zip(draft(split), draft(model), strict=True):
        np.testing.assert_allclose(ours, expected, 0, FLOAT32_LOGITS)


@pytest.mark.slow
def test_a_scanned_stack_taps_its_layers():
    """Context keys come from the mean streams behind layers 1, 4 and 6; all three are scanned."""
    config = small_models.make_config("window csa hca csa hca csa hca")
    config = dataclasses.replace(
        config,
        draft=dataclasses.replace(DRAFT, target_layer_ids=(1, 4, 6), noise_token_id=7),
        compress_ratios=config.compress_ratios + (0,) * 3,
        layer_types=config.layer_types + (LayerKind.WINDOW,) * 3,
    )
    plan, stack = config.stack_plan, small_models.make_model(config).stack
    assert (plan.prefix, plan.period, plan.repeats, plan.suffix) == (1, 2, 3, 0)
    model, tokens = small_models.make_model(config), small_models.IDS[:2, :40]
    _, cache = model.extend(tokens, model.init_cache(2, 64))
    kept, seen = draft_keys(cache, cache.lengths, config.sliding_window)
    assert np.asarray(seen).sum(1).tolist() == [40, 40]

    @jax.jit
    def run(model):
        zeros = jnp.zeros(2, jnp.int32)
        ropes = {layer.rope for layer in (*config.layers, *config.draft_layers)}
        context = make_context(jnp.asarray(tokens), zeros, zeros + 40, ropes, model.target)

        def run_layer(block, streams, layer):
            memory = full_sequence(config, stack.numerics, layer, context)
            streams, _ = block(streams, context, memory)
            return streams, streams.mean(axis=2)

        streams = open_streams(context, model.embed, model.stack)
        _, means = model.stack.run(streams, run_layer)
        # Layer 1 is CSA, repeat 0; layers 4 and 6 are HCA, repeats 1 and 2.
        csa, hca = means["stack.period.0"], means["stack.period.1"]
        taps = jnp.stack([csa[0], hca[1], hca[2]], axis=2)
        return model.drafter.context_keys(taps, context)

    for ours, expected in zip(kept, run(model), strict=True):
        np.testing.assert_allclose(ours[:, -40:], expected, 0, FLOAT32_LOGITS)
