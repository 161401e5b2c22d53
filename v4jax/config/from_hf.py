"""A checkpoint's `config.json` → `ModelConfig`: the released keys and those of transformers.

Every key is used, checked against what the code computes (`FIXED`), or listed as informational
(`INFORMATIONAL`); any other key is an error, because it could change the mathematics.
`to_hf.py` goes the other way.

Source: spec A.2, A.3; transformers `DeepseekV4Config` (5.17 to 5.24).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from v4jax import log
from v4jax.config.json_keys import JsonKeys, brief
from v4jax.config.model import DraftConfig, LayerKind, ModelConfig, RouterKind, YarnScaling
from v4jax.config.ranges import check_range
from v4jax.errors import ConfigError

MODEL_TYPE = "deepseek_v4"
CSA_RATIO, HCA_RATIO = 4, 128  # of both released models; a released ratio of 4 means CSA

# Keys whose value the code has built in: {key: the only accepted values}. Absence means the first.
FIXED = {
    "model_type": (MODEL_TYPE,),
    "architectures": (["DeepseekV4ForCausalLM"],),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
}

# The same inside `quantization_config`.
QUANTIZATION = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3",),
    "scale_fmt": ("ue8m0", "float"),
}

# Keys that say nothing about what the model computes: {key: what they are}.
INFORMATIONAL = {
    "_name_or_path": "where transformers loaded the model from",
    "chunk_size_feed_forward": "transformers: memory saving, same result",
    "dtype": "storage dtype; every tensor carries its own",
    "id2label": "transformers: classification heads",
    "label2id": "transformers: classification heads",
    "output_attentions": "transformers: what a call returns",
    "output_hidden_states": "transformers: what a call returns",
    "output_router_logits": "transformers: what a call returns",
    "pad_token_id": "padding is given by lengths here",
    "problem_type": "transformers: classification heads",
    "return_dict": "transformers: what a call returns",
    "router_aux_loss_coef": "transformers: its training loss",
    "router_jitter_noise": "transformers: its training noise",
    "torch_dtype": "storage dtype; every tensor carries its own",
    "transformers_version": "the version that wrote the file",
    "use_cache": "transformers: whether a call returns a cache",
}

# Families of keys of later checkpoints, with the reason they are refused.
_REFUSED = {
    "vision_": "is a key of a vision checkpoint; v4jax reads text models",
    "text_config": "is a key of a nested (later or multimodal) configuration",
}

# Fields that are read by themselves; every other number is under its own name.
_APART = (
    "qk_rope_head_dim rope_theta compress_rope_theta initializer_range bos_token_id eos_token_id"
)
_ALIASES = {"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
# Of the released inference/config.json; here where no ratios behind those of the layers count them.
STAGES_KEY = "n_mtp_layers"
# Our own keys, written only where the others do not say it.
TOKENIZER_KEY = "v4jax_tokenizer"
PROFILE_KEY = "v4jax_profile"


def model_config_from_hf(raw: Mapping) -> ModelConfig:
    """Returns the configuration that a `config.json` describes.

    `compress_ratios` or `layer_types` without entries for the MTP blocks get window layers for
    them. `dspark_` keys name a draft module in place of MTP blocks, whatever
    `num_nextn_predict_layers` says; its stages are the ratios behind those of the layers. A missing
    `expert_dtype` becomes "fp4". The checkpoint reader corrects all this from the tensors.

    Args:
      raw: the parsed `config.json`, released keys or those of transformers, or a mixture that
        agrees with itself.

    Raises:
      ConfigError: a key is missing, unknown, of the wrong type, or contradicts what the code
        computes.
    """
    keys = JsonKeys(raw, "config.json")
    _refuse_later_models(keys)
    keys.check_fixed(FIXED)
    values = {
        field.name: _take_number(keys, field.name, field.type)
        for field in dataclasses.fields(ModelConfig)
        if field.type in (int, float) and field.name not in _APART.split()
    }
    values |= _rope(keys, values["head_dim"])
    draft, blocks = _draft(keys), values["num_nextn_predict_layers"]
    if draft is not None:  # the released files count 1 block where there are three stages
        values["num_nextn_predict_layers"], blocks = 0, draft.pop("stages")
    values |= _layers(keys, values["num_hidden_layers"], blocks)
    stages = len(values["compress_ratios"]) - values["num_hidden_layers"]
    values["draft"] = DraftConfig(stages=stages, **draft) if draft and stages else None
    values |= _storage(keys)
    values["initializer_range"] = keys.take("initializer_range", float, 0.02)
    values["bos_token_id"] = keys.take("bos_token_id", int, 0)
    values |= _ends(keys)
    # The checkpoints with a draft module are of the later generation, and nothing else tells.
    values["profile"] = keys.take(PROFILE_KEY, str, "preview" if draft is None else "0731")
    values["tokenizer"] = keys.take(TOKENIZER_KEY, str, "v4")
    keys.check_all_used(INFORMATIONAL)
    return ModelConfig(**values)


def layer_kinds(ratios: Sequence[int], csa_ratio: int = CSA_RATIO) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer from its ratio: 0 window, `csa_ratio` CSA, any other HCA."""
    by_ratio = {0: LayerKind.WINDOW, csa_ratio: LayerKind.CSA}
    return tuple(by_ratio.get(ratio, LayerKind.HCA) for ratio in ratios)


def router_kinds(hash_layers: int, layers: int) -> tuple[RouterKind, ...]:
    """Returns the router of each layer: the first `hash_layers` by table, the rest by score."""
    if not 0 <= hash_layers <= layers:
        raise ConfigError(
            f"model.num_hash_layers must be between 0 and {layers}, got {hash_layers}"
        )
    return (RouterKind.HASH,) * hash_layers + (RouterKind.TOPK,) * (layers - hash_layers)


def _refuse_later_models(keys: JsonKeys) -> None:
    # First of all checks: their other keys contradict too, with less helpful messages.
    keys.take("model_type", str)
    for key in keys.raw:
        for prefix, reason in _REFUSED.items():
            if key.startswith(prefix):
                raise ConfigError(f"{keys.path}: {key} {reason}")


def _take_number(keys: JsonKeys, key: str, kind: type) -> int | float:
    alias = _ALIASES.get(key)
    other = alias and keys.take(alias, kind, None)
    value = keys.take(key, kind, ... if other is None else other)
    _check_agree(keys.path, **{key: value, str(alias): other})
    check_range(ModelConfig, key, value, "model.")  # before lists of that length are made
    return value


def _ends(keys: JsonKeys) -> dict:
    """Reads the tokens that end an answer: one id, or a list."""
    key = "eos_token_id"
    ids = keys.take_list(key, int) if isinstance(keys.raw.get(key), list) else None
    first, *more = [keys.take(key, int, 1)] if ids is None else dict.fromkeys(ids) or [None]
    if first is None:
        raise ConfigError(f"{keys.path}: {key} must name a token that ends an answer, got []")
    return {key: first, "more_eos_token_ids": tuple(more)}


def _check_agree(path: str, **values) -> None:
    """Raises unless all values that are not None are equal."""
    given = {name: value for name, value in values.items() if value is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        said = " and ".join(f"{name} = {brief(value)}" for name, value in given.items())
        raise ConfigError(f"{path}: {said} contradict")


def _rope(keys: JsonKeys, head_dim: int) -> dict:
    """Reads both rotations: flat keys as released, `rope_parameters` as transformers."""
    factor = keys.take("partial_rotary_factor", float, None)
    if factor is not None and not 0 < factor <= 1:
        raise ConfigError(f"{keys.path}: partial_rotary_factor must be in (0, 1], got {factor}")
    dim = keys.take("qk_rope_head_dim", int, ... if factor is None else round(factor * head_dim))
    _check_rotated(keys, factor, dim, head_dim)
    released = _scaling(keys.take_object("rope_scaling", None), dim, head_dim)
    nested = keys.take_object("rope_parameters", None) or JsonKeys({}, keys.path)
    main = _scaling(nested.take_object("main", None), dim, head_dim)
    compress = _scaling(nested.take_object("compress", None), dim, head_dim)
    nested.check_all_used()
    _check_agree(keys.path, rope_scaling=released[0], rope_parameters=compress[0])
    if main[0] is not None:
        raise ConfigError(f"{nested.path}.main must be 'default': window layers have no YaRN")
    values = {"qk_rope_head_dim": dim, "rope_scaling": released[0] or compress[0]}
    for key, inner in (("rope_theta", main[1]), ("compress_rope_theta", compress[1])):
        values[key] = keys.take(key, float, ... if inner is None else inner)
        _check_agree(keys.path, **{key: values[key], "rope_parameters": inner})
    return values


def _check_rotated(keys: JsonKeys, factor: float | None, dim: int, head_dim: int) -> None:
    # transformers takes int(head_dim × factor), so a factor may sit a little above dim / head_dim.
    if factor is not None and not dim - 0.01 < factor * head_dim < dim + 1:
        raise ConfigError(
            f"{keys.path}: partial_rotary_factor = {factor} contradicts {dim} rotated channels of "
            f"head_dim = {head_dim}"
        )


def _scaling(
    keys: JsonKeys | None, dim: int, head_dim: int
) -> tuple[YarnScaling | None, float | None]:
    """Reads one rope object: its scaling and its theta, where it has them."""
    if keys is None:
        return None, None
    kinds = {keys.take(key, str, None) for key in ("type", "rope_type")} - {None}
    theta = keys.take("rope_theta", float, None)
    _check_rotated(keys, keys.take("partial_rotary_factor", float, None), dim, head_dim)
    # YaRN's magnitude factor does not exist in V4 (spec H.2); its ramp has whole ends (spec B.5).
    keys.check_fixed({"attention_factor": (1.0,), "truncate": (True,)})
    if kinds not in ({"yarn"}, {"default"}):
        raise ConfigError(f"{keys.path}: type must be 'yarn' or 'default', got {sorted(kinds)}")
    scaling = None
    if kinds == {"yarn"}:
        numbers = {key: keys.take(key, float) for key in ("factor", "beta_fast", "beta_slow")}
        original = keys.take("original_max_position_embeddings", int)
        scaling = YarnScaling(**numbers, original_max_position_embeddings=original)
    keys.check_all_used()
    return scaling, theta


def describes_draft(raw: Mapping) -> bool:
    """Whether a `config.json` describes a draft module, even one that the folder does not have."""
    return any(key.startswith("dspark_") and value is not None for key, value in raw.items())


def _draft(keys: JsonKeys) -> dict | None:
    """Reads the keys of a DSpark draft module; None where there are none."""
    ids = keys.take_list("dspark_target_layer_ids", int)
    names = ("block_size", "noise_token_id", "markov_rank")
    fields = {name: keys.take(f"dspark_{name}", int, None) for name in names}
    fields["target_layer_ids"] = None if ids is None else tuple(ids)
    stages = keys.take(STAGES_KEY, int, None) if any(fields.values()) else None
    missing = [name for name, value in fields.items() if value is None]
    if len(missing) == len(fields):
        return None
    if missing:
        raise ConfigError(
            f"{keys.path} has some dspark_ keys but no dspark_{missing[0]}; copy the config.json "
            "of the checkpoint"
        )
    check_range(DraftConfig, "stages", stages, "model.draft.")
    return fields | {"stages": stages}


def _layers(keys: JsonKeys, layers: int, blocks: int | None) -> dict:
    """Reads which layer is of which kind, in either vocabulary, and adds the blocks behind them.

    Args:
      blocks: how many; None: as many as there are ratios.
    """
    rates = _rates(keys)
    ratios = keys.take_list("compress_ratios", int)
    names = keys.take_list("layer_types", str)
    if names is None and ratios is None:
        raise ConfigError(f"{keys.path} needs compress_ratios or layer_types; it has neither")
    if names is None:
        kinds = layer_kinds(ratios, rates[LayerKind.CSA])
    else:
        kinds = tuple(_member(LayerKind, name, keys, "layer_types") for name in names)
        from_names = [rates[kind] for kind in kinds]
        ratios = from_names if ratios is None else ratios
        _check_agree(keys.path, compress_ratios=ratios[: len(kinds)], layer_types=from_names)
        kinds += layer_kinds(ratios[len(kinds) :], rates[LayerKind.CSA])
    if blocks is not None and len(ratios) >= layers:
        if any(ratios[layers + blocks :]):  # of layers that were taken out of the model
            log.once(
                f"{keys.path}: compress_ratios or layer_types has {len(ratios)} entries for "
                f"{layers} layers and {blocks} MTP blocks; those behind the layers are not used"
            )
            ratios, kinds = ratios[:layers], kinds[:layers]
        missing = max(layers + blocks - len(ratios), 0)
        ratios = [*ratios, *[0] * missing][: layers + blocks]
        kinds = (*kinds, *[LayerKind.WINDOW] * missing)[: layers + blocks]
    return {
        "compress_ratios": tuple(ratios),
        "layer_types": kinds,
        "mlp_layer_types": _routers(keys, layers),
    }


def _rates(keys: JsonKeys) -> dict[LayerKind, int]:
    rates = {LayerKind.WINDOW: 0, LayerKind.CSA: CSA_RATIO, LayerKind.HCA: HCA_RATIO}
    given = keys.take_object("compress_rates", {})
    for kind, legacy in (
        (LayerKind.CSA, "compress_rate_csa"),
        (LayerKind.HCA, "compress_rate_hca"),
    ):
        rates[kind] = keys.take(legacy, int, given.take(kind.value, int, rates[kind]))
    given.check_all_used()
    return rates


def _routers(keys: JsonKeys, layers: int) -> tuple[RouterKind, ...]:
    names = keys.take_list("mlp_layer_types", str)
    hash_layers = keys.take("num_hash_layers", int, ... if names is None else None)
    by_count = None if hash_layers is None else router_kinds(hash_layers, layers)
    if names is None:
        return by_count
    by_name = tuple(_member(RouterKind, name, keys, "mlp_layer_types") for name in names)
    _check_agree(keys.path, num_hash_layers=by_count, mlp_layer_types=by_name)
    return by_name


def _member(enum: type, name: str, keys: JsonKeys, key: str):
    names = [member.value for member in enum]
    if name not in names:
        raise ConfigError(
            f"{keys.path}: every entry of {key} must be one of {names}, got {brief(name)}"
        )
    return enum(name)


def _storage(keys: JsonKeys) -> dict:
    """Reads the weights' formats; `expert_dtype` is beside `quantization_config` or in it."""
    outer = keys.take("expert_dtype", str, None)
    inner = keys.take_object("quantization_config", None)
    if inner is None:
        return {} if outer is None else {"expert_dtype": outer}
    inner.take("quant_method", str)
    inner.check_fixed(QUANTIZATION)
    expert_dtype = inner.take("expert_dtype", str, outer)
    _check_agree(inner.path, expert_dtype=expert_dtype, expert_dtype_outside=outer)
    block = inner.take_list("weight_block_size", int)
    inner.check_all_used(("modules_to_not_convert", "dequantize"))
    values = {} if block is None else {"weight_block_size": tuple(block)}
    return values if expert_dtype is None else values | {"expert_dtype": expert_dtype}
