"""Which blocks behind the layers a folder has: its tensors say so, whatever the file counts."""

import dataclasses

import pytest
import small_models
from oracle import checkpoints

import v4jax
from v4jax import log
from v4jax.config.from_hf import model_config_from_hf
from v4jax.config.model import DraftConfig, LayerKind
from v4jax.errors import CheckpointError, ConfigError

TAPPED = DraftConfig(stages=2, target_layer_ids=(0, 1), markov_rank=16, noise_token_id=300)
WINDOW = LayerKind.WINDOW
DRAFTS = small_models.make_config(
    "csa hca",
    draft=TAPPED,
    compress_ratios=(4, 128, 0, 0),
    layer_types=(LayerKind.CSA, LayerKind.HCA, WINDOW, WINDOW),
)
SERIAL = small_models.make_config("csa hca", mtp=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{config: ({name: array}, config.json)} of released folders."""
    found = {}
    for name, config in (("drafts", DRAFTS), ("serial", SERIAL)):
        folder = tmp_path_factory.mktemp(name) / "model"
        v4jax.save(small_models.make_model(config, stored_as="released"), folder)
        found[name] = checkpoints.read_checkpoint(folder)
    return found


def test_written_back_byte_for_byte(tmp_path, folders):
    tensors, raw = folders["drafts"]
    checkpoints.write_checkpoint(tmp_path / "a", tensors, raw, shards=1)
    v4jax.save(v4jax.load(tmp_path / "a"), tmp_path / "b")
    again, raw_again = checkpoints.read_checkpoint(tmp_path / "b")
    assert raw_again == raw and raw["num_nextn_predict_layers"] == 1
    assert {n: (a.dtype, a.tobytes()) for n, a in again.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in tensors.items()
    }


def without(tensors, prefix):
    return {name: array for name, array in tensors.items() if not name.startswith(prefix)}


# {what: (folder, tensors left out, changes to config.json, blocks found: serial, stages)}
READ = {
    "a draft module": ("drafts", (), {}, (0, 2)),
    "another count of MTP blocks beside it": (
        *("drafts", (), {"num_nextn_predict_layers": 3}),
        (0, 2),
    ),
    "no tensors of the module": ("drafts", "mtp.", {}, (0, 0)),
    "an MTP block": ("serial", (), {}, (1, 0)),
    "more MTP blocks counted than there are": (
        *("serial", (), {"num_nextn_predict_layers": 3}),
        (1, 0),
    ),
    "an MTP block that is not counted": ("serial", (), {"num_nextn_predict_layers": 0}, (1, 0)),
    "no tensors of the MTP block": ("serial", "mtp.", {}, (0, 0)),
}


@pytest.mark.parametrize(("folder", "gone", "change", "blocks"), READ.values(), ids=READ.keys())
def test_tensors_decide(tmp_path, folders, folder, gone, change, blocks):
    tensors, raw = folders[folder]
    checkpoints.write_checkpoint(tmp_path, without(tensors, gone), raw | change, shards=1)
    config = v4jax.load(tmp_path).config
    assert (len(config.mtp_layers), len(config.draft_layers)) == blocks


def test_what_is_left_out_is_said(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.setattr(log, "_said", set())
    tensors, raw = folders["drafts"]
    checkpoints.write_checkpoint(tmp_path, without(tensors, "mtp."), raw, shards=1)
    model = v4jax.load(tmp_path)
    said = capsys.readouterr().err
    assert "no tensors of a draft module: the model runs without, and drafts nothing" in said
    assert said.count("drafts nothing; each pass writes one token") == 1
    with pytest.raises(ConfigError, match="neither draft module nor MTP block"):
        model.draft([1], model.init_cache(1, 8))


def as_transformers(raw):
    """Returns a released config.json with the layers as transformers writes them."""
    config = model_config_from_hf(raw)
    layers = {"layer_types": [kind.value for kind in config.layer_types[:2]]}
    gone = ("compress_ratios", "v4jax_profile")
    return {key: value for key, value in raw.items() if key not in gone} | layers


def test_saved_by_transformers_without_the_module(tmp_path, folders, monkeypatch, capsys):
    """Its config.json describes the module, and nothing counts the stages."""
    monkeypatch.setattr(log, "_said", set())
    tensors, raw = folders["drafts"]
    checkpoints.write_checkpoint(tmp_path, without(tensors, "mtp."), as_transformers(raw), shards=1)
    config = v4jax.load(tmp_path).config
    assert config.draft is None and config.profile == "0731"
    assert "has no tensors of a draft module" in capsys.readouterr().err


def test_stages_that_only_the_tensors_count(tmp_path, folders):
    tensors, raw = folders["drafts"]
    checkpoints.write_checkpoint(tmp_path, tensors, as_transformers(raw), shards=1)
    assert v4jax.load(tmp_path).config == dataclasses.replace(DRAFTS, profile="0731")


def test_counts_that_the_tensors_correct_are_said(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.setattr(log, "_said", set())
    tensors, raw = folders["serial"]
    raw = raw | {"num_nextn_predict_layers": 3}
    checkpoints.write_checkpoint(tmp_path, tensors, raw, shards=1)
    v4jax.load(tmp_path)
    assert "counts 3 MTP blocks, the tensors make up 1: 1 are used" in capsys.readouterr().err


# {what: (folder, its tensors changed, config.json changed, what the message must say)}
BROKEN = {
    "a stage missing": (
        *("drafts", lambda t: without(t, "mtp.0."), {}),
        "mtp.N must be numbered from 0 without a gap, got ['1']",
    ),
    "fewer stages than ratios": (
        *("drafts", lambda t: without(t, "mtp.1."), {}),
        "a draft module of 1 stages, but config.json has 2 stages",
    ),
    "no main_proj": (
        *("drafts", lambda t: without(t, "mtp.0.main_proj"), {}),
        "mtp.0 must have main_proj (a DSpark draft module) or e_proj and h_proj (an MTP block), "
        "got neither",
    ),
    "a tensor of the module missing": (
        *("drafts", lambda t: without(t, "mtp.1.markov_head.markov_w2"), {}),
        "mtp.1.markov_head.markov_w2.weight is missing",
    ),
    "a tensor of the module too many": (
        *("drafts", lambda t: t | {"mtp.0.norm.weight": t["mtp.1.norm.weight"]}, {}),
        "mtp.0.norm.weight",
    ),
}


@pytest.mark.parametrize(
    ("folder", "change", "keys", "message"), BROKEN.values(), ids=BROKEN.keys()
)
def test_broken(tmp_path, folders, folder, change, keys, message):
    tensors, raw = folders[folder]
    checkpoints.write_checkpoint(tmp_path, change(tensors), raw | keys, shards=1)
    with pytest.raises(CheckpointError) as error:
        v4jax.load(tmp_path)
    assert message in str(error.value)


def test_keys_and_tensors_of_different_modules(tmp_path, folders):
    tensors, raw = folders["drafts"]
    plain = {key: value for key, value in raw.items() if not key.startswith("dspark_")}
    plain |= {"num_nextn_predict_layers": 2}
    checkpoints.write_checkpoint(tmp_path / "a", tensors, plain, shards=1)
    with pytest.raises(CheckpointError, match=r"config\.json has no dspark_ keys"):
        v4jax.load(tmp_path / "a")
    tensors, _ = folders["serial"]
    checkpoints.write_checkpoint(tmp_path / "b", tensors, raw, shards=1)
    with pytest.raises(CheckpointError, match=r"has dspark_ keys, but mtp\.0 is an MTP block"):
        v4jax.load(tmp_path / "b")
