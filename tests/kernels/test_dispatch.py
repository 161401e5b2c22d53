"""Which implementation runs: by platform, by reason, by request."""

import jax.numpy as jnp
import pytest

from v4jax import log
from v4jax.errors import UnsupportedError
from v4jax.kernels import Target
from v4jax.kernels.dispatch import pick
from v4jax.kernels.rotation import pallas_tpu, portable

ROOM = "v4jax.kernels.rotation"
X, ANGLES = jnp.zeros((1, 3, 16, 256), jnp.bfloat16), jnp.zeros((1, 3, 64))


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(log, "once", lines.append)
    return lines


def test_the_first_that_can(said):
    """Implementations for other platforms are skipped without a word."""
    assert pick(Target("tpu"), "rotation", ROOM, X, ANGLES) is pallas_tpu
    assert pick(Target("cpu"), "rotation", ROOM, X, ANGLES) is portable
    assert pick(Target("gpu"), "rotation", ROOM, X, ANGLES) is portable
    assert said == [
        "kernels: rotation=pallas_tpu on tpu",
        "kernels: rotation=portable on cpu",
        "kernels: rotation=portable on gpu",
    ]


def test_the_reason_is_said(said):
    assert pick(Target("tpu"), "rotation", ROOM, X[..., :192], ANGLES) is portable
    assert said[0].startswith("kernels: rotation=portable on tpu; not pallas_tpu: channels must")


def test_requests_run_or_raise():
    plain = Target("tpu").using(rotation="portable")
    assert pick(plain, "rotation", ROOM, X, ANGLES) is portable
    assert pick(plain.using(rotation="auto"), "rotation", ROOM, X, ANGLES) is pallas_tpu
    for target, x, reason in (
        (Target("cpu").using(rotation="pallas_tpu"), X, "it needs a tpu, this program is for cpu"),
        (Target("tpu").using(rotation="pallas_tpu"), X[..., :192], "channels must divide"),
        (Target("tpu").using(rotation="cuda"), X, "no implementation 'cuda'; it has"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            pick(target, "rotation", ROOM, x, ANGLES)


def test_targets_are_values():
    one = Target("tpu", "TPU v6 lite").using(indexer="portable", rotation="portable")
    other = Target("tpu", "TPU v6 lite").using(rotation="portable").using(indexer="portable")
    assert one == other and hash(one) == hash(other)
    assert Target.here().platform == "cpu"
