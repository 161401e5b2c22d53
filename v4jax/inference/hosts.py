"""One engine on several hosts: process 0 leads, the others follow.

    status = run_together(load_engine, work)     # on every process

All processes must run the same programs in the same order. Only process 0 runs `work`: it reads the
input, knows which answers the output has, and writes. Before each call of its engine it tells the
others which call that is, with all tokens, and they make the same call. What only one host can see,
such as a missing file, therefore never makes them differ.

A call that fails on one process (for want of memory) fails on all, and the work goes on. An error
that ends the work ends all processes with its message. A process that is killed takes the others
with it, through JAX; a batch job continues from its output when it is started again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from v4jax.errors import RequestError, V4JaxError
from v4jax.inference.answer import Answer, Piece
from v4jax.inference.engine import EncodedDocument, Engine
from v4jax.inference.request import Question, SamplingOptions
from v4jax.inference.scoring import Score
from v4jax.inference.steps import Cache
from v4jax.parallel.agreement import on_all, share_json, warm_up_collectives

Loader = Callable[[], Any]


def run_together(load_engine: Loader, work: Callable[[Loader], Any]) -> Any:
    """Runs `work` on process 0 with an engine of all processes; returns its result on each.

    Args:
      load_engine: loads this process' part of the model.
      work: is called with a function that loads the engine, which it may call once. Its result must
        be expressible in JSON.

    Raises:
      V4JaxError: `work` raised it on process 0, or loading failed on any process.
    """
    if jax.process_count() == 1:
        return work(load_engine)
    if jax.process_index():
        return _follow(load_engine)

    def load() -> LeadingEngine:
        share_json({"call": "load"})
        return LeadingEngine(_load(load_engine))

    try:
        result = work(load)
    except V4JaxError as error:
        share_json({"call": "end", "error": str(error)})
        raise
    share_json({"call": "end", "result": result})
    return result


class LeadingEngine:
    """The engine of process 0, which others follow; it is used like an `Engine`."""

    def __init__(self, engine: Engine):
        self._engine, self._told = engine, None
        self.options, self.encode, self.drafts = engine.options, engine.encode, engine.drafts
        self.encode_text, self.describe_tokens = engine.encode_text, engine.describe_tokens
        self.max_document_bytes = engine.max_document_bytes
        self.reading_work = engine.reading_work

    @property
    def compile_seconds(self) -> float:
        """As that of `Engine`."""
        return self._engine.compile_seconds

    def prepare(self, encoded: EncodedDocument) -> None:
        """As `Engine.prepare`."""
        self._tell("prepare", encoded)
        _call(lambda: self._engine.prepare(encoded))

    def read(
        self, encoded: EncodedDocument, on_chunk: Callable[[int], None] = lambda tokens: None
    ) -> Cache:
        """As `Engine.read`; the others keep only the state of the last document."""
        self._tell("read", encoded)
        return _call(lambda: self._engine.read(encoded, on_chunk))

    def answer(
        self,
        encoded: EncodedDocument,
        state: Cache,
        group: Sequence[int],
        on_piece: Callable[[int, Piece], None] = lambda index, piece: None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """As `Engine.answer`, from the state of the last document read."""
        assert encoded is self._told, "the others have another document's state"
        share_json({"call": "answer", "group": list(group)})
        return _call(lambda: self._engine.answer(encoded, state, group, on_piece, on_tokens))

    def stream(self, prompt: Question) -> Iterator[Piece | Answer]:
        """As `Engine.stream`; the caller must read it to its end."""
        share_json({"call": "stream", "prompt": dataclasses.asdict(prompt)})
        return self._engine.stream(prompt)

    def score_text(
        self,
        tokens: Sequence[int],
        first: int,
        on_chunk: Callable[[int], None] = lambda tokens: None,
    ) -> Score:
        """As `Engine.score_text`."""
        share_json({"call": "score", "tokens": list(tokens), "first": first})
        return _call(lambda: self._engine.score_text(tokens, first, on_chunk))

    def _tell(self, call: str, encoded: EncodedDocument) -> None:
        """Tells the others a call, with the document if they do not have it yet."""
        document = {}
        if encoded is not self._told:
            sampling = [vars(options) for options in encoded.sampling]
            document = {"document": vars(encoded) | {"sampling": sampling}}
        share_json({"call": call} | document)
        self._told = encoded


def _follow(load_engine: Loader) -> Any:
    """Makes the calls of process 0 until it ends the work; returns the result."""
    follower = _Follower(load_engine)
    while (order := share_json(None))["call"] != "end":
        try:
            follower.do(order)
        except Exception as error:
            # Process 0 has the same error and decides what follows from it.
            loads = order["call"] == "load"
            if not (isinstance(error, V4JaxError) if loads else _fails_alone(error)):
                raise
    if "error" in order:
        raise V4JaxError(f"process 0: {order['error']}")
    return order["result"]


class _Follower:
    """The engine of another process, with the last document and its state."""

    def __init__(self, load_engine: Loader):
        self.load_engine = load_engine
        self.engine = self.encoded = self.state = None

    def do(self, order: dict[str, Any]) -> None:
        """Makes one call of the leading engine."""
        if "document" in order:
            self.encoded, self.state = _to_document(order["document"]), None
        match order["call"]:
            case "load":
                self.engine = _load(self.load_engine)
            case "prepare":
                _call(lambda: self.engine.prepare(self.encoded))
            case "read":
                self.state = _call(lambda: self.engine.read(self.encoded))
            case "answer":
                _call(lambda: self.engine.answer(self.encoded, self.state, order["group"]))
            case "score":
                _call(lambda: self.engine.score_text(order["tokens"], order["first"]))
            case "stream":
                for _ in self.engine.stream(_to_question(**order["prompt"])):
                    pass


def _load(load_engine: Loader) -> Engine:
    engine = on_all(load_engine)
    warm_up_collectives(engine.model.layout)
    return engine


def _call(call: Callable[[], Any]) -> Any:
    return on_all(call, fails=_fails_alone, as_error=RequestError)


def _fails_alone(error: Exception) -> bool:
    """Whether an error concerns one request or document and leaves the engine as it was."""
    return not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error)


def _to_document(fields: dict[str, Any]) -> EncodedDocument:
    return EncodedDocument(
        tokens=tuple(fields["tokens"]),
        question_tokens=tuple(map(tuple, fields["question_tokens"])),
        sampling=tuple(SamplingOptions(**options) for options in fields["sampling"]),
        capacity=fields["capacity"],
    )


def _to_question(text: str, sampling: dict[str, Any]) -> Question:
    return Question(text, SamplingOptions(**sampling))
