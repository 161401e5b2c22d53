"""What a run trains, and that rounding on the way is what the exported model computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import CSA, IDS, WINDOWS, make_config, make_model

from v4jax.checkpoint import read_model
from v4jax.config import LayerKind, get_numerics
from v4jax.config.model import DraftConfig
from v4jax.config.run import DraftTraining, LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from v4jax.errors import ConfigError
from v4jax.model import abstract_transformer
from v4jax.model.weights import read_weights, write_weights
from v4jax.parallel import Layout, annotate_shardings, make_mesh
from v4jax.parallel.weight_sharding import put_sharded
from v4jax.quant import LowRank, Master, ScaledArray, quantize_weight
from v4jax.training.export import export
from v4jax.training.optimizer import build_optimizer
from v4jax.training.state import abstract_state, finish, init_state, join_model, split_model
from v4jax.training.trainable import describe_heads, split_trained


def config_of(**changes):
    return TrainConfig("model", "output", None, steps=10, **changes)  # data is not read here


def abstract(config=CSA, numerics="float32"):
    return abstract_transformer(config, get_numerics(numerics), storage="released")


TWO_MTP = dataclasses.replace(
    CSA,
    num_nextn_predict_layers=2,
    compress_ratios=(*CSA.compress_ratios, 0),
    layer_types=(*CSA.layer_types, LayerKind.WINDOW),
)
SILENT = LossConfig(mtp_weight=0.0)
# (model, changes of the run, prefixes of blocks with a part that is not trained).
POLICIES = {
    "indexer frozen": (CSA, {}, {"stack.period.0.attention.indexer"}),
    "indexer distilled": (CSA, {"indexer": "distill"}, set()),
    "no loss reaches the MTP block": (CSA, {"loss": SILENT, "indexer": "distill"}, {"mtp.0"}),
    "the second MTP block": (TWO_MTP, {"indexer": "distill"}, {"mtp.1"}),
}  # fmt: skip


@pytest.mark.parametrize("case", POLICIES.values(), ids=POLICIES.keys())
def test_what_is_trained(case):
    """What is not trained has neither gradient, nor decay, nor moments: it is not in the state."""
    model_config, changes, untrained = case
    model, config = abstract(model_config), config_of(**changes)
    frozen, weights, biases = split_trained(model, config)
    optimizer = build_optimizer(config.optimizer, model_config)
    state = abstract_state(frozen, weights, biases, optimizer)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    left = {name for name in read_weights(model) if name not in weights}
    for prefix in untrained:
        assert not any(prefix in path for path in paths)
        assert any(name.startswith(prefix) for name in left)
    assert all(name.startswith(tuple(untrained)) for name in left)
    kept = {id(leaf) for leaf in jax.tree.leaves(frozen)}
    for name, value in read_weights(model).items():
        assert all((id(leaf) in kept) == (name in left) for leaf in jax.tree.leaves(value)), name
    # A router's bias moves where its router is trained.
    routers = {name for name in weights if name.endswith("router.weight")}
    assert biases.keys() == {name.removesuffix("weight") + "bias" for name in routers}
    assert any("mtp.0" in name for name in biases) == ("mtp.0" not in untrained)


MODULE = DraftConfig(stages=1, target_layer_ids=(1,), markov_rank=4, noise_token_id=7)
# (model, changes of the run, what the log says of blocks that predict ahead).
HEADS = {
    "MTP is trained": (CSA, {}, "the first MTP block is trained too, by loss.mtp_weight = 0.3"),
    "MTP without a loss": (CSA, {"loss": SILENT}, "the MTP blocks stay bit for bit"),
    "MTP without adapters": (
        CSA, {"lora": LoraConfig(targets=("indexer.query_up",)), "indexer": "distill"},
        "the MTP blocks stay bit for bit",
    ),
    "a module": (CSA.with_draft(MODULE), {}, "the draft module stays bit for bit"),
    "the module's own run": (
        CSA.with_draft(MODULE), {"draft": DraftTraining()}, "the draft module alone is trained",
    ),
    "a fresh module": (
        CSA, {"draft": DraftTraining(MODULE)}, "the draft module alone is trained",
    ),
    "neither": (WINDOWS, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())
def test_what_becomes_of_blocks_that_predict_ahead(case):
    model_config, changes, said = case
    config = config_of(**changes)
    frozen, weights, _ = split_trained(abstract(model_config), config)
    assert describe_heads(frozen.config, config, weights).startswith(said)
    alone = {name.startswith("drafter.") for name in weights}
    assert alone == {bool(config.draft)}


DRAFT_ERRORS = {
    "no module": ({"draft": DraftTraining()}, "train.model has none; describe a fresh one"),
    "taps beyond the layers": (
        {"draft": DraftTraining(dataclasses.replace(MODULE, target_layer_ids=(2,)))},
        "draft.target_layer_ids must be ascending layers",
    ),
    "adapters": ({"draft": DraftTraining(MODULE), "lora": LoraConfig()}, "lora must be left out"),
    "the indexer": (
        {"draft": DraftTraining(MODULE), "indexer": "distill"}, "indexer must be 'frozen'",
    ),
    "no anchors": (lambda: {"draft": DraftTraining(anchors=0)}, "draft.anchors must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", DRAFT_ERRORS.values(), ids=DRAFT_ERRORS.keys())
def test_draft_errors(case):
    changes, message = case
    with pytest.raises(ConfigError, match=message):
        split_trained(abstract(), config_of(**(changes() if callable(changes) else changes)))


LORA_ERRORS = {
    "the indexer is frozen": (
        {"lora": LoraConfig(targets=("indexer.query_up",))},
        "names no matrix that may be trained",
    ),
    "nothing of the indexer is trained": (
        {"lora": LoraConfig(), "indexer": "distill"},
        "trains nothing with train.lora unless",
    ),
}


@pytest.mark.parametrize("case", LORA_ERRORS.values(), ids=LORA_ERRORS.keys())
def test_lora_errors(case):
    changes, message = case
    with pytest.raises(ConfigError, match=message):
        split_trained(abstract(), config_of(**changes))


# Field: (changes, what the message says).
UNNAMED = {
    "undecayed": (
        {"optimizer": OptimizerConfig(undecayed=("indxer",))},
        r"train.optimizer.undecayed: 'indxer' names no weight of the model; did you mean 'indexer'",
    ),
    "frozen": (
        {"frozen": ("embed", "moe.expert")},
        r"train.frozen: 'moe.expert' names no weight of the model; did you mean 'moe.experts'\?",
    ),
    "lora.targets": (
        {"lora": LoraConfig(targets=("attention.querydown",))},
        r"train.lora.targets: 'attention.querydown' names no matrix that may be trained; did you "
        r"mean 'attention.query_down'\?",
    ),
    "all frozen": ({"frozen": ("*",)}, r"train.frozen = \['\*'\] leaves no weight to be trained"),
}


@pytest.mark.parametrize("case", UNNAMED.values(), ids=UNNAMED.keys())
def test_patterns_that_name_nothing(case):
    """The nearest part of a name is offered; defaults are for models without an indexer, too."""
    changes, message = case
    with pytest.raises(ConfigError, match=message):
        split_trained(abstract(), config_of(**changes))
    split_trained(abstract(WINDOWS), config_of())


def test_frozen_by_name():
    _, every, _ = split_trained(abstract(), config_of())
    frozen, weights, biases = split_trained(
        abstract(), config_of(frozen=("moe.router", "*norm", "stack.period.0.attention"))
    )
    left = every.keys() - weights.keys()
    assert left == {
        name for name in every
        if "moe.router." in name or "norm." in name or "stack.period.0.attention." in name
    }  # fmt: skip
    assert left <= frozen.arrays.keys() and not biases and len(weights) > 10


def test_lora_trains_adapters_only():
    lora = LoraConfig(rank=2, targets=("attention.indexer.query_up", "moe.experts"))
    config = config_of(lora=lora, indexer="distill")
    frozen, weights, biases = split_trained(abstract(), config)
    parts = ("attention.indexer.query_up", "moe.experts.gate_up", "moe.experts.down")
    names = {f"stack.period.0.{part}" for part in parts}
    names |= {f"mtp.0.block.{part}" for part in parts[1:]}
    assert weights.keys() == {f"{n}.{part}" for n in names for part in ("lora_down", "lora_up")}
    assert not biases
    values = read_weights(frozen.outline)
    assert {name for name, value in values.items() if isinstance(value, LowRank)} == names
    assert frozen.arrays.keys().isdisjoint(weights)


def test_masters_of_stored_weights():
    """Training all of a released model starts from what its stored weights hold."""
    model = make_model(WINDOWS, "bfloat16", stored_as="released")
    names = [name for name in read_weights(model) if "attention" in name]
    frozen, weights, biases = split_model(model, names)
    state = init_state(frozen, weights, biases, optax.sgd(1.0))
    joined, finished = read_weights(join_model(frozen, state)), read_weights(finish(frozen, state))
    for name in names:
        value = read_weights(model)[name]
        expected = value.dequantize() if isinstance(value, ScaledArray) else value
        np.testing.assert_array_equal(state.weights[name], expected.astype(jnp.float32))
        assert finished[name] is state.weights[name]
        stays = name.endswith(("sink", "fn", "base", "scale"))
        assert joined[name].dtype == (jnp.float32 if stays else jnp.bfloat16), name
        np.testing.assert_array_equal(joined[name], expected.astype(joined[name].dtype))


def test_rounding_on_the_way_is_what_the_exported_model_computes(tmp_path, capsys):
    """Bit for bit under the released numerics, inputs of quantized weights rounded too.

    The start is plain, and the frozen indexer has to be rounded as well.
    """
    numerics = get_numerics("released")
    model = make_model(make_config("csa", mtp=True), "released")
    config = config_of(quantization_aware=True, numerics="released")
    frozen, weights, biases = split_trained(model, config)
    values = read_weights(frozen.outline)
    formats = {name: value.format for name, value in values.items() if isinstance(value, Master)}
    assert formats["stack.prefix.0.moe.experts.down"] == "fp4"
    assert formats["mtp.0.stream_projection"] == "fp8" and formats["embed"] == "bfloat16"
    assert values["stack.prefix.0.attention.indexer.query_up"].block == (128, 128)
    state = init_state(frozen, weights, biases, optax.sgd(1.0))
    logits = join_model(frozen, state)(IDS)
    capsys.readouterr()
    export(finish(frozen, state), tmp_path / "out")
    assert "warning" not in capsys.readouterr().err  # nothing is rounded any more
    again = read_model(tmp_path / "out", numerics)
    np.testing.assert_array_equal(again(IDS), logits)
    assert 0.5 < np.std(logits) < 5
    # MTP, biases and what is float32 come back, too.
    found, biases = read_weights(again), read_weights(again, buffers=True)
    for name, value in read_weights(finish(frozen, state)).items():
        pairs = zip(jax.tree.leaves(value), jax.tree.leaves(found[name]), strict=True)
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs), name
    for name, value in state.biases.items():
        np.testing.assert_array_equal(biases[name], value)
    assert (again.config.tokenizer, len(again.mtp)) == ("byte", 1)


def test_frozen_weights_are_rounded_where_they_are():
    """On a mesh, too: a tile of 128×128 is on one device, however the weight was split before."""
    layout, plain = Layout(make_mesh(data=8), "train"), make_model(make_config("csa", mtp=True))
    model = put_sharded(plain, layout)
    model.layout = layout
    frozen, _, _ = split_trained(model, config_of(quantization_aware=True))
    name = "stack.prefix.0.attention.indexer.query_up"
    value = ScaledArray(frozen.arrays[name], frozen.arrays[f"{name}.scales"], (128, 128))
    expected = quantize_weight(read_weights(plain)[name], "fp8")
    assert value.values.sharding.is_fully_replicated
    np.testing.assert_array_equal(value.dequantize(), expected.dequantize())


def test_a_mesh_that_splits_tiles_is_refused():
    """Half of a 128×128 tile would be rounded by another scale."""
    model = abstract(WINDOWS)
    layout = Layout(make_mesh(data=4, tensor=2), "train")
    plain = {
        name: jax.ShapeDtypeStruct(value.shape, jnp.float32)
        for name, value in read_weights(model).items()
    }
    model = annotate_shardings(write_weights(model, plain), layout)
    model.layout = layout
    split_trained(model, config_of(optimizer=OptimizerConfig()))
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 2 does not divide axis 'heads'"):
        split_trained(model, config_of(quantization_aware=True))
