"""Training data: how fast batches are made, and how full their rows are.

    python -m tests.benchmarks.bench_data [--records=20000]

Writes conversations of pseudo-random English words to a temporary folder, their lengths lognormal
(median 245 words, half of it the answer), and reads them as the trainer does, one thread, nothing
made ahead. Tokens are documents' tokens; padding is not counted.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from v4jax.config import DataConfig, SourceConfig
from v4jax.tokenizer import load_tokenizer
from v4jax.training.data import Loader

CASES = (("byte", 4096), ("byte", 65536), ("v4", 4096), ("v4", 32768))
TOKENS = 2**21  # of the rows that a case makes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    records = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.jsonl"
        write_conversations(file, records)
        print(f"{records:,} conversations, {file.stat().st_size / 2**20:.0f} MiB")
        print("| tokenizer | row | tokens/s | rows full | index | resume |")
        print("|---|---|---|---|---|---|")
        for tokenizer, length in CASES:
            print(measure(file, tokenizer, length))
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


def write_conversations(file: Path, records: int) -> None:
    random = np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(random.choice(list(letters), n)) for n in random.integers(1, 9, 5000)]
    with open(file, "w") as out:
        for _ in range(records):
            count = max(int(random.lognormal(5.5, 0.8)), 4)
            text = [words[i] for i in random.integers(0, len(words), count)]
            messages = [
                {"role": "user", "content": " ".join(text[: count // 2])},
                {"role": "assistant", "content": " ".join(text[count // 2 :])},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")


def measure(file: Path, name: str, length: int) -> str:
    tokenizer = load_tokenizer(name)
    source = SourceConfig("chat", (str(file),), too_long="split")
    config = DataConfig((source,), length, batch=4, prefetch=0)
    start = time.perf_counter()
    loader = Loader(config, tokenizer)
    index_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(max(TOKENS // (4 * length), 1)):
        next(loader)
    seconds, counts = time.perf_counter() - start, loader.counts()
    state, again = loader.state(), Loader(config, tokenizer)
    start = time.perf_counter()
    again.restore(state)
    resume_seconds = time.perf_counter() - start
    return (
        f"| {name} | {length:,} | {counts.tokens / seconds:,.0f} | {100 * counts.fill:.1f} % | "
        f"{index_seconds:.2f} s | {resume_seconds:.2f} s |"
    )


if __name__ == "__main__":
    main()
