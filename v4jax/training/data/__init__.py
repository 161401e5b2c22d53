"""Training data: files to Documents, Documents to Batches. Read `document.py`, then `loader.py`.

document.py   one example: tokens, and how much each counts as a target
files.py      lines and ranges of files, read where they lie
chat.py       conversations, loss on the assistant's turns
text.py       plain text and long documents
sources.py    a configured source; bad and too long records
packing.py    documents to rows
pipeline.py   shuffling, mixing, batches ahead: all of grain
loader.py     configuration to Batches, and where one stands
"""

from v4jax.training.data.document import Document, weigh_all
from v4jax.training.data.loader import Loader, merge_states
from v4jax.training.data.packing import Counts, split_document

__all__ = ["Counts", "Document", "Loader", "merge_states", "split_document", "weigh_all"]
