"""`v4jax generate`: one prompt, answered in the terminal while it is written."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from v4jax.cli.hosts import HostFlags, start_serving
from v4jax.config.inference import InferenceConfig
from v4jax.errors import RequestError

SUMMARY = "answers one prompt, streaming to the terminal"
USAGE = """
Reads a prompt as one user turn and prints the answer while it is written. Reasoning and progress go
to stderr; stdout has the answer alone, followed by tool calls, one JSON object per line.

  v4jax generate --model=/models/v4-flash --prompt="Why is the sky blue?"
  v4jax generate --model=/models/v4-flash --prompt=- --thinking < question.txt
  v4jax generate --model=nano --prompt=hello --temperature=0.8 --seed=7 --max_new_tokens=64

--logprobs lists the tokens of the answer with their log-probabilities behind it, on stderr.
"""

HINT = "quote a prompt with spaces: --prompt='…'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax generate` is told.

    Attributes:
      prompt: The text to answer; - reads it from stdin. Required.
    """

    config: InferenceConfig = dataclasses.field(metadata={"without": ("questions_at_once",)})
    prompt: str
    hosts: HostFlags


def run(flags: Flags) -> int:
    """Answers the prompt."""
    from v4jax import log
    from v4jax.cli import engine as engines
    from v4jax.inference import Question, run_together

    # All but stdin, which is that of process 0 alone, is checked before anything is loaded.
    given = None if flags.prompt == "-" else _check_prompt(flags.prompt)
    sampling = engines.build_sampling(flags.config)
    start_serving(flags)
    config = engines.complete(flags.config)
    mesh, options = engines.plan_engine(config, asks=False)

    def work(load_engine: Callable[[], Any]) -> int:
        text = _check_prompt(_read_stdin()) if given is None else given
        engine = load_engine()
        answer = _show(engine.stream(Question(text, sampling)))
        if answer.warning:
            log.warning(f"generate: {answer.warning}")
        for token in answer.logprobs:
            print(f"{token['logprob']:>12.6f}  {token['token']!r}", file=sys.stderr)
        log.info(
            f"generate: read {answer.prompt_tokens:,} tokens, wrote {answer.answer_tokens:,}"
            f"{_describe_passes(answer) if engine.drafts else ''}, "
            f"finish reason {answer.finish_reason}"
        )
        return 0

    return run_together(lambda: engines.load_engine(config, mesh, options), work)


def _show(parts: Iterable[Any]) -> Any:
    """Prints what a stream gives, reasoning to stderr; returns the answer that it ends with."""
    from v4jax import log
    from v4jax.tokenizer import ContentText, ReasoningText

    def write(text: str, file: TextIO) -> None:
        file.write(log.printable(text) if file.isatty() else text)
        file.flush()

    reasoned = False
    for part in parts:
        if isinstance(part, ReasoningText):
            write(part.text, sys.stderr)
            reasoned = True
        elif isinstance(part, ContentText):
            if reasoned:
                write("\n\n", sys.stderr)
                reasoned = False
            write(part.text, sys.stdout)
        else:
            answer = part
    if reasoned:
        write("\n", sys.stderr)
    if answer.text:
        write("\n", sys.stdout)
    for call in answer.tool_calls:
        write(json.dumps(call["function"], ensure_ascii=False) + "\n", sys.stdout)
    return answer


def _describe_passes(answer: Any) -> str:
    """Returns how many tokens a pass of the model wrote on average: the accepted length."""
    if not answer.passes:
        return ""
    written = answer.answer_tokens - 1  # reading the prompt gave the first
    return f" ({written / answer.passes:.2f} a pass in {answer.passes:,} passes)"


def _check_prompt(text: str) -> str:
    if not text.strip():
        raise RequestError(f"--prompt must not be empty, got {text[:20]!r}")
    return text


def _read_stdin() -> str:
    from v4jax.inference.documents import decode_utf8

    return decode_utf8(sys.stdin.buffer.read(), "stdin")
