"""Fine-tuning: each file is a run of `v4jax train`; see `docs/training.md`."""
