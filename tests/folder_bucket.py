"""A bucket that outlives the process: objects of s3:// and gs:// as files of a folder."""

import importlib
import os
import pathlib
import uuid

import fsspec
from fsspec.spec import AbstractFileSystem

CHUNK_BYTES = 1 << 20


class FolderBucket(AbstractFileSystem):
    """Objects are files of a folder, whose names are the objects' with slashes replaced.

    `root` is set by `install`. What is written gets its name last, as in a bucket; `create`
    succeeds once for a name, whoever tries at the same time.
    """

    protocol = ("s3", "gs")
    cachable = False
    root: pathlib.Path

    def _file(self, path):
        return self.root / self._strip_protocol(path).strip("/").replace("/", "\\")

    def _objects(self):
        names = (f.name for f in self.root.iterdir() if not f.name.startswith("."))
        return sorted(name.replace("\\", "/") for name in names)

    def ls(self, path, detail=True, **_options):
        path = self._strip_protocol(path).strip("/")
        folder = path + "/" if path else ""
        found = {}
        for name in self._objects():
            if name == path:
                found[name] = self._info(name, "file")
            elif name.startswith(folder):
                first, slash, _ = name.removeprefix(folder).partition("/")
                child = folder + first
                found[child] = self._info(child, "directory" if slash else "file")
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _info(self, name, kind):
        size = self._file(name).stat().st_size if kind == "file" else 0
        return {"name": name, "size": size, "type": kind}

    def pipe_file(self, path, value, mode="overwrite", **_options):
        new = self.root / f".{uuid.uuid4().hex}"
        with open(new, "wb") as file:
            file.write(value)
        if mode == "create":
            try:
                os.link(new, self._file(path))
            finally:
                new.unlink()
        else:
            new.replace(self._file(path))

    def cat_file(self, path, start=None, end=None, **_options):
        return self._file(path).read_bytes()[start:end]

    def rm_file(self, path):
        self._file(path).unlink()

    def _rm(self, path):
        self.rm_file(path)

    def _open(self, path, mode="rb", **_options):
        if mode == "rb":
            return open(self._file(path), "rb")
        assert mode == "wb", mode
        return _Upload(self, path)


class _Upload:
    """A file that is being written: an object once it is closed, nothing if it is discarded."""

    def __init__(self, bucket, path):
        self._bucket, self._path, self._data, self.closed = bucket, path, b"", False

    def write(self, data):
        self._data += data

    def discard(self):
        self._data = None

    def close(self):
        self._bucket.pipe_file(self._path, self._data)


def install(root: str | os.PathLike) -> None:
    """Makes s3:// and gs:// of this process the objects of a folder."""
    FolderBucket.root = pathlib.Path(root)
    FolderBucket.root.mkdir(exist_ok=True)
    for scheme in FolderBucket.protocol:
        fsspec.register_implementation(scheme, FolderBucket, clobber=True)


def uninstall() -> None:
    """Makes s3:// and gs:// what they were."""
    for scheme in FolderBucket.protocol:
        importlib.import_module("fsspec.registry")._registry.pop(scheme, None)


def read(path: str) -> bytes:
    """Returns the content of an object."""
    return FolderBucket().cat_file(path)


def names(path: str) -> list[str]:
    """Returns the names of all objects below a path, without it."""
    path = FolderBucket._strip_protocol(path).strip("/") + "/"
    found = FolderBucket()._objects()
    return [name.removeprefix(path) for name in found if name.startswith(path)]
