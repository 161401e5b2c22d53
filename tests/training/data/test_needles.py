"""The needle task: what is asked is in the text once, and the ids are those of inference."""

import dataclasses
import re

import numpy as np
import pytest

from v4jax.config import DataConfig, SourceConfig
from v4jax.errors import DataError
from v4jax.inference.prompt import Frame
from v4jax.tokenizer import encode_messages, load_tokenizer
from v4jax.training.data import Loader
from v4jax.training.data.needles import END, WORDS, Needles, ask, draw_names, hide, make_document

BYTE = load_tokenizer("byte")
SETTINGS = Needles(tokens=(400, 900), needles=(2, 6), distractors=(1, 4), questions=(1, 4))
TURN = re.compile(r"What is the code of ([a-z]+-[a-z]+)\?<｜Assistant｜></think>(\d{5})")
INDICES = range(30)


START = "<｜begin▁of▁sentence｜><｜User｜>"


def turns(document):
    whole = BYTE.decode(document.tokens)
    assert whole.startswith(START)
    text = whole.removeprefix(START).partition("<｜Assistant｜>")[0].rpartition("\n\n")[0]
    return text, TURN.findall(whole)


@pytest.mark.parametrize("index", INDICES)
def test_answers_stand_in_the_text(index):
    text, answers = turns(make_document(0, index, SETTINGS))
    assert 1 <= len(answers) <= 4
    assert len({name for name, _ in answers}) == len(answers)
    for name, number in answers:
        assert text.count(f"The code of {name} is ") == 1
        assert f"The code of {name} is {number}." in text


@pytest.mark.parametrize("index", INDICES[:5])
def test_ids_are_those_of_inference(index):
    document = make_document(0, index, SETTINGS)
    text, answers = turns(document)
    frame = Frame()
    prompt = frame.encode_document(BYTE, text) + frame.encode_question(BYTE, ask(answers[0][0]))
    assert document.tokens[: len(prompt)].tolist() == prompt
    messages = []
    for i, (name, number) in enumerate(answers):
        words = ask(name) if i else f"{text}\n\n{ask(name)}"
        messages += [dict(role="user", content=words), dict(role="assistant", content=number)]
    assert document.tokens.tolist() == BYTE.encode(encode_messages(messages))


def test_answers_count_fully():
    document = make_document(0, 1, SETTINGS)
    counted = BYTE.decode(document.tokens[document.weights == 1])
    assert re.fullmatch(r"(\d{5}<｜end▁of▁sentence｜>)+", counted)
    assert document.weights[0] == 0
    assert set(document.weights[1:].tolist()) == {np.float32(0.1), 1.0}


def test_same_arguments_same_document():
    one, again = (make_document(3, 7, SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    other = make_document(3, 8, SETTINGS)
    assert one.tokens.tolist() != other.tokens.tolist()


def test_lengths_and_depths():
    depths = []
    for index in INDICES:
        haystack = hide(np.random.default_rng(index), SETTINGS)
        assert 390 <= len(haystack.text.encode()) <= 900
        assert 1 <= len(haystack.codes) <= 6
        for name, depth in haystack.depths.items():
            place = haystack.text.index(f" The code of {name} is {haystack.codes[name]}.")
            assert depth == pytest.approx(place / len(haystack.text), abs=1e-9)
        depths += haystack.depths.values()
    assert min(depths) < 0.1 and max(depths) > 0.8


def test_a_short_document_keeps_one_needle():
    haystack = hide(np.random.default_rng(0), Needles(tokens=(64, 64), needles=(8, 8)))
    assert len(haystack.codes) == 1


def test_splits_share_words_but_no_pairs():
    generator = np.random.default_rng(0)
    train, test = (set(draw_names(generator, 400, split)) for split in ("train", "test"))
    assert not train & test
    assert {word for name in test for word in name.split("-")} <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_a_folder_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("lorem ipsum " * 6000)
    text, _ = turns(make_document(0, 0, dataclasses.replace(SETTINGS, folder=str(tmp_path))))
    assert "lorem" in text
    with pytest.raises(DataError, match="holds 0 bytes of text; at least 65536"):
        make_document(0, 0, dataclasses.replace(SETTINGS, folder=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("tokens", (10, 20), r"needles.tokens must be a range \(low, high\) with 64 ≤ low"),
        ("questions", (3, 2), r"got \(3, 2\)"),
        ("text_weight", -1.0, "must not be negative, got -1.0"),
        ("split", "dev", "must be 'train' or 'test', got 'dev'"),
    ],
)
def test_bad_settings(field, value, message):
    with pytest.raises(DataError, match=message):
        Needles(**{field: value})


def test_gaps_lie_between_stretches_and_before_the_questions():
    settings = Needles(
        tokens=(128, 640), needles=(1, 3), distractors=(0, 2), questions=(1, 3), gaps=1.0,
        gap_tokens=(256, 1 << 16),
    )  # fmt: skip
    for index in range(60):
        document = make_document(2, index, settings)
        changes = np.flatnonzero(np.diff(document.skipped)) + 1
        assert changes.tolist() == list(range(128, len(document), 128))
        sizes = np.diff(document.skipped)[changes - 1]
        assert (sizes % 128 == 0).all() and sizes.min() >= 256 and sizes.max() <= 1 << 16
        text = bytes(t for t in document.tokens.tolist() if t < 256)
        # BOS and the user's role stand in front of the text, one token each.
        assert (text.index(END.encode() + b"What is") + 2 + len(END)) % 128 == 0
        answered = document.tokens[document.weights == 1.0]
        assert answered.size % 6 == 0 and answered.size  # five digits and the end, each time


def test_a_row_says_what_its_documents_leave_out():
    settings = dict(tokens=(128, 128), gaps=1.0, needles=(1, 1), questions=(1, 1))
    source = SourceConfig("needles", settings=settings)
    config = DataConfig((source,), length=512, batch=2, gaps=True, prefetch=0)
    batch = next(Loader(config, BYTE))
    moved = (batch.skipped > 0) & (batch.begin >= 0)
    assert moved.any() and (batch.skipped[batch.begin < 0] == 0).all()
    rows = np.arange(512) - batch.begin
    assert (rows[moved] >= 128).all()
    without = dataclasses.replace(config, gaps=False)
    with pytest.raises(
        DataError, match=r"data\.gaps is False, but a document leaves positions out"
    ):
        next(Loader(without, BYTE))
