"""`Store`: the checkpoints of a training run, written while the run goes on (orbax-checkpoint).

    folder/
      1200/           one checkpoint, named by its step: complete, or not there
        state/        the arrays of a pytree, by the path of each leaf, split as they lay on devices
        extra/        one JSON object: what the caller adds, and the configuration of the model
      1300.orbax-…    being written, or left by a process that was killed; opening clears it away

A checkpoint is a folder that gets its name last, so a kill at any moment leaves the older ones as
they were and nothing that looks like one. (Not a power loss: nothing is forced to disk.)

    store = Store("run/checkpoints", keep=3, every=100, model=config)
    state, extra = store.restore(None, state) if store.latest() else (state, {})
    for step in …:
        store.save(step, state, {"examples": examples})   # returns once the arrays are copied
    store.close()

A store belongs to one job, all of whose processes make every call. Others open it `read_only`.

A checkpoint whose files are missing, cut or unreadable is damaged: whoever asks for the newest gets
the newest that is whole, and a warning that names both. (What bytes inside an array's file say is
not checked: Orbax keeps no sums of them.)
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore

from v4jax import log
from v4jax.checkpoint.leaves import as_wanted, check_leaves, name_leaves, sharding_of
from v4jax.config import ModelConfig
from v4jax.errors import CheckpointError, ConfigError, UnsupportedError
from v4jax.files import Path, PathLike, check_writable, is_remote, to_path
from v4jax.parallel.agreement import on_all

Result = TypeVar("Result")

# Orbax logs the traceback of every thread that fails; the error raised here says the same once.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname
)


def _silence_echoes() -> None:
    """Leaves out what Orbax's other reads say once one of them has failed, megabytes of it.

    They end in threads of the driver, which find the event loop closed, and as coroutines that
    nobody awaits any more. The error raised here says the same once.
    """
    before = sys.unraisablehook

    def report(found):
        closed = isinstance(found.exc_value, RuntimeError) and "loop is closed" in str(
            found.exc_value
        )
        read = getattr(found.object, "__qualname__", "").startswith("_read_")
        if not ((closed and threading.current_thread() is not threading.main_thread()) or read):
            before(found)

    sys.unraisablehook = report


_silence_echoes()


class DamagedError(CheckpointError):
    """A checkpoint is there, but a file of it is missing, cut or unreadable."""


class Store:
    """The checkpoints in one folder, each a pytree of arrays and a JSON object."""

    def __init__(
        self,
        folder: PathLike,
        *,
        keep: int = 3,
        every: int = 1,
        model: ModelConfig | None = None,
        read_only: bool = False,
    ):
        """Opens a folder, makes it if need be, and clears away what a killed process left.

        Args:
          keep: how many checkpoints to keep, at least 1; older ones go after a newer one is there.
          every: `save` acts on steps that are multiples of this.
          model: whose checkpoints these are; a folder that belongs to another model is refused.
          read_only: looks on while another job writes; `save` is an error.

        Raises:
          CheckpointError: the folder cannot be made, read or written, or its checkpoints are those
            of another model; the message names the field that differs.
          ConfigError: `keep` or `every` is no positive integer.
          UnsupportedError: the folder is in s3://, or the library for gs:// is not installed.
        """
        for name, value in (("keep", keep), ("every", every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        text = str(folder)
        if is_remote(text) and not text.startswith("gs://"):
            raise UnsupportedError(
                f"{text}: Orbax writes to a file system or to gs://; keep checkpoints on a disk "
                "(convert --run writes their model to any bucket)"
            )
        self.folder = to_path(text if is_remote(text) else os.path.abspath(text))
        self.every, self.keep, self.read_only = every, keep, read_only
        self._model = None if model is None else _as_json(dataclasses.asdict(model))
        self._pending: int | None = None
        self._damaged: set[int] = set()  # found so by this store
        if not read_only:
            _check_writable(self.folder)
        elif not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder; give that of a training run")
        with self._reading("opened"):
            self._manager = self._open(cleans=not read_only)
        if self.steps():
            self.read_extra()  # compares the model

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, extra: dict | None = None, *, force: bool = False
    ) -> bool:
        """Begins to write a checkpoint; returns whether it does.

        Returns once every array is copied to host memory: the caller may change or donate them. A
        save that still runs is waited for first. What fails later is raised by the next call.

        Args:
          state: any pytree of jax arrays.
          extra: what JSON can express: position in the data, counters, seeds.
          force: also where `every` does not divide the step. A step that is there is never written
            again.

        Raises:
          CheckpointError: this or the previous checkpoint was not written (disk full, folder gone);
            those before are untouched, and saving may be tried again.
        """
        if self.read_only:
            raise CheckpointError(f"the store {self.folder} was opened read_only: it cannot save")
        if not force and step % self.every:
            return False
        if step in self.steps():
            return False
        arrays = {name: leaf for name, leaf in name_leaves(state).items() if leaf.size}
        extra = _as_json({"model": self._model, "extra": extra or {}})
        self._pending = step
        with self._writing(step):
            if step in self._damaged:
                self._manager.delete(step)
                self._damaged.discard(step)
            items = {"state": ocp.args.PyTreeSave(arrays), "extra": ocp.args.JsonSave(extra)}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        size = sum(leaf.nbytes for leaf in arrays.values())
        log.info(f"checkpoint: step {step}, {log.format_bytes(size)}, goes to {self.folder}")
        return True

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          CheckpointError: it failed, as `save`.
        """
        if self._pending is not None:
            step, self._pending = self._pending, None
            with self._writing(step):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the store.

        Raises:
          CheckpointError: the save failed, as `save`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending; waits for the last save.

        Those that were found damaged are left out.
        """
        self.wait()
        return sorted(set(self._manager.all_steps(read=self.read_only)) - self._damaged)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int | None, like: Any) -> tuple[Any, dict]:
        """Returns the state and the extra of a checkpoint, bit for bit what was saved.

        Args:
          step: of the checkpoint; None: the newest that is whole.
          like: a pytree of the state's structure, of arrays or `jax.ShapeDtypeStruct`s, whose
            shardings say where the arrays go: on any mesh, whatever they were saved from. Every
            process reads the shares of its own devices.

        Raises:
          CheckpointError: the step is not there, the model is another, a leaf is absent from either
            side or has another shape or dtype, or a file is damaged (with None: in all of them).
        """
        return self._newest(lambda found: self._restore(found, like), step)

    def _restore(self, step: int, like: Any) -> tuple[Any, dict]:
        extra = self._read_extra(step)
        wanted = name_leaves(like)
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        with self._reading(f"read at step {step}"):
            on_all(lambda: self._check_files(step), as_error=DamagedError)
            metadata = self._manager.item_metadata(step)["state"]
            if metadata is None:
                raise FileNotFoundError("its state has no _METADATA")
            check_leaves(stored, metadata.tree)
            places = {name: sharding_of(leaf) for name, leaf in stored.items()}
            targets = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
                for name, leaf in stored.items()
            }
            arguments = ocp.args.PyTreeRestore(
                targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
            )
            found = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        leaves = [as_wanted(leaf, found.get(name)) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def _check_files(self, step: int) -> None:
        """Raises unless every stored array ends where it should, from the last byte of each.

        Orbax would find out as well, in the middle of reading, and leave threads behind that write
        thousands of lines. An object of a bucket is whole or absent; there Orbax has to find out.

        Raises:
          DamagedError: a file is missing or cut, or what says where the arrays lie is unreadable.
        """
        if is_remote(self.folder):
            return
        place = {"driver": "file", "path": f"{self.folder / str(step) / 'state'}/"}
        with self._reading(f"read at step {step}"):
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()
            found = [store.read(key, byte_range=slice(-1, None)) for key in store.list().result()]
            for read in found:
                read.result()

    def read_extra(self, step: int | None = None) -> dict:
        """Returns the extra of a checkpoint alone; None: of the newest where it is whole.

        Raises:
          CheckpointError: as `restore`.
        """
        return self._newest(self._read_extra, step)

    def _read_extra(self, step: int) -> dict:
        with self._reading(f"read at step {step}"):
            arguments = ocp.args.Composite(extra=ocp.args.JsonRestore())
            content = self._manager.restore(step, args=arguments)["extra"]
            model, extra = content["model"], content["extra"]
        self._check_model(model)
        return extra

    def _newest(self, read: Callable[[int], Result], step: int | None) -> Result:
        """Returns read(step); None: of the newest checkpoint that is whole, and says so."""
        last = self._find(step)
        if step is not None:
            return read(step)
        for found in reversed(self.steps()):
            try:
                result = read(found)
            except DamagedError as error:
                log.warning(f"checkpoint: step {found} is damaged: {error}")
                self._damaged.add(found)
                continue
            if found != last:
                log.warning(
                    f"checkpoint: going on from step {found}, the newest whole one in "
                    f"{self.folder}; step {last} is left as it is until it is saved again"
                )
            return result
        raise DamagedError(
            f"{self.folder} holds no whole checkpoint: all are damaged "
            f"({_steps(sorted(self._damaged))})"
        )

    def _open(self, *, cleans: bool) -> ocp.CheckpointManager:
        registry = ocp.handlers.create_default_handler_registry(
            state=ocp.PyTreeCheckpointHandler(), extra=ocp.JsonCheckpointHandler()
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self.read_only else self.keep,
            cleanup_tmp_directories=cleans,
            read_only=self.read_only,
            create=False,
        )
        return ocp.CheckpointManager(str(self.folder), options=options, handler_registry=registry)

    def _find(self, step: int | None) -> int:
        steps = sorted({*self.steps(), *self._damaged})
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint of step {step}, only of {_steps(steps)}"
            )
        return steps[-1] if step is None else step

    def _check_model(self, stored: dict | None) -> None:
        if self._model is None or stored is None:
            return
        # Fields of one side only come from another version of this code, not from another model.
        for field in self._model.keys() & stored.keys():
            if self._model[field] != stored[field]:
                raise CheckpointError(
                    f"{self.folder} belongs to another model: model.{field} is {stored[field]!r} "
                    f"there and {self._model[field]!r} here; choose another folder"
                )

    @contextlib.contextmanager
    def _reading(self, done: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and its driver agree on no type
            denied = isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error)
            kind = CheckpointError if denied else DamagedError
            raise kind(f"{self.folder} cannot be {done}: {_reason(error)}") from error

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._pending = None
            self._recover()
            steps = sorted(self._manager.all_steps())
            kept = f"kept: {_steps(steps)}" if steps else "there is no other"
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {self.folder}: "
                f"{_reason(error)}; {kept}. Make room, or save to another folder"
            ) from error

    def _recover(self) -> None:
        """Opens the folder anew after a failed save.

        What the save left behind stays until the step is saved again or the folder is next opened:
        Orbax clears it away in a thread that nothing waits for, and which the next store's own
        would meet. Among several processes the others may not have failed and would not come along.
        """
        if jax.process_count() > 1:
            return
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._manager.close()
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._manager = self._open(cleans=False)


def _check_writable(folder: Path) -> None:
    if is_remote(folder):
        try:
            check_writable(folder / "new")
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be written: {error.strerror or error}; name a bucket that these "
                "credentials may write"
            ) from error
        return
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; checkpoints need a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {_reason(error)}; choose another folder"
        ) from error


def _as_json(content: Any) -> Any:
    """Returns a copy of `content` as JSON would give it back."""
    try:
        return json.loads(json.dumps(content, default=_enum_name))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra must hold what JSON can express: {error}") from error


def _enum_name(value: Any) -> str:
    if hasattr(value, "name"):
        return value.name
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _steps(steps: list[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _reason(error: BaseException) -> str:
    """Returns in one line what went wrong first, which tensorstore and Orbax wrap in several."""
    while error.__cause__ is not None:
        error = error.__cause__
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    text = (str(error).splitlines() or [repr(error)])[0]
    return getattr(error, "strerror", None) or re.split(r" \[(?:tensorstore|source)", text)[0]
