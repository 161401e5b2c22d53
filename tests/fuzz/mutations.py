"""Ways to damage a file: values that no field wants, and bytes in any place.

json_mutations(valid)     texts near a JSON value: a value replaced, removed, added or repeated
byte_mutations(valid)     bytes cut, changed, inserted or taken out
bounded()                 fails what takes longer or more memory than a small file may
"""

import contextlib
import copy
import json
import resource
import signal
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SECONDS, BYTES = 20, 2 << 30  # of one small file; a busy machine takes a tenth of it

HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**12, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "F32",
        "BF16",
        "I64",
        "yarn",
        "x" * 300,
        "\ud800",
        "\0",
        "a\nb",
        "../x",
        "/dev/zero",
    ),
    *([], [[]], [0], [0, 1], [-1, 2**40], [None], ["x"], [0] * 5000, {}, {"": 0}, {"a": {"b": []}}),
    [[[[[[[[[[[[]]]]]]]]]]]],
)
MARK = b"\xef\xbb\xbf"


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    else:
        items = ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


@st.composite
def json_mutations(draw, valid: Any) -> bytes:
    """Draws the text of a JSON value with up to three changes, and sometimes changed bytes."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in _paths(value) if path] or [(None,)]))
        if last is None:
            break
        place = value
        for key in path:
            place = place[key]
        action = draw(st.sampled_from(("replace", "replace", "swap", "remove", "add")))
        if action == "remove":
            del place[last]
        elif action == "add" and isinstance(place, dict):
            place[draw(st.sampled_from(("x", "", "__metadata__", "a\nb", "x" * 300)))] = place[last]
        elif action == "swap":
            others = list(place) if isinstance(place, dict) else range(len(place))
            other = draw(st.sampled_from(list(others)))
            place[last], place[other] = place[other], place[last]
        else:
            place[last] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    text = json.dumps(value).encode()
    return draw(byte_mutations(text)) if draw(st.integers(0, 4)) == 0 else text


@st.composite
def byte_mutations(draw, valid: bytes) -> bytes:
    """Draws bytes with one to three changes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.one_of(st.binary(max_size=9), st.sampled_from((b"[" * 5000, MARK, b"\n"))))
        action = draw(st.sampled_from(("cut", "overwrite", "insert", "take out")))
        if action == "cut":
            del data[at:]
        elif action == "overwrite":
            data[at : at + len(piece)] = piece
        elif action == "insert":
            data[at:at] = piece
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@contextlib.contextmanager
def bounded(seconds: int = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Raises TimeoutError or MemoryError in what takes more than a small file may."""

    def late(number, frame):
        raise TimeoutError(f"no answer in {seconds} s")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
