"""Rates and forecasts, on a clock that the test turns."""

import pytest

from v4jax import log
from v4jax.inference.meter import Meter, summarize


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def test_forecast(clock):
    meter = Meter(document_bytes=[1000, 2000], questions=4, max_new_tokens=50)
    assert meter.seconds_left is None
    meter.begin_document(1000, tokens=500)
    meter.reading.start()
    clock.now += 2
    meter.read(200)
    # 300 of this document, and 2000 bytes at half a token per byte, at 100 tokens per second.
    assert meter.seconds_left == pytest.approx(13, rel=0.02)
    assert meter.total == 200 + 300 + 1000 + 4 * 50
    meter.read(300)
    clock.now += 1  # spent on something else
    meter.writing.start()
    clock.now += 1
    meter.writing.add(20)
    meter.answered(2, tokens=20)
    assert meter.total == 520 + 1000 + 2 * 10
    assert meter.seconds_left == pytest.approx(1000 / 250 + 2 * 10 / 20, rel=0.02)
    meter.give_up(2000, questions=2)
    assert (meter.total, meter.seconds_left) == (meter.done, 0)


def test_reading_slows_with_length(clock):
    """From the first chunks on, the time that the rest takes is known to a tenth.

    The device does work with weights four times as fast as the other, which no plan would know. By
    the mean rate of the chunks so far the first forecast would be a fifth of the truth.
    """
    chunk, lengths = 100, [2000, 500, 8000]
    meter = Meter([2 * n for n in lengths], questions=0, max_new_tokens=1)
    meter.work = lambda first, end: (10.0 * (end - first), (end**2 - first**2) / 2)
    costs = 0.25e-3, 1e-3

    def seconds(first, end):
        return sum(c * w for c, w in zip(costs, meter.work(first, end), strict=True))

    left = sum(seconds(0, n) for n in lengths)
    for length in lengths:
        meter.begin_document(2 * length, length)
        meter.reading.start()
        for first in range(0, length, chunk):
            clock.now += seconds(first, first + chunk)
            meter.read(chunk)
            left -= seconds(first, first + chunk)
            if first >= 300 or length != lengths[0]:
                assert meter.seconds_left == pytest.approx(left, rel=0.1, abs=1e-6)
    assert meter.total == meter.done == sum(lengths)


def test_short_documents_cost_what_they_compute(clock):
    """One speed serves them; their number does not matter to the cost of a forecast."""
    meter = Meter(range(100_000, 200_000), questions=0, max_new_tokens=1)
    asked = []
    meter.work = lambda first, end: asked.append(end) or (4096.0, 0.0)
    meter.begin_document(100_000, 25_000)
    meter.reading.start()
    clock.now += 2
    meter.read(25_000)
    assert meter.seconds_left == pytest.approx(2 * 99_999)
    assert meter.seconds_left and len(asked) < 40


def test_summary_counts_what_the_file_holds():
    answer = {"line": 1, "tokens": {"document": 100, "question": 5, "answer": 7}}
    records = {(1, 0): answer, (1, 1): answer, (2, -1): {"line": 2, "error": {}}}
    meter = Meter([], 0, 1)
    meter.cache_bytes = 2048
    summary = summarize(records, meter, questions_before=1, compile_seconds=3.0)
    assert summary.lines() == [
        "documents  2, of them failed 1",
        "questions  2 answered (1 before this run)",
        "read       110 tokens",
        "written    14 tokens",
        "cache      2.00 KiB for the largest document",
        "time       reading 0.00 s, writing 0.00 s, compiling 3.00 s",
    ]
    assert summary.to_json()["read_tokens_per_second"] is None
