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
    meter = Meter(document_bytes=3000, questions=4, max_new_tokens=50)
    assert meter.seconds_left is None
    meter.begin_document(1000, tokens=500)
    meter.reading.start()
    clock.now += 2
    meter.read(200)
    # 300 of this document, and 2000 bytes at half a token per byte, at 100 tokens per second.
    assert meter.seconds_left == pytest.approx(13)
    assert meter.total == 200 + 300 + 1000 + 4 * 50
    meter.read(300)
    clock.now += 1  # spent on something else
    meter.writing.start()
    clock.now += 1
    meter.writing.add(20)
    meter.answered(2, tokens=20)
    assert meter.total == 520 + 1000 + 2 * 10
    assert meter.seconds_left == pytest.approx(1000 / 250 + 2 * 10 / 20)
    meter.give_up(2000, questions=2)
    assert (meter.total, meter.seconds_left) == (meter.done, 0)


def test_summary_counts_what_the_file_holds():
    answer = {"line": 1, "tokens": {"document": 100, "question": 5, "answer": 7}}
    records = {(1, 0): answer, (1, 1): answer, (2, -1): {"line": 2, "error": {}}}
    meter = Meter(0, 0, 1)
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
