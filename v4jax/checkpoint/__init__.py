"""Checkpoints: the released files and those of transformers, read and written without loss.

Read `names.py` first (one table of all tensor names), then `hf_reader.py`.

    api.py               load and save
    names.py             tensor name ↔ place in a module's parameter
    hf_folder.py         what a folder holds, before a tensor is read
    hf_sources.py        the tensors of each parameter: found and checked
    hf_reader.py         folder → Transformer
    finite.py            infinities and NaNs, found while a file is read
    hf_writer.py         Transformer → folder
    new_folder.py        a folder that appears complete or not at all
    adapters.py          adapters (LoRA) ↔ folder, as PEFT attaches them
    adapter_layout.py    names and shapes of their tensors
    adapter_config.py    their adapter_config.json
    safetensors_file.py  the container format
    census.py            parameter counts and bytes, from shapes alone
    orbax_store.py       checkpoints of a training run; imported by itself: Orbax is slow
    leaves.py            the leaves of a pytree by name

Reading needs host memory for the largest parameter beside an accelerator, for one device's share of
it on a mesh, and for nothing but the model on a CPU; docs/checkpoints.md has the figures.
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
