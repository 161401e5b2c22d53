"""One site of hyper-connections against the transcription."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import checkpoints
from oracle.released_numpy import FLOAT32, ReleasedModel
from small_models import CPU

from v4jax.config.from_hf import model_config_from_hf
from v4jax.model.hyper_connections import HyperConnection
from v4jax.model.parameters import Declare

# Float32 through twenty normalizations of numbers up to 1.
TOLERANCE = 1e-5


def test_iterations_are_those_of_the_configuration():
    """On a matrix that converges slowly one Sinkhorn iteration fewer is seen."""
    raw = checkpoints.tiny_config([0], num_hash_layers=0)
    config = model_config_from_hf(raw)
    site = HyperConnection(Declare(config, "float32", nnx.Rngs(0)), config)
    wanted = np.full((4, 4), -8.0)  # two rows want column 2, and none wants column 3
    wanted[[0, 1, 2, 3], [0, 1, 2, 2]] = 8.0
    base = np.concatenate([np.zeros(8), wanted.reshape(-1)]).astype(np.float32)
    site.base.set_value(jnp.asarray(base))
    streams = np.random.RandomState(0).standard_normal((5, 4, config.hidden_size)).astype("float32")
    _, mix = jax.jit(site, static_argnums=1)(streams[None], CPU)

    def transcribe(iterations):
        config = dict(raw, hc_sinkhorn_iters=iterations)
        model = ReleasedModel({"fn": np.asarray(site.fn.get_value())}, config, FLOAT32)
        scale = np.asarray(site.scale.get_value())
        return model.split_mixes(model.mixes(streams, "fn"), scale, base)[2]

    expected = transcribe(config.hc_sinkhorn_iters)
    np.testing.assert_allclose(mix.residual[0], expected, 0, TOLERANCE)
    assert np.abs(transcribe(config.hc_sinkhorn_iters - 1) - expected).max() > 10 * TOLERANCE
