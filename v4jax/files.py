"""Where files can be: on a disk of this machine or in a bucket (gs://, s3://), used the same way.

    folder = to_path("s3://models/v4-flash")   # a pathlib.Path, or a RemotePath with its methods
    (folder / "config.json").read_text()
    with open_bytes(folder / "model-00001.safetensors") as file: ...   # seek, readinto
    (folder / "run.png").write_bytes(data)

Buckets are used through fsspec, whose libraries are extras: `pip install 'v4jax[gcs]'`,
`'v4jax[s3]'`. Reading asks for ranges of bytes. An object is written whole: it is there when the
call returns and not before, whatever ends the process, and can be neither appended to nor changed
in place. `create` writes it only where there is none, which of several writers one can do.
Whatever the libraries raise becomes an OSError.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from v4jax.errors import UnsupportedError

EXTRAS = {"gs://": "gcs", "s3://": "s3"}
REMOTE = (*EXTRAS, "memory://")  # the last one, fsspec's own, needs nothing: it serves the tests


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names a bucket."""
    return isinstance(path, RemotePath) or str(path).startswith(REMOTE)


def to_path(path: "str | os.PathLike | RemotePath") -> "pathlib.Path | RemotePath":
    """Returns a path as an object to read and write through.

    Raises:
      UnsupportedError: it names a bucket, and the library for it is not installed.
    """
    if isinstance(path, RemotePath) or not is_remote(path):
        return path if isinstance(path, RemotePath) else pathlib.Path(path)
    return RemotePath(str(path).rstrip("/"))


def open_bytes(path: "str | os.PathLike | RemotePath") -> BinaryIO:
    """Opens a file for reading bytes at any offset.

    Raises:
      OSError: it cannot be read.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    if isinstance(path, RemotePath):
        return _Ranges(path)
    return open(path, "rb", buffering=0)


def is_same_file(first: str, second: str) -> bool:
    """Whether two paths name one file; neither has to be there."""
    if is_remote(first) or is_remote(second):
        return first.rstrip("/") == second.rstrip("/")
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return os.path.abspath(first) == os.path.abspath(second)


def check_writable(path: "str | os.PathLike | RemotePath") -> None:
    """Raises now, and not after hours of work, unless a file of this name could be written.

    Raises:
      OSError: it could not; the message says why.
      UnsupportedError: as `to_path`.
    """
    path = to_path(path)
    if isinstance(path, RemotePath):
        probe = path.with_name(f"{path.name}.writable-{uuid.uuid4().hex[:8]}")
        probe.write_bytes(b"v4jax asks whether it may write here\n")
        probe.unlink()
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif not os.access(path.absolute().parent, os.W_OK):
        raise OSError("its folder is missing, or may not be written")


def read_all(paths: "Sequence[RemotePath]") -> list[bytes]:
    """Returns the contents of objects of one bucket, asked for side by side.

    Raises:
      OSError: one cannot be read.
    """
    if not paths:
        return []
    with _as_os_error():
        urls = [path.url for path in paths]
        bounds = [None] * len(urls)
        return paths[0].system().cat_ranges(urls, bounds, bounds, on_error="raise")


def remove_all(paths: "Sequence[RemotePath]") -> None:
    """Removes objects of one bucket, in no order; one that is gone already is no error."""
    if not paths:
        return
    with _as_os_error(), contextlib.suppress(FileNotFoundError):
        paths[0].system().rm([path.url for path in paths])


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder in a bucket, with those of pathlib's methods that are used here."""

    url: str

    def __post_init__(self):
        self.system()  # a missing library is said at once

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The extension with its dot."""
        return pathlib.PurePosixPath(self.url).suffix

    def with_name(self, name: str) -> "RemotePath":
        """Returns the path beside this one."""
        return RemotePath(f"{self.url.rsplit('/', 1)[0]}/{name}")

    def system(self) -> Any:
        """Returns fsspec's file system for the path.

        Raises:
          UnsupportedError: its library is not installed.
        """
        import fsspec

        scheme = self.url[: self.url.index("://") + 3]
        try:
            return fsspec.filesystem(scheme.removesuffix("://"))
        except ImportError as error:
            raise UnsupportedError(
                f"{self.url}: {scheme} needs the extra {EXTRAS[scheme]}; "
                f"pip install 'v4jax[{EXTRAS[scheme]}]'"
            ) from error

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        with _as_os_error():
            return self.system().exists(self.url)

    def is_file(self) -> bool:
        """Whether it is a file."""
        with _as_os_error():
            return self.system().isfile(self.url)

    def is_dir(self) -> bool:
        """Whether something lies below it."""
        with _as_os_error():
            return self.system().isdir(self.url)

    def iterdir(self) -> "Iterator[RemotePath]":
        """Yields what lies in the folder."""
        with _as_os_error():
            found = self.system().ls(self.url, detail=False)
        for path in found:
            yield self / path.rstrip("/").rsplit("/", 1)[-1]

    def stat(self) -> os.stat_result:
        """Returns what is known of a file: its `st_size`."""
        with _as_os_error():
            size = self.system().size(self.url)
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def open(self) -> BinaryIO:
        """Opens a file to be read from its beginning on, in blocks."""
        with _as_os_error():
            return self.system().open(self.url, "rb")

    def read_range(self, start: int, stop: int | None) -> bytes:
        """Returns the bytes from `start` up to `stop`, or to the end."""
        with _as_os_error():
            return self.system().cat_file(self.url, start=start, end=stop)

    def read_bytes(self) -> bytes:
        """Returns the whole file."""
        return self.read_range(0, None)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the whole file as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file, over one that is there."""
        with _as_os_error():
            self.system().pipe_file(self.url, data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes the whole file as text."""
        self.write_bytes(text.encode(encoding))

    def create(self, data: bytes) -> None:
        """Writes a file that must not be there; the bucket sees to it that one writer succeeds.

        Raises:
          FileExistsError: it is there.
          OSError: it cannot be written.
        """
        try:
            with _as_os_error():
                self.system().pipe_file(self.url, data, mode="create")
        except FileExistsError:
            # A request whose answer was lost is repeated, and then finds what it wrote itself.
            if self.read_bytes() != data:
                raise

    def write_blocks(self, blocks: Iterable[bytes | memoryview]) -> None:
        """Writes a file of any size, block by block; should a block fail to come, nothing."""
        with _as_os_error():
            file = self.system().open(self.url, "wb")
            try:
                for block in blocks:
                    file.write(block)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error counts
                    file.discard()
                with contextlib.suppress(AttributeError):  # of memory://, which has nothing to end
                    file.closed = True  # or else it would be completed when it is forgotten
                raise
            file.close()

    def unlink(self) -> None:
        """Removes a file."""
        with _as_os_error():
            self.system().rm_file(self.url)

    def refresh(self) -> "RemotePath":
        """Forgets what was listed before, which others may have changed; returns the path."""
        self.system().invalidate_cache()
        return self


class _Ranges:
    """A file of a bucket as the readers here use files: one request for each read."""

    def __init__(self, path: RemotePath):
        self.name, self._path, self._at = path.url, path, 0

    def __enter__(self) -> "_Ranges":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence in (os.SEEK_SET, os.SEEK_END)
        self._at = offset if whence == os.SEEK_SET else self._path.stat().st_size + offset
        return self._at

    def read(self, count: int = -1) -> bytes:
        if count == 0:
            return b""
        data = self._path.read_range(self._at, None if count < 0 else self._at + count)
        self._at += len(data)
        return data

    def readinto(self, view: memoryview) -> int:
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


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
