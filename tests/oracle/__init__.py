"""Independent truth for v4jax: nothing here imports the package that it judges.

Start with `numpy_oracle.py` (the mathematics on one page), then `released_numpy.py` (the same
forward pass with the roundings of the published inference code). `quantizers.py` holds the number
formats bit for bit, `checkpoints.py` makes tiny checkpoints in the released layout, `hf.py` drives
transformers' implementation, and `make_golden.py` writes `tests/golden/*.npz` from it.
"""
