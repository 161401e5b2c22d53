"""What a checkpoint folder says about its model: `config.json`, and what files beside it add.

    config.json                        the model
    generation_config.json             further tokens that end an answer
    encoding/*.py, chat templates      the texts that ask for effort, which tell the generation

The tensors are read by `v4jax.checkpoint`.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from v4jax.config.from_hf import PROFILE_KEY, model_config_from_hf
from v4jax.config.json_keys import MOST_BYTES, JsonKeys, read_json
from v4jax.config.model import ModelConfig
from v4jax.errors import ConfigError
from v4jax.files import Path, PathLike, read_regular, to_path

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
ENCODERS = "encoding"  # the folder of the released prompt encoder
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # of those who convert checkpoints

# {profile: how the longest effort text of its generation begins}, the latest first: an encoder has
# the texts of earlier generations, too.
MARKS = {
    "0731": "Reasoning Effort: Beyond maximum",
    "preview": "Reasoning Effort: Absolute maximum",
}


def read_folder_config(folder: PathLike) -> tuple[dict, ModelConfig]:
    """Returns the parsed `config.json` of a folder, and the configuration that its files give.

    Raises:
      ConfigError: `config.json` is missing, or a file is unreadable, no JSON object, or contradicts
        what the code computes.
    """
    folder = to_path(folder)
    raw = read_object(folder / CONFIG_NAME)
    config = model_config_from_hf(raw)
    names = _list_names(folder)
    if GENERATION_NAME in names:
        config = _add_ends(config, read_object(folder / GENERATION_NAME))
    if PROFILE_KEY not in raw:
        config = dataclasses.replace(config, profile=_find_profile(folder, names) or config.profile)
    return raw, config


def read_object(path: Path) -> dict:
    """Returns the JSON object that a file holds.

    Raises:
      ConfigError: the file is missing, unreadable, or no JSON object.
    """
    try:
        raw = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _list_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed: {error.strerror or error}") from error


def _add_ends(config: ModelConfig, raw: Mapping) -> ModelConfig:
    """Returns the configuration with the end tokens of a `generation_config.json` added."""
    keys, key = JsonKeys(raw, GENERATION_NAME), "eos_token_id"
    listed = isinstance(raw.get(key), list)
    ids = keys.take_list(key, int) if listed else [keys.take(key, int, config.eos_token_id)]
    _, *more = dict.fromkeys((*config.end_token_ids, *ids))
    return dataclasses.replace(config, more_eos_token_ids=tuple(more))


def _find_profile(folder: Path, names: set[str]) -> str | None:
    """Returns the generation whose effort texts the folder's prompt encoder has, if it has one."""
    for text in _encoders(folder, names):
        for profile, mark in MARKS.items():
            if mark in text:
                return profile
    return None


def _encoders(folder: Path, names: set[str]) -> Iterator[str]:
    """Yields the texts of the files that may make prompts."""
    files = [folder / name for name in TEMPLATES if name in names]
    try:
        if ENCODERS in names:
            found = (folder / ENCODERS).iterdir()
            files = [*sorted(path for path in found if path.name.endswith(".py")), *files]
        for file in files:
            yield read_regular(file, MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its prompt encoder cannot be read: {error}") from error
