"""Training data: files to Examples, Examples to Batches. Read `example.py`, then `loader.py`.

example.py    one document: its tokens, and how much each counts as a target
files.py      lines and ranges of files, read at random access
chat.py       conversations; the assistant's turns count
text.py       plain text and long documents
needles.py    the needle task, made of any text
sources.py    a configured source; bad records and records that are too long
packing.py    documents to rows
pipeline.py   shuffling, mixing, batches ahead: everything that uses grain
loader.py     from the configuration to Batches, and back to a saved position
"""

from v4jax.training.data.example import Example, weigh_all
from v4jax.training.data.loader import Loader, merge_states
from v4jax.training.data.packing import Counts, split_example

__all__ = ["Counts", "Example", "Loader", "merge_states", "split_example", "weigh_all"]
