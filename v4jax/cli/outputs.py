"""Files that flags name for writing: checked before the work, written after it."""

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


def write(path: str, text: str) -> None:
    """Writes a text.

    Raises:
      V4JaxError: it cannot be written.
    """
    try:
        files.to_path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error
