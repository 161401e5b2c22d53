"""A model of one CSA layer, which compiles fastest of those that have an indexer."""

from v4jax.config.models import tiny


def get_config():
    config = tiny.get_config()
    config.num_hidden_layers = 1
    config.num_hash_layers = 0
    config.compress_ratios = (4,)
    config.num_nextn_predict_layers = 0
    config.hidden_size = 32
    config.n_routed_experts = 4
    return config
