"""Answers from ids: what is text, what is reasoning, and what happens to output without form."""

from dataclasses import dataclass

import pytest

from v4jax.inference.answer import AnswerReader
from v4jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Case:
    """What the model wrote, and what becomes of it."""

    written: str
    text: str
    finish_reason: str = "stop"
    mode: str = "chat"
    reasoning: str = ""
    warning: str = ""


CASES = {
    "ended": Case(f"An answer.{EOS}", "An answer."),
    "cut off": Case("An ans", "An ans", "length"),
    "empty": Case(EOS, ""),
    "held back to the end": Case("a <", "a <", "length"),
    "umlaut": Case(f"größer{EOS}", "größer"),
    "reasoned": Case(f"hm</think>yes{EOS}", "yes", mode="thinking", reasoning="hm"),
    "only reasoned": Case("hm, hm", "", "length", mode="thinking", reasoning="hm, hm"),
    "stray control token": Case(f"a<think>b\n{EOS}", "ab\n", warning="<think>"),
    "stray control token, reasoning": Case(
        f"a<think>b</think>c{EOS}", "bc", mode="thinking", reasoning="a", warning="<think>"
    ),
    "held back, then malformed": Case(f"a\n\n<think>b{EOS}", "a\n\nb", warning="<think>"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_answers(case):
    reader = AnswerReader(TOKENIZER, case.mode, prompt_tokens=5)
    tokens = TOKENIZER.encode(case.written)
    shown = "".join(map(reader.push, tokens))
    piece, answer = reader.finish()
    assert (answer.text, answer.reasoning) == (case.text, case.reasoning)
    assert answer.finish_reason == case.finish_reason
    assert case.warning in answer.warning and bool(case.warning) == bool(answer.warning)
    assert shown + piece == case.reasoning + case.text
    assert (answer.prompt_tokens, answer.answer_tokens) == (5, len(tokens))


def test_cut_inside_a_character():
    reader = AnswerReader(TOKENIZER, "chat", 0)
    shown = "".join(map(reader.push, "aé".encode()[:-1]))
    piece, answer = reader.finish()
    assert shown + piece == answer.text == "a\ufffd"


def test_tool_calls_are_kept():
    invoke = '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>'
    call = f"\n\n<｜DSML｜tool_calls>\n{invoke}\n</｜DSML｜tool_calls>"
    reader = AnswerReader(TOKENIZER, "chat", 0)
    for token in TOKENIZER.encode(f"x{call}{EOS}"):
        reader.push(token)
    _, answer = reader.finish()
    assert answer.text == "x"
    assert [c["function"]["name"] for c in answer.tool_calls] == ["f"]


def test_any_tokens_make_an_answer():
    tokens = [(i * 7919) % 320 for i in range(640)]
    for start in range(0, 320, 13):
        for mode in ("chat", "thinking"):
            reader = AnswerReader(TOKENIZER, mode, 0)
            shown = "".join(reader.push(t) for t in tokens[start:] if t != TOKENIZER.eos_id)
            piece, answer = reader.finish()
            assert shown + piece == answer.reasoning + answer.text
