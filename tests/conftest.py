"""Settings of every test: eight CPU devices, compilations that favour compile time, checked shapes.

The suite's time is XLA compiling small programs; optimization level 1 halves it and changes results
by rounding only. The programs of a file are freed when it is done: each takes mappings of memory,
of which Linux gives a process 65,530, and XLA crashes where there are no more.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=1 --xla_force_host_platform_device_count=8"
).strip()

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


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Frees what the tests of a file compiled; the next file begins like a new process."""
    yield
    jax.clear_caches()
