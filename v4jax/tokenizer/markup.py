"""Prompts in pieces: control tokens and plain text.

Everything that a user, a document or a tool wrote is plain text and encodes to no control token,
whatever it spells. Control tokens come only from the templates of this package.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from v4jax.tokenizer.vocabulary import CONTROLS, Vocabulary

SLOT = "\x00"  # place of a text in a template; only templates are searched for it


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
      text: its text.
      control: whether it consists of control tokens; otherwise it is plain text.
      weight: how much it counts in training; 0 unless the assistant wrote it (reasoning, content,
        calls and EOS).
    """

    text: str
    control: bool = False
    weight: float = 0.0


def markup(template: str, *texts: str) -> list[Piece]:
    """Returns a template as pieces, with `texts` as plain text in its slots (`SLOT`)."""
    own = template.split(SLOT)
    assert len(own) == len(texts) + 1, (template, texts)
    pieces = []
    for i, part in enumerate(own):
        halves = _CONTROL.split(part)  # plain text and control tokens in turn
        pieces += [Piece(text, control=j % 2 == 1) for j, text in enumerate(halves)]
        pieces += [Piece(text) for text in texts[i : i + 1]]
    return [piece for piece in pieces if piece.text]


def join_pieces(pieces: Iterable[Piece]) -> str:
    """Returns the text of all pieces."""
    return "".join(piece.text for piece in pieces)


def encode_pieces(pieces: Iterable[Piece], tokenizer: Vocabulary) -> list[int]:
    """Returns the ids of pieces; plain text that spells a control token gives none of its ids.

    Raises:
      RequestError: a text holds a lone surrogate.
    """
    ids = []
    for control, group in groupby(pieces, key=lambda piece: piece.control):
        ids += tokenizer.encode(join_pieces(group), specials=control)
    return ids


_CONTROL = re.compile(f"({'|'.join(map(re.escape, CONTROLS))})")
