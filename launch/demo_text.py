"""Makes the input of the demo from text that every Python installation has, and checks its answers.

python launch/demo_text.py write documents.jsonl --tokens 65536
python launch/demo_text.py show documents.jsonl answers.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from v4jax.training.data import needles

QUESTIONS = 10
CODES = 40  # hidden in the text, as many distractors beside them
ROOM = 512  # tokens left for BOS, roles, the longest question and its answer


def write(path: Path, tokens: int, seed: int) -> None:
    """Writes one document, real text with codes in it, and questions at all depths.

    `codes.json` beside it holds the right answers, with their depth.
    """
    if tokens < 8 * ROOM:
        raise SystemExit(f"demo: tokens must be at least {8 * ROOM}, got {tokens}")
    size = tokens - ROOM
    count = min(CODES, size // 256)
    settings = needles.Needles(
        tokens=(size, size), needles=(count, count), distractors=(count, count), split="test"
    )
    haystack = needles.hide(np.random.default_rng(seed), settings)
    # Evenly from the first hidden to the last, asked in the order of the text.
    names = list(haystack.codes)
    asked = [
        names[i] for i in np.linspace(0, len(names) - 1, min(QUESTIONS, len(names)), dtype=int)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_suffix(".txt")
    text.write_text(haystack.text, encoding="utf-8", newline="")
    line = {"id": "python", "path": text.name, "questions": [needles.ask(name) for name in asked]}
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    right = {
        needles.ask(name): {"code": haystack.codes[name], "depth": haystack.depths[name]}
        for name in asked
    }
    path.with_name("codes.json").write_text(json.dumps(right, indent=2), encoding="utf-8")


def show(documents: Path, answers: Path) -> None:
    """Prints each question with its answer, whether it is right, and how many were."""
    sys.stdout.reconfigure(errors="replace")
    codes = json.loads(documents.with_name("codes.json").read_text(encoding="utf-8"))
    found = 0
    records = list(_read_records(answers))
    print(f"\n{'question':42} {'hidden at':>9}  {'answer':12} {'':5} code")
    for record in records:
        if "error" in record:
            raise SystemExit(f"demo: line {record['line']}: {record['error']['message']}")
        true, answer = codes[record["question"]], record["answer"].strip()
        right = answer == true["code"]
        found += right
        mark = "right" if right else "WRONG"
        # Quoted: whatever a model writes must not command the terminal.
        quoted = ascii(answer)[1:-1]
        print(f"{record['question']:42} {true['depth']:>9.0%}  {quoted:12} {mark} {true['code']}")
    print(f"\n{found} of {len(records)} answers are right")


def _read_records(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def main() -> None:
    """Runs the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("path", type=Path)
    writing.add_argument("--tokens", type=int, default=65536)
    writing.add_argument("--seed", type=int, default=0)
    showing = commands.add_parser("show")
    showing.add_argument("documents", type=Path)
    showing.add_argument("answers", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.path, arguments.tokens, arguments.seed)
    else:
        show(arguments.documents, arguments.answers)


if __name__ == "__main__":
    main()
