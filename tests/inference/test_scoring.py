"""Scores are the model's log-probabilities, in any chunks, of texts and of answers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_config, make_model, on_mesh

from v4jax.errors import NonFiniteError, RequestError
from v4jax.inference import (
    BatchJob,
    Document,
    Engine,
    EngineOptions,
    Question,
    SamplingOptions,
    run_scores,
)
from v4jax.inference.scoring import score_tokens
from v4jax.tokenizer import ByteTokenizer

from .fake_model import FakeModel, make_engine

TOKENIZER = ByteTokenizer()
# Sums in another order; logits have a deviation near 1.
TOLERANCE = 1e-4


def expect(model, tokens: list[int]) -> np.ndarray:
    """Returns the log-probabilities of the tokens but the first, from all logits at once."""
    cache = model.init_cache(1, 512)
    logits, _ = model.extend(jnp.array([tokens]), cache)
    scores = np.asarray(jax.nn.log_softmax(logits[0]))
    return scores[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 39, 40, 64])
def test_any_chunking_scores_the_same(chunk_tokens):
    model, sequences = FakeModel(), [list(range(40)), list(range(60, 67)), [], [5]]
    cache = model.init_cache(5, 64)
    found = score_tokens(model, sequences, cache, chunk_tokens=chunk_tokens)
    for (scores, greedy), sequence in zip(found, sequences, strict=True):
        expected = expect(model, sequence) if len(sequence) > 1 else np.zeros(0)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert greedy.shape == scores.shape


def test_what_greedy_decoding_writes_is_greedy():
    engine = make_engine()
    prompt, _ = engine.encode_text("Begin.")
    (answer,) = (
        piece for piece in engine.stream(Question("x", SamplingOptions(max_new_tokens=9)))
        if hasattr(piece, "tokens")
    )  # fmt: skip
    tokens = [*engine.options.frame.encode_prompt(TOKENIZER, "x"), *answer.tokens]
    assert engine.score_text(tokens, len(tokens) - len(answer.tokens)).greedy
    assert not engine.score_text([*tokens, 5, 5, 5], len(tokens)).greedy
    assert prompt[0] == TOKENIZER.bos_id


def test_a_text_and_its_context():
    engine = make_engine()
    whole, part = engine.score("Paris is old."), engine.score("is old.", context="Paris ")
    tokens = [TOKENIZER.bos_id, *b"Paris is old."]
    expected = expect(engine.model, tokens)
    np.testing.assert_allclose(whole.log_probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(part.log_probabilities, expected[6:], atol=1e-5)
    assert (part.tokens, part.bytes) == (tuple(b"is old."), 7)
    assert whole.log_probability == pytest.approx(expected.sum(), rel=1e-5)
    assert part.perplexity == pytest.approx(math.exp(-expected[6:].mean()), rel=1e-5)
    assert part.bits_per_byte == pytest.approx(-expected[6:].sum() / math.log(2) / 7, rel=1e-5)
    # What looks like a control token is text.
    assert len(engine.score("<｜User｜>").tokens) == len("<｜User｜>".encode())


def test_answers_have_the_log_probabilities_of_their_tokens():
    """Of a group, only the question that asks for them; whatever temperature chose the tokens."""
    engine = make_engine()
    warm = SamplingOptions(temperature=1.0, max_new_tokens=9, seed=4)
    plain, asked = Question("Who?", warm), Question("When?", warm.replace(logprobs=True))
    encoded = engine.encode(Document("Some text.", (plain, asked)))
    state = engine.read(encoded)
    first, second = engine.answer(encoded, state, range(2))
    assert first.logprobs == () and len(second.logprobs) == second.answer_tokens
    prompt = [*encoded.tokens, *encoded.question_tokens[1]]
    expected = expect(engine.model, [*prompt, *second.tokens])[len(prompt) - 1 :]
    found = [token["logprob"] for token in second.logprobs]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [token["id"] for token in second.logprobs] == list(second.tokens)
    *_, streamed = engine.stream(Question("Tell me.", warm.replace(logprobs=True)))
    assert len(streamed.logprobs) == len(streamed.tokens) == streamed.answer_tokens


def test_a_real_model():
    model = make_model(make_config("csa"))
    engine = Engine(model, EngineOptions(max_tokens=256, chunk_tokens=32), TOKENIZER)
    text = "It was a dark and stormy night; the rain fell."  # two chunks
    found = engine.score(text)
    tokens = [TOKENIZER.bos_id, *text.encode()]
    scores = np.asarray(jax.nn.log_softmax(model(jnp.array([tokens]))[0]))
    expected = scores[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(found.log_probabilities, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_a_mesh_scores_as_one_device():
    """Vocabulary, tokens and entries are split; the text is read in chunks."""
    model = on_mesh(make_model(make_config("csa")), data=2, context=2, tensor=2)
    options = EngineOptions(max_tokens=256, chunk_tokens=32, questions_at_once=2)
    text = "It was a dark and stormy night; the rain fell."
    found = Engine(model, options, TOKENIZER).score(text).log_probabilities
    tokens = [TOKENIZER.bos_id, *text.encode()]
    scores = np.asarray(jax.nn.log_softmax(make_model(make_config("csa"))(jnp.array([tokens]))[0]))
    expected = scores[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


class SickModel(FakeModel):
    """Computes NaN behind the byte @."""

    def extend(self, tokens, cache, lengths=None, logits="all", **options):
        values, extended = super().extend(tokens, cache, lengths, logits, **options)
        return jnp.where((tokens == ord("@"))[..., None], jnp.nan, values), extended


def test_numbers_that_are_not_finite_and_texts_that_are_too_long():
    engine = make_engine(SickModel())
    with pytest.raises(NonFiniteError, match="NaN or infinity at token 5"):
        engine.score("abc@de")
    with pytest.raises(RequestError, match="a text of 4,101 tokens does not fit into the context"):
        engine.score("x" * 4000, context="y" * 100)


def run(tmp_path, engine, **fields):
    output = tmp_path / "scores.jsonl"
    settings = {"settings": {"model": "fake"}, "scores": True} | fields
    job = BatchJob(str(tmp_path / "texts.jsonl"), str(output), **settings)
    summary = run_scores(job, lambda: engine)
    return summary, [json.loads(line) for line in output.read_text().splitlines()]


def test_a_job(tmp_path, capsys):
    """It goes on after failures, continues, and its summary counts all tokens alike."""
    lines = [
        {"id": "a", "text": "One text."},
        {"text": "a sick@ one"},
        {"id": "c", "path": "c.txt", "context": "In a file: "},
        {"text": "x", "question": "Who?"},
    ]
    (tmp_path / "c.txt").write_text("The third text.")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = make_engine(SickModel())
    summary, found = run(tmp_path, engine)
    assert [line["line"] for line in found] == [1, 2, 3, 4]
    assert [line["error"]["kind"] for line in (found[1], found[3])] == [
        "NonFiniteError",
        "RequestError",
    ]
    assert "unknown field 'question'; did you mean" not in found[3]["error"]["message"]
    scores = [engine.score("One text."), engine.score("The third text.", "In a file: ")]
    for line, score in zip((found[0], found[2]), scores, strict=True):
        assert line["logprob"] == pytest.approx(score.log_probability, abs=1e-6)
        assert line["perplexity"] == pytest.approx(score.perplexity, abs=1e-6)
        assert (line["tokens"], line["greedy"]) == (len(score.tokens), score.greedy)
    assert "logprobs" not in found[0] and found[2]["file"]["bytes"] == 15
    assert (summary.documents, summary.failed, summary.tokens) == (4, 2, 24)
    total = sum(score.log_probability for score in scores)
    assert summary.perplexity == pytest.approx(math.exp(-total / 24), rel=1e-5)
    assert run(tmp_path, None)[1] == found, "nothing is left to do"
    assert "score: line 2: the model computed NaN" in capsys.readouterr().err
    sampling = SamplingOptions(logprobs=True)
    _, found = run(tmp_path, engine, sampling=sampling, overwrite=True)
    assert [token["token"] for token in found[0]["logprobs"]] == list("One text.")
