"""Models of the Hugging Face hub, which a server on this machine stands in for."""

import shutil
import sys

import hub_server
import jax
import numpy as np
import pytest
from checkpoint import folders
from checkpoint.test_shares import host_arrays
from jax.sharding import NamedSharding

import v4jax
from v4jax import files, hub
from v4jax.checkpoint import hf_reader, read_abstract, read_model
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.checkpoint.hf_sources import plan_sources
from v4jax.cli import engine, main
from v4jax.config.inference import InferenceConfig
from v4jax.config.loading import load_model_config
from v4jax.errors import CheckpointError, UnsupportedError, V4JaxError
from v4jax.model.weights import variables
from v4jax.parallel import Layout, annotate_shardings, make_mesh
from v4jax.parallel.weight_sharding import plan_boxes, spec_of
from v4jax.tokenizer import load_tokenizer

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "org/some-model.1"
SHARDS = "-of-00003"
CONFIG = dict(
    folders.SMALL,
    compress_ratios=[4],
    num_hidden_layers=1,
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    n_routed_experts=2,
    vocab_size=320,
    v4jax_tokenizer="byte",
)


def forget():
    """Makes this process forget what names of the hub mean."""
    for function in (hub._find_commit, hub.find_snapshot, hub.open_system):
        function.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = folders.tensors_of(CONFIG)
    return folders.write(tmp_path_factory.mktemp("hub") / "first", tensors, CONFIG)


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A hub that has one model; its cache on this machine is empty."""
    with hub_server.serving({NAME: {"main": folder}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        forget()
        yield server
    forget()


def same(model, other) -> bool:
    a, b = host_arrays(model), host_arrays(other)
    return a.keys() == b.keys() and all(
        folders.same_bytes(x, y) for path in a for x, y in zip(a[path], b[path], strict=True)
    )


@pytest.mark.parametrize("name", [f"hf://{NAME}", NAME, f"hf://{NAME}@main", f"{NAME}@main"])
def test_names(server, folder, name):
    commit = server.commit(folder)
    assert files.find_model(name) == f"hf://{NAME}@{commit}"
    assert len(server.requests) == 1
    assert load_model_config(name) == load_model_config(folder)
    assert all(commit in path for method, path, _ in server.requests[1:] if "/cdn" not in path)


def test_a_model_by_ranges(server, folder, monkeypatch):
    """What is read is the tensors once, beside headers and JSON; long ranges come in pieces."""
    monkeypatch.setattr(files, "REQUEST_BYTES", 4096)
    model = v4jax.load(f"hf://{NAME}")
    assert same(model, v4jax.load(folder))
    weights = sum(tensor.nbytes for tensor in open_folder(folder).tensors.values())
    shards = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert weights < shards == server.received(SHARDS)
    assert max(count for _, path, count in server.requests if SHARDS in path) == 4096
    assert load_tokenizer(model.folder).vocab_size == load_tokenizer(NAME).vocab_size == 320
    assert {method for method, *_ in server.requests} == {"GET"}


def test_a_host_fetches_its_shares(server, folder):
    """Of two hosts with four devices each, by the parts that `read_model` reads for its devices."""
    layout = Layout(make_mesh(expert=2, context=4), "serve")
    opened = open_folder(f"hf://{NAME}")
    placed = variables(annotate_shardings(read_abstract(folder), layout))
    shapes = {path: variable.get_value().shape for path, variable in placed.items()}
    sources = plan_sources(opened, shapes)
    half = sum(source.nbytes for path, source in sources.items() if ".experts." in path) // 2
    for host in (jax.devices()[:4], jax.devices()[4:]):
        server.requests.clear()
        share = experts = 0
        with hf_reader._Reader(sources, placed, None, layout) as reader:
            for path, source in sources.items():
                sharding = NamedSharding(layout.mesh, spec_of(placed[path]))
                for array in source.arrays:
                    indices = sharding.devices_indices_map(array.shape)
                    for box, _ in plan_boxes({d: indices[d] for d in host}, array.shape):
                        part = reader._read(array, box).size / np.prod(array.shape)
                        share += round(array.nbytes * part)
                        experts += round(array.nbytes * part) if ".experts." in path else 0
        assert server.received(SHARDS) == server.received("") == share
        assert experts == half


def fill_cache(server, folder, cache):
    """Puts a commit into the hub's cache, as `hf download` does."""
    commit, below = server.commit(folder), cache / f"models--{NAME.replace('/', '--')}"
    (below / "refs").mkdir(parents=True)
    (below / "refs" / "main").write_text(commit)
    shutil.copytree(folder, below / "snapshots" / commit)
    return below / "snapshots" / commit


@pytest.mark.parametrize("offline", [False, True])
def test_the_cache_is_read_without_a_request(server, folder, tmp_path, monkeypatch, offline):
    snapshot = fill_cache(server, folder, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    model = v4jax.load(NAME)
    assert model.folder == snapshot and same(model, v4jax.load(folder))
    assert server.requests == []


def test_a_cache_that_lacks_a_shard_is_not_read(server, folder, tmp_path, monkeypatch):
    snapshot = fill_cache(server, folder, tmp_path / "cache")
    next(snapshot.glob("*.safetensors")).unlink()
    assert same(v4jax.load(NAME), v4jax.load(folder))
    assert server.received(SHARDS) > 0
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the hub's cache on this"):
        v4jax.load(NAME)


def test_all_reads_are_of_one_commit(server, folder, tmp_path):
    """A push while a model is read changes nothing; a new process sees it."""
    shutil.copytree(folder, tmp_path / "second")
    folders.change_json(tmp_path / "second" / "config.json", lambda raw: raw.update(rope_theta=2e4))
    assert load_model_config(NAME).rope_theta == 1e4
    server.repositories[NAME]["main"] = tmp_path / "second"
    server.repositories[NAME]["v1.0"] = folder
    assert load_model_config(NAME).rope_theta == 1e4
    forget()
    assert load_model_config(NAME).rope_theta == 2e4
    assert load_model_config(f"{NAME}@v1.0").rope_theta == 1e4
    commit = server.commit(folder)
    assert load_model_config(f"hf://{NAME}@{commit}").rope_theta == 1e4


def test_connections_that_break_are_made_again(server, folder):
    opened = open_folder(f"hf://{NAME}")
    server.cut = 5
    assert same(read_model(opened.path), v4jax.load(folder))
    assert server.cut == 0
    answers = iter([(503, ""), (429, ""), (500, "")])
    server.refuse = lambda path: next(answers, None)
    forget()
    assert load_model_config(NAME) == load_model_config(folder)


def only(part: str, status: int, code: str = ""):
    """Refuses requests with that in their path."""
    return lambda path: (status, code) if part in path else None


# {what: (name, how the hub refuses, what the message must say)}
REFUSED = {
    "no such repository": ("org/none", None, "has no such repository, or a private one; check the"),
    "no such revision": (f"{NAME}@v9", None, "it has no revision v9; see http"),
    "no such commit": (f"{NAME}@{'0' * 40}", None, f"it has no revision {'0' * 40}; see http"),
    "no address": ("hf://name", None, "hf://name names no repository of the hub; write hf://org/"),
    "gated": (NAME, only("/resolve/", 403, "GatedRepo"), "it is gated; accept its terms at http"),
    "not logged in": (NAME, only("/resolve/", 401), "refuses the token; log in with `hf"),
    "private": (NAME, only("/api/", 401, "RepoNotFound"), "or a private one; check the name"),
    "may not read": (NAME, only("/tree/", 403), "the token may not read it; give it that"),
    "down": (NAME, only("/revision/", 502), "answers 502; try again later"),
    "down later": (NAME, only("/resolve/", 502), "answers 502; try again later"),
    "no config": (f"{NAME}@empty", None, "config.json"),
}


@pytest.mark.parametrize(("name", "refuse", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(server, tmp_path, capsys, name, refuse, message):
    """In one line, by a call and by a command."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    server.repositories[NAME]["empty"] = tmp_path / "empty"
    server.refuse = refuse or server.refuse
    with pytest.raises(V4JaxError) as error:
        v4jax.load(name)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert main.run(["inspect", name]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if message in line and line.startswith("v4jax: error: ")]


def test_nobody_answers(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"127.0.0.1:9 cannot be reached \(ConnectError: .*"):
        v4jax.load(NAME)


@pytest.mark.parametrize("name", [NAME, f"hf://{NAME}"])
def test_library_is_missing(monkeypatch, name):
    forget()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = rf"{NAME}: hf:// needs the extra hub; pip install 'v4jax\[hub\]'"
    with pytest.raises(UnsupportedError, match=message):
        v4jax.load(name)


def test_a_folder_goes_before_a_repository(server, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / NAME)
    assert files.find_model(NAME) == NAME
    assert load_model_config(NAME) == load_model_config(folder)
    assert files.find_model("configs/none.py") == "configs/none.py"
    assert server.requests == []


def test_the_hub_is_only_read(server, folder):
    with pytest.raises(CheckpointError, match="the hub is only read; write a folder, and upload"):
        v4jax.save(v4jax.load(folder), f"hf://{NAME}/mine")
    with pytest.raises(OSError, match="the hub is only read"):
        files.check_writable(f"hf://{NAME}/answers.jsonl")


def test_a_server_without_ranges(server, folder, monkeypatch):
    """What it gives is more than was asked for, and is no part of a tensor."""
    monkeypatch.setattr(
        hub_server._Handler, "_send_file", lambda self, file: self._send(200, file.read_bytes(), {})
    )
    (shard, *_) = sorted(folder.glob("*.safetensors"))
    message = f"{shard.name} cannot be read: the hub gave {shard.stat().st_size} bytes where 8 were"
    with pytest.raises(CheckpointError, match=message):
        v4jax.load(NAME)


def test_a_command_names_the_commit(server, folder):
    """All hosts read it, and the answers of a job are of it."""
    config = engine.complete(InferenceConfig(NAME))
    assert config.model == f"hf://{NAME}@{server.commit(folder)}"
    assert engine.identify_model(config, None) == config.model
    assert engine.complete(config) == config
