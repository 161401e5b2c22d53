"""Settings of every test: eight CPU devices, compilations that favour compile time, checked shapes.

The suite's time is XLA compiling small programs. Without optimization it takes 0.6 of its time,
with the older emitter of fusions as well a quarter (measured: the steps of four layers); results
change by rounding only. The programs of a file are freed when it is done: each takes mappings of
memory, of which Linux gives a process 65,530, and XLA crashes where there are no more.
"""

import gc
import os
import pathlib
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["V4JAX_COMPILE_CACHE"] = "off"  # nothing is written to the user's folders
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    # XLA ends the process at a flag that it does not know, as the one of jaxlib 0.12 does here.
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
).strip()

import folder_bucket
import jax
import pytest
from jaxtyping import install_import_hook

# Public signatures say their shapes; the tests hold them to it. (`model.transformer` is left out:
# what a user calls accepts numpy arrays and lists as well.)
_MODEL = "attention block compressor experts hyper_connections indexer moe mtp norm rope router"
install_import_hook(
    ["v4jax.kernels", "v4jax.quant.formats", *(f"v4jax.model.{name}" for name in _MODEL.split())],
    "beartype.beartype",
)

from v4jax.planning import ahead_of_time  # noqa: E402 (after the hook)

# What takes longest begins first: at the end no process works alone (`python -m tests.measure`).
_LONGEST = (
    "parallel/test_model.py",
    "model/test_golden_logits.py",
    "model/test_conformance.py",
    "training/test_mesh.py",
    "training/test_trainer.py",
    "model/test_released.py",
    "model/test_packing.py",
    "inference/test_hosts.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    folder = pathlib.Path(__file__).parent
    items.sort(key=lambda item: rank.get(item.path.relative_to(folder).as_posix(), len(rank)))


def pytest_runtest_setup(item):
    """Skips the tests of the TPU compiler where it is missing, with the reason."""
    if item.get_closest_marker("tpu_compiler") and (reason := ahead_of_time.why_unavailable()):
        pytest.skip(reason)


def pytest_collection_finish():
    """Spares Python's collector what imports made; searching it took an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def bucket(tmp_path_factory):
    """The address of an empty bucket in s3://, whose objects are files of a folder."""
    folder_bucket.install(tmp_path_factory.mktemp("bucket"))
    yield "s3://bucket"
    folder_bucket.uninstall()


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Frees what the tests of a file compiled; the next file begins like a new process."""
    yield
    jax.clear_caches()
