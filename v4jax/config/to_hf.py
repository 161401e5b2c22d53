"""`ModelConfig` → a checkpoint's `config.json`, with the released keys or those of transformers.

`model_config_from_hf(model_config_to_hf(config, layout)) == config` for every configuration that
the layout can express.
"""

import dataclasses
import math
from typing import Literal

from v4jax.config.from_hf import (
    CSA_RATIO,
    FIXED,
    PROFILE_KEY,
    QUANTIZATION,
    STAGES_KEY,
    TOKENIZER_KEY,
    layer_kinds,
)
from v4jax.config.model import DraftConfig, LayerKind, ModelConfig, RouterKind
from v4jax.errors import ConfigError

_OMITTED = ("is_encoder_decoder", "mlp_bias")  # checked where present; the released files lack them


def model_config_to_hf(
    config: ModelConfig,
    layout: Literal["released", "transformers"] = "released",
    *,
    quantized: bool | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict:
    """Returns the `config.json` of `config`, its keys sorted as in the released files.

    Args:
      layout: whose keys.
      quantized: whether to write `quantization_config`; by default only the released layout does.
      dtype: dtype of the plain tensors.

    Raises:
      ConfigError: the layout cannot express the configuration.
    """
    if config.layer_overrides:
        layers = ", ".join(str(layer) for layer, _ in config.layer_overrides)
        raise ConfigError(
            f"layers {layers} have values of their own, which config.json cannot say; save the "
            "model loaded without overrides.layers: its weights are the same"
        )
    raw = {key: accepted[0] for key, accepted in FIXED.items() if key not in _OMITTED}
    for field in dataclasses.fields(config):  # numbers, in both layouts under their own names
        if field.type in (int, float):
            raw[field.name] = getattr(config, field.name)
    raw |= {key: _number(raw[key]) for key in ("rope_theta", "compress_rope_theta")}
    raw["expert_dtype"] = config.expert_dtype
    raw["use_cache"] = True
    if quantized if quantized is not None else layout == "released":
        raw["quantization_config"] = {key: accepted[0] for key, accepted in QUANTIZATION.items()}
        raw["quantization_config"]["weight_block_size"] = list(config.weight_block_size)
    if config.draft is not None:
        raw |= _draft(config.draft)
    if config.tokenizer != "v4":
        raw[TOKENIZER_KEY] = config.tokenizer
    if config.profile != ("preview" if config.draft is None else "0731"):
        raw[PROFILE_KEY] = config.profile
    if config.more_eos_token_ids:
        raw["eos_token_id"] = list(config.end_token_ids)
    if layout == "released":
        raw |= _released_layers(config)
        raw |= {"torch_dtype": dtype, "rope_scaling": _scaling(config, "type")}
    else:
        raw |= _transformers_layers(config)
        if config.draft is not None:
            raw[STAGES_KEY] = config.draft.stages
        raw |= {"dtype": dtype, "mlp_bias": False} | _rope_parameters(config)
    return dict(sorted(raw.items()))


def _draft(draft: DraftConfig) -> dict:
    fields = dataclasses.asdict(draft)
    del fields["stages"]  # the ratios behind those of the layers count them
    fields["target_layer_ids"] = list(draft.target_layer_ids)
    # What the released files say beside a draft module of three stages.
    return {f"dspark_{name}": value for name, value in fields.items()} | {
        "num_nextn_predict_layers": 1
    }


def _released_layers(config: ModelConfig) -> dict:
    layers = {"compress_ratios": list(config.compress_ratios)}
    hash_layers = config.mlp_layer_types.count(RouterKind.HASH)
    if config.mlp_layer_types[:hash_layers] == (RouterKind.HASH,) * hash_layers:
        layers["num_hash_layers"] = hash_layers
    else:  # the released keys cannot say this
        layers["mlp_layer_types"] = [kind.value for kind in config.mlp_layer_types]
    if config.layer_types != layer_kinds(config.compress_ratios):
        layers |= {"layer_types": [kind.value for kind in config.layer_types]} | _rates(config)
    return layers


def _transformers_layers(config: ModelConfig) -> dict:
    main, mtp = (
        config.layer_types[: config.num_hidden_layers],
        config.layer_types[config.num_hidden_layers :],
    )
    if set(mtp) - {LayerKind.WINDOW}:
        raise ConfigError(
            "model.layer_types: the transformers layout has no entry for MTP blocks and takes them "
            f"as window layers, got {[kind.name for kind in mtp]}; save as 'released'"
        )
    return {
        "layer_types": [kind.value for kind in main],
        "mlp_layer_types": [kind.value for kind in config.mlp_layer_types],
    } | _rates(config)


def _rates(config: ModelConfig) -> dict:
    rates = dict(zip(config.layer_types, config.compress_ratios, strict=True))
    csa = rates.get(LayerKind.CSA, CSA_RATIO)
    hca = rates.get(LayerKind.HCA, 128)
    return {"compress_rates": {LayerKind.CSA.value: csa, LayerKind.HCA.value: hca}}


def _rope_parameters(config: ModelConfig) -> dict:
    factor = config.qk_rope_head_dim / config.head_dim
    if int(config.head_dim * factor) < config.qk_rope_head_dim:  # what transformers computes
        factor = math.nextafter(factor, 1.0)
    main = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": factor,
    }
    compress = main | {"rope_theta": config.compress_rope_theta}
    if config.rope_scaling is not None:
        compress |= _scaling(config, "rope_type") | {"attention_factor": 1.0}
    rope = {"main": main, "compress": compress}
    return {"partial_rotary_factor": factor, "rope_parameters": rope}


def _scaling(config: ModelConfig, type_key: str) -> dict | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    return {
        type_key: "yarn",
        "factor": _number(scaling.factor),
        "beta_fast": _number(scaling.beta_fast),
        "beta_slow": _number(scaling.beta_slow),
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _number(value: float) -> int | float:
    """Returns an integer where the value is one, as the released files write them."""
    return int(value) if value == int(value) else value
