"""What the program says: formats, phases, and progress where there is no terminal."""

import pytest

from v4jax import log

BYTES = {0: "0 bytes", 1023: "1023 bytes", 2048: "2.00 KiB", 99 * 2**20: "99.0 MiB"}
BYTES |= {148 * 2**30: "148 GiB", 1000 * 2**20: "0.98 GiB", 2**52: "4096 TiB"}
SECONDS = {0.417: "0.42 s", 12.3: "12 s", 212: "212 s", 720: "12 min", 11100: "3 h 05 min"}


@pytest.mark.parametrize(("size_bytes", "text"), BYTES.items())
def test_bytes(size_bytes, text):
    assert log.format_bytes(size_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), SECONDS.items())
def test_seconds(seconds, text):
    assert log.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\n\tü\U0001f642", "a\n\tü\U0001f642"), ("a\x1b[2Jb\x07\0", "a\ufffd[2Jb\ufffd\ufffd")],
)
def test_a_terminal_is_not_commanded(text, shown):
    assert log.printable(text) == shown


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def test_phase(capsys, clock):
    with log.phase("weights", "reading 46 shards") as phase:
        clock.now += 212
        phase.note("read 46 shards", log.format_bytes(148 * 2**30))
    assert capsys.readouterr().err == (
        "weights: reading 46 shards\nweights: read 46 shards, 148 GiB, 212 s\n"
    )
    assert phase.seconds == 212


def test_a_phase_that_fails_does_not_close(capsys):
    with pytest.raises(KeyError), log.phase("weights"):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_plain_progress_speaks_at_intervals(capsys, clock):
    with log.Progress("batch", total=100) as progress:
        for done in range(100):
            clock.now += 1
            progress.update(done, rate=1234.5, seconds_left=100 - done, note="document 1 of 2")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "batch: 14 %, document 1 of 2, 1,234 tokens/s, 86 s left"
    assert lines[-1] == "batch: 89 %, document 1 of 2, 1,234 tokens/s, 11 s left"


def test_progress_knows_its_rate(capsys, clock):
    with log.Progress("save", total=100 * 2**20, unit="bytes") as progress:
        for _ in range(10):
            clock.now += 2
            progress.advance(2**20, note="embed")
        progress.update(50 * 2**20, total=150 * 2**20)  # at once, but not shown so soon
        clock.now += 15
        progress.advance(0)
    assert capsys.readouterr().err.splitlines() == [
        "save: 8 %, embed, 512 KiB/s, 184 s left",
        "save: 33 %, 1.43 MiB/s, 70 s left",
    ]


def test_rate_leaves_pauses_out(clock):
    rate = log.Rate()
    assert rate.per_second is None
    clock.now += 2
    with rate.paused():
        clock.now += 100
    clock.now += 3
    rate.add(10)
    assert rate.per_second == 2
    clock.now += 100
    rate.start()
    clock.now += 5
    rate.add(10)
    assert rate.per_second == 2


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with log.Progress("batch", total=100) as progress:
        progress.update(50, rate=3, seconds_left=9.0, total=200)
        log.info("in between")
        (task,) = progress._bar.tasks
        assert task.fields["status"] == "3 tokens/s, under 10 s left"
        with log.phase("compile", "2 steps", doing="compiling"):
            assert task.fields["status"] == "compiling", "old figures would look like a stop"
        progress.update(51, rate=3, seconds_left=9.0)
        assert task.fields["status"] == "3 tokens/s, under 10 s left"
    assert "in between" in capsys.readouterr().err


def test_said_once(capsys):
    for _ in range(2):
        log.once("kernels: reference")
    log.warning("careful")
    assert capsys.readouterr().err == "kernels: reference\nwarning: careful\n"
