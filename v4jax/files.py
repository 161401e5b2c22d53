"""Where files can be: on a disk of this machine or in a bucket (gs://, s3://), read the same way.

    folder = to_path("s3://models/v4-flash")   # a pathlib.Path, or a RemotePath with its methods
    (folder / "config.json").read_text()
    with open_bytes(folder / "model-00001.safetensors") as file: ...   # seek, readinto

Buckets are read through fsspec, a request for each range of bytes asked for; whose libraries are
extras: `pip install 'v4jax[gcs]'`, `'v4jax[s3]'`. Whatever they raise becomes an OSError. Nothing
here writes: objects of a bucket can be neither appended to nor changed in place.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from v4jax.errors import UnsupportedError

EXTRAS = {"gs://": "gcs", "s3://": "s3"}
REMOTE = (*EXTRAS, "memory://")  # the last one, fsspec's own, needs nothing: it serves the tests


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names a bucket."""
    return isinstance(path, RemotePath) or str(path).startswith(REMOTE)


def to_path(path: "str | os.PathLike | RemotePath") -> "pathlib.Path | RemotePath":
    """Returns a path as an object to read through.

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


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder in a bucket, with those of pathlib's methods that reading needs."""

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
                f"{self.url}: reading from {scheme} needs the extra {EXTRAS[scheme]}; "
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
