"""The needle task: codes hidden in a long real text, and questions for them.

    BOS <｜User｜> …text… The code of amber-falcon is 40917. …text…

    What is the code of amber-falcon?<｜Assistant｜></think>40917 EOS
    <｜User｜>What is the code of …

The first turn holds the ids that `v4jax batch` makes of a document and its question. Each further
question is a turn of its own. Names in training and in tests share words, but never pairs of words.
"""

import dataclasses
import functools
import itertools
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Literal, NamedTuple

import numpy as np

from v4jax.config.data import ALIGN
from v4jax.errors import DataError
from v4jax.tokenizer import ByteTokenizer, encode_messages
from v4jax.training.data.example import Example

DIGITS = 5
END = "\n\n"  # between the text and the first question
LINE = 70  # bytes in which the end of a word is looked for
TEST_SHARE = 8  # one pair of words in eight is kept for tests

# Sentences that look like needles and answer no question.
DISTRACTORS = (
    "The price of {name} is {number}.",
    "The code of {name} is not known.",
    "{name} has {number} pages.",
    "Call {number} for {name}.",
    "The number {number} is the code of nothing.",
)

WORDS = tuple(
    """
    acorn agate alder alpha amber angle ankle apple april arrow ashen aspen atlas autumn azure
    badge baker bamboo banjo basil basin beach beam bear berry birch bird bison black blade blaze
    bloom blue board bolt bone book booth brave bread brick bridge bright bronze brook brown brush
    cabin cable cactus camel candle canoe canyon carbon cargo castle cedar chalk cherry chess cider
    cinder circle citrus clay cliff clock cloud clover coast cobalt comet copper coral cotton crane
    creek crimson crow crown crystal dagger daisy dancer dawn deer delta denim desert diamond dingo
    dolphin dome dove dragon drift drum dune dusk eagle earth east ebony echo eland elbow elder elk
    ember empty engine falcon fast feather fern field fig finch fire fjord flame flax flint flora
    flute foam forest forge fossil fox frost garden garnet gecko ginger glacier glass globe goat
    gold goose grain granite grape grass gravel green grove gull hammer harbor harp hawk hazel
    heart hedge heron hill holly honey horn horse house hunter ice indigo iris iron island ivory
    jade jaguar jasmine jelly jewel jungle juniper kayak kettle kite koala lake lamp lantern lark
    laurel lava leaf lemon level lilac lily lime linen lion lizard lotus lunar lynx magnet mango
    maple marble marsh meadow melon mesa metal mint mirror mist moon moose moss moth mouse mule
    myrtle nickel night noble north nutmeg oak oasis oat ocean olive onyx opal orange orbit orchid
    otter owl oyster paint palm panda paper parrot pearl pebble pepper piano pigeon pilot pine
    planet plum polar pond poplar prism puma purple quail quartz quick quiet rabbit radio rain
    raven red reef ribbon ridge river robin rocket rose ruby rust sable saddle saffron sage salt
    sand satin scarlet seal shadow shell silk silver slate smoke snow solar south spark sparrow
    spice spruce stable star steel stone storm summer sun swan swift table tango teal temple tiger
    timber tin topaz torch tower trout tulip tundra turtle umber urban valley velvet violet walnut
    water wave west whale wheat willow wind winter wolf wood wren yarrow yellow yew zebra zenith
    """.split()  # noqa: SIM905 (a list of 420 strings reads worse)
)


@dataclass(frozen=True)
class Needles:
    """What documents of the needle task look like; ranges include both ends.

    Attributes:
      tokens: of the document without its questions.
      needles: number of sentences that give a code; one is always there, whatever the length.
      distractors: number of sentences that look like needles.
      questions: number of codes that are asked for, at most those in the text.
      gaps: probability that positions are left out before a stretch of 128 tokens, for all but the
        first stretch. A short document then has the distances of a long one.
      gap_tokens: range of the number of positions left out; its logarithm is uniform.
      text_weight: how much a token outside the answers counts as a target.
      split: which pairs of words make names.
      folder: its *.txt, *.md, *.rst and *.py files give the text around the sentences; None: the
        language reference and library of this Python.

    Raises:
      DataError: a range is empty or too small.
    """

    tokens: tuple[int, int] = (512, 2048)
    needles: tuple[int, int] = (1, 8)
    distractors: tuple[int, int] = (0, 4)
    questions: tuple[int, int] = (1, 4)
    gaps: float = 0.0
    gap_tokens: tuple[int, int] = (128, 1 << 20)
    text_weight: float = 0.1
    split: Literal["train", "test"] = "train"
    folder: str | None = None

    def __post_init__(self):
        least = dict(tokens=64, needles=1, distractors=0, questions=1, gap_tokens=ALIGN)
        for field, smallest in least.items():
            low, high = getattr(self, field)
            if not smallest <= low <= high:
                raise DataError(
                    f"needles.{field} must be a range (low, high) with {smallest} ≤ low ≤ high, "
                    f"got {(low, high)}"
                )
        if not 0 <= self.gaps <= 1:
            raise DataError(f"needles.gaps must be a probability, got {self.gaps}")
        if self.text_weight < 0:
            raise DataError(f"needles.text_weight must not be negative, got {self.text_weight}")
        if self.split not in ("train", "test"):
            raise DataError(f"needles.split must be 'train' or 'test', got {self.split!r}")


class Sentence(NamedTuple):
    """One sentence; `name` and `number` are empty unless it gives a code."""

    text: str
    name: str = ""
    number: str = ""


@dataclass(frozen=True)
class Haystack:
    """A text with its codes in it.

    codes: name → number in the order of the text. depths: name → place of its sentence, from 0
    (the first byte) to 1 (the last).
    """

    text: str
    codes: dict[str, str]
    depths: dict[str, float]


def make_document(seed: int, index: int, settings: Needles) -> Example:
    """Returns document `index` of the task; equal arguments and text give equal documents."""
    generator = np.random.default_rng((seed, index))
    haystack = (hide_in_stretches if settings.gaps else hide)(generator, settings)
    count = int(generator.integers(*settings.questions, endpoint=True))
    asked = [str(name) for name in generator.permutation(list(haystack.codes))[:count]]
    answers = [(name, haystack.codes[name]) for name in asked]
    document = write_turns(haystack.text, answers, settings)
    if settings.gaps:
        skipped = draw_gaps(generator, len(document), settings)
        document = dataclasses.replace(document, skipped=skipped)
    return document


def draw_gaps(generator: np.random.Generator, tokens: int, settings: Needles) -> np.ndarray:
    """Returns `Example.skipped` for a document of `tokens` tokens."""
    stretches = -(-tokens // ALIGN)
    sizes = np.exp2(generator.uniform(*np.log2(settings.gap_tokens), stretches))
    sizes = (sizes // ALIGN * ALIGN).astype(np.int64)
    sizes = np.where(generator.uniform(size=stretches) < settings.gaps, sizes, 0)
    sizes[0] = 0
    return np.repeat(np.cumsum(sizes), ALIGN)[:tokens].astype(np.int32)


def hide_in_stretches(generator: np.random.Generator, settings: Needles) -> Haystack:
    """Does what `hide` does, but no sentence crosses a multiple of 128 tokens of the document.

    The questions begin at such a multiple too. The text is ASCII: one byte is one token.
    """
    size = int(generator.integers(*settings.tokens, endpoint=True))
    count = max(round(size / ALIGN), 1)
    around = len(ByteTokenizer().encode(render_turn(first=True)[0])) + len(END)
    needles = int(generator.integers(*settings.needles, endpoint=True))
    distractors = int(generator.integers(*settings.distractors, endpoint=True))
    sentences = draw_sentences(generator, needles, distractors, settings.split)
    places = generator.integers(count, size=len(sentences))
    texts, codes = [], {}
    for stretch in range(count):
        room = ALIGN - (around - len(END) if stretch == 0 else 0)
        room -= len(END) if stretch == count - 1 else 0
        # The first needle always fits, because it comes first in its stretch.
        mine = [s for s, place in zip(sentences, places, strict=True) if place == stretch]
        part = _join(generator, *_fit(mine, room), settings.folder)
        texts.append(part.text.encode("ascii", "replace").decode().ljust(room))
        codes |= part.codes
    text = "".join(texts)
    depths = {name: text.index(f"The code of {name} is") / len(text) for name in codes}
    return Haystack(text, codes, depths)


def hide(generator: np.random.Generator, settings: Needles) -> Haystack:
    """Returns a text of `settings.tokens` bytes with needles and distractors anywhere in it."""
    size = int(generator.integers(*settings.tokens, endpoint=True))
    needles = int(generator.integers(*settings.needles, endpoint=True))
    distractors = int(generator.integers(*settings.distractors, endpoint=True))
    sentences = draw_sentences(generator, needles, distractors, settings.split)
    return _join(generator, *_fit(sentences, size), settings.folder)


def draw_sentences(generator, needles: int, distractors: int, split: str) -> list[Sentence]:
    """Returns needles and distractors in random order; the first is a needle."""
    names = draw_names(generator, needles + distractors, split)
    numbers = draw_numbers(generator, needles + distractors)
    sentences = []
    for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
        if i < needles:
            sentences.append(Sentence(f"The code of {name} is {number}.", name, number))
        else:
            form = DISTRACTORS[generator.integers(len(DISTRACTORS))]
            sentences.append(Sentence(form.format(name=name, number=number)))
    return [sentences[0], *(sentences[i + 1] for i in generator.permutation(len(sentences) - 1))]


def _fit(sentences: Sequence[Sentence], room: int) -> tuple[list[Sentence], int]:
    """Returns the sentences that fit into `room` bytes, and the room left; the first is kept."""
    kept: list[Sentence] = []
    for sentence in sentences:
        if not kept or len(sentence.text) + 1 <= room:
            kept.append(sentence)
            room -= len(sentence.text) + 1
    return kept, max(room, 0)


def _join(generator, sentences: Sequence[Sentence], room: int, folder) -> Haystack:
    """Returns one stretch of text with the sentences inside, at random depths."""
    text = read_text(folder)
    first = int(generator.integers(len(text) - room))
    filler = text[first : first + room].decode(errors="ignore")
    order = generator.permutation(len(sentences))
    cuts = sorted(
        _next_gap(filler, int(i)) for i in generator.integers(0, len(filler) + 1, order.size)
    )
    parts, codes, depths = [], {}, {}
    for start, end, place in zip([0, *cuts], [*cuts, len(filler)], [*order, None], strict=True):
        parts.append(filler[start:end])
        if place is not None:
            sentence = sentences[place]
            if sentence.name:
                codes[sentence.name] = sentence.number
                depths[sentence.name] = sum(map(len, parts))
            parts.append(f" {sentence.text}")
    whole = "".join(parts)
    return Haystack(whole, codes, {name: place / len(whole) for name, place in depths.items()})


def _next_gap(text: str, place: int) -> int:
    """Returns the first place at or after `place` where a word ends."""
    for i in range(place, min(place + LINE, len(text))):
        if text[i].isspace():
            return i
    return min(place, len(text))


def write_turns(text: str, answers: Sequence[tuple[str, str]], settings: Needles) -> Example:
    """Returns text, questions and answers as the model reads them; answers have weight 1."""
    tokenizer = ByteTokenizer()
    tokens: list[int] = []
    weights: list[float] = []

    def add(ids: list[int], weight: float):
        tokens.extend(ids)
        weights.extend([weight] * len(ids))

    for turn, (name, number) in enumerate(answers):
        before, after = render_turn(first=turn == 0)
        add(tokenizer.encode(before), settings.text_weight)
        if turn == 0:
            add(tokenizer.encode(text + END, specials=False), settings.text_weight)
        add(tokenizer.encode(ask(name), specials=False), settings.text_weight)
        add(tokenizer.encode(after), settings.text_weight)
        add([*tokenizer.encode(number, specials=False), tokenizer.eos_id], 1.0)
    weights[0] = 0.0
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


def ask(name: str) -> str:
    """Returns the question for the code of `name`."""
    return f"What is the code of {name}?"


@functools.cache
def render_turn(*, first: bool) -> tuple[str, str]:
    """Returns what the encoder writes before and after the user's words."""
    mark = "\x00"
    turn = {"role": "user", "content": mark}
    if first:
        before, after = encode_messages([turn]).split(mark)
        return before, after
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before, after = encode_messages([*history, turn]).split(mark)
    return before.removeprefix(encode_messages(history)), after


def draw_names(generator: np.random.Generator, count: int, split: str) -> list[str]:
    """Returns `count` different names of the split."""
    names: dict[str, None] = {}
    while len(names) < count:
        a, b = (int(i) for i in generator.integers(len(WORDS), size=2))
        kept_for_tests = (a * 31 + b * 17) % TEST_SHARE == 0
        if a != b and kept_for_tests == (split == "test"):
            names[f"{WORDS[a]}-{WORDS[b]}"] = None
    return list(names)


def draw_numbers(generator: np.random.Generator, count: int) -> list[str]:
    """Returns `count` numbers of five digits; leading digits may be 0."""
    return [f"{number:0{DIGITS}}" for number in generator.integers(10**DIGITS, size=count)]


@functools.cache
def read_text(folder: str | None) -> bytes:
    """Returns the text that surrounds needles, UTF-8; see `Needles.folder`.

    Raises:
      DataError: the folder has less than 64 KiB of text.
    """
    if folder is None:
        library = Path(sysconfig.get_path("stdlib"))
        files = sorted(library.glob("*.py"))
        pieces = [topics.topics[name].encode() for name in sorted(topics.topics)]
    else:
        found = (Path(folder).rglob(f"*.{kind}") for kind in ("txt", "md", "rst", "py"))
        files, pieces = sorted(itertools.chain.from_iterable(found)), []
    pieces += [path.read_bytes() for path in files]
    text = b"\n\n".join(pieces)
    if len(text) < 65536:
        raise DataError(
            f"needles.folder = {folder!r} holds {len(text)} bytes of text; at least 65536 are "
            "needed to draw from"
        )
    return text
