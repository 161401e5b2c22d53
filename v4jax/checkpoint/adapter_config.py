"""adapter_config.json: rank and scale of every module, and what of PEFT is computed here.

Source: `LoraConfig` of PEFT 0.21; `get_pattern_key` of its utils/other.py.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from v4jax.checkpoint.adapter_layout import EXTRA, Module, Naming
from v4jax.config.json_keys import brief, did_you_mean, read_json
from v4jax.errors import CheckpointError
from v4jax.files import Path

CONFIG_NAME = "adapter_config.json"

# What PEFT can express and we do not compute: the fields' values must be these, or absent.
_REQUIRED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}
# Of newer versions, or of some layers only: required likewise, and not written.
_REQUIRED_TOO: dict[str, Any] = {
    "layers_to_transform": None,
    "layers_pattern": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
}
# Some ways to start change the base as well, which the file of the adapters does not hold.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

# What says how adapters were found or trained, and nothing about what they compute.
_IGNORED = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights loftq_config lora_dropout lora_ga_config megatron_config
    megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type
    velora_config
"""
_MOST_RANK, _MOST_ALPHA = 1 << 16, 1 << 20
# What is read.
_READ = "r lora_alpha rank_pattern alpha_pattern target_parameters"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of ranks and scales.

    A pattern is a regular expression for the end of a target's name, as PEFT matches it. A target
    that none matches has `rank` and `alpha`.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]

    def settings(self, target: str) -> tuple[int, float]:
        """Returns rank, and scale = alpha / rank, of a target (`adapter_layout.Module`)."""
        rank = _match(self.ranks, target, self.rank)
        return rank, _match(self.alphas, target, self.alpha) / rank


def make_config(
    modules: Mapping[Module, tuple[int, float]], naming: Naming, base: str | None
) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
      modules: rank and alpha of each.
      naming: with "peft" the targets are written out, and those of MTP are none.
      base: name of the model that they were trained for.
    """
    ((usual, _),) = collections.Counter(modules.values()).most_common(1)
    kinds: dict[str, dict[str, tuple[int, float]]] = {}
    for module, found in modules.items():
        kinds.setdefault(_pattern(module.target), {})[module.target] = found
    ranks, alphas = {}, {}
    for kind, held in kinds.items():
        alike = len({*held.values()}) == 1
        for target, found in held.items():
            if found != usual:
                key = kind if alike else re.escape(target)
                ranks[key], alphas[key] = found
    attached = [module for module in modules if not module.name.startswith(EXTRA)]
    parameters = [module.target for module in attached if module.is_parameter]
    if naming == "released":  # a name for every expert
        targets: str | list[str] = "|".join(sorted(kinds))
    else:
        targets = [module.target for module in attached if not module.is_parameter]
    return {
        **_REQUIRED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": targets,
        "target_parameters": parameters or None,
    }


def _pattern(target: str) -> str:
    """Returns a pattern for the target in every layer, and of every expert."""
    words = target.split(".")
    return r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in words)


def _match(patterns: Mapping[str, Any], target: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default


def read_config(folder: Path) -> AdapterConfig:
    """Returns what the configuration of a folder says.

    Raises:
      CheckpointError: it cannot be read, a value is out of its range, or the adapters are of a kind
        that is not computed here.
    """
    path = folder / CONFIG_NAME
    try:
        config = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {brief(config)}")
    required = _REQUIRED | _REQUIRED_TOO
    for field, value in required.items():
        if config.get(field, value) != value and (config[field] or value):
            raise CheckpointError(
                f"{path}: {field} must be {value!r}, got {brief(config[field])}: adapters of this "
                "kind are not computed here"
            )
    if config.get("init_lora_weights") not in _STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights must be one of {list(_STARTS)}, got "
            f"{brief(config['init_lora_weights'])}: adapters that began so go with another base; "
            "convert them with PEFT (path_initial_model_for_weight_conversion)"
        )
    for field in sorted(config.keys() - required.keys() - set((_READ + _IGNORED).split())):
        if config[field]:
            raise CheckpointError(
                f"{path}: {brief(field)} (= {brief(config[field])}) is unknown and could change "
                f"what the adapters compute{did_you_mean(field, required)}; remove it if it does "
                "not"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    _check_rank(path, "r", rank)
    _check_alpha(path, "lora_alpha", alpha)
    ranks = _read_patterns(path, config, "rank_pattern", _check_rank)
    alphas = _read_patterns(path, config, "alpha_pattern", _check_alpha)
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CheckpointError(
            f"{path}: target_parameters must be a list of names, got {brief(parameters)}"
        )
    return AdapterConfig(rank, alpha, ranks, alphas, tuple(parameters))


def _check_rank(path: Path, field: str, rank: Any) -> None:
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise CheckpointError(
            f"{path}: {field} must be an integer between 1 and {_MOST_RANK}, got {brief(rank)}"
        )


def _check_alpha(path: Path, field: str, alpha: Any) -> None:
    if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:
        raise CheckpointError(
            f"{path}: {field} must be a number above 0 and at most {_MOST_ALPHA}, got "
            f"{brief(alpha)}"
        )


def _read_patterns(path: Path, config: dict, field: str, check: Callable) -> dict[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {field} must be a JSON object, got {brief(patterns)}")
    for pattern, value in patterns.items():
        check(path, f"{field} of {brief(pattern)}", value)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: {field} has {brief(pattern)}, no regular expression: {error}"
            ) from error
    return patterns
