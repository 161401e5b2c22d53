"""How a run learns that it has to end: from a signal to this process or to any other of the job."""

import signal
import threading

import jax


class AskedToEnd:
    """A context in which SIGTERM and ctrl-C set an event instead of ending the process.

    A second ctrl-C interrupts as usual.
    """

    def __enter__(self) -> threading.Event:
        self.event, self.before = threading.Event(), {}
        if threading.current_thread() is threading.main_thread():
            # In a job of several processes JAX itself listens for SIGTERM (`others_asked`).
            alone = (signal.SIGTERM,) if jax.process_count() == 1 else ()
            for number in (signal.SIGINT, *alone):
                self.before[number] = signal.signal(number, self._ask)
        return self.event

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.event.set()


def others_asked(step: int) -> bool:
    """Returns whether any process of the job was asked to end; the same on all of them."""
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
