"""What a folder's files add to `config.json`: end tokens, and the generation of its prompts."""

import json
import re

import pytest

from v4jax.config.folder import MARKS, read_folder_config
from v4jax.config.loading import load_model_config
from v4jax.errors import ConfigError
from v4jax.tokenizer import PROFILES

from .released import FLASH, FLASH_0731

EARLY, LATE = MARKS["preview"], MARKS["0731"]
OWN = {"v4jax_profile": "preview"}


def write(folder, raw, **files):
    """Writes config.json and further files, whose names have `__` for a slash and `_` for a dot."""
    for name, content in {"config_json": raw, **files}.items():
        path = folder.joinpath(*name.split("__"))
        path = path.with_name(".".join(path.name.rsplit("_", 1)))
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


# {what: (config.json, files beside it, the profile)}
PROFILE = {
    "a preview": (FLASH, {}, "preview"),
    "a draft module": (FLASH_0731, {}, "0731"),
    "the encoder of a preview": (FLASH, {"encoding__encoding_dsv4_py": EARLY}, "preview"),
    "a preview with a draft module": (FLASH_0731, {"encoding__encoding_py": EARLY}, "preview"),
    "a later encoder, with both texts": (
        *(FLASH, {"encoding__a_py": "…", "encoding__b_py": f"{EARLY}\n{LATE} — exhaustive"}),
        "0731",
    ),
    "a template": (FLASH, {"chat_template_jinja": f"{{{{ '{LATE}' }}}}"}, "0731"),
    "a template among the tokenizer's values": (
        *(FLASH, {"tokenizer_config_json": {"chat_template": f"{EARLY} … {LATE} …"}}),
        "0731",
    ),
    "a template without effort texts": (FLASH_0731, {"chat_template_jinja": "{{ x }}"}, "0731"),
    "our own key": (FLASH_0731 | OWN, {"chat_template_jinja": LATE}, "preview"),
}


@pytest.mark.parametrize(("raw", "files", "profile"), PROFILE.values(), ids=PROFILE.keys())
def test_profile(tmp_path, raw, files, profile):
    assert load_model_config(write(tmp_path, raw, **files)).profile == profile


def test_marks_are_of_the_texts():
    """The later generation has both texts, under other names."""
    for profile, mark in MARKS.items():
        assert PROFILES[profile].effort_prefixes["max"].startswith(mark)
    assert PROFILES["0731"].effort_prefixes["high"].startswith(EARLY)


# {what: (eos of config.json, of generation_config.json, the end tokens)}
ENDS = {
    "the same": (1, 1, (1,)),
    "none said": (1, None, (1,)),
    "more": (1, [1, 128804], (1, 128804)),
    "another": (1, 5, (1, 5)),
    "lists": ([1, 7], [5, 7], (1, 7, 5)),
}


@pytest.mark.parametrize(("own", "generation", "ends"), ENDS.values(), ids=ENDS.keys())
def test_end_tokens(tmp_path, own, generation, ends):
    raw = {"eos_token_id": generation, "temperature": 0.6, "do_sample": True}
    write(tmp_path, FLASH | {"eos_token_id": own}, generation_config_json=raw)
    assert load_model_config(tmp_path).end_token_ids == ends


BROKEN = {
    "no object": ({"generation_config_json": []}, "must hold a JSON object, got list"),
    "no token": (
        {"generation_config_json": {"eos_token_id": [1, "x"]}},
        "generation_config.json: every entry of eos_token_id must be an integer, got 'x'",
    ),
    "token beyond the vocabulary": (
        {"generation_config_json": {"eos_token_id": 129280}},
        "model.more_eos_token_ids must be token ids below vocab_size = 129280, got (129280,)",
    ),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(tmp_path, files, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_folder_config(write(tmp_path, FLASH, **files))


def test_encoder_that_is_no_text(tmp_path):
    write(tmp_path, FLASH)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="its prompt encoder cannot be read: 'utf-8' codec"):
        read_folder_config(tmp_path)
