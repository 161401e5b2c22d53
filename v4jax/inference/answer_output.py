"""Where the answers of a batch job go: lines that are safe once appended, on a disk or in a bucket.

Both kinds of output promise the same. `append` writes lines as one piece and returns when they
survive a crash. One job writes at a time. `lines` yields every appended line once, whatever a crash
left. After `finish` all lines are in one file, `path`.

On a disk, lines are appended to a file and forced to disk under a lock that ends with the process.
An incomplete last line, which a crash can leave, is cut off.

In a bucket, objects are written whole and cannot be appended to. Every group of answers therefore
becomes a numbered part, from which any machine can continue:

    answers.jsonl.parts/00000001.jsonl    the name of the job that writes, no answer
    answers.jsonl.parts/00000002.jsonl    the answers of one group of questions, and so on
    answers.jsonl                         all of them, when the job is finished; the parts go then

A bucket has no locks, but lets one of several writers create an object. A part is created, never
replaced, under the number after the last known one: a job that does not know the last part fails. A
job that starts takes the next number at once, with its name. Hence the newest job goes on, as it
must when a machine is lost and its replacement cannot know whether it still runs, and an older one
ends at its next answers with an error that names the newer. Google Cloud Storage and S3 keep this
rule, and those imitations of S3 that heed If-None-Match.

The output is written before its parts are removed. Parts that a crash left in between repeat it to
the byte; they are recognized and removed later.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator

from v4jax import log
from v4jax.errors import V4JaxError
from v4jax.files import BucketPath, is_remote, read_all, remove_all, to_path
from v4jax.retries import retry

FOLDER_ENDING = ".parts"
_WRITER = b'{"writer": '  # beginning of a part that holds no answers
_AT_ONCE = 256  # parts read side by side
_TRIES = 10  # attempts to become the writer while another job writes
_CONTINUES = "start the job again when that is repaired, and it will continue"


def open_output(path: str, *, overwrite: bool = False) -> "FileOutput | BucketOutput":
    """Opens an output for one job; creates it if it does not exist.

    Raises:
      V4JaxError: it cannot be read or written, or another job holds it.
    """
    return (BucketOutput if is_remote(path) else FileOutput)(path, overwrite)


class FileOutput:
    """An output on a disk of this machine."""

    def __init__(self, path: str, overwrite: bool):
        self.path = path
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise V4JaxError(
                f"cannot write {path}: it is not a regular file, and a job continues from the "
                "lines of one; copy the answers on when it has ended"
            )
        with _explained(f"cannot write {path}"):
            self.descriptor = _open_locked(path)
            self._opened = os.fstat(self.descriptor)
            try:
                if not self._is_in_place():  # the job that held it replaced it just now
                    raise _in_use(path)
                if overwrite:
                    os.ftruncate(self.descriptor, 0)
                _sync_folder(path)
            except BaseException:
                self.close()
                raise

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Yields every line with its place for messages; cuts off an incomplete one."""
        end = 0
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    os.ftruncate(self.descriptor, end)
                    break
                end += len(data)
                yield f"{self.path} line {number}", data

    def drop(self, goes: Callable[[bytes], bool]) -> None:
        """Takes lines out: another file with the others takes the place of this one."""
        place = os.path.realpath(self.path)
        new = f"{place}.retrying"
        with _explained(f"cannot write {new}"):
            descriptor = _open_locked(new)
            try:
                os.ftruncate(descriptor, 0)
                os.fchmod(descriptor, os.fstat(self.descriptor).st_mode)
                with open(self.path, "rb") as old, open(descriptor, "ab", closefd=False) as file:
                    file.writelines(line for line in old if not goes(line))
                os.fsync(descriptor)
                os.replace(new, place)
                _sync_folder(place)
            except BaseException:
                os.close(descriptor)
                raise
        self.close()
        self.descriptor, self._opened = descriptor, os.fstat(descriptor)

    def append(self, data: bytes) -> None:
        """Writes lines as one piece, and returns when they are on disk.

        Raises:
          V4JaxError: they could not be written, or the file was removed.
        """
        self._check_in_place()
        with _explained(f"cannot write {self.path}", _CONTINUES):
            while data:
                data = data[os.write(self.descriptor, data) :]
            os.fsync(self.descriptor)

    def finish(self) -> None:
        """Raises V4JaxError if the file, which has all lines, was removed."""
        self._check_in_place()

    def close(self) -> None:
        """Closes the file, which gives up the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one that `path` names."""
        try:
            return os.path.samestat(os.stat(self.path), self._opened)
        except FileNotFoundError:
            return False

    def _check_in_place(self) -> None:
        if not self._is_in_place():
            raise V4JaxError(
                f"{self.path} was removed or replaced while this job was writing it, and the "
                "answers went with it; start the job again, which begins with what is there now"
            )


class BucketOutput:
    """An output in a bucket."""

    def __init__(self, path: str, overwrite: bool):
        self.path, self.folder = to_path(path), to_path(path + FOLDER_ENDING)
        with _explained(f"cannot write {path}"):
            if overwrite:
                remove_all([self._part(number) for number in self._list()])
                if self.path.is_file():
                    self.path.unlink()
            self._numbers = self._claim()  # all parts known; the last is ours
            self._own_name = self._numbers[-1]
            self._exists = self.path.is_file()
        self._unmerged: list[int] = []  # parts with lines that the output lacks

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Yields every line with its place for messages, and a part's lines unless merged."""
        remedy = "if another job ended just now, start this one again"
        with _explained(f"cannot read {self.path}", remedy):
            merged = set()
            if self._exists:
                with self.path.open() as file:
                    for i, line in enumerate(file, start=1):
                        merged.add(_digest(line))
                        yield f"{self.path} line {i}", line
            for number, data in self._read(self._numbers):
                lines = data.splitlines(keepends=True)
                if all(_digest(line) in merged for line in lines):
                    continue
                self._unmerged.append(number)
                for i, line in enumerate(lines, start=1):
                    yield f"{self._part(number)} line {i}", line

    def drop(self, goes: Callable[[bytes], bool]) -> None:
        """Takes lines out: of the output, and whole parts, which have one kind of lines each."""
        with _explained(f"cannot write {self.path}"):
            if self._exists:
                with self.path.open() as file:
                    self.path.write_blocks(line for line in file if not goes(line))
            gone = [n for n, data in self._read(self._numbers) if data and goes(_first_line(data))]
            remove_all([self._part(number) for number in gone])
        self._numbers = [number for number in self._numbers if number not in gone]
        self._unmerged = [number for number in self._unmerged if number not in gone]

    def append(self, data: bytes) -> None:
        """Writes lines as one piece, and returns when they are in the bucket.

        Raises:
          V4JaxError: they could not be written, or another job is writing.
        """
        last = self._numbers[-1]
        with _explained(f"cannot write {self._part(last + 1)}", _CONTINUES):
            # A finished job has removed its parts, and their numbers could be taken again.
            if not retry(self._part(last).is_file, f"look for {self._part(last)}"):
                raise self._taken(last + 1)
            part = self._part(last + 1)
            try:
                retry(lambda: part.create(data), f"write {part}")
            except FileExistsError as error:
                raise self._taken(last + 1) from error
        self._numbers.append(last + 1)
        self._unmerged.append(last + 1)

    def finish(self) -> None:
        """Makes the output of its parts, and removes them.

        Raises:
          V4JaxError: as `append`.
        """
        remedy = f"its parts are in {self.folder}, and the same command makes it of them"
        with _explained(f"cannot write {self.path}", remedy):
            if self._list() != self._numbers:
                raise self._taken(self._numbers[-1] + 1)
            if self._unmerged or not self._exists:
                retry(lambda: self.path.write_blocks(self._blocks()), f"write {self.path}")
                log.info(f"batch: {self.path} is made of its {len(self._numbers):,} parts")
            remove_all([self._part(number) for number in self._numbers])
            self._numbers = []

    def close(self) -> None:
        """Ends writing; a job that wrote nothing removes its name."""
        if self._numbers and self._numbers[-1] == self._own_name:
            with contextlib.suppress(OSError):  # nothing is lost if it stays
                self._part(self._own_name).unlink()

    def _claim(self) -> list[int]:
        """Becomes the writer by creating the part after the last; returns all numbers."""
        name = f"process {os.getpid()} on {socket.gethostname()}"
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        data = _WRITER + f'"{name}, begun {began}"}}\n'.encode()
        for _ in range(_TRIES):
            numbers = self._list()
            numbers.append(numbers[-1] + 1 if numbers else 1)
            with contextlib.suppress(FileExistsError):  # another job wrote since the list was made
                self._part(numbers[-1]).create(data)
                return numbers
        raise self._taken(numbers[-1])

    def _list(self) -> list[int]:
        """Returns the numbers of the parts, as they are now."""
        if not self.folder.is_dir():
            return []
        names = [path.name.removesuffix(".jsonl") for path in self.folder.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _part(self, number: int) -> BucketPath:
        return self.folder / f"{number:08d}.jsonl"

    def _read(self, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yields the number and the lines of every part; a part with a job's name has none."""
        for i in range(0, len(numbers), _AT_ONCE):
            some = numbers[i : i + _AT_ONCE]
            contents = read_all([self._part(number) for number in some])
            for number, data in zip(some, contents, strict=True):
                yield number, b"" if data.startswith(_WRITER) else data

    def _blocks(self) -> Iterator[bytes]:
        if self._exists:
            with self.path.open() as file:
                while data := file.read(1 << 22):
                    yield data
        for _, data in self._read(self._unmerged):
            yield data

    def _taken(self, number: int) -> V4JaxError:
        """Returns the error of a job whose next part another one wrote."""
        who = "it was finished or overwritten meanwhile"
        with contextlib.suppress(OSError):
            data = self._part(number).read_bytes()
            who = f"it wrote {self._part(number)}"
            if data.startswith(_WRITER):
                who = data.removeprefix(_WRITER).decode(errors="replace").strip('"}\n')
        return V4JaxError(
            f"another job is writing {self.path} ({who}), and this one ends; its answers are "
            "kept. Wait for the other, or choose another output"
        )


@contextlib.contextmanager
def _explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turns an OSError into the project's error, with its reason and what to do."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL character in a path
        reason = getattr(error, "strerror", None) or error
        raise V4JaxError(f"{what}: {reason}{remedy and '; ' + remedy}") from error


def _open_locked(path: str) -> int:
    """Returns the descriptor of a file that this process alone writes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise _in_use(path) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _in_use(path: str) -> V4JaxError:
    return V4JaxError(f"another job is writing {path}; wait for it, or choose another output")


def _first_line(data: bytes) -> bytes:
    return data.partition(b"\n")[0]


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()


def _sync_folder(path: str) -> None:
    """Makes the file's name survive a crash of the machine."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
