"""What the documentation shows a reader: its pages, their fenced blocks, the commands in them."""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

from v4jax.cli.main import VERBS

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "benchmarks/**/*.md",
        "tests/README.md",
        "v4jax/**/README.md",
    )
    for path in ROOT.glob(pattern)
)

# A block that does not run says why in a comment above it: <!-- not run: it needs a TPU slice -->
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# Ends a command that is followed by something else on its line.
_OPERATORS = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", "(", ")"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. `reason` says why it does not run here; None: it does."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(*languages: str, page: str | None = None) -> list[Block]:
    """Returns the blocks of all pages, or of one, in the order of the text."""
    blocks = []
    for name in [page] if page else PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("language")) + 1
                inside = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
                blocks.append(Block(name, line, match["language"], inside, match["reason"]))
    return blocks


def split_commands(script: str) -> Iterator[list[str]]:
    """Yields the words of every simple command of a shell script; here-documents are left out."""
    script = re.sub(
        r"<<-?\s*'?(\w+)'?(.*?)\n.*?^\1$", r"\2", script, flags=re.DOTALL | re.MULTILINE
    )
    words: list[str] = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
        lexer.whitespace_split = True
        for word in lexer:
            if word in _OPERATORS:
                yield words
                words = []
            else:
                words.append(word)
        yield words
        words = []


def find_calls(script: str) -> Iterator[list[str]]:
    """Yields verb and flags of every call of v4jax in a script, also as arguments of a recipe."""
    for words in split_commands(script):
        if "v4jax" in words:
            call = words[words.index("v4jax") + 1 :]
        elif any(word.startswith("launch/") for word in words):
            call = words[next((i for i, word in enumerate(words) if word in VERBS), len(words)) :]
        else:
            continue
        if call and not call[0].startswith("-"):
            yield call


def find_inline_commands() -> Iterator[tuple[str, str]]:
    """Yields page and command of every `v4jax …` in running text."""
    for page in PAGES:
        text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for match in re.finditer(r"`(v4jax [a-z]+(?: [^`]*)?)`", text):
            yield page, " ".join(match[1].split())
