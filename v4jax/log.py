"""What the program says while it works: one logger, phases with time and size, progress.

Everything goes to stderr, so that stdout belongs to the answers. In a job of several processes,
process 0 speaks and the others speak only on warnings.

    log.info("kernels: sparse_attention=portable (no accelerator)")
    with log.phase("weights") as phase:
        phase.note(f"read {shards} shards", log.format_bytes(size))
    # → weights: read 46 shards, 148 GiB, 212 s
    with log.Progress("save", total=size, unit="bytes") as progress:
        progress.advance(written)              # → save: 40 %, 212 MiB/s, 73 s left
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

_PLAIN_SECONDS = 15.0  # between progress lines when the output is no terminal
_TERMINAL_SECONDS = 0.1  # between redraws of the bar on a terminal


class _Stderr(logging.Handler):
    """Writes to the stderr of the moment (tests and progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        sys.stderr.write(f"{prefix}{self.format(record)}\n")
        sys.stderr.flush()


def _build_logger() -> logging.Logger:
    built = logging.getLogger("v4jax")
    if not any(isinstance(handler, _Stderr) for handler in built.handlers):
        built.addHandler(_Stderr())
        built.addFilter(lambda record: record.levelno >= logging.WARNING or speaks())
        built.setLevel(logging.INFO)
        built.propagate = False
    return built


def speaks() -> bool:
    """Says whether this process is the one that reports (process 0, or the only one).

    Neither imports JAX nor starts a backend: a process is one of several only after
    `jax.distributed` began.
    """
    jax = sys.modules.get("jax")
    distributed = getattr(jax, "distributed", None)
    if distributed is None or not distributed.is_initialized():
        return True
    return jax.process_index() == 0


logger = _build_logger()
_said: set[str] = set()
_shown: list["Progress"] = []  # that are open now


def info(message: str) -> None:
    """Logs one line, on process 0."""
    logger.info("%s", message)


def warning(message: str) -> None:
    """Logs one line starting with `warning:`, on every process."""
    logger.warning("%s", message)


def once(message: str) -> None:
    """Logs one line the first time it is said: for automatic choices and their reasons."""
    if message not in _said:
        _said.add(message)
        info(message)


class Phase:
    """Collects what a phase did; `seconds` is set when it ends."""

    def __init__(self):
        self.notes: tuple[str, ...] = ()
        self.seconds = 0.0

    def note(self, *notes: str) -> None:
        """Sets what the closing line says before the time: `"read 46 shards", "148 GiB"`."""
        self.notes = notes


@contextlib.contextmanager
def phase(name: str, announcement: str = "", *, doing: str = "") -> Iterator[Phase]:
    """Announces a long phase and closes it: `weights: read 46 shards, 148 GiB, 212 s`.

    Args:
      name: the first word of both lines.
      announcement: what is about to happen; without it only the closing line is logged.
      doing: what a progress bar says meanwhile, such as `compiling`.
    """
    if announcement:
        info(f"{name}: {announcement}")
    for progress in _shown if doing else ():
        progress.interrupt(doing)
    current, start = Phase(), time.perf_counter()
    yield current
    current.seconds = time.perf_counter() - start
    info(f"{name}: " + ", ".join((*current.notes, format_seconds(current.seconds))))


class Rate:
    """How many units a second takes, over the time that counts."""

    def __init__(self):
        """Begins to count time."""
        self.units, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """Leaves out the time since the last `add`."""
        self._last = time.perf_counter()

    def add(self, units: float) -> None:
        """Counts units that took the time since `start` or the last `add`."""
        now = time.perf_counter()
        self.seconds += now - self._last
        self.units += units
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        self.add(0)
        yield
        self.start()

    @property
    def per_second(self) -> float | None:
        """Units per second; None before any was counted."""
        return self.units / self.seconds if self.units and self.seconds else None


class Progress:
    """Shows how far a loop is: a bar on a terminal, a plain line every 15 seconds elsewhere."""

    def __init__(self, name: str, total: float, unit: str = "tokens"):
        """Begins at 0 of `total` units; `total` may be an estimate that `update` corrects."""
        self.name, self.unit, self.total, self.done = name, unit, total, 0
        self._rate = Rate()
        self._bar = self._task = None
        self._next = time.perf_counter() + _PLAIN_SECONDS

    def __enter__(self) -> "Progress":
        if speaks() and sys.stderr.isatty():
            self._bar = _build_bar()
            self._task = self._bar.add_task(self.name, total=self.total, status="")
            self._bar.start()
            self._next = 0.0
        _shown.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _shown.remove(self)
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: float, *, note: str = "") -> None:
        """Counts units that were just finished, and shows the state."""
        self.update(self.done + units, note=note)

    def update(
        self,
        done: float,
        *,
        rate: float | None = None,
        seconds_left: float | None = None,
        total: float | None = None,
        note: str = "",
    ) -> None:
        """Shows the state; cheap enough to be called at every step.

        Args:
          done: units finished so far.
          rate: units per second; None: that of all updates.
          seconds_left: the remaining time; None: that of the remaining units at this rate.
          total: a better estimate of the total.
          note: what is being worked on, such as `document 3 of 40`.
        """
        self._rate.add(done - self.done)
        self.done, self.total = done, self.total if total is None else total
        now = time.perf_counter()
        if now < self._next:
            return
        rate = self._rate.per_second if rate is None else rate
        if rate and seconds_left is None:
            seconds_left = max(self.total - done, 0) / rate
        left = "" if seconds_left is None else f"{_format_estimate(seconds_left)} left"
        status = ", ".join(part for part in (note, self._format_rate(rate), left) if part)
        if self._bar is not None:
            self._next = now + _TERMINAL_SECONDS
            self._bar.update(
                self._task, completed=min(done, self.total), total=self.total, status=status
            )
        else:
            self._next = now + _PLAIN_SECONDS
            percent = 100 * min(done / self.total, 1.0) if self.total else 100.0
            info(f"{self.name}: {percent:.0f} %" + (f", {status}" if status else ""))

    def interrupt(self, status: str) -> None:
        """Shows what happens in place of progress; the next update replaces it at once."""
        if self._bar is not None:
            self._bar.update(self._task, status=status)
            self._next = 0.0

    def _format_rate(self, rate: float | None) -> str:
        if rate is None:
            return ""
        return f"{format_bytes(rate) if self.unit == 'bytes' else f'{rate:,.0f} {self.unit}'}/s"


def _format_estimate(seconds: float) -> str:
    return "under 10 s" if seconds < 10 else format_seconds(seconds)


def _build_bar():
    import rich.console
    import rich.progress

    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        console=rich.console.Console(stderr=True),
        transient=True,
    )


def printable(text: str) -> str:
    """Replaces control characters, with which text from outside could command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def format_bytes(size_bytes: float) -> str:
    """Gives a size with its unit, three digits: `148 GiB`, `6.72 MiB`, `12 bytes`."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size_bytes /= 1024
        if size_bytes < 1000 or unit == "TiB":
            break
    digits = 2 if size_bytes < 10 else 1 if size_bytes < 100 else 0
    return f"{size_bytes:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """Gives a duration as people say it: `0.42 s`, `212 s`, `12 min`, `3 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
