"""Files of training data: found, indexed, and read at random access.

    find_files(("corpus", "more.jsonl"), (".txt", ".jsonl"))   folders opened, in a fixed order
    Lines(files)[i]                                            line i of all files

No corpus is read into memory as a whole.
"""

import gzip
import json
import shutil
import tempfile
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v4jax import log
from v4jax.config.json_keys import parse_json
from v4jax.errors import ConfigError, DataError

LISTS = (".json", ".json.gz")  # one list of records
LINES = (".jsonl", ".jsonl.gz", ".parquet")  # a record a line, or a row
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINES_PER_UPDATE = 65_536  # lines between two updates of the progress display


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Returns the files that `paths` name; folders are searched, and their files sorted.

    Args:
      suffixes: of the files wanted; other files in folders are ignored. One that is named may also
        be a list in JSON.

    Raises:
      ConfigError: a path does not exist, is of another kind, or no file was found.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        known = ", ".join((*suffixes, *LISTS))
        if path.is_dir():
            found = sorted(
                f for f in path.rglob("*") if f.name.endswith(tuple(suffixes)) and f.is_file()
            )
            if not found:
                raise ConfigError(
                    f"data.sources.paths: {path} holds no file ending in {', '.join(suffixes)}"
                )
            files.extend(found)
        elif not path.is_file():
            raise ConfigError(
                f"data.sources.paths: {path} is no file or folder; remote files must be copied to "
                "a local disk first"
            )
        elif not path.name.endswith((*suffixes, *LISTS)):
            raise ConfigError(
                f"data.sources.paths: {path} must end in one of {known}; unpack it or convert it"
            )
        else:
            files.append(path)
    return files


class Lines:
    """The lines of JSONL files that are not blank, each read on request.

    Building it reads the files once; the index takes 16 bytes per line. What is packed, a list in
    JSON, and the rows of a table become lines in the folder for temporary files, until the object
    is gone.
    """

    def __init__(self, files: Sequence[Path]):
        """Indexes the files.

        Raises:
          DataError: one cannot be read or unpacked.
        """
        self._names = list(files)
        packed = [path for path in files if path.suffix != ".jsonl"]
        folder = Path(tempfile.mkdtemp(prefix="v4jax-data-")) if packed else Path()
        if packed:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = [
            path if path.suffix == ".jsonl" else unpack(path, folder / str(i))
            for i, path in enumerate(files)
        ]
        self._begins, self._numbers = array("q"), array("q")
        self._first = [0]  # index of each file's first line, and the end
        if not self._files:
            return
        sizes = [file.stat().st_size for file in self._files]
        with (
            log.phase("data index") as phase,
            log.Progress("data index", sum(sizes), "bytes") as progress,
        ):
            for i, file in enumerate(self._files):
                self._index(file, sum(sizes[:i]), progress)
                self._first.append(len(self._begins))
            phase.note(f"{len(self):,} lines", log.format_bytes(sum(sizes)))

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> bytes:
        with open_file(self._file(index)) as file:
            file.seek(self._begins[index])
            return file.readline()

    def place(self, index: int) -> str:
        """Returns the place of a line for messages: `file, line 7`."""
        name = self._names[bisect_right(self._first, index) - 1]
        unit = "row" if name.suffix == ".parquet" else "line"
        return f"{name}, {unit} {self._numbers[index]}"

    def _file(self, index: int) -> Path:
        return self._files[bisect_right(self._first, index) - 1]

    def _index(self, path: Path, before: int, progress: log.Progress) -> None:
        begin = 0
        with open_file(path) as file:
            for number, data in enumerate(file, start=1):
                # The offset skips a byte-order mark, which is no content.
                mark = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
                if not data[mark:].isspace():
                    self._begins.append(begin + mark)
                    self._numbers.append(number)
                begin += len(data)
                if number % _LINES_PER_UPDATE == 0:
                    progress.update(before + begin, note=path.name)


def unpack(path: Path, target: Path) -> Path:
    """Writes the lines of a packed file, or the entries of a list or table, and returns `target`.

    Raises:
      DataError: it cannot be read or unpacked, holds no list, or values that JSON does not have.
    """
    if path.suffix == ".parquet":
        return _unpack_table(path, target)
    packed = path.suffix == ".gz"
    with log.phase("data", f"unpacking {path}"):
        try:
            with (
                gzip.open(path) if packed else open_file(path) as source,
                open(target, "wb") as out,
            ):
                if path.name.endswith(LISTS):
                    for entry in _read_list(source.read(), path):
                        out.write(json.dumps(entry).encode() + b"\n")
                else:
                    shutil.copyfileobj(source, out)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked: {error}") from error
    return target


def _unpack_table(path: Path, target: Path) -> Path:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read; pip install pyarrow") from error
    with log.phase("data", f"unpacking {path}"), open(target, "wb") as out:
        try:
            with parquet.ParquetFile(path) as table:
                for rows in table.iter_batches():
                    for row in rows.to_pylist():
                        out.write(json.dumps(row).encode() + b"\n")
        except TypeError as error:  # a date or bytes
            raise DataError(f"{path} has values that JSON does not have: {error}") from error
        except (OSError, ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path} cannot be read as Parquet: {reason}") from error
    return target


def _read_list(data: bytes, path: Path) -> list:
    try:
        entries = parse_json(data.removeprefix(_BYTE_ORDER_MARK))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; lines of JSON end in .jsonl") from error
    if not isinstance(entries, list):
        raise DataError(f"{path} must hold a list of records, got {type(entries).__name__}")
    return entries


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line.

    Raises:
      DataError: it is none; the caller adds the place to the message.
    """
    text = decode(data)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise DataError(f"is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"must hold a JSON object, got {type(fields).__name__}")
    return fields


def open_file(path: Path):
    """Opens a file for reading bytes.

    Raises:
      DataError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_range(path: Path, begin: int, end: int) -> bytes:
    """Returns bytes `begin` to `end` of a file; both ends move forward to the next character.

    Neighbouring ranges together give the whole file, and none cuts a UTF-8 character.
    """
    with open_file(path) as file:
        file.seek(begin)
        data = file.read(end - begin + 3)  # a character has at most three bytes after its first
    first = _continuation_bytes(data[:3]) if begin else 0
    last = end - begin + _continuation_bytes(data[end - begin :])
    return data[first:last]


def decode(data: bytes) -> str:
    """Returns the text of UTF-8 bytes.

    Raises:
      DataError: they are no UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}; "
            "convert the file"
        ) from error


def _continuation_bytes(data: bytes) -> int:
    """Returns how many leading bytes belong to a character that began earlier."""
    return next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
