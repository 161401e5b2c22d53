"""The engine: a document's state serves every question, and nothing leaks from one to another."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from v4jax.errors import ConfigError, RequestError
from v4jax.inference import Document, Frame, Question, SamplingOptions
from v4jax.tokenizer import ByteTokenizer

from .fake_model import FakeConfig, FakeModel, expected_tokens, make_engine

GREEDY = SamplingOptions(max_new_tokens=12)
WARM = SamplingOptions(temperature=1.0, seed=3, max_new_tokens=12)
TEXT = "It was a dark and stormy night. " * 5


def ask(engine, text: str, *questions: Question) -> list:
    """Returns the answers to all questions."""
    encoded = engine.encode(Document(text, questions))
    state = engine.read(encoded)
    return [a for g in encoded.groups(engine.options) for a in engine.answer(encoded, state, g)]


def test_answers_continue_document_and_question():
    tokenizer, frame = ByteTokenizer(), Frame()
    answers = ask(make_engine(), TEXT, Question("Who?", GREEDY), Question("When?", GREEDY))
    for question, answer in zip(("Who?", "When?"), answers, strict=True):
        prompt = frame.encode_document(tokenizer, TEXT) + frame.encode_question(tokenizer, question)
        tokens = expected_tokens(prompt, 12)
        controls = [t for t in tokens if tokenizer.is_control(t)]
        assert answer.answer_tokens == len(tokens)
        if not controls:
            assert answer.text == tokenizer.decode(tokens)


def test_answers_are_the_same_in_any_company():
    questions = [Question(f"Question {i}?", WARM.replace(seed=i)) for i in range(5)]
    alone = [ask(make_engine(), TEXT, question)[0] for question in questions]
    assert len({answer.text for answer in alone}) == 5
    for size in (1, 2, 3, 8):
        engine = make_engine(questions_at_once=size)
        assert ask(engine, TEXT, *questions) == alone
        ask(engine, "Another text.", Question("What?", WARM))
        assert ask(engine, TEXT, *reversed(questions)) == alone[::-1]


def test_a_document_is_read_once():
    model = FakeModel()
    engine = make_engine(model)
    encoded = engine.encode(Document(TEXT, tuple(Question(f"{i}?", GREEDY) for i in range(6))))
    engine.prepare(encoded)
    model.calls.clear()
    state = engine.read(encoded)
    read = [call for call in model.calls if call[1] > 1]
    assert sum(real for _, _, real in read) == len(encoded.tokens)
    for group in encoded.groups(engine.options):
        engine.answer(encoded, state, group)
    asked = [call for call in model.calls[len(read) :] if call[1] > 1]
    assert sum(real for _, _, real in asked) == sum(map(len, encoded.question_tokens))


def test_few_shapes():
    model = FakeModel()
    engine = make_engine(model)
    for length in (40, 64, 65, 500, 1000):
        ask(engine, "x" * length, Question("a?", GREEDY), Question("b?", GREEDY))
    assert {call[:2] for call in model.calls} == {(1, 64), (2, 16), (2, 1)}


def test_streaming_gives_the_answer():
    engine = make_engine()
    *pieces, answer = engine.stream(Question("Tell me.", WARM))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [*engine.stream(Question("Tell me.", WARM))] == [*pieces, answer]


def test_drafts_change_the_speed_alone():
    engines = [make_engine(FakeModel(drafts=4), speculate=s) for s in ("off", 1, "auto")]
    assert [engine.drafts for engine in engines] == [0, 1, 4]
    questions = [Question(f"Question {i}?", GREEDY) for i in range(5)]
    plain, *drafted = (ask(engine, TEXT, *questions) for engine in engines)
    for answers in drafted:
        assert [replace(a, passes=0) for a in answers] == [replace(a, passes=0) for a in plain]
        assert sum(a.passes for a in answers) < sum(a.passes for a in plain)
        assert all(a.passes for a in answers)
    assert [a.passes for a in plain] == [a.answer_tokens - 1 for a in plain]
    *pieces, answer = engines[2].stream(questions[0])
    *_, expected = engines[0].stream(questions[0])
    assert replace(answer, passes=0) == replace(expected, passes=0)
    assert "".join(piece.text for piece in pieces) == answer.text


def test_shapes_of_drafting_are_compiled_before():
    model = FakeModel(drafts=4)
    engine = make_engine(model)
    encoded = engine.encode(Document(TEXT, (Question("a?", GREEDY), Question("b?", GREEDY))))
    engine.prepare(encoded)
    compiled = {call[:2] for call in model.calls}
    assert compiled == {(1, 64), (2, 16), (2, 5)}
    model.calls.clear()
    engine.answer(encoded, engine.read(encoded), range(2))
    assert {call[:2] for call in model.calls} == compiled


BAD_DRAFTS = {
    "no module": (
        0,
        "asks for 3 drafts a step, and this model has neither draft module nor MTP block; take "
        "auto, off",
    ),
    "fewer": (2, "and this model drafts 2 at most; take auto, off or 1 … 2"),
}


@pytest.mark.parametrize(("drafts", "message"), BAD_DRAFTS.values(), ids=BAD_DRAFTS.keys())
def test_more_drafts_than_the_model_makes(drafts, message):
    with pytest.raises(ConfigError) as error:
        make_engine(FakeModel(drafts=drafts), speculate=3)
    assert str(error.value).endswith(message)
    assert make_engine(FakeModel(drafts=drafts)).drafts == drafts


TOO_LONG = {
    "document": (
        {},
        lambda engine: engine.encode(Document("x" * 4090, (Question("why?", GREEDY),))),
        "document is too long: 4,092 tokens with a question of 8 and max_new_tokens 12 need 4,112, "
        "and the context (max_position_embeddings) holds 4,096; shorten the document or lower "
        "max_new_tokens",
    ),
    "answer": (
        {"max_tokens": 100},
        lambda engine: engine.encode(
            Document(
                "x", (Question("why?", GREEDY), Question("y?", GREEDY.replace(max_new_tokens=99)))
            )
        ),
        "document is too long: 3 tokens with a question of 6 and max_new_tokens 99 need 108, and "
        "the context (max_tokens) holds 100; shorten the document or lower max_new_tokens",
    ),
    "prompt": (
        {"max_tokens": 100},
        lambda engine: next(engine.stream(Question("x" * 90, GREEDY))),
        "prompt is too long: 94 tokens with max_new_tokens 12 need 106, and the context "
        "(max_tokens) holds 100; shorten the prompt or lower max_new_tokens",
    ),
}


@pytest.mark.parametrize(("options", "ask", "message"), TOO_LONG.values(), ids=TOO_LONG.keys())
def test_too_long(options, ask, message):
    with pytest.raises(RequestError) as error:
        ask(make_engine(**options))
    assert str(error.value) == message


def test_exactly_the_context_fits():
    room = 4096 - 2 - 8 - 12  # BOS and role, question, answer
    [answer] = ask(make_engine(), "x" * room, Question("why?", GREEDY))
    assert answer.answer_tokens >= 1


def test_tokenizer_of_another_model():
    with pytest.raises(ConfigError, match="its 320 ids with EOS 257 do not fit a model"):
        make_engine(FakeModel(FakeConfig(vocab_size=300)))


def test_rows_beyond_the_tokenizer_are_never_written():
    """A padded head: the tokens are those of a model without the padding."""

    class Padded(FakeModel):
        def extend(self, *arguments, **options):
            logits, cache = super().extend(*arguments, **options)
            return jnp.pad(logits, ((0, 0), (0, 64)), constant_values=99.0), cache

    questions = [Question(f"{i}?", WARM.replace(seed=i)) for i in range(4)]
    padded = make_engine(Padded(FakeConfig()))
    assert ask(padded, TEXT, *questions) == ask(make_engine(), TEXT, *questions)


def test_bad_options():
    with pytest.raises(ConfigError, match="chunk_tokens must be at least 1, got 0"):
        make_engine(chunk_tokens=0)
    with pytest.raises(ConfigError, match=r"max_tokens must be at most .* 4,096, got 4,097"):
        make_engine(max_tokens=4097)
