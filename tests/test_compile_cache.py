"""The cache of compiled programs: where it is, what is taken out, and that processes share it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from v4jax import compile_cache

FOLDERS = {
    "the user's": ({"HOME": "/h"}, "linux", "/h/.cache/v4jax/compiled"),
    "by XDG": ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "linux", "/x/v4jax/compiled"),
    "on macOS": ({"HOME": "/h"}, "darwin", "/h/Library/Caches/v4jax/compiled"),
    "named": ({"HOME": "/h", "V4JAX_COMPILE_CACHE": "/c"}, "linux", "/c"),
    "off": ({"HOME": "/h", "V4JAX_COMPILE_CACHE": "off"}, "linux", None),
    "JAX's own": ({"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, "linux", None),
}


@pytest.mark.parametrize("variables, system, folder", FOLDERS.values(), ids=FOLDERS.keys())
def test_folder(variables, system, folder):
    assert compile_cache.find_folder(variables, system) == (folder and Path(folder))


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment of a user with another home, restored afterwards; JAX is not imported."""
    for name in list(os.environ):
        if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "XDG_CACHE", "V4JAX_COMPILE")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"HOME": str(tmp_path)})
    monkeypatch.delitem(sys.modules, "jax")
    return os.environ


def test_halves_are_removed_and_jax_is_told(environment, tmp_path):
    folder = compile_cache.use()
    assert folder.parent == tmp_path / ".cache/v4jax/compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "programs are code: nobody else writes"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(8 << 30)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).touch()
    del environment["JAX_COMPILATION_CACHE_DIR"]
    compile_cache.use()
    assert {path.name for path in folder.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_a_folder_that_cannot_be_made_is_said_once_and_harms_nothing(environment, capsys):
    Path(environment["HOME"], ".cache").write_text("a file")
    assert compile_cache.use() is None
    assert "V4JAX_COMPILE_CACHE=DIR names another folder" in capsys.readouterr().err
    assert "JAX_COMPILATION_CACHE_DIR" not in environment


PROGRAM = """
from v4jax import compile_cache
compile_cache.use()
import jax, jax.numpy as jnp
from jax._src import monitoring
hits = []
monitoring.register_event_listener(lambda event, **rest: hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_processes_share_what_they_compiled(tmp_path):
    """Two at once compile and write; a third finds what they wrote."""
    settings = os.environ | {
        "V4JAX_COMPILE_CACHE": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=settings, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    for count in (2, 1):
        for process in [start() for _ in range(count)]:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0 and "rror" not in errors, errors
    assert int(output) >= 1
    assert list(tmp_path.glob("*/*-cache")) and not list(tmp_path.glob("*-cache"))
