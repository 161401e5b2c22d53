"""The output of a batch job in a bucket: numbered parts, which become the output in the end.

    answers.jsonl.parts/00000001.jsonl    who began writing, no answer
    answers.jsonl.parts/00000002.jsonl    the answers of one group of questions, and so on
    answers.jsonl                         all of them, when the job is finished; the parts go then

Objects are written whole and cannot be appended to. So every group of answers becomes an object,
and is in the bucket before the job goes on: any machine can continue from there. (Writing the one
object again for each group, as a mounted bucket does, costs the square of its size; writing it at
intervals loses what was answered since.)

There are no locks in a bucket, but of several writers one can create an object. A part is created,
never replaced, under the number after the last one known: whoever does not know of the last part
fails. A job that starts takes the next number at once, with its name. So the newest job goes on,
as it must when a machine is lost and its replacement cannot know whether it still runs; an older
one ends with an error that names the newer, at its next answers. Nothing is lost or written twice.
Google Cloud Storage and S3 keep this rule; of imitations of S3, those that heed If-None-Match.

The output is written before its parts are removed. Parts that a crash left in between repeat it to
the byte, and are removed when the job is started again.
"""

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator

from v4jax import log
from v4jax.errors import V4JaxError
from v4jax.files import RemotePath, read_all, remove_all, to_path

FOLDER_ENDING = ".parts"
_WRITER = b'{"writer": '  # how a part begins that holds no answers
_AT_ONCE = 256  # parts read side by side
_TRIES = 10  # to become the writer, while another one writes


class Parts:
    """An output in a bucket, opened for one job.

    Raises:
      V4JaxError: it cannot be read or written, or another job is writing it.
    """

    def __init__(self, path: str, *, overwrite: bool = False):
        self.path, self.folder = to_path(path), to_path(path + FOLDER_ENDING)
        self._numbers: list[int] = []  # of the parts there are, the last one being ours
        self._claim = 0  # number of the part that names this job
        self._whole = False  # whether the output object is there
        self._holds_answers = False  # whether a part does, which the output does not
        try:
            if overwrite:
                self._remove(self._list())
                if self.path.refresh().is_file():
                    self.path.unlink()
            self._begin()
            self._whole = self.path.refresh().is_file()
        except OSError as error:
            raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Yields every line, with its place for messages."""
        try:
            seen = set()
            if self._whole:
                with self.path.open() as file:
                    for number, line in enumerate(file, start=1):
                        seen.add(_digest(line))
                        yield f"{self.path} line {number}", line
            repeated = []
            for number, data in self._read_parts():
                lines = data.splitlines(keepends=True)
                if lines and all(_digest(line) in seen for line in lines):
                    repeated.append(number)
                    continue
                self._holds_answers |= bool(lines)
                for i, line in enumerate(lines, start=1):
                    yield f"{self._name(number)} line {i}", line
            self._remove(repeated)
        except OSError as error:
            raise V4JaxError(
                f"cannot read {self.path}: {error.strerror or error}; if another job ended just "
                "now, start this one again"
            ) from error

    def append(self, data: bytes) -> None:
        """Writes lines as one piece, and returns when they are in the bucket.

        Raises:
          V4JaxError: they could not be written, or another job is writing.
        """
        last = self._numbers[-1]
        try:
            # What another job has finished has no parts; their numbers could be taken again.
            if not self._name(last).refresh().is_file():
                raise self._taken("it was finished or overwritten meanwhile")
            self._name(last + 1).create(data)
        except FileExistsError as error:
            raise self._taken(self._writer_of(last + 1)) from error
        except OSError as error:
            raise V4JaxError(
                f"cannot write {self._name(last + 1)}: {error.strerror or error}; start the job "
                "again when that is repaired, and it will continue"
            ) from error
        self._numbers.append(last + 1)
        self._holds_answers = True

    def finish(self) -> None:
        """Makes the output of its parts, and removes them.

        Raises:
          V4JaxError: as `append`.
        """
        try:
            if self._list() != self._numbers:
                raise self._taken(self._writer_of(self._numbers[-1] + 1))
            if self._holds_answers or not self._whole:
                self.path.write_blocks(self._blocks())
                log.info(f"batch: {self.path} is made of its {len(self._numbers):,} parts")
            self._remove(self._numbers)
        except OSError as error:
            raise V4JaxError(
                f"cannot write {self.path}: {error.strerror or error}; its parts are in "
                f"{self.folder}, and the same command makes it of them"
            ) from error

    def close(self) -> None:
        """Ends writing; a job that wrote nothing takes its name away again."""
        if self._claim in self._numbers[-1:]:
            with contextlib.suppress(OSError):  # nothing is lost if it stays
                self._remove([self._claim])

    def _begin(self) -> None:
        """Becomes the writer: takes the number after the last part."""
        name = f"process {os.getpid()} on {socket.gethostname()}"
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        data = _WRITER + f'"{name}, begun {began}"}}\n'.encode()
        for _ in range(_TRIES):
            numbers = self._list()
            number = numbers[-1] + 1 if numbers else 1
            try:
                self._name(number).create(data)
            except FileExistsError:
                continue  # another job wrote since the list was made
            self._claim, self._numbers = number, [*numbers, number]
            return
        raise self._taken("it writes faster than this one can list the parts")

    def _list(self) -> list[int]:
        """Returns the numbers of the parts, as they are now."""
        if not self.folder.refresh().is_dir():
            return []
        names = [path.name.removesuffix(".jsonl") for path in self.folder.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _name(self, number: int) -> RemotePath:
        return self.folder / f"{number:08d}.jsonl"

    def _read_parts(self) -> Iterator[tuple[int, bytes]]:
        """Yields number and lines of every part, none for one that says who writes."""
        numbers = list(self._numbers)
        for i in range(0, len(numbers), _AT_ONCE):
            some = numbers[i : i + _AT_ONCE]
            contents = read_all([self._name(number) for number in some])
            for number, data in zip(some, contents, strict=True):
                yield number, b"" if data.startswith(_WRITER) else data

    def _blocks(self) -> Iterator[bytes]:
        if self._whole:
            with self.path.open() as file:
                while data := file.read(1 << 22):
                    yield data
        for _, data in self._read_parts():
            yield data

    def _remove(self, numbers: Iterable[int]) -> None:
        gone = set(numbers)
        remove_all([self._name(number) for number in sorted(gone)])
        self._numbers = [number for number in self._numbers if number not in gone]

    def _writer_of(self, number: int) -> str:
        try:
            data = self._name(number).read_bytes()
        except OSError:
            return "it was finished or overwritten meanwhile"
        if data.startswith(_WRITER):
            return data[len(_WRITER) :].decode(errors="replace").strip().strip('"}')
        return f"it wrote {self._name(number)}"

    def _taken(self, who: str) -> V4JaxError:
        return V4JaxError(
            f"another job is writing {self.path} ({who}), and this one ends; what it answered is "
            "kept. Wait for the other, or choose another output"
        )


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()
