"""Checkpoints: the released files and those of transformers, read and written without loss.

Read `names.py` first (the one table: tensor name ↔ place in a module), then `hf_reader.py`.

    api.py               load and save
    hf_folder.py         what a folder holds, before a tensor is read
    hf_sources.py        which tensors make up which parameter, and whether they may
    hf_reader.py         folder → Transformer
    finite.py            infinities and NaNs, found while a file is read
    hf_writer.py         Transformer → folder
    adapters.py          adapters (LoRA) ↔ folder, in PEFT's layout
    safetensors_file.py  the container format
    census.py            parameter counts and bytes, from shapes alone
    orbax_store.py       checkpoints of a training run; imported by itself, as Orbax loads slowly
    leaves.py            the leaves of a pytree by name

Host memory while reading: the largest parameter on an accelerator, one device's share of it on a
mesh, the model alone on the CPU; docs/checkpoints.md has the figures.
"""

from v4jax.checkpoint.api import load, save
from v4jax.checkpoint.census import Entry, Totals, census, total
from v4jax.checkpoint.hf_reader import read_abstract, read_model
from v4jax.checkpoint.hf_writer import FORMATS, write_model

__all__ = [
    "FORMATS",
    "Entry",
    "Totals",
    "census",
    "load",
    "read_abstract",
    "read_model",
    "save",
    "total",
    "write_model",
]
