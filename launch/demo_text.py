"""Makes the input of the demo from text that every Python installation has, and shows its answers.

python launch/demo_text.py write documents.jsonl --tokens 65536
python launch/demo_text.py show answers.jsonl
"""

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

QUESTIONS = (
    "What does the with statement do?",
    "Which exceptions can an import raise?",
    "How is a class created?",
    "In which order are operands evaluated?",
)
ROOM = 512  # tokens left for BOS, roles, the longest question and its answer


def read_pieces() -> Iterator[str]:
    """Yields the language reference topic by topic, then the library file by file, for ever."""
    library = Path(sysconfig.get_path("stdlib"))
    while True:
        for name, text in sorted(topics.topics.items()):
            yield f"=== Python topic: {name} ===\n\n{text}\n\n"
        for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
            yield f"=== Python source: {path.relative_to(library)} ===\n\n{_read(path)}\n\n"


def sample_text(size_bytes: int) -> str:
    """Returns real text of at most that many UTF-8 bytes, cut at a character.

    The byte tokenizer makes one token of each byte. Beyond what the installation has (tens of
    megabytes) the text begins again.
    """
    pieces, total = [], 0
    for piece in read_pieces():
        pieces.append(piece)
        total += len(piece.encode())
        if total >= size_bytes:
            break
    return "".join(pieces).encode()[:size_bytes].decode(errors="ignore")


def write(path: Path, tokens: int) -> None:
    """Writes one document with its questions."""
    if tokens <= ROOM:
        raise SystemExit(f"demo: tokens must be more than {ROOM}, got {tokens}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_suffix(".txt")
    text.write_text(sample_text(tokens - ROOM), encoding="utf-8", newline="")
    line = {"id": "python", "path": text.name, "questions": QUESTIONS}
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")


def show(path: Path) -> None:
    """Prints questions and answers, quoted: random bytes must not command the terminal."""
    sys.stdout.reconfigure(errors="replace")
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "error" in record:
            print(f"line {record['line']}: {record['error']['message']}")
        else:
            print(f"\nQ: {record['question']}\nA: {record['answer']!r}")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    """Runs the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("path", type=Path)
    writing.add_argument("--tokens", type=int, default=65536)
    commands.add_parser("show").add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.path, arguments.tokens)
    else:
        show(arguments.path)


if __name__ == "__main__":
    main()
