"""Files on a disk, in a bucket (gs://, s3://) or on the hub (hf://), all named by `epath.Path`.

    folder = to_path("s3://models/v4-flash")
    (folder / "config.json").read_text()
    with open_bytes(folder / "model-00001.safetensors") as file: ...   # seek, readinto
    (folder / "run.png").write_bytes(data)

A path on a disk is epath's own. A path in a bucket is a `BucketPath`, which promises more than
epath does. Reading asks for ranges of bytes. Whatever the cloud's library raises becomes an
OSError. Listings are never cached, as other machines may change them. An object is written whole:
it exists when the call returns and not before, whatever ends the process; it can be neither
appended to nor changed in place. `create` writes an object only where there is none, and lets one
of several writers succeed.

A repository of the hub is a folder that is only read, at one commit (`v4jax.hub`).

Both are reached through fsspec, whose libraries are extras: `pip install 'v4jax[gcs]'`,
`'v4jax[s3]'`, `'v4jax[hub]'`.
"""

import contextlib
import errno
import functools
import io
import os
import pathlib
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from etils import epath
from etils.epath.gpath import PosixGPath

from v4jax import hub
from v4jax.errors import CheckpointError, UnsupportedError

Path, PathLike = epath.Path, epath.PathLike
EXTRAS = {"gs://": "gcs", "s3://": "s3", hub.SCHEME: "hub"}
REQUEST_BYTES = 64 << 20  # read at most by one request, which may have to be repeated


def is_remote(path: PathLike) -> bool:
    """Whether a path names a bucket or a repository of the hub."""
    return os.fspath(path).startswith(tuple(EXTRAS))


def to_path(path: PathLike) -> Path:
    """Returns a path as an object to read and write through.

    A repository of the hub becomes its commit: a folder in the hub's cache, or `HubPath`.

    Raises:
      UnsupportedError: it names a bucket or the hub, and the library for it is not installed; or it
        is of another kind.
      CheckpointError: the hub has no such repository, or cannot be reached.
    """
    if not is_remote(path):
        if "://" in os.fspath(path):
            raise UnsupportedError(
                f"{path}: of paths with ://, those in {', '.join(EXTRAS)} are read; copy the "
                "files to one of these, or to a disk"
            )
        return epath.Path(path)
    if os.fspath(path).startswith(hub.SCHEME):
        return _to_hub_path(os.fspath(path))
    path = BucketPath(path)
    _ = path.system  # a missing library is an error now
    return path


def find_model(name: PathLike) -> PathLike:
    """Returns where the model of a name is: `org/name` is on the hub if it is nothing here.

    The commit of a repository is part of what is returned.

    Raises:
      UnsupportedError, CheckpointError: as `to_path`.
    """
    text = os.fspath(name)
    if not is_remote(text) and hub.is_repository(text) and not os.path.exists(text):
        text = hub.SCHEME + text
    if not text.startswith(hub.SCHEME):
        return name
    with _extra(text):
        return hub.pin(text)


def _to_hub_path(text: str) -> Path:
    with _extra(text):
        pinned = hub.pin(text)
        repository, commit, below = hub.split(pinned)
        snapshot = hub.find_snapshot(repository, commit)
    return HubPath(pinned) if snapshot is None else epath.Path(snapshot + below)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder.

    Raises:
      CheckpointError: its bucket or the hub does not tell.
    """
    with reading(path):
        return path.is_dir()


@contextlib.contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turns an OSError into the CheckpointError that a path cannot be read, and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def open_bytes(path: PathLike) -> BinaryIO:
    """Opens a file for reading bytes at any offset.

    Raises:
      OSError: it cannot be read, or is no regular file: a pipe would wait for ever, and a device
        never ends.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    if is_remote(path):
        return _Ranges(path)
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except ValueError as error:  # a NUL character in the path
        raise OSError(str(error)) from error
    if not regular:
        raise OSError("it is no regular file")
    return open(path, "rb", buffering=0)


def read_regular(path: PathLike, most_bytes: int) -> bytes:
    """Returns the whole of a small file.

    Raises:
      OSError: as `open_bytes`, or it is larger than `most_bytes`.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    size = size_of(path) if is_remote(path) else None
    with open_bytes(path) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        if size > most_bytes:
            raise OSError(f"it has {size:,} bytes, and at most {most_bytes:,} are read")
        return file.read()


def is_there(path: PathLike) -> bool:
    """Whether there is a file, folder or link of this name; a link may lead nowhere."""
    path = to_path(path)
    return path.exists() if is_remote(path) else os.path.lexists(path)


def size_of(path: PathLike) -> int:
    """Returns the bytes of a file.

    (epath's own `stat` asks for the owner's name, which a container's user may not have.)

    Raises:
      OSError: it cannot be read.
    """
    path = to_path(path)
    return path.system.size(str(path)) if is_remote(path) else os.path.getsize(path)


def is_same_file(first: str, second: str) -> bool:
    """Whether two paths name one file. Neither has to exist."""
    if is_remote(first) or is_remote(second):
        return epath.Path(first) == epath.Path(second)
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return os.path.abspath(first) == os.path.abspath(second)


def check_writable(path: PathLike) -> None:
    """Raises now, and not after hours of work, unless a file of this name could be written.

    Raises:
      OSError: it could not; the message says why.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    if is_remote(path):
        probe = path.with_name(f"{path.name}.writable-{uuid.uuid4().hex[:8]}")
        probe.write_bytes(b"v4jax asks whether it may write here\n")
        probe.unlink()
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    else:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass  # asked by doing: what root may do, and where no file can be, no flag says


def check_folder_writable(path: PathLike) -> None:
    """Raises now unless a folder of this name could be made, or something be put into it.

    Raises:
      OSError: it could not; the message says why.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    if is_remote(path):
        return check_writable(path / "new")
    place = pathlib.Path(path).absolute()
    while not place.exists():
        place = place.parent
    os.rmdir(tempfile.mkdtemp(prefix=".v4jax-", dir=place))


class BucketPath(PosixGPath):
    """A file or folder in a bucket."""

    @property
    def system(self) -> "_FileSystem":
        """The file system of fsspec that reaches the bucket.

        Raises:
          UnsupportedError: its library is not installed.
        """
        import fsspec

        with _extra(str(self)):
            scheme = str(self).partition("://")[0]
            return _FileSystem(fsspec.filesystem(scheme, use_listings_cache=False), _as_os_error)

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self.system.exists(str(self))

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.system.isfile(str(self))

    def is_dir(self) -> bool:
        """Whether something lies below it."""
        return self.system.isdir(str(self))

    def iterdir(self) -> "Iterator[BucketPath]":
        """Yields what lies in the folder."""
        for found in self.system.ls(str(self), detail=False):
            yield self / found.rstrip("/").rpartition("/")[2]

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens a file to be read from its beginning, in blocks."""
        return self.system.open(str(self), mode)

    def read_bytes(self) -> bytes:
        """Returns the whole file."""
        return self.system.cat_file(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the whole file as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int | None) -> bytes:
        """Returns a range of bytes; None: to the end of the file."""
        return self.system.cat_file(str(self), start=start, end=end)

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file, over an existing one."""
        self.system.pipe_file(str(self), data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes the whole file as text."""
        self.write_bytes(text.encode(encoding))

    def create(self, data: bytes) -> None:
        """Writes a file that must not exist; the bucket lets one writer succeed.

        Raises:
          FileExistsError: it exists.
          OSError: it cannot be written.
        """
        try:
            self.system.pipe_file(str(self), data, mode="create")
        except FileExistsError:
            # A request whose answer was lost is repeated, and then finds its own object.
            if self.read_bytes() != data:
                raise

    def write_blocks(self, blocks: Iterable[bytes | memoryview]) -> None:
        """Writes a file of any size block by block, or nothing if a block fails to come."""
        with _as_os_error():
            file = self.system.open(str(self), "wb")
            try:
                for block in blocks:
                    file.write(block)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error counts
                    file.discard()
                file.closed = True  # otherwise the garbage collector would complete it
                raise
            file.close()

    def unlink(self) -> None:
        """Removes a file."""
        self.system.rm_file(str(self))


class HubPath(BucketPath):
    """A file or folder of a commit on the hub. It never changes, and nothing is written."""

    @property
    def system(self) -> "_FileSystem":
        """The file system of the hub's library."""
        return _FileSystem(hub.open_system(), functools.partial(hub.explained, str(self)))

    # The library's own exists, isfile and isdir answer False, too, when the hub does not.

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self._kind() == "directory"

    def read_range(self, start: int, end: int | None) -> bytes:
        """Returns a range of bytes, and asks for no more; None: to the end of the file."""
        data = self.system.cat_file(str(self), start=start, end=end, cache_type="none")
        if end is not None and len(data) != end - start:
            raise OSError(f"the hub gave {len(data)} bytes where {end - start} were asked for")
        return data

    def write_bytes(self, data: bytes) -> None:
        """Raises: the hub is only read."""
        raise OSError("the hub is only read; write a folder, and upload that with `hf upload`")

    create = write_blocks = write_bytes

    def unlink(self) -> None:
        """Raises: the hub is only read."""
        raise OSError("the hub is only read")

    def _kind(self) -> str | None:
        try:
            return self.system.info(str(self))["type"]
        except FileNotFoundError:
            return None


def read_all(paths: Sequence[BucketPath]) -> list[bytes]:
    """Returns the contents of objects of one bucket, read side by side.

    Raises:
      OSError: one cannot be read.
    """
    if not paths:
        return []
    names, bounds = [str(path) for path in paths], [None] * len(paths)
    return paths[0].system.cat_ranges(names, bounds, bounds, on_error="raise")


def remove_all(paths: Sequence[BucketPath]) -> None:
    """Removes objects of one bucket in no order. An object that is gone already is no error."""
    if paths:
        with contextlib.suppress(FileNotFoundError):
            paths[0].system.rm([str(path) for path in paths])


class _FileSystem:
    """A file system of fsspec, whose methods raise OSError.

    errors: makes a context that turns what the library raises into that.
    """

    def __init__(self, system: Any, errors: Callable[[], Any]):
        self._system, self._errors = system, errors

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._errors()(getattr(self._system, name))


class _Ranges(io.RawIOBase):
    """A file of a bucket, opened to be read at any offset by one request or few for each read."""

    def __init__(self, path: BucketPath):
        self._path, self._offset = path, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence in (os.SEEK_SET, os.SEEK_END)
        self._offset = offset + (size_of(self._path) if whence == os.SEEK_END else 0)
        return self._offset

    def readinto(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            data = self._fetch(self._offset + min(len(view) - done, REQUEST_BYTES))
            if not data:
                break
            view[done : done + len(data)] = data
            done += len(data)
        return done

    def readall(self) -> bytes:
        return self._fetch(None)

    def _fetch(self, end: int | None) -> bytes:
        if end == self._offset:  # buckets refuse an empty range
            return b""
        data = self._path.read_range(self._offset, end)
        self._offset += len(data)
        return data


@contextlib.contextmanager
def _extra(path: str) -> Iterator[None]:
    """Turns a library that is not installed into an UnsupportedError, which names its extra."""
    try:
        yield
    except ImportError as error:
        scheme = path.partition("://")[0]
        extra = EXTRAS[f"{scheme}://"]
        raise UnsupportedError(
            f"{path}: {scheme}:// needs the extra {extra}; pip install 'v4jax[{extra}]'"
        ) from error


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turns what the clouds' libraries raise (they agree on no type) into an OSError."""
    try:
        yield
    except (OSError, UnsupportedError):
        raise
    except Exception as error:
        text = str(error).splitlines() or [""]
        raise OSError(f"{type(error).__name__}: {text[0]}") from error
