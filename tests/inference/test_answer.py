"""Answers from ids: what is text, what is reasoning, and what happens to output without form."""

from dataclasses import dataclass

import pytest

from v4jax.inference.answer import Answer, AnswerReader, Piece
from v4jax.tokenizer import ByteTokenizer, ContentText, ReasoningText

TOKENIZER = ByteTokenizer()
EOS = "<｜end▁of▁sentence｜>"


def read(tokens, mode: str = "chat", prompt_tokens: int = 0) -> tuple[list[Piece], Answer]:
    """Returns the pieces shown while tokens arrive, and the whole."""
    reader = AnswerReader(TOKENIZER, mode, prompt_tokens, (TOKENIZER.eos_id, ord("#")))
    pieces = [piece for token in tokens for piece in reader.push(token)]
    last, answer = reader.finish()
    return pieces + last, answer


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
    "ended by a token of the folder": Case("An answer.#", "An answer."),
    "cut off": Case("An ans", "An ans", "length"),
    "empty": Case(EOS, ""),
    "held back to the end": Case("a <", "a <", "length"),
    "umlaut": Case(f"größer{EOS}", "größer"),
    "reasoned": Case(f"hm</think>yes{EOS}", "yes", mode="thinking", reasoning="hm"),
    "only reasoned": Case("hm, hm", "", "length", mode="thinking", reasoning="hm, hm"),
    "stray control token": Case(f"a<think>b\n{EOS}", "ab\n", warning="<think>"),
    "stray control token, reasoning": Case(
        f"a<think>b</think>c{EOS}", "c", mode="thinking", reasoning="ab", warning="<think>"
    ),
    "held back, then malformed": Case(f"a\n\n<think>b{EOS}", "a\n\nb", warning="<think>"),
    "control tokens of other places": Case(
        f"a<｜User｜>b<｜title｜><｜User｜>{EOS}", "ab", warning="left out: <｜User｜>, <｜title｜>"
    ),
    "thinking ended twice": Case(
        f"r</think>a</think>b{EOS}", "ab", mode="thinking", reasoning="r", warning="</think>"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_answers(case):
    tokens = TOKENIZER.encode(case.written)
    pieces, answer = read(tokens, case.mode, prompt_tokens=5)
    assert (answer.text, answer.reasoning) == (case.text, case.reasoning)
    assert answer.finish_reason == case.finish_reason
    assert case.warning in answer.warning and bool(case.warning) == bool(answer.warning)
    for kind, whole in ((ReasoningText, case.reasoning), (ContentText, case.text)):
        assert "".join(piece.text for piece in pieces if isinstance(piece, kind)) == whole
    assert (answer.prompt_tokens, answer.answer_tokens) == (5, len(tokens))


def test_cut_inside_a_character():
    pieces, answer = read("aé".encode()[:-1])
    assert "".join(piece.text for piece in pieces) == answer.text == "a\ufffd"


def test_tool_calls_are_kept():
    invoke = '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>'
    call = f"\n\n<｜DSML｜tool_calls>\n{invoke}\n</｜DSML｜tool_calls>"
    _, answer = read(TOKENIZER.encode(f"x{call}{EOS}"))
    assert answer.text == "x"
    assert [c["function"]["name"] for c in answer.tool_calls] == ["f"]


def test_any_tokens_make_an_answer():
    tokens = [(i * 7919) % 320 for i in range(640)]
    for start in range(0, 320, 13):
        for mode in ("chat", "thinking"):
            pieces, answer = read([t for t in tokens[start:] if t != TOKENIZER.eos_id], mode)
            assert "".join(piece.text for piece in pieces) == answer.reasoning + answer.text
