"""Files that flags name for writing: checked before the work, written after it."""

import itertools

from v4jax import files
from v4jax.errors import RequestError, V4JaxError


def check_writable(flag: str, path: str) -> None:
    """Raises RequestError now, and not after hours of work, if a flag's file cannot be written."""
    try:
        files.check_writable(path)
    except OSError as error:
        remedy = "; name a file in a folder that exists and can be written"
        if files.is_remote(path):
            remedy = f": {error.strerror or error}; name a bucket that these credentials may write"
        raise RequestError(f"cannot write --{flag}={path}{remedy}") from error


def check_ending(flag: str, path: str | None, ending: str) -> None:
    """Raises RequestError unless a flag's file, if there is one, has its format's ending."""
    if path and not path.endswith(ending):
        raise RequestError(f"--{flag} must end in {ending}, got {path!r}")


def check_apart(**paths: str | None) -> None:
    """Raises RequestError where two flags name the same file."""
    given = [(flag, path) for flag, path in paths.items() if path]
    for (first, one), (second, other) in itertools.combinations(given, 2):
        if files.is_same_file(one, other):
            raise RequestError(f"--{first} and --{second} are the same file, {one}")


def write(path: str, text: str) -> None:
    """Writes a text.

    Raises:
      V4JaxError: it cannot be written.
    """
    try:
        files.to_path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error
