"""Training: data, losses, optimizer, step and trainer. Read `batch.py`, then `step.py`."""
