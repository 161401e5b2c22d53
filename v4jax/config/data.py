"""Training data as configured: which files, in which shares, in rows of which length."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from v4jax.config.ranges import MAX_SEED, MOST_TOKENS, check_ranges, within
from v4jax.errors import ConfigError

ALIGN = 128  # documents start at multiples of it: the least common multiple of the ratios

# Fields that one kind of source heeds.
_ONLY_FOR = dict.fromkeys(("mode", "effort", "profile", "drop_thinking", "turns"), "chat")
_ONLY_FOR |= {"settings": "needles"}


@dataclass(frozen=True)
class SourceConfig:
    """One kind of examples.

    Attributes:
      kind: `chat` (JSONL with `messages`), `text` (.txt and .md files, JSONL with `text`), or
        `needles` (made by `training.data.needles`).
      paths: files, or folders that are searched for files of the kind; none for needles.
      weight: share of the records drawn, relative to the other sources; any positive number.
      too_long: what happens to a document longer than a row: `split` cuts it at whole rows, each
        part a document of its own; `error` makes it a bad record. None: text is split, others not.
      mode: how conversations are rendered; `auto` takes thinking where a message has
        `reasoning_content`. A record's own `mode` wins.
      effort: key of the profile's efforts, in thinking mode. A record's own `effort` wins.
      profile: the generation of checkpoints whose effort prefixes are rendered; None: that of the
        run's model, and preview where there is no run.
      drop_thinking: leave out the reasoning before the last question, as prompts do.
      turns: which of the assistant's turns are learned: `all`, or those after the `last` question.
      settings: fields of `training.data.needles.Needles`, for needles.
    """

    kind: Literal["chat", "text", "needles"]
    paths: tuple[str, ...] = ()
    weight: float = 1.0
    too_long: Literal["split", "error"] | None = None
    mode: Literal["auto", "chat", "thinking"] = "auto"
    effort: str | None = None
    profile: Literal["preview", "0731"] | None = None
    drop_thinking: bool = True
    turns: Literal["all", "last"] = "all"
    settings: Any = None

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"data.sources.weight must be positive, got {self.weight}; leave out a source that "
                "is not wanted"
            )
        if self.kind == "needles" and self.paths:
            raise ConfigError(f"data.sources.paths must be empty for needles, got {self.paths}")
        if self.kind != "needles" and not self.paths:
            raise ConfigError(f"data.sources.paths must name a file or folder of {self.kind}")
        for field in fields(self):
            only = _ONLY_FOR.get(field.name, self.kind)
            if only != self.kind and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"data.sources.{field.name} is for kind {only!r}, got "
                    f"{getattr(self, field.name)!r} with kind {self.kind!r}; remove it"
                )

    @property
    def splits(self) -> bool:
        """Whether a document longer than a row is cut."""
        return (self.too_long or ("split" if self.kind == "text" else "error")) == "split"


@dataclass(frozen=True)
class DataConfig:
    """Rows of documents, the same for every number of hosts.

    Attributes:
      sources: where documents come from.
      length: tokens of a row; a multiple of 128.
      batch: rows of a batch, of all hosts together.
      packing: several documents in a row, each seeing only itself; False: one document a row.
      gaps: batches say which positions documents leave out (`needles.Needles.gaps`).
      lookahead: documents that wait for a row they fit into, for each row of the batch.
      shuffle: in a new order every epoch; False: in the order of the files.
      seed: of shuffling, 0 to 2³² − 1.
      epochs: how often every record is read, whatever the weights; None: without end, by weights.
        A run without `steps` is so long.
      on_bad_record: `error` stops at a record that cannot be used; `skip` warns and counts it.
      prefetch: batches made ahead by a thread; 0 makes each when it is asked for.
    """

    sources: tuple[SourceConfig, ...]
    length: int = within(ALIGN, MOST_TOKENS)
    batch: int = within(1, 1 << 20)
    packing: bool = True
    gaps: bool = False
    lookahead: int = within(1, 1 << 20, 64)
    shuffle: bool = True
    seed: int = within(0, MAX_SEED, 0)
    epochs: int | None = within(1, 1 << 30, None)
    on_bad_record: Literal["error", "skip"] = "error"
    prefetch: int = within(0, 1 << 10, 2)

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("data.sources must name at least one source, got none")
        if self.length < ALIGN or self.length % ALIGN:
            below = max(self.length // ALIGN, 1) * ALIGN
            raise ConfigError(
                f"data.length must be a positive multiple of {ALIGN}, got {self.length}; "
                f"try {below} or {below + ALIGN}"
            )
        check_ranges(self, "data.")
        if self.epochs is not None and len({source.weight for source in self.sources}) > 1:
            raise ConfigError(
                "data.sources.weight must be the same for all where data.epochs is given, because "
                "every record is then read that often; leave out one or the other"
            )
        if self.epochs is not None and any(s.kind == "needles" for s in self.sources):
            raise ConfigError("data.epochs must be None with needles, which never end")

    def with_profile(self, profile: str) -> "DataConfig":
        """Returns the configuration whose chat sources have a profile where they named none."""
        sources = tuple(
            replace(source, profile=source.profile or profile) if source.kind == "chat" else source
            for source in self.sources
        )
        return replace(self, sources=sources)
