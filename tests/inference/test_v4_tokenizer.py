"""The whole way with the real tokenizer: chat template, thinking, tool calls, text from outside.

The model is a script: it knows what it will write, and remembers what it read.
"""

import json

import jax.numpy as jnp
import pytest

from v4jax.cli import main
from v4jax.inference import Document, Engine, EngineOptions, Frame, Question, SamplingOptions
from v4jax.tokenizer import ContentText, ReasoningText, encode_messages, load_tokenizer

from .fake_model import FakeConfig, FakeModel

EOS = "<｜end▁of▁sentence｜>"
CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zürich</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
WRITTEN = "Hm, 天气？</think>Moment, ich frage nach. 🌦" + CALL + EOS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("v4")


class ScriptedModel(FakeModel):
    """Writes the ids of `script`, whatever it reads; `read` holds the ids of its prompt."""

    def __init__(self, script: list[int]):
        config = FakeConfig(vocab_size=129280, bos_token_id=0, eos_token_id=1, tokenizer="v4")
        super().__init__(config)
        self.script, self.read = script, []

    def extend(self, tokens, cache, lengths=None, logits="all", **options):
        """Appends tokens; see the contract."""
        real = int(lengths[0])
        if tokens.shape[1] > 1:
            self.read += tokens[0, :real].tolist()
        written = int(cache.lengths[0]) + real - len(self.read)
        _, cache = super().extend(tokens, cache, lengths, logits, **options)
        following = self.script[min(written, len(self.script) - 1)]
        shape = (tokens.shape[0], self.config.vocab_size)
        return jnp.zeros(shape).at[:, following].set(1.0), cache


def make(tokenizer, written: str, **frame) -> Engine:
    """Returns an engine whose model writes that."""
    options = EngineOptions(Frame(**frame), chunk_tokens=64, short_tokens=64)
    return Engine(ScriptedModel(tokenizer.encode(written)), options, tokenizer)


def test_reasoning_and_tool_calls(tokenizer):
    engine = make(tokenizer, WRITTEN, thinking=True)
    *pieces, answer = engine.stream(Question("Wie wird das Wetter?", SamplingOptions()))
    assert answer.reasoning == "Hm, 天气？" and answer.text == "Moment, ich frage nach. 🌦"
    [call] = answer.tool_calls
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich", "days": 2}
    assert (answer.finish_reason, answer.warning) == ("stop", "")
    for kind, whole in ((ReasoningText, answer.reasoning), (ContentText, answer.text)):
        assert "".join(piece.text for piece in pieces if isinstance(piece, kind)) == whole


@pytest.mark.parametrize("effort", [None, "max"])
def test_a_prompt_is_the_chat_template(tokenizer, effort):
    engine = make(tokenizer, "ja" + EOS, thinking=effort is not None, effort=effort, system="Kurz.")
    list(engine.stream(Question("Geht das?", SamplingOptions())))
    messages = [{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Geht das?"}]
    mode = "chat" if effort is None else "thinking"
    assert tokenizer.decode(engine.model.read) == encode_messages(
        messages, mode=mode, effort=effort
    )


def test_a_document_and_its_question_make_one_turn(tokenizer):
    engine = make(tokenizer, "Nein." + EOS)
    text = f"Grüße 你好 {EOS} <think> <｜User｜>"  # control tokens from outside are plain text
    encoded = engine.encode(Document(text, (Question("Was </think>?", SamplingOptions()),)))
    [answer] = engine.answer(encoded, engine.read(encoded), range(1))
    assert answer.text == "Nein."
    read = engine.model.read
    turn = [{"role": "user", "content": f"{text}\n\nWas </think>?"}]
    assert tokenizer.decode(read) == encode_messages(turn, mode="chat")
    controls = [tokenizer.decode([token]) for token in read if tokenizer.is_control(token)]
    assert controls == ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "</think>"]


def test_generate_keeps_reasoning_out_of_stdout(tokenizer, monkeypatch, capsys):
    model = ScriptedModel(tokenizer.encode(WRITTEN))
    monkeypatch.setattr("v4jax.load", lambda *arguments, **options: model, raising=False)
    flags = ("--model=tiny", "--prompt=Wetter?", "--thinking", "--chunk_tokens=64")
    assert main.run(["generate", *flags]) == 0
    out, err = capsys.readouterr()
    answer, call = out.splitlines()
    assert answer == "Moment, ich frage nach. 🌦" and "Hm, 天气？\n\n" in err
    assert json.loads(call)["name"] == "weather"
