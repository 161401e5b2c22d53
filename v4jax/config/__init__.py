"""Configuration: what the model computes, how it rounds, and how files become typed values.

Read `model.py` first (every number of the model), then `numerics.py` (how the system rounds),
`from_hf.py` and `folder.py` (a checkpoint's `config.json`, and the files beside it), `run.py` (a
training run), `data.py` (what it reads), `inference.py` (a model that answers), and `loading.py`
(how files become these). `models/` holds the packaged models.
"""

from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.inference import InferenceConfig
from v4jax.config.model import Layer, LayerKind, ModelConfig, Rope, RouterKind, YarnScaling
from v4jax.config.numerics import NUMERICS, Numerics, choose_numerics, get_numerics
from v4jax.config.run import TrainConfig

__all__ = [
    "NUMERICS",
    "DataConfig",
    "InferenceConfig",
    "Layer",
    "LayerKind",
    "ModelConfig",
    "Numerics",
    "Rope",
    "RouterKind",
    "SourceConfig",
    "TrainConfig",
    "YarnScaling",
    "choose_numerics",
    "get_numerics",
]
