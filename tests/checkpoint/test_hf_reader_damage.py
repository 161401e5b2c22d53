"""Damaged folders: each gives an error that names tensor and file, and no model."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy

from v4jax.checkpoint import read_abstract, read_model
from v4jax.errors import CheckpointError, ConfigError

from . import folders

SECONDS_TO_SAY_NO = 10  # a tenth of a second on an idle core; planning 1,500 layers took minutes
QUERY = "layers.2.attn.wq_a"
FIRST = "model-00001-of-00003.safetensors"


def change(**tensors):
    """Changes tensors: None removes one, a function maps one, an array adds one."""

    def damage(folder):
        found = folders.tensors_of()
        for name, value in tensors.items():
            if value is None:
                del found[name]
            else:
                found[name] = value(found[name]) if callable(value) else value
        folders.write(folder, found)

    return damage


def index(change_weight_map):
    """Changes the index's weight map."""

    def damage(folder):
        folders.write(folder)
        folders.change_json(
            folder / folders.INDEX, lambda raw: change_weight_map(raw["weight_map"])
        )

    return damage


def after(action):
    """Acts on a good folder."""

    def damage(folder):
        folders.write(folder)
        action(folder)

    return damage


def truncate(folder):
    """Cuts the last bytes of the first file."""
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:-5])


def duplicate(folder):
    """Puts one tensor into a second file, without an index to decide."""
    (folder / folders.INDEX).unlink()
    safetensors.numpy.save_file(
        {"norm.weight": folders.tensors_of()["norm.weight"]}, str(folder / "more.safetensors")
    )


def both_names(folder):
    """Adds a tensor under the name that transformers gives it."""
    (folder / folders.INDEX).unlink()
    array = folders.tensors_of()["norm.weight"]
    safetensors.numpy.save_file({"model.norm.weight": array}, str(folder / "more.safetensors"))


def out_of_range(table):
    """Returns a table with one id too large, which int32 would fold back into range."""
    table = table.copy()
    table[3, 1] = 2**32
    return table


def replaced(name, make):
    """Puts something that `make(path)` makes in the place of a file."""

    def replace(folder):
        (folder / name).unlink()
        make(folder / name)

    return after(replace)


def nowhere(path):
    """Makes a link that leads nowhere."""
    path.symlink_to("nowhere")


def circle(path):
    """Makes a link to itself."""
    path.symlink_to(path.name)


def endless(path):
    """Makes a link to a device that never ends."""
    path.symlink_to("/dev/zero")


def huge(path):
    """Makes a sparse file of a terabyte."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def no_experts_key(raw):
    """Says that experts are FP8 while they are FP4."""
    raw["expert_dtype"] = "fp8"


DAMAGE = {
    "missing": (
        change(**{QUERY + ".weight": None}),
        r"tensor layers.2.attn.wq_a.weight is missing: no file of",
    ),
    "missing scale": (
        change(**{QUERY + ".scale": None}),
        r"tensor layers.2.attn.wq_a.scale is missing",
    ),
    "missing expert": (
        change(**{"layers.3.ffn.experts.2.w3.weight": None}),
        r"tensor layers.3.ffn.experts.2.w3.weight is missing",
    ),
    "missing in an MTP block": (
        change(**{"mtp.0.hc_attn_fn": None}),
        r"tensor mtp.0.hc_attn_fn is missing: no file of",
    ),
    "unknown": (
        change(**{"layers.2.attn.wq_c.weight": np.zeros(3, np.float32)}),
        r"tensor layers.2.attn.wq_c.weight in .*safetensors is unknown: .*did you mean",
    ),
    "unknown layer": (
        change(**{"layers.6.attn_norm.weight": np.zeros(64, np.float32)}),
        r"tensor layers.6.attn_norm.weight in .* is unknown",
    ),
    "scales without a quantized weight": (
        change(**{"norm.scale": np.zeros(1, np.float32)}),
        r"tensor norm.scale in .* is unknown: scales, but their weight is not quantized",
    ),
    "shape": (
        change(**{"layers.3.attn_norm.weight": lambda x: x[:-1]}),
        r"tensor layers.3.attn_norm.weight in .*safetensors must have shape \[64\], got \[63\]",
    ),
    "transposed": (
        change(**{"layers.1.ffn.gate.weight": lambda x: np.ascontiguousarray(x.T)}),
        r"layers.1.ffn.gate.weight in .* must have shape \[4, 64\], got \[64, 4\]",
    ),
    "unpacked experts": (
        change(**{"layers.1.ffn.experts.0.w1.weight": lambda x: np.repeat(x, 2, 1)}),
        r"layers.1.ffn.experts.0.w1.weight in .* must have shape \[32, 32\], got \[32, 64\]",
    ),
    "scale shape": (
        change(**{QUERY + ".scale": lambda x: np.repeat(x, 2, 0)}),
        r"layers.2.attn.wq_a.scale in .* must have shape \[1, 1\], got \[2, 1\]",
    ),
    "dtype": (
        change(**{"norm.weight": lambda x: x.astype(np.float16)}),
        r"tensor norm.weight in .* must have dtype BF16 or F32, got F16",
    ),
    "bytes for a linear": (
        change(**{QUERY + ".weight": lambda x: x.view(np.int8)}),
        r"wq_a.weight in .* must have dtype F8_E4M3 or BF16 or F32, got I8",
    ),
    "dtype of a table": (
        change(**{"layers.0.ffn.gate.tid2eid": lambda x: x.astype(np.float32)}),
        r"tid2eid in .* must have dtype I64 or I32, got F32",
    ),
    "dtype of scales": (
        change(**{QUERY + ".scale": lambda x: x.astype(np.float64)}),
        r"wq_a.scale in .* must have dtype F8_E8M0 or U8 or F32, got F64",
    ),
    "scales of two kinds in one parameter": (
        change(**{"layers.3.ffn.experts.2.w2.scale": lambda x: x.astype(np.float32)}),
        r"experts.2.w2.scale in .* is F32 and .* is F8_E8M0: .* must be stored alike",
    ),
    "formats of two kinds in one parameter": (
        change(
            **{
                "layers.3.ffn.experts.2.w2.weight": np.zeros((64, 32), np.float32),
                "layers.3.ffn.experts.2.w2.scale": None,
            }
        ),
        r"is fp4 and layers.3.ffn.experts.2.w2.weight in .* is plain: they share one parameter",
    ),
    "expert id": (
        change(**{"layers.0.ffn.gate.tid2eid": out_of_range}),
        r"tid2eid in .* must hold expert ids below 4, got 4294967296 at \[3, 1\]",
    ),
    "negative expert id": (
        change(**{"layers.0.ffn.gate.tid2eid": lambda x: x - 1}),
        r"must hold expert ids below 4, got -1 at",
    ),
    "expert dtype": (
        after(lambda f: folders.change_json(f / "config.json", no_experts_key)),
        r"is I8 \(fp4\), but config.json says expert_dtype = 'fp8'",
    ),
    "truncated": (after(truncate), rf"{FIRST} is truncated: its header describes"),
    "no file": (after(lambda f: (f / FIRST).unlink()), rf"lies in {FIRST}, which does not exist"),
    "no shards": (
        after(lambda f: [p.unlink() for p in f.glob("model*")]),
        r"holds no \*.safetensors file",
    ),
    "no config": (after(lambda f: (f / "config.json").unlink()), r"has no config.json"),
    "no folder": (after(shutil.rmtree), r"is no folder"),
    "index is no JSON": (
        after(lambda f: (f / folders.INDEX).write_text("{")),
        r"index.json is broken: ",
    ),
    "index names a tensor twice": (
        after(lambda f: (f / folders.INDEX).write_text('{"weight_map": {"a": "b", "a": "b"}}')),
        r"index.json is broken: 'a' appears twice",
    ),
    "index without a map": (
        after(lambda f: (f / folders.INDEX).write_text('{"metadata": {}}')),
        r"index.json is broken: it has no weight_map",
    ),
    "index is a pipe": (
        replaced(folders.INDEX, os.mkfifo),
        r"index.json cannot be read: it is no regular file",
    ),
    "index never ends": (
        replaced(folders.INDEX, endless),
        r"index.json cannot be read: it is no regular file",
    ),
    "index of a terabyte": (
        replaced(folders.INDEX, huge),
        r"index.json cannot be read: it has 1,099,511,627,776 bytes, and at most 100,000,000 are",
    ),
    "index leads nowhere": (
        replaced(folders.INDEX, nowhere),
        r"index.json cannot be read: No such file or directory",
    ),
    "index leads to itself": (
        replaced(folders.INDEX, circle),
        r"index.json cannot be read: Too many levels of symbolic links",
    ),
    "index names a file of 300 characters": (
        index(lambda m: m.update({"norm.weight": "x" * 300})),
        r"tensor norm.weight must lie in a file beside it, got 'x{57}\.\.\.x{58}'$",
    ),
    "index names a file with a null": (
        index(lambda m: m.update({"norm.weight": "a\0b"})),
        r"tensor norm.weight must lie in a file beside it, got 'a\\x00b'",
    ),
    "index names a file of no encoding": (
        index(lambda m: m.update({"norm.weight": "\ud800"})),
        r"tensor norm.weight must lie in a file beside it, got '\\ud800'",
    ),
    "index names another folder": (
        index(lambda m: m.update({"norm.weight": "../other.safetensors"})),
        r"tensor norm.weight must lie in a file beside it, got '../other.safetensors'",
    ),
    "index names an absent tensor": (
        index(lambda m: m.update({"layers.9.x": FIRST})),
        rf"tensor layers.9.x is absent from .*{FIRST}, where the index puts it",
    ),
    "index lacks a tensor": (
        index(lambda m: m.pop("norm.weight")),
        r"tensor norm.weight is in .*, but model.safetensors.index.json names no file for it",
    ),
    "index names the wrong file": (
        index(lambda m: m.update({"norm.weight": FIRST})),
        rf"tensor norm.weight is in .*, but .* names {FIRST} for it",
    ),
    "duplicate": (after(duplicate), r"tensor norm.weight is in .* and again in more.safetensors"),
    "duplicate under two names": (after(both_names), r"tensors .*norm.weight.* are the same"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_model(tmp_path)


# {what is wrong with config.json: (what is put in its place, what the message must say)}
FILES = {
    "pipe": (os.mkfifo, r"config.json cannot be read: it is no regular file"),
    "never ends": (endless, r"config.json cannot be read: it is no regular file"),
    "a terabyte": (huge, r"config.json cannot be read: it has 1,099,511,627,776 bytes, and at"),
    "leads nowhere": (nowhere, r"config.json cannot be read: No such file"),
    "nested without end": (lambda f: f.write_text("[" * 10**6), r"config.json is no JSON: nested"),
    "no UTF-8": (
        lambda f: f.write_bytes(b'{"a": "\xff"}'),
        r"config.json is no JSON: 'utf-8' codec",
    ),
    "a number of digits": (lambda f: f.write_text("9" * 10**4), r"config.json is no JSON: Exceeds"),
}


@pytest.mark.parametrize("make, message", FILES.values(), ids=FILES.keys())
def test_files_that_are_no_config(tmp_path, make, message):
    replaced("config.json", make)(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_model(tmp_path)


def test_config_with_a_byte_order_mark(tmp_path):
    folders.write(tmp_path)
    for name in ("config.json", folders.INDEX):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_abstract(tmp_path).config == read_abstract(folders.write(tmp_path / "same")).config


def test_a_claim_of_many_layers_is_answered_at_once(tmp_path):
    """Of 1,000 layers that do not repeat, and 16,384 experts: nothing of that size is made."""
    folders.write(tmp_path)
    ratios = [0, 4, 128, 0, 0, 4, *np.random.RandomState(0).choice([0, 4, 128], 994).tolist(), 0]
    claim = {"num_hidden_layers": 1000, "compress_ratios": ratios, "n_routed_experts": 16384}
    folders.change_json(tmp_path / "config.json", lambda raw: raw.update(claim))
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"tensor layers.0.ffn.experts.4.w1.weight is missing"
    ):
        read_model(tmp_path)
    folders.change_json(tmp_path / "config.json", lambda raw: raw.update(n_routed_experts=4))
    with pytest.raises(CheckpointError, match=r"tensor layers.6.hc_attn_fn is missing"):
        read_model(tmp_path)
    assert time.monotonic() - started < SECONDS_TO_SAY_NO


def test_broken_config(tmp_path):
    folders.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"model_type must be 'deepseek_v4', got 'llama'"):
        read_model(tmp_path)


def test_bytes_are_read_only_after_every_header_was_checked(tmp_path, monkeypatch):
    change(**{"head.weight": None})(tmp_path)
    monkeypatch.setattr("v4jax.checkpoint.hf_reader.read_into", None)  # any use would fail
    with pytest.raises(CheckpointError, match=r"head.weight is missing"):
        read_model(tmp_path)
