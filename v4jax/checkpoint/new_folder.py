"""Makes a folder as a whole or not at all: on a disk or in a bucket, by one host or by several.

    with new_folder("s3://models/mine") as folder:
        folder.write_tensors("model.safetensors", contents, read)
        folder.write_text("config.json", text)

On a disk the folder has a hidden name beside its own until it is complete. Process 0 writes it,
because other hosts may not see its disk. In a bucket nothing can be renamed: texts are written
after all tensors, in the order given, and the caller gives the file that readers look for
(config.json) last. There the hosts divide the files among themselves.

A tensor may be spread over several hosts, and all of them must ask for it (`read`) to gather it.
Every process therefore makes the same calls. One that fails to write goes on asking; in the end all
raise its error.
"""

import abc
import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from v4jax.checkpoint.safetensors_file import Tensor, as_bytes, encode_header
from v4jax.errors import CheckpointError
from v4jax.files import (
    BucketPath,
    Path,
    PathLike,
    check_folder_writable,
    is_remote,
    remove_all,
    to_path,
)
from v4jax.parallel.agreement import gather_json

Contents = Mapping[str, tuple[str, tuple[int, ...]]]  # name → dtype in the file, shape
Read = Callable[[str, bool], np.ndarray | None]  # name, whether it is needed here → its array


def check_new(folder: PathLike) -> None:
    """Raises unless the folder is empty or does not exist; in a bucket, also unless it can be made.

    Every process of a job calls this.

    Raises:
      CheckpointError: it holds something, is a file, or cannot be written.
      UnsupportedError: the library for its bucket is not installed.
    """
    _agree(_find_obstacle(folder))


def _find_obstacle(folder: PathLike) -> str | None:
    path = to_path(folder)
    if jax.process_index():
        return None  # what process 0 sees counts
    taken = f"{path} exists and is not empty; remove it or choose another folder"
    try:
        if is_remote(path):
            if path.exists():
                return taken
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            return taken
        check_folder_writable(path)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    return None


def _agree(error: str | None) -> None:
    """Raises on every process the first error of any."""
    for found in gather_json(error):
        if found is not None:
            raise CheckpointError(found)


@contextlib.contextmanager
def new_folder(folder: PathLike) -> "Iterator[NewFolder]":
    """Gives a folder to be filled, which is there when the block succeeds, and vanishes if not.

    Raises:
      CheckpointError: it cannot be written; on every process.
    """
    new = (_InBucket if is_remote(folder) else _OnDisk)(to_path(folder))
    completed = False
    try:
        new.attempt(new.begin)
        yield new
        _agree(new.error)
        new.attempt(new.complete)
        _agree(new.error)
        completed = True
    finally:
        if not completed:
            new.discard()


class NewFolder(abc.ABC):
    """A folder that is being filled."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.error: str | None = None  # of what this process wrote
        self._count = 0  # files of tensors so far

    def write_tensors(self, name: str, contents: Contents, read: Read) -> None:
        """Writes a safetensors file.

        Args:
          read: is called for every tensor once, in the order of the file, on every process.
        """
        number, self._count = self._count, self._count + 1
        header, tensors = encode_header(contents)
        left = iter(tensors)  # what fails to be written is asked for all the same
        if self._writes(number):
            arrays = ((tensor, read(tensor.name, True)) for tensor in left)
            self.attempt(lambda: self._write_tensors(name, header, arrays))
        for tensor in left:
            read(tensor.name, False)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        self.write_bytes(name, text.encode())

    @abc.abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a small file."""

    def attempt(self, action: Callable[[], None]) -> None:
        """Does something unless an earlier action failed; one process alone fails at once."""
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            reason = error.strerror or error
            self.error = f"{self.folder} cannot be written: {reason}; nothing was kept"
            if jax.process_count() == 1:
                raise CheckpointError(self.error) from error

    @abc.abstractmethod
    def begin(self) -> None:
        """Makes what is filled."""

    @abc.abstractmethod
    def complete(self) -> None:
        """Makes the folder what it is to be, once all processes have written."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Removes what was written."""

    @abc.abstractmethod
    def _writes(self, number: int) -> bool:
        """Whether this process writes the file of this number."""

    @abc.abstractmethod
    def _write_tensors(
        self, name: str, header: bytes, arrays: Iterator[tuple[Tensor, np.ndarray]]
    ) -> None:
        """Writes a file of these tensors."""


class _OnDisk(NewFolder):
    def __init__(self, folder: Path):
        super().__init__(to_path(os.path.realpath(folder)))
        self._hidden = self.folder.with_name(f".{self.folder.name}.partial-{uuid.uuid4().hex[:8]}")

    def begin(self) -> None:
        if self._writes(0):
            self._hidden.mkdir(parents=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        if self._writes(0):
            self.attempt(lambda: _write(self._hidden / name, [data]))

    def complete(self) -> None:
        if self._writes(0):
            os.replace(self._hidden, self.folder)  # over an empty folder, too

    def discard(self) -> None:
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _writes(self, number: int) -> bool:
        return jax.process_index() == 0

    def _write_tensors(self, name, header, arrays) -> None:
        _write(self._hidden / name, _blocks(header, arrays))


class _InBucket(NewFolder):
    def __init__(self, folder: BucketPath):
        super().__init__(folder)
        self._last: dict[str, bytes] = {}
        self._written: list[BucketPath] = []

    def begin(self) -> None:
        """Does nothing: a bucket has no folders."""

    def write_bytes(self, name: str, data: bytes) -> None:
        self._last[name] = data

    def complete(self) -> None:
        for name, data in self._last.items() if self._writes(0) else ():
            self._add(name).write_bytes(data)

    def discard(self) -> None:
        for path in self._written:
            with contextlib.suppress(OSError):  # the first error counts
                remove_all([path])

    def _writes(self, number: int) -> bool:
        return number % jax.process_count() == jax.process_index()

    def _write_tensors(self, name, header, arrays) -> None:
        self._add(name).write_blocks(_blocks(header, arrays))

    def _add(self, name: str) -> BucketPath:
        self._written.append(self.folder / name)
        return self._written[-1]


def _blocks(header: bytes, arrays: Iterator[tuple[Tensor, np.ndarray]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor, array in arrays:
        yield as_bytes(tensor, array)


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            view, done = memoryview(block), 0
            while done < len(view):
                done += file.write(view[done:])
