"""What more text behind a code costs: the same codes in growing text, and with fewer rivals.

    python -m benchmarks.competitors --lengths=135168,262144,524288

The codes of two texts of 64 K come first; other text with codes and distractors of its own follows.
At the last length the codes are asked for again while attention sees only a part of the selected
entries:

    own    the entries of the code that is asked for
    codes  those, and entries of sentences that look like one
    text   those, and entries of plain text
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from v4jax.cli import needle_grid
from v4jax.inference import Document, Engine, EngineOptions, Question, SamplingOptions
from v4jax.inference.steps import prefill
from v4jax.model import attend
from v4jax.training.data import needles

RATIO = 4  # tokens of an entry; it says something of the four before as well
CODE = "The code of {name} is {number}."
NAME = "[a-z]+-[a-z]+"
PARTS = ("own", "codes", "text")


def find_entries(text: bytes, patterns: list[str]) -> np.ndarray:
    """Returns for each entry of a text whether it holds a part of what matches."""
    inside = np.zeros(len(text) // RATIO + 3, bool)
    for pattern in patterns:
        for match in re.finditer(pattern.encode(), text):
            inside[match.start() // RATIO : (match.end() - 1) // RATIO + 2] = True
    return inside


def to_pattern(sentence: str, name: str = NAME) -> str:
    """Returns what finds a sentence with any number, and any name unless one is given."""
    pattern = re.escape(sentence).replace(re.escape("{name}"), name)
    return pattern.replace(re.escape("{number}"), "[0-9]{5}")


class Rivals:
    """Leaves out a part of what the indexer selects in the document.

    Attributes:
      owned: per question being answered, which entries are of its code.
    """

    def __init__(self, text: bytes):
        self.text, self.select = text, attend.select
        patterns = [to_pattern(sentence) for sentence in (CODE, *needles.DISTRACTORS)]
        self.sentences = find_entries(text, patterns)
        self.owned = self.sentences[None]

    def ask_for(self, names: list[str], slots: int) -> None:
        """Sets whose entries are a question's own."""
        owned = [find_entries(self.text, [to_pattern(CODE, name)]) for name in names]
        self.owned = np.resize(np.stack(owned), (slots, self.sentences.size))

    def install(self, part: str) -> None:
        """Has all later selections keep one of `PARTS`, of the document; jitted code is dropped."""

        def keep(ids_btk):
            place = np.clip(ids_btk, 0, self.sentences.size - 1)
            own = np.stack([owned[ids] for owned, ids in zip(self.owned, place, strict=True)])
            also = {"own": False, "codes": self.sentences[place], "text": ~self.sentences[place]}
            behind = ids_btk >= self.sentences.size
            return np.where((ids_btk >= 0) & (own | also[part] | behind), ids_btk, -1)

        def select(*arguments, **options):
            ids_btk = self.select(*arguments, **options)
            return jax.pure_callback(keep, jax.ShapeDtypeStruct(ids_btk.shape, jnp.int32), ids_btk)

        attend.select = select
        jax.clear_caches()


def draw_document(length: int) -> tuple[str, list[tuple[str, str]]]:
    """Returns a text whose codes are in its first 128 K, and those with their names."""
    first = [needle_grid.draw_texts([65536], 5, lambda _: 20, seed)[0] for seed in (5, 6)]
    behind = needle_grid.draw_texts([1 << 20], 5, lambda _: 10, 7)[0].text
    text = "".join([*(part.text for part in first), behind])[:length]
    asked = [(name, code) for part in first for name, code, _ in part.asked]
    return text, [(name, code) for name, code in asked if text.count(name) == 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--lengths", default="135168,262144,524288", help="tokens, rising")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    text, asked = draw_document(lengths[-1])
    engine = Engine(v4jax.load(arguments.model), EngineOptions())
    sampling = SamplingOptions(max_new_tokens=needle_grid.MAX_NEW_TOKENS)
    questions = tuple(Question(needles.ask(name), sampling) for name, _ in asked)
    encoded = engine.encode(Document(text, questions))
    rivals = Rivals(bytes(token if token < 256 else 0 for token in encoded.tokens))
    slots = engine.options.questions_at_once

    def count(cache, length: int, part: str) -> None:
        right = 0
        for group in encoded.groups(engine.options):
            rivals.ask_for([asked[i][0] for i in group], slots)
            answers = engine.answer(encoded, cache, group)
            right += sum(
                answer.text.strip() == asked[i][1] for i, answer in zip(group, answers, strict=True)
            )
        print(f"{length:,} tokens, {part} selected: {right} of {len(asked)}", flush=True)

    engine.prepare(encoded)
    cache, done = engine.model.init_cache(1, encoded.capacity), 0
    chunk_tokens = engine.options.chunk_tokens
    for length in lengths:
        tokens = encoded.tokens[done:length]
        _, cache = prefill(engine.model, [tokens], cache, chunk_tokens=chunk_tokens)
        done += len(tokens)
        count(cache, done, "all")
    for part in PARTS:
        rivals.install(part)
        count(cache, done, part)


if __name__ == "__main__":
    main()
