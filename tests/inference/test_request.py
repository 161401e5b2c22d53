"""Requests: every rule, with the message its breach must give."""

import math

import pytest

from v4jax.errors import RequestError
from v4jax.inference.request import Document, Question, SamplingOptions

BAD_SAMPLING = {
    "temperature negative": (
        {"temperature": -0.5},
        "temperature must be a number at least 0, got -0.5",
    ),
    "temperature infinite": (
        {"temperature": math.inf},
        "temperature must be a number at least 0, got inf",
    ),
    "temperature text": (
        {"temperature": "hot"},
        "temperature must be a number at least 0, got 'hot'",
    ),
    "temperature boolean": (
        {"temperature": True},
        "temperature must be a number at least 0, got True",
    ),
    "top_p zero": (
        {"top_p": 0.0},
        "top_p must be a number greater than 0 and at most 1, got 0.0",
    ),
    "top_p above one": (
        {"top_p": 1.5},
        "top_p must be a number greater than 0 and at most 1, got 1.5",
    ),
    "top_p not a number": (
        {"top_p": math.nan},
        "top_p must be a number greater than 0 and at most 1, got nan",
    ),
    "top_k negative": (
        {"top_k": -1},
        "top_k must be an integer between 0 and 16777216, got -1; 0 keeps every token",
    ),
    "top_k fraction": (
        {"top_k": 2.5},
        "top_k must be an integer between 0 and 16777216, got 2.5; 0 keeps every token",
    ),
    "seed too large": (
        {"seed": 2**32},
        "seed must be an integer between 0 and 4294967295, got 4294967296; choose another",
    ),
    "no new tokens": (
        {"max_new_tokens": 0},
        "max_new_tokens must be an integer between 1 and 268435456, got 0; an answer ends",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_SAMPLING.values(), ids=BAD_SAMPLING.keys())
def test_bad_sampling(options, message):
    with pytest.raises(RequestError) as error:
        SamplingOptions(**options)
    assert str(error.value) == message


def test_replacing_checks_again():
    with pytest.raises(RequestError, match="top_p"):
        SamplingOptions().replace(top_p=2)


BAD_TEXT = {
    "empty question": (lambda: Question(""), "question must not be empty, got ''"),
    "blank question": (lambda: Question(" \n"), r"question must not be empty, got ' \n'"),
    "number as question": (lambda: Question(7), "question must be a string, got 7"),
    "empty document": (lambda: Document("", (Question("q"),)), "text must not be empty, got ''"),
    "no questions": (
        lambda: Document("text", ()),
        "questions must hold at least one question, got none",
    ),
    "lone surrogate": (
        lambda: Question("a\ud800"),
        r"question must be valid Unicode, got the lone surrogate '\ud800' at character 1",
    ),
}


@pytest.mark.parametrize(("build", "message"), BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_bad_text(build, message):
    with pytest.raises(RequestError) as error:
        build()
    assert str(error.value) == message
