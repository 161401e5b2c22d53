"""Training data: files to Documents, Documents to Batches. Read `document.py`, then `loader.py`."""

from v4jax.training.data.document import Document, weigh_all

__all__ = ["Document", "weigh_all"]
