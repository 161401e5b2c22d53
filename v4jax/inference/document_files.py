"""The files that lines of a job name: where they may be, how long they may be, what they were.

A file is bounded before it is read, because a name can stand for a terabyte. Size and digest
identify what was read: a file that changed between two runs of a job is another document.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from v4jax.errors import RequestError
from v4jax.files import is_remote, open_bytes, size_of, to_path
from v4jax.inference.request import FileIdentity, describe
from v4jax.retries import retry

_BLOCK_BYTES = 1 << 24  # read at once
_DIGITS = 32  # of SHA-256 in hexadecimal


@dataclass(frozen=True)
class DocumentFiles:
    """Reads files of documents.

    Attributes:
      folder: relative paths start here; also a bucket's.
      under: folder that all files must be in, links followed. None: anywhere.
    """

    folder: str
    under: str | None = None

    def resolve(self, path: Any) -> str:
        """Returns the full path of a file.

        Raises:
          RequestError: it is no string, or leads out of `under`.
        """
        if not isinstance(path, str) or not path:
            raise RequestError(f"path must be a string, got {describe(path)}")
        found = path if is_remote(path) else os.path.join(self.folder, path)
        if self.under is None:
            return found
        if "\0" not in found and not (is_remote(found) or is_remote(self.under)):
            found, under = os.path.realpath(found), os.path.realpath(self.under)
            inside = os.path.commonpath([found, under]) == under
        else:
            inside = found.startswith(self.under.rstrip("/") + "/") and ".." not in found.split("/")
        if not inside:
            raise RequestError(
                f"path {describe(path)} is outside of {self.under}, the folder that "
                "--documents_under allows; move the file there, or name another folder"
            )
        return found

    def measure(self, path: Any) -> int:
        """Returns a file's bytes, as its folder or bucket tells; does not try again.

        Raises:
          RequestError: as `resolve`.
          OSError: it cannot be asked.
        """
        return size_of(self.resolve(path))

    def read(self, path: Any, max_bytes: int) -> tuple[bytes, FileIdentity]:
        """Returns the contents of a file, and their identity.

        Raises:
          RequestError: as `resolve`; it has more than `max_bytes`, or cannot be read.
        """
        found = self.resolve(path)
        with explained(found):
            data = retry(lambda: _read_at_most(found, max_bytes), f"read {found}")
        return data, FileIdentity(len(data), hashlib.sha256(data).hexdigest()[:_DIGITS])

    def identify(self, path: Any) -> FileIdentity:
        """Returns the identity of a file of any size.

        Raises:
          RequestError: as `resolve`, or it cannot be read.
        """
        found = self.resolve(path)
        with explained(found):
            return retry(lambda: _identify(found), f"read {found}")


def open_path(path: str) -> BinaryIO:
    """Opens a file for reading bytes.

    Raises:
      UnsupportedError: the path names a bucket, and the library for it is not installed.
      RequestError: there is no such file, or it cannot be read.
    """
    with explained(path):
        if is_remote(path):
            return to_path(path).open()
        _check_regular(path)
        return open(path, "rb")


def _read_at_most(path: str, max_bytes: int) -> bytes:
    """Returns a file's contents; its size is asked first, and not believed."""
    size = _size_of_regular(path)
    if size <= max_bytes:
        data = b"".join(_blocks(path, size, max_bytes + 1))
        size = len(data)
    if size > max_bytes:
        raise RequestError(
            f"{path} has {size:,} bytes or more, and the context of the model holds at most "
            f"{max_bytes:,}; divide it into several documents"
        )
    return data


def _identify(path: str) -> FileIdentity:
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path, _size_of_regular(path)):
        digest.update(block)
        size += len(block)
    return FileIdentity(size, digest.hexdigest()[:_DIGITS])


def _blocks(path: str, size: int, limit: int | None = None) -> Iterator[bytes]:
    """Yields a file's bytes up to `limit`; those of a bucket's by its size, which cannot change."""
    with open_bytes(path) as file:
        left = size if is_remote(path) else limit
        while left != 0:
            block = file.read(_BLOCK_BYTES if left is None else min(left, _BLOCK_BYTES))
            if not block:
                return
            left = None if left is None else left - len(block)
            yield block


def _size_of_regular(path: str) -> int:
    if not is_remote(path):
        _check_regular(path)
    return size_of(path)


def _check_regular(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        raise RequestError(f"cannot read {path}: it is not a regular file")


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns an OSError about a file into a RequestError with its reason."""
    try:
        yield
    except RequestError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read {path}: {reason}") from error
