"""Training from scratch and continued pre-training: each file is a run of `v4jax train`."""
