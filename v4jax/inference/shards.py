"""A job divided among independent processes: shard i of n answers the lines that are i modulo n.

Each shard reads the whole input, answers its own lines and writes its own file. The files together
hold the lines of the undivided job, in another order:

    cat answers-*-of-00016.jsonl > answers.jsonl

makes a file that the undivided job accepts as its own.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from v4jax.errors import RequestError
from v4jax.inference.documents import InputLine, read_lines
from v4jax.parallel.hosts import find_job_index


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def read_lines(self, path: str) -> Iterator[InputLine]:
        """Yields this shard's lines of the input, numbered as in the file."""
        return (line for line in read_lines(path) if (line.number - 1) % self.count == self.index)

    def name_file(self, path: str) -> str:
        """Returns this shard's own file: answers.jsonl → answers-00003-of-00016.jsonl."""
        if self.count == 1:
            return path
        stem, ending = os.path.splitext(path)
        return f"{stem}-{self.index:05d}-of-{self.count:05d}{ending}"


def parse_shard(text: str, variables: Mapping[str, str] | None = None) -> Shard:
    """Returns the shard that `3/16` or `auto/16` names; auto takes the index from the environment.

    Auto must be asked for, because the same variables also count the processes of one model on
    several machines, which must not divide the input.

    Raises:
      RequestError: the text is neither, or the index is not below the count.
      ConfigError: the text says auto, and the environment has no index.
    """
    match = re.fullmatch(r"(auto|[0-9]+)/([0-9]+)", text)
    if not match:
        raise RequestError(f"--shard must be INDEX/COUNT or auto/COUNT, such as 3/16; got {text!r}")
    index = find_job_index(variables) if match[1] == "auto" else int(match[1])
    count = int(match[2])
    if count < 1 or index >= count:
        raise RequestError(
            f"--shard={text} is part {index} of {count}, but indices run from 0 to {count - 1}"
            if count
            else f"--shard={text} divides the input into no parts; a count is at least 1"
        )
    return Shard(index, count)
