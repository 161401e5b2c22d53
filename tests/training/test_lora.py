"""LoRA on stored weights: targets, the base untouched, merged equals unmerged, bytes, a mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from small_models import CPU, IDS, WINDOWS, make_model, on_mesh

from v4jax.checkpoint.adapters import choose_naming, read_adapters, write_adapters
from v4jax.checkpoint.hf_writer import write_model
from v4jax.config.run import LoraConfig, LossConfig, TrainConfig
from v4jax.errors import CheckpointError, ConfigError
from v4jax.model.weights import materialize, read_weights, write_weights
from v4jax.parallel import Layout, make_mesh
from v4jax.parallel.shard import WEIGHTS, on_shards
from v4jax.parallel.weight_sharding import is_variable, put_sharded
from v4jax.quant import LowRank, Master, ScaledArray
from v4jax.training.batch import Batch
from v4jax.training.export import export
from v4jax.training.forward import Mode
from v4jax.training.lora import add_adapters, choose_targets, merge
from v4jax.training.state import (
    TrainState,
    abstract_state,
    finish,
    init_state,
    join_model,
    split_model,
)
from v4jax.training.step import build_step
from v4jax.training.trainable import split_trained
from v4jax.training.trainer import load_model

LORA = LoraConfig(rank=4, alpha=8.0)
# Logits have deviation 1.5; the merged weights are rounded as the expanded ones are.
MERGED_TOLERANCE = 1e-5
MESH_TOLERANCE = 3e-5  # sums of devices have another order; measured 1.2e-5


@functools.cache
def base():
    return make_model(WINDOWS, stored_as="released")


@functools.cache
def adapted():
    """The base with adapters that change its logits as much as they are."""
    random = np.random.RandomState(1)

    def turn(value):
        if not isinstance(value, LowRank):
            return value
        up = random.standard_normal(value.up.shape).astype(np.float32) * 0.2
        return dataclasses.replace(value, up=jnp.asarray(up))

    model = add_adapters(base(), LORA)
    return write_weights(model, {name: turn(v) for name, v in read_weights(model).items()})


def same(a, b):
    """Whether two weights hold the same bytes."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


TARGETS = {
    "words are whole": (("attention.key_value",), ["attention.key_value"]),
    "a part of a path": (("moe.shared",), ["moe.shared.down", "moe.shared.gate_up"]),
    "vectors and float32 matrices have none": (
        ("attention", "moe_hyper"),
        None,  # moe_hyper.fn is float32
    ),
    "no embedding": (("embed",), None),
    "no such weight": (("attention.q_proj",), None),
    "twice the same": (("head", "head"), ["head"]),
}


@pytest.mark.parametrize("case", TARGETS.values(), ids=TARGETS.keys())
def test_targets(case):
    targets, expected = case
    lora = LoraConfig(targets=targets)
    if expected is None:
        with pytest.raises(ConfigError, match="names no matrix that may be trained"):
            choose_targets(base(), lora, read_weights(base()))
        return
    found = choose_targets(base(), lora, read_weights(base()))
    assert [name.removeprefix("stack.period.0.") for name in found] == expected


def test_adapters_start_at_the_base_and_leave_it_alone():
    model = add_adapters(base(), LORA)
    stored, count = read_weights(base()), 0
    for name, value in read_weights(model).items():
        if isinstance(value, LowRank):
            count += 1
            *lead, rows, columns = stored[name].shape
            assert value.down.shape == (*lead, 4, columns)
            assert value.up.shape == (*lead, rows, 4) and not value.up.any()
            # Random, and different for every layer, expert, gate and up.
            assert len(np.unique(value.down)) > 0.99 * value.down.size
            assert 0.8 < float(value.down.std() * np.sqrt(columns)) < 1.2
            value = value.base
        assert same(value, stored[name]), name
    assert count == 9
    assert isinstance(stored["stack.period.0.moe.experts.down"], ScaledArray)
    assert stored["stack.period.0.moe.experts.down"].is_fp4
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapters(model, LORA)


def test_merged_equals_unmerged():
    """One weight is float32 as the activations are; others stay as they are stored."""
    model = adapted()
    merged = merge(model)
    logits = model(IDS)
    np.testing.assert_allclose(merged(IDS), logits, atol=MERGED_TOLERANCE)
    assert np.abs(logits).std() > 0.5
    for name, value in read_weights(model).items():
        now = read_weights(merged)[name]
        if not isinstance(value, LowRank):
            assert now is value
            continue
        expected = value.base.dequantize() + 2.0 * np.einsum(
            "...or,...ri->...oi", value.up, value.down
        )
        assert now.dtype == jnp.float32
        np.testing.assert_allclose(now, expected, rtol=1e-5, atol=1e-5)
        assert same(value.base, read_weights(base())[name])
        assert not np.allclose(now, value.base.dequantize(), atol=0.1)


def test_unmerged_answers_as_merged():
    """Reading in pieces and single steps expand a weight as a whole pass does; the base stays."""
    found = []
    for model in (adapted(), merge(adapted())):
        cache, pieces = model.init_cache(batch=1, max_tokens=32), []
        for part in (IDS[:1, :16], IDS[:1, 16:17], IDS[:1, 17:18]):
            logits, cache = model.extend(part, cache)
            pieces.append(np.asarray(logits))
        found.append(np.concatenate(pieces, 1))
    np.testing.assert_allclose(*found, atol=MERGED_TOLERANCE)
    whole = adapted()(IDS)[:1, :18]
    np.testing.assert_allclose(found[0], whole, atol=MERGED_TOLERANCE)


@pytest.mark.slow
def test_read_on_a_mesh_they_answer_alike(tmp_path):
    """Adapters of a folder are split like the weights they are beside, as inference holds them."""
    write_adapters(adapted(), tmp_path / "adapters")
    split = on_mesh(base(), data=2, expert=2, context=2)
    split = read_adapters(split, tmp_path / "adapters")
    np.testing.assert_allclose(split(IDS), adapted()(IDS), atol=MESH_TOLERANCE)
    up = read_weights(split)["stack.period.0.moe.experts.down"].up
    assert up.addressable_shards[0].data.shape[1] == up.shape[1] // 4  # over expert and context


def test_requantized_says_what_it_loses(capsys):
    model = adapted()
    merged = merge(model, requantize=True)
    lost = re.search(r"roundings are (\d+)% of the adapters' change", capsys.readouterr().err)
    change = loss = 0.0
    for name, value in read_weights(model).items():
        now = read_weights(merged)[name]
        if isinstance(value, LowRank):
            assert (now.block, now.values.dtype) == (value.block, value.base.values.dtype)
            exact = value.merge("float32")
            change += np.square(exact - value.base.dequantize()).sum()
            loss += np.square(exact - now.dequantize()).sum()
    assert int(lost[1]) == pytest.approx(100 * np.sqrt(loss / change), abs=1)
    merge(add_adapters(base(), LORA), requantize=True)
    assert "the adapters changed nothing" in capsys.readouterr().err


def test_adapters_are_merged_before_they_are_written(tmp_path):
    with pytest.raises(CheckpointError, match="merge adapters"):
        from v4jax.checkpoint import write_model

        write_model(adapted(), tmp_path / "no")
    from v4jax.checkpoint import read_model

    export(adapted(), tmp_path / "released")
    requantized = merge(adapted(), requantize=True)
    again = read_weights(read_model(tmp_path / "released"))
    for name, value in read_weights(requantized).items():
        assert same(value, again[name]), name


def config_of(**changes):
    data = None  # not read here
    return TrainConfig("model", "output", data, 10, lora=LORA, numerics="float32", **changes)


def test_a_run_goes_on_from_given_adapters(tmp_path, monkeypatch):
    """Its state begins with their factors; rank, scale and targets are theirs, or it is refused."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    write_adapters(adapted(), tmp_path / "given", choose_naming(adapted()))
    write_model(base(), tmp_path / "base")
    lora = dataclasses.replace(LORA, start=str(tmp_path / "given"))
    config = dataclasses.replace(config_of(), model=str(tmp_path / "base"), lora=lora)
    model = load_model(config)
    _, weights, _ = split_trained(model, config)
    given = {n: v for n, v in read_weights(adapted()).items() if isinstance(v, LowRank)}
    for name, value in given.items():
        np.testing.assert_array_equal(weights[f"{name}.lora_down"], value.down)
        np.testing.assert_array_equal(weights[f"{name}.lora_up"], value.up)
    assert len(weights) == 2 * len(given)
    for changes, message in (
        ({"rank": 2}, f"give rank = {LORA.rank} and alpha = {LORA.alpha:g}"),
        ({"targets": ("attention.query_up",)}, "targets do not name .*, which has adapters"),
        ({"targets": (*LORA.targets, "head")}, "targets name head, which has no adapters"),
    ):
        other = dataclasses.replace(config, lora=dataclasses.replace(lora, **changes))
        with pytest.raises(ConfigError, match=message):
            split_trained(model, other)


def test_what_a_run_keeps():
    """The base as it is stored, nothing twice; adapters of every expert and two moments of each."""
    frozen, weights, biases = split_trained(base(), config_of())
    state = init_state(frozen, weights, biases, optax.adamw(1e-3))
    arrays = {id(x) for x in jax.tree.leaves(frozen)}
    assert arrays <= {id(x) for x in jax.tree.leaves(base())}
    # Three matrices, 32 and 64 wide, of eight experts in two layers, rank 4.
    rank = sum(4 * (rows + columns) for rows, columns in ((32, 64), (32, 64), (64, 32)))
    of_experts = {k: v for k, v in state.weights.items() if ".experts." in k}
    assert sum(v.nbytes for v in of_experts.values()) == 2 * 8 * rank * 4
    trained = sum(v.nbytes for v in state.weights.values())
    assert sum(v.nbytes for v in jax.tree.leaves(state.optimizer)) == 2 * trained + 4


def mixed(model, rounded):
    """Returns `split_model` of all weights with adapters, and some others rounded on the way."""
    weights = read_weights(model)
    masters = {name: rounded for name in weights if "moe.shared" in name}
    plain = {name: weights[name].base.dequantize() for name in masters}
    model = write_weights(model, plain)
    adapters = [n for n, v in read_weights(model).items() if isinstance(v, LowRank)]
    frozen, weights, biases = split_model(model, [*adapters, *masters], masters)
    assert all(isinstance(read_weights(frozen.outline)[name], Master) for name in masters)
    return frozen, weights, biases


def test_a_step_moves_what_is_trained():
    """Gradients reach both factors and rounded weights; nothing else can change."""
    frozen, weights, biases = mixed(adapted(), "fp8")
    optimizer = optax.sgd(1.0)
    state = init_state(frozen, weights, biases, optimizer)
    batch = Batch(jnp.asarray(IDS)[None], jnp.ones((1, *IDS.shape)), None)
    step = jax.jit(
        build_step(LossConfig(mtp_weight=0.0), optimizer, lambda _: 1.0, Mode(), clip_norm=1.0)
    )
    after, metrics = step(frozen, state, batch)
    assert state.biases == {} and np.isfinite(metrics["grad_norm"])
    suffixes = {name.rsplit(".", 1)[-1] for name in state.weights}
    assert suffixes == {"lora_down", "lora_up", "gate_up", "down"}
    for name, before in state.weights.items():
        assert before.dtype == jnp.float32 and not np.array_equal(before, after.weights[name]), name
    trained = read_weights(finish(frozen, after))
    for name, value in read_weights(base()).items():
        if "moe.shared" in name:
            assert trained[name].block == value.block and not same(trained[name], value)
        else:
            held = trained[name]
            assert same(held.base if isinstance(held, LowRank) else held, value), name


def test_a_mesh_expands_and_differentiates_the_same():
    """Adapters and masters are split, gathered, expanded and scattered as on one device.

    The experts lie over `expert`, their widths of whole FP4 blocks over `data`.
    """
    layout = Layout(make_mesh(data=2, expert=2, context=2), "train")
    placed = put_sharded(base(), layout)
    placed.layout = layout
    placed = add_adapters(placed, LORA)
    found = {}
    for model in (add_adapters(base(), LORA), placed):
        weights = read_weights(model)
        rounded = "stack.period.0.moe.experts.down"
        model = write_weights(model, {rounded: weights[rounded].base.dequantize() * 1.1})
        name = "stack.period.0.moe.experts.gate_up"
        frozen, weights, biases = split_model(model, [name, rounded], {rounded: "fp4"})
        random = np.random.RandomState(3)
        up = random.standard_normal(weights[name + ".lora_up"].shape).astype(np.float32)
        sharding = weights[name + ".lora_up"].sharding
        weights[name + ".lora_up"] = jax.device_put(jnp.asarray(up), sharding)

        def add_cubes(axes, experts):
            experts = materialize(axes, experts, CPU)
            found = jax.tree.leaves(experts, is_leaf=is_variable)
            values = (variable.get_value() for variable in found)
            return axes.psum(sum((value**3).sum() for value in values), "experts")

        def run(weights, frozen=frozen, biases=biases):
            joined = join_model(frozen, TrainState(0, weights, biases, None, 0))
            sharded = on_shards(add_cubes, frozen.layout, "split", (WEIGHTS,), P())
            return sharded(joined.stack.period[0].moe.experts)

        found[model.layout] = jax.jit(jax.value_and_grad(run))(weights)
        state = abstract_state(frozen, weights, biases, optax.adam(1.0))
    (total, wanted), (total_split, gradients) = found.values()
    assert total_split == pytest.approx(float(total), rel=1e-5)
    for name, gradient in wanted.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-5 * largest, err_msg=name)
        # Gradients and moments lie like what they belong to.
        for leaf in (state.weights[name], state.optimizer[0].mu[name]):
            assert leaf.sharding.is_equivalent_to(gradients[name].sharding, leaf.ndim), name
    down = gradients["stack.period.0.moe.experts.gate_up.lora_down"]
    assert down.shape == (2, 8, 2, 4, 64)
    assert down.addressable_shards[0].data.shape == (2, 4, 2, 4, 32)
