"""Reads a document once and answers its questions from the state that reading left behind.

    engine = Engine(v4jax.load("nano"))
    encoded = engine.encode(Document(text, (Question("Who wrote it?"), Question("When?"))))
    state = engine.read(encoded)                        # in chunks, into a cache of one slot
    for group in encoded.groups(engine.options):        # questions answered side by side
        answers = engine.answer(encoded, state, group)  # each from its own copy of the state

Each new shape is compiled. There are therefore few: one size of chunks for reading, one short size
for questions, one token (or the drafts of one step) for writing, and cache capacities that are
powers of two.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from v4jax import log
from v4jax.errors import ConfigError, NonFiniteError, RequestError
from v4jax.inference.answer import Answer, AnswerReader, Piece
from v4jax.inference.prompt import Frame
from v4jax.inference.request import Document, Question, SamplingOptions
from v4jax.inference.sampling import are_finite, init_sampler, sample
from v4jax.inference.scoring import AT_ONCE, Score, compile_scoring, score_tokens
from v4jax.inference.steps import Cache, decode, prefill, write_block
from v4jax.parallel.mesh import divisors
from v4jax.parallel.shard import batch_shards
from v4jax.shapes import round_up
from v4jax.tokenizer import Vocabulary, load_tokenizer


@dataclass(frozen=True)
class EngineOptions:
    """How the engine works. Options and request together determine the answer.

    Attributes:
      frame: system message and thinking; a missing profile becomes that of the model.
      chunk_tokens: tokens read at once.
      short_tokens: size of the chunk for texts that fit into it, such as questions.
      questions_at_once: questions of one document that are answered side by side, each with its own
        copy of the document's cache.
      max_tokens: capacity of every cache; None: what each document needs, rounded up.
      speculate: tokens that are drafted and verified in a step of writing; "off": none; "auto": as
        many as the model can draft.
    """

    frame: Frame = field(default_factory=Frame)
    chunk_tokens: int = 4096
    short_tokens: int = 128
    questions_at_once: int = 4
    max_tokens: int | None = None
    speculate: str | int = "auto"

    def __post_init__(self):
        for name in ("chunk_tokens", "short_tokens", "questions_at_once", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def count_drafts(self, available: int) -> int:
        """Returns how many tokens a step drafts with a model that can draft `available`.

        Raises:
          ConfigError: more are asked for.
        """
        if self.speculate in ("auto", "off"):
            return available if self.speculate == "auto" else 0
        if self.speculate > available:
            found = (
                f"drafts {available} at most"
                if available
                else "has neither draft module nor MTP block"
            )
            raise ConfigError(
                f"speculate asks for {self.speculate} drafts a step, and this model {found}; "
                f"take auto, off{f' or 1 … {available}' if available else ''}"
            )
        return self.speculate

    def check_data(self, parts: int) -> None:
        """Raises unless the `parts` of the mesh along `data` divide the questions.

        Raises:
          ConfigError: they do not; the message says what would do.
        """
        count = self.questions_at_once
        if count % parts:
            raise ConfigError(
                f"mesh.data = {parts} does not divide questions_at_once = {count}, the questions "
                f"of a document that it is to share out; sizes that would do: {divisors(count)}, "
                f"or questions_at_once = {round_up(count, parts)}"
            )


@dataclass(frozen=True)
class EncodedDocument:
    """A document as token ids, which fit into the context.

    Attributes:
      tokens: the prompt up to the end of the document.
      question_tokens: for each question, the rest of its prompt.
      sampling: for each question, how its answer is chosen.
      capacity: tokens of a cache that holds the document with any one question and answer.
    """

    tokens: tuple[int, ...]
    question_tokens: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingOptions, ...]
    capacity: int

    def groups(self, options: EngineOptions) -> list[range]:
        """Returns the indices of the questions that are answered side by side.

        They depend only on the number of questions: an interrupted job forms the same groups again.
        """
        count, size = len(self.question_tokens), options.questions_at_once
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


class _Shape(NamedTuple):
    """A step to compile; with drafts, also the step of writing that follows it."""

    slots: int
    tokens: int
    capacity: int
    drafts: int = 0


class Engine:
    """Serves documents and prompts with one model, one request at a time.

    `max_document_bytes` is more than any text has that fits into the context.

    Args:
      model: a model that `v4jax.load` returned.
      options: how the engine works.
      tokenizer: None: that of the model's folder or configuration.

    Raises:
      ConfigError: model and tokenizer do not belong together, max_tokens exceeds the context, or
        the mesh does not divide questions_at_once.
    """

    def __init__(
        self,
        model: Any,
        options: EngineOptions = EngineOptions(),
        tokenizer: Vocabulary | None = None,
    ):
        config = model.config
        if tokenizer is None:
            tokenizer = load_tokenizer(model.folder or config.tokenizer)
        ends = config.end_token_ids
        if tokenizer.vocab_size > config.vocab_size or tokenizer.eos_id not in ends:
            raise ConfigError(
                f"tokenizer: its {tokenizer.vocab_size} ids with EOS {tokenizer.eos_id} do not fit "
                f"a model of vocab_size {config.vocab_size} whose answers end with {list(ends)}"
            )
        if options.frame.profile is None:
            frame = replace(options.frame, profile=config.profile)
            options = replace(options, frame=frame)
        if options.max_tokens and options.max_tokens > config.max_position_embeddings:
            raise ConfigError(
                f"max_tokens must be at most the model's max_position_embeddings "
                f"{config.max_position_embeddings:,}, got {options.max_tokens:,}"
            )
        # Along `data`, questions are split; every part has read the whole document.
        self._parts = batch_shards(model.layout)
        options.check_data(self._parts)
        self.model, self.options, self.tokenizer = model, options, tokenizer
        self.max_document_bytes = self._limit() * tokenizer.longest_bytes
        # A cache has room for at least one step of writing.
        self.drafts = min(options.count_drafts(model.draft_tokens), self._limit() - 1)
        _say_drafts(self.drafts, options.speculate, model.draft_tokens)
        self._ends = {"end_tokens": ends, "choices": tokenizer.vocab_size}
        self.compile_seconds = 0.0
        self._scoring: set[tuple[int, int, int]] = set()  # (slots, tokens, capacity) compiled
        self._compiled: set[_Shape] = set()

    def encode(self, document: Document) -> EncodedDocument:
        """Returns the token ids of a document's prompts.

        Raises:
          RequestError: document, question and answer together are longer than the context.
        """
        frame = self.options.frame
        tokens = frame.encode_document(self.tokenizer, document.text)
        rests = [frame.encode_question(self.tokenizer, q.text) for q in document.questions]
        sampling = [question.sampling for question in document.questions]
        needed = self._check_length("document", tokens, rests, sampling)
        return EncodedDocument(
            tokens=tuple(tokens),
            question_tokens=tuple(map(tuple, rests)),
            sampling=tuple(sampling),
            capacity=self._capacity(needed),
        )

    def read(
        self, encoded: EncodedDocument, on_chunk: Callable[[int], None] = lambda tokens: None
    ) -> Cache:
        """Returns the state after the document. `answer` copies it and leaves it as it is.

        The state is a cache with one slot; on a mesh, with one slot for each part along `data`.

        Args:
          on_chunk: is called after each chunk with its number of tokens.

        Raises:
          NonFiniteError: the model computed NaN or infinity.
        """
        self.prepare(encoded)
        return self._read(encoded.tokens, encoded.capacity, on_chunk)[1]

    def answer(
        self,
        encoded: EncodedDocument,
        state: Cache,
        group: Sequence[int],
        on_piece: Callable[[int, Piece], None] = lambda index, piece: None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """Answers the questions of one group side by side.

        Args:
          state: the state that `read` returned; it can be used again.
          group: indices of the questions, one of `encoded.groups`.
          on_piece: is called with the index of a question and each piece of its answer.
          on_tokens: is called after each step with the number of tokens that it wrote.

        Returns:
          An answer for each question; `error` says if one had to be given up.

        Raises:
          NonFiniteError: the model computed NaN or infinity in all questions of the group.
        """
        rests = [encoded.question_tokens[i] for i in group]
        sampling = [encoded.sampling[i] for i in group]
        slots = self._slots(len(encoded.question_tokens))
        forks = state.repeat(slots // self._parts)
        longest = max(map(len, rests))
        logits_bv, forks = prefill(
            self.model, rests, forks, chunk_tokens=self._chunk(longest, encoded.capacity)
        )
        answers: list[Answer | None] = [None] * len(rests)
        for slot, pieces, answer in self._write(logits_bv, forks, rests, sampling, on_tokens):
            for piece in pieces:
                on_piece(group[slot], piece)
            answers[slot] = answer or answers[slot]
        return self._with_log_probabilities(
            answers, rests, sampling, lambda: state.repeat(slots // self._parts)
        )

    def stream(self, prompt: Question) -> Iterator[Piece | Answer]:
        """Answers a prompt without a document.

        Yields:
          The pieces of text as they become known, then the whole answer.

        Raises:
          RequestError: prompt and answer together are longer than the context.
          NonFiniteError: the model computed NaN or infinity.
        """
        tokens = self.options.frame.encode_prompt(self.tokenizer, prompt.text)
        needed = self._check_length("prompt", [], [tokens], [prompt.sampling])
        capacity = self._capacity(needed)
        chunk_tokens = self._chunk(len(tokens), capacity)
        self._compile(self._writing_shapes(self._parts, chunk_tokens, capacity))
        with log.Progress("read", total=len(tokens)) as progress:
            logits_bv, cache = self._read(tokens, capacity, progress.advance)
        for _, pieces, answer in self._write(logits_bv, cache, [tokens], [prompt.sampling]):
            yield from pieces
            if answer is not None:
                if answer.error:
                    raise NonFiniteError(answer.error)
                yield self._with_log_probabilities(
                    [answer],
                    [tokens],
                    [prompt.sampling],
                    lambda: self.model.init_cache(self._parts, capacity),
                )[0]

    def score(self, text: str, context: str = "") -> Score:
        """Returns the log-probabilities of a text that begins a document, or follows a context.

        Both are plain text: neither a turn of a conversation, nor able to spell a control token.

        Raises:
          RequestError: context and text together are longer than the context of the model.
          NonFiniteError: the model computed NaN or infinity.
        """
        tokens, first = self.encode_text(text, context)
        return self.score_text(tokens, first)

    def encode_text(self, text: str, context: str = "") -> tuple[list[int], int]:
        """Returns the ids of BOS, context and text, and how many of them precede the text."""
        before = [self.tokenizer.bos_id, *self.tokenizer.encode(context, specials=False)]
        tokens = before + self.tokenizer.encode(text, specials=False)
        if len(tokens) > self._limit():
            raise RequestError(
                f"a text of {len(tokens):,} tokens does not fit into the context of "
                f"{self._limit():,}; divide it, and give what precedes a part as its context"
            )
        return tokens, len(before)

    def score_text(
        self,
        tokens: Sequence[int],
        first: int,
        on_chunk: Callable[[int], None] = lambda tokens: None,
    ) -> Score:
        """Returns the log-probabilities of `tokens` from `first` on, what `encode_text` returned.

        Args:
          on_chunk: is called after each chunk with its number of tokens.
        """
        cache = self.model.init_cache(self._parts, self._capacity(len(tokens)))
        scores, greedy = self._score(
            [tokens] * self._parts, cache, lambda count: on_chunk(count // self._parts)
        )[0]
        return Score(
            tuple(tokens[first:]),
            tuple(scores[first - 1 :].tolist()),
            bool(greedy[first - 1 :].all()),
            len(self.tokenizer.decode_bytes(tokens[first:])),
        )

    def describe_tokens(self, tokens: Sequence[int], scores: Iterable[float]) -> tuple[dict, ...]:
        """Returns {"id", "token", "logprob"} of each token; the last of `scores` are theirs."""
        own = list(scores)[-len(tokens) :]
        return tuple(
            {
                "id": token,
                "token": self.tokenizer.token_bytes(token).decode("utf-8", errors="replace"),
                "logprob": round(float(score), 6),
            }
            for token, score in zip(tokens, own, strict=True)
        )

    def reading_work(self, first: int, end: int) -> tuple[float, float]:
        """Returns the operations of reading a document's tokens `first` to before `end`.

        They are the work that every token has, padding of the last chunk included, and the work
        that depends on how much the tokens see.
        """
        tokens = round_up(end - first, self._chunk(end - first, self._limit()))
        every, _ = self._work(0, tokens)
        return every, self._work(first, end)[1]

    @functools.cached_property
    def _work(self) -> Callable[[int, int], tuple[float, float]]:
        return self.model.count_reading()

    def prepare(self, encoded: EncodedDocument) -> None:
        """Compiles the programs that the document needs and that are not compiled yet.

        Reading and answering are then timed without compilation.
        """
        capacity = encoded.capacity
        slots = self._slots(len(encoded.question_tokens))
        longest = max(map(len, encoded.question_tokens))
        reading = _Shape(self._parts, self._chunk(len(encoded.tokens), capacity), capacity)
        writing = self._writing_shapes(slots, self._chunk(longest, capacity), capacity)
        self._compile({reading} | writing)

    def _read(
        self, tokens: Sequence[int], capacity: int, on_chunk: Callable[[int], None]
    ) -> tuple[Any, Cache]:
        """Returns the last logits and the cache after all parts of the mesh read the tokens."""
        return prefill(
            self.model,
            [tokens] * self._parts,
            self.model.init_cache(self._parts, capacity),
            chunk_tokens=self._chunk(len(tokens), capacity),
            on_chunk=lambda count: on_chunk(count // self._parts),
        )

    def _writing_shapes(self, slots: int, chunk_tokens: int, capacity: int) -> set["_Shape"]:
        """Returns the steps that read prompts of so many slots and write their answers."""
        if self.drafts:
            return {_Shape(slots, chunk_tokens, capacity, self.drafts)}
        return {_Shape(slots, chunk_tokens, capacity), _Shape(slots, 1, capacity)}

    def _compile(self, shapes: set["_Shape"]) -> None:
        """Runs one step of each shape that has not run yet."""
        shapes = shapes - self._compiled
        if not shapes:
            return
        steps = "1 step" if len(shapes) == 1 else f"{len(shapes)} steps"
        title = f"{steps} for caches of {max(shapes).capacity:,} tokens"
        with log.phase("compile", title, doing="compiling") as phase:
            phase.note(title)
            for shape in sorted(shapes):
                self._step(*shape)
        self._compiled |= shapes
        self.compile_seconds += phase.seconds

    def _step(self, slots: int, tokens: int, capacity: int, drafts: int) -> None:
        """Runs one step that appends nothing, and one of writing where there are drafts."""
        cache = self.model.init_cache(self._parts, capacity).repeat(slots // self._parts)
        tokens_bt = jnp.zeros((slots, tokens), jnp.int32)
        model = self.model.flatten()
        logits_bv, cache = model.extend(
            tokens_bt, cache, jnp.zeros(slots, jnp.int32), logits="last", donate=True
        )
        are_finite(logits_bv, layout=self.model.layout)
        ends = self._ends | {"layout": self.model.layout}
        tokens, _, state = sample(logits_bv, init_sampler([], slots), **ends)
        if drafts:
            tokens, *_ = write_block(model, tokens, cache, state, drafts, **ends)
        tokens.block_until_ready()

    def _write(
        self,
        logits_bv,
        cache: Cache,
        rests: Sequence[Sequence[int]],
        sampling: Sequence[SamplingOptions],
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[int, list[Piece], Answer | None]]:
        mode, end_tokens = self.options.frame.mode, self._ends["end_tokens"]
        readers = [AnswerReader(self.tokenizer, mode, len(rest), end_tokens) for rest in rests]
        how = self._ends | {"drafts": self.drafts}
        for blocks in decode(self.model, logits_bv, cache, sampling, **how):
            on_tokens(sum(map(len, blocks)))
            for slot, tokens in enumerate(blocks):
                if tokens:
                    yield slot, readers[slot].push(*tokens), None
        for slot, reader in enumerate(readers):
            yield slot, *reader.finish()

    def _with_log_probabilities(
        self,
        answers: list[Answer],
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingOptions],
        open_cache: Callable[[], Cache],
    ) -> list[Answer]:
        """Returns the answers with log-probabilities where they are asked for.

        They are those of the finished text, read at once: how it was written does not matter.

        Args:
          open_cache: returns the caches that the prompts are read into.
        """
        asked = [o.logprobs and not a.error for o, a in zip(sampling, answers, strict=True)]
        if not any(asked):
            return answers
        texts = [
            [*prompt, *answer.tokens] if wanted else []
            for prompt, answer, wanted in zip(prompts, answers, asked, strict=True)
        ]
        scored = self._score(texts, open_cache())
        return [
            replace(answer, logprobs=self.describe_tokens(answer.tokens, scores))
            if wanted
            else answer
            for answer, (scores, _), wanted in zip(answers, scored, asked, strict=True)
        ]

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        cache: Cache,
        on_chunk: Callable[[int], None] = lambda tokens: None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns `score_tokens` in chunks whose logits fit; compiles what is not compiled yet."""
        slots, capacity = cache.lengths.shape[0], cache.capacity
        longest = max(map(len, sequences))
        chunk = min(self._chunk(longest, capacity), max(AT_ONCE // slots, 1))
        choices = self.tokenizer.vocab_size
        if (slots, chunk, capacity) not in self._scoring:
            with log.phase("compile", "a step of scoring", doing="compiling") as phase:
                phase.note("a step of scoring")
                empty = self.model.init_cache(self._parts, capacity).repeat(slots // self._parts)
                compile_scoring(self.model, empty, chunk, choices)
            self._scoring.add((slots, chunk, capacity))
            self.compile_seconds += phase.seconds
        return score_tokens(
            self.model, sequences, cache, chunk_tokens=chunk, choices=choices, on_chunk=on_chunk
        )

    def _slots(self, questions: int) -> int:
        return self._parts if questions == 1 else self.options.questions_at_once

    def _chunk(self, tokens: int, capacity: int) -> int:
        short, long = self.options.short_tokens, self.options.chunk_tokens
        return min(short if tokens <= short else long, capacity)

    def _capacity(self, needed: int) -> int:
        if self.options.max_tokens:
            return self._limit()
        # At most twice the memory, and one compilation for each doubling; never below one step.
        least = max(self.options.chunk_tokens, self.drafts + 1)
        rounded = 1 << (max(needed, least) - 1).bit_length()
        return min(rounded, self._limit())

    def _limit(self) -> int:
        return self.options.max_tokens or self.model.config.max_position_embeddings

    def _check_length(
        self,
        what: str,
        tokens: Sequence[int],
        rests: Sequence[Sequence[int]],
        sampling: Sequence[SamplingOptions],
    ) -> int:
        """Returns the tokens that the longest prompt and its answer need."""
        needs = [len(r) + s.max_new_tokens for r, s in zip(rests, sampling, strict=True)]
        longest = max(range(len(needs)), key=needs.__getitem__)
        needed, limit = len(tokens) + needs[longest], self._limit()
        if needed > limit:
            parts = [f"a question of {len(rests[longest]):,}"] if tokens else []
            parts += [f"max_new_tokens {sampling[longest].max_new_tokens:,}"]
            name = "max_tokens" if self.options.max_tokens else "max_position_embeddings"
            raise RequestError(
                f"{what} is too long: {len(tokens or rests[longest]):,} tokens with "
                f"{' and '.join(parts)} need {needed:,}, and the context ({name}) holds {limit:,}; "
                f"shorten the {what} or lower max_new_tokens"
            )
        return needed


def _say_drafts(drafts: int, speculate: str | int, available: int) -> None:
    """Says whether steps of writing draft tokens, where a model can."""
    if drafts:
        why = f"as the model drafts {available}" if speculate == "auto" else "as asked for"
        what = "1 token is" if drafts == 1 else f"{drafts} tokens are"
        log.once(f"speculate: {what} drafted and verified in each step, {why}")
    elif available:
        what = "1 token" if available == 1 else f"{available} tokens"
        log.once(f"speculate: off; the model could draft {what} in each step")
