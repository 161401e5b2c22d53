"""Settings of every test: CPU, and compilations that favour compile time.

The suite's time is XLA compiling small programs; optimization level 1 halves it and changes results
by rounding only.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
).strip()
