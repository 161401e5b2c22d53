"""Training data: how fast batches are made, and how full their rows are.

    python -m benchmarks.data
    python -m benchmarks.data --records=20000

Conversations of pseudo-random English words are written to a temporary folder; their lengths are
lognormal with a median of 245 words, half of them the answer. They are read as the trainer reads
them, by one thread, with nothing prepared ahead. Tokens are documents' tokens without padding.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import machine
from v4jax.config import DataConfig, SourceConfig
from v4jax.tokenizer import load_tokenizer
from v4jax.training.data import Loader

CASES = (("byte", 4096), ("byte", 65536), ("v4", 4096), ("v4", 32768))
TOKENS = 2**21  # of the rows that a case makes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=20_000)
    records = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.jsonl"
        write_conversations(file, records)
        print(f"{records:,} conversations, {file.stat().st_size / 2**20:.0f} MiB")
        gigaflops = machine.product_rate() / 1e9
        print(f"{machine.describe()}, float32 products {gigaflops:.0f} GFLOP/s")
        print("| tokenizer | row | tokens/s | per GFLOP of the products | full | index | resume |")
        print("|---|---|---|---|---|---|---|")
        for tokenizer, length in CASES:
            print(measure(file, tokenizer, length, gigaflops))
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


def measure(file: Path, name: str, length: int, gigaflops: float) -> str:
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
    rate = counts.tokens / seconds
    return (
        f"| {name} | {length:,} | {rate:,.0f} | {rate / gigaflops:,.0f} | "
        f"{100 * counts.fill:.1f} % | {index_seconds:.2f} s | {resume_seconds:.2f} s |"
    )


if __name__ == "__main__":
    main()
