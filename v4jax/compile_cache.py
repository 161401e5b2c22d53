"""Compiled programs, kept between processes in the user's cache folder.

    V4JAX_COMPILE_CACHE=DIR    keeps them in DIR; `off` keeps none

Without it they are in `$XDG_CACHE_HOME/v4jax/compiled` (`~/.cache`, on macOS `~/Library/Caches`).
Every verb of the command line begins with `use`; so can any program, before JAX compiles. Who sets
JAX's own JAX_COMPILATION_CACHE_DIR decides alone.

Processes share the folder. JAX reads and writes it under a lock and removes what was not used for
longest where it grows beyond `MAX_BYTES`. A process that is killed while it writes leaves a program
without the file that says when it was used last; `use` removes such halves.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from v4jax import log

VARIABLE = "V4JAX_COMPILE_CACHE"
MAX_BYTES = 8 << 30
_SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    # Programs that compile faster are not worth a file.
    "jax_persistent_cache_min_compile_time_secs": 0.5,
}


def use() -> Path | None:
    """Makes JAX keep compiled programs; returns the folder, None where it shall not or cannot."""
    folder = find_folder(os.environ, sys.platform)
    if folder is None:
        return None
    # XLA compiles for the very processor; homes are shared by machines that differ.
    folder = folder / _describe_processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_halves(folder)
    except OSError as error:
        log.info(
            f"compiled programs cannot be kept in {folder} ({error.strerror or error}); "
            f"{VARIABLE}=DIR names another folder, {VARIABLE}=off stops trying"
        )
        return None
    settings = {"jax_compilation_cache_dir": str(folder), **_SETTINGS}
    new = {name: value for name, value in settings.items() if name.upper() not in os.environ}
    if "jax" in sys.modules:
        import jax

        for name, value in new.items():
            jax.config.update(name, value)
    else:  # JAX reads them when it is imported, which `--help` never does
        os.environ |= {name.upper(): str(value) for name, value in new.items()}
    return folder


def find_folder(variables: Mapping[str, str], system: str) -> Path | None:
    """Returns the folder for all machines, None for no cache or one that JAX was told.

    Args:
      system: as `sys.platform`.
    """
    chosen = variables.get(VARIABLE)
    if chosen == "off" or "JAX_COMPILATION_CACHE_DIR" in variables:
        return None
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = Path(variables.get("HOME") or Path.home())
    default = home / ("Library/Caches" if system == "darwin" else ".cache")
    return Path(variables.get("XDG_CACHE_HOME") or default) / "v4jax" / "compiled"


def _describe_processor() -> str:
    """Returns a name for processors that understand the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _remove_halves(folder: Path) -> None:
    """Removes programs whose writing was interrupted, unless a process is writing now."""
    import filelock

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=0):  # the lock that JAX takes
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except filelock.Timeout:
        pass
