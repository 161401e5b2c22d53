"""The store of a training run: bit for bit, onto any mesh, and nothing lost when a save fails."""

import dataclasses
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.checkpoint.leaves import name_leaves
from v4jax.checkpoint.orbax_store import DamagedError, Store
from v4jax.config.loading import load_model_config
from v4jax.errors import CheckpointError, ConfigError, UnsupportedError
from v4jax.parallel import make_mesh
from v4jax.quant.scaled_array import FP4_BLOCK, FP8_BLOCK, ScaledArray

from . import store_worker

WORKER = pathlib.Path(store_worker.__file__)
ROOT = pathlib.Path(__file__).parents[2]
KILLS = 3


def make_state(mesh, spec: PartitionSpec) -> dict:
    """Returns every kind of leaf that training keeps: plain, FP8, packed FP4, optimizer, scalar."""
    over, whole = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
    draw = np.random.RandomState(0)
    normal, codes = draw.standard_normal((16, 64)), draw.randint(0, 256, (16, 32), np.uint8)
    fp8 = normal.astype(ml_dtypes.float8_e4m3fn)
    weights = {
        "plain": normal.astype(np.float32),
        "bfloat16": normal.astype(ml_dtypes.bfloat16),
        "fp4": ScaledArray(codes, codes[:, :2], FP4_BLOCK),
        "fp8": ScaledArray(fp8, codes[:1, :1], FP8_BLOCK),
        "flags": codes[:, 0] > 100,
        "ids": np.arange(16, dtype=np.int32),
    }

    def put(leaf):
        return jax.device_put(leaf, over if leaf.shape[0] == 16 else whole)

    weights = jax.tree.map(put, weights)
    return {
        "weights": weights,
        "optimizer": optax.adam(1e-3).init({"plain": weights["plain"]}),
        "key": jax.random.key_data(jax.random.key(7)),
        "step": jnp.int32(3),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
    }


def assert_same(found, expected) -> None:
    """Asserts the same structure, dtypes and bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(name_leaves(found).items(), jax.tree.leaves(expected), strict=True)
    for (name, a), b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def test_other_mesh(tmp_path):
    """What was split one way comes back split another, every bit the same; free scalars stay so."""
    state = make_state(make_mesh(data=8), PartitionSpec("data"))
    with Store(tmp_path) as store:
        assert store.latest() is None
        assert store.save(5, state, {"examples": 12, "name": "nano"})
    mesh = make_mesh(expert=2, tensor=4)
    like = make_state(mesh, PartitionSpec("tensor"))
    like = jax.tree.map(lambda x: abstract(x) if x.committed else x, like)
    with Store(tmp_path, read_only=True) as store:
        found, extra = store.restore(None, like)
        assert store.read_extra() == extra == {"examples": 12, "name": "nano"}
    assert_same(found, state)
    for (name, a), b in zip(name_leaves(found).items(), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding, name
    assert not found["step"].committed and found["weights"]["plain"].committed


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_training_goes_on_while_it_is_written(tmp_path):
    """The caller may donate the arrays and change the extra as soon as `save` returns."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state, extra = advance(store_worker.state_of(0)), {"position": [1]}
    with Store(tmp_path) as store:
        store.save(1, state, extra)
        state = advance(advance(state))
        extra["position"].append(2)
        found, restored = store.restore(1, state)
    assert_same(found, store_worker.state_of(1))
    assert restored == {"position": [1]}


def test_which_steps_are_kept(tmp_path):
    with Store(tmp_path, keep=2, every=10) as store:
        saved = [step for step in (0, 5, 10, 20, 25, 30) if store.save(step, {"x": jnp.arange(3)})]
        assert saved == [0, 10, 20, 30] and store.steps() == [20, 30]
        assert store.save(33, {"x": jnp.arange(3)}, force=True)
        assert not store.save(33, {"x": jnp.arange(4)}, force=True)  # there already
        assert store.steps() == [30, 33]


def test_step_that_is_not_there(tmp_path):
    like = {"x": jnp.arange(3)}
    with Store(tmp_path) as store:
        with pytest.raises(CheckpointError, match=r"holds no checkpoint$"):
            store.restore(None, like)
        store.save(3, like)
        store.save(4, like)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7, only of steps 3, 4$"):
            store.restore(7, like)


MISMATCHES = {
    "absent": ({"x": jnp.zeros(3), "y": jnp.zeros(3)}, "y is here but not in the checkpoint"),
    "more": ({}, "x is not here but in the checkpoint"),
    "shape": ({"x": jnp.zeros((3, 1))}, r"x has shape \(3, 1\) here and \(3,\) in the checkpoint"),
    "dtype": ({"x": jnp.zeros(3, jnp.bfloat16)}, "x has dtype bfloat16 here and float32 in the"),
    "no array": ({"x": 3}, "x must be a jax array to be stored, got int; plain values go into ext"),
    "key": ({"x": jax.random.key(0)}, "x is a random key; store jax.random.key_data of it"),
}


def test_state_that_does_not_fit(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, {"x": jnp.zeros(3)})
        for like, message in MISMATCHES.values():
            with pytest.raises(CheckpointError, match=message):
                store.restore(1, like)
        with pytest.raises(CheckpointError, match=r"extra must hold what JSON can express: .*set"):
            store.save(2, {"x": jnp.zeros(3)}, {"a": {1, 2}})
        assert store.steps() == [1]


def test_folder_of_another_model(tmp_path):
    config = load_model_config("tiny")
    with Store(tmp_path, model=config) as store:
        store.save(1, {"x": jnp.zeros(3)})
    other = dataclasses.replace(config, rms_norm_eps=1e-4)
    expected = (
        f"{tmp_path} belongs to another model: model.rms_norm_eps is 1e-06 there and 0.0001 here; "
        "choose another folder"
    )
    with pytest.raises(CheckpointError) as error:
        Store(tmp_path, model=other)
    assert str(error.value) == expected
    with Store(tmp_path, model=config) as store:
        assert store.steps() == [1]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="file is a file; checkpoints need a folder"):
        Store(tmp_path / "file")
    with pytest.raises(CheckpointError, match="file/below cannot be written: Not a directory; cho"):
        Store(tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="absent is no folder"):
        Store(tmp_path / "absent", read_only=True)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ConfigError, match="keep must be a positive integer, got 0"):
        Store(tmp_path, keep=0)
    with pytest.raises(
        UnsupportedError, match="s3://b/run: Orbax writes to a file system or to gs"
    ):
        Store("s3://b/run")


@pytest.fixture
def no_room():
    """Lets this process write no file of more than 64 KiB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(tmp_path, capfd, no_room):
    """The save that fails says why; the ones before stay, and later ones work."""
    small = {"x": jnp.zeros(8)}
    large = {"x": jnp.asarray(np.random.RandomState(0).randint(0, 256, 1 << 20, np.uint8))}
    with Store(tmp_path, keep=2) as store:
        store.save(1, small)
        store.save(2, small)
        store.save(3, large)
        with pytest.raises(CheckpointError) as error:
            store.wait()
        assert str(error.value) == (
            f"the checkpoint of step 3 was not written to {tmp_path}: File too large; kept: steps "
            "1, 2. Make room, or save to another folder"
        )
        assert store.steps() == [1, 2]
        assert_same(store.restore(1, small)[0], small)
        no_room()
        store.save(3, large)
        assert store.steps() == [2, 3] and sorted(os.listdir(tmp_path)) == ["2", "3"]
        assert_same(store.restore(3, large)[0], large)
    assert "Traceback" not in capfd.readouterr().err


def test_a_store_opened_right_after_a_failed_save(tmp_path, no_room):
    """Two stores that clear away the same leftovers at once would fail one time in two."""
    state = {f"w{i}": jnp.arange(60_000.0) + i for i in range(12)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        no_room()
        with Store(folder) as store:
            store.save(3, state)
            store.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            with pytest.raises(CheckpointError, match="step 6 was not written"):
                store.save(6, state)
                store.wait()
        no_room()
        with Store(folder) as store:
            assert store.save(6, state)
            store.wait()
            assert store.steps() == [3, 6]


def remove(file: pathlib.Path) -> None:
    """Removes a file."""
    file.unlink()


def cut(file: pathlib.Path) -> None:
    """Leaves the first half of a file."""
    os.truncate(file, file.stat().st_size // 2)


def spoil(file: pathlib.Path) -> None:
    """Puts 64 other bytes into the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :][:64] = os.urandom(64)
    data[: len(data) // 4] = bytes(len(data) // 4)
    file.write_bytes(data)


# {what is damaged: (files of step 2, how)}
DAMAGES = {
    f"{file} {how.__name__}": (file, how)
    for file in ("extra/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*")
    for how in (remove, cut, spoil)
} | {
    "arrays removed": ("state/ocdbt.process_0/d/*", remove),
    "arrays cut": ("state/ocdbt.process_0/d/*", cut),
    "sharding cut": ("state/_sharding", cut),
}


def noise(step: int) -> dict:
    """Returns a state that does not shrink when it is compressed."""
    draw = np.random.RandomState(step)
    return {name: jnp.asarray(draw.standard_normal(2000), jnp.float32) for name in "abc"}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with Store(folder) as store:
        for step in (1, 2):
            store.save(step, noise(step), {"step": step})
    return folder


@pytest.mark.parametrize("pattern, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_checkpoint(tmp_path, capfd, caplog, two_steps, pattern, damage):
    """The newest whole one is taken, and one line names both; the damaged one is saved anew."""
    folder, like = tmp_path / "run", noise(0)
    shutil.copytree(two_steps, folder)
    files = list((folder / "2").glob(pattern))
    assert files
    for file in files:
        damage(file)
    with Store(folder) as store:
        with pytest.raises(DamagedError, match=f"^{folder} cannot be read at step 2: ") as error:
            store.restore(2, like)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
        found, extra = store.restore(None, like)
        assert_same(found, noise(1))
        assert extra == {"step": 1} and store.latest() == 1
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert any("step 2 is damaged: " in text for text in said), said
        assert any("going on from step 1, the newest whole one" in text for text in said), said
        assert store.save(2, noise(2), {"step": 2})
        assert_same(store.restore(None, like)[0], noise(2))
    output = capfd.readouterr()
    assert "Traceback" not in output.err and "Event loop" not in output.err
    assert len(output.err) < 10_000


def test_no_whole_checkpoint(tmp_path, two_steps):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    for step in "12":
        (folder / step / "state" / "_METADATA").unlink()
    with Store(folder) as store:
        with pytest.raises(CheckpointError, match=r"no whole checkpoint: .*\(steps 1, 2\)$"):
            store.restore(None, noise(0))
        assert store.latest() is None


def test_a_state_that_does_not_fit_is_no_damage(two_steps):
    with Store(two_steps, read_only=True) as store:
        with pytest.raises(CheckpointError, match="y is here but not in the checkpoint"):
            store.restore(None, {"y": jnp.zeros(3)})
        assert store.latest() == 2


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """After kill -9 every checkpoint that is there is whole, and the next run goes on."""
    chance, newest = random.Random(0), 0
    for _ in range(KILLS):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path)], env=environment, stdout=subprocess.PIPE
        )
        begun = int(worker.stdout.readline())
        assert begun > newest
        time.sleep(chance.uniform(0.0, 0.4))  # anywhere in the next saves
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        with Store(tmp_path, read_only=True) as store:
            steps = store.steps()
            assert steps and steps[-1] >= newest
            newest = steps[-1]
            found, extra = store.restore(None, store_worker.state_of(0))
            assert_same(found, store_worker.state_of(newest))
            assert extra == {"step": newest}
