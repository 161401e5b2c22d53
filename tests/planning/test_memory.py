"""Bytes of a device, against published totals and against sums by hand."""

import collections
import dataclasses

import pytest

from v4jax.costs.inventory import device_bytes
from v4jax.planning import memory, programs, roofline

from .plans import work

GIB = 2**30
CACHE_GIB = {"v4_flash": 3.4349, "v4_pro": 4.9178}  # spec C.3, one sequence of a million tokens


@pytest.mark.parametrize("model", CACHE_GIB)
def test_cache_of_a_million_tokens(model):
    held = memory.cache_bytes(work("v5p:1x1x1", "data=1", model=model, batch=1))
    held.pop("unfinished windows")
    held.pop("draft")
    held["window"] = held["window"] * 128 // 129  # one row of a ring is spare
    assert sum(held.values()) / GIB == pytest.approx(CACHE_GIB[model], abs=5e-5)


def test_entries_are_split_and_windows_are_not():
    alone = memory.cache_bytes(work("v6e-1", "data=1", batch=1))
    split = memory.cache_bytes(work("v6e-16", "context=16", batch=1))
    for name in ("csa", "hca", "index"):
        assert split[name] == alone[name] / 16
    assert split["window"] == alone["window"] == 43 * 129 * 584
    # The MTP block's window, and the last two tokens' streams of 4 × 4,096 channels.
    assert split["draft"] == alone["draft"] == 129 * 584 + 2 * 4 * 4096 * 2
    by_data = memory.cache_bytes(work("v6e-4", "data=4", batch=8))
    assert by_data == {name: 2 * size for name, size in alone.items()}


def test_weights_on_one_device_are_the_checkpoint():
    """As `v4jax inspect` counts them, tables as int32."""
    arguments = memory.count_arguments(work("v5p:1x1x1", "data=1", batch=1))
    held = collections.Counter(arguments.weights) + collections.Counter(arguments.drafts)
    assert held["bfloat16"] == 2_830_518_528
    assert held["fp4"] + held["fp8"] == 6_023_020_544 + 8_858_737_664 + 141_733_920_768
    assert (held["float32"], held["int32"]) == (144_672_072, 18_616_320 // 2)


@pytest.mark.parametrize(("model", "tokens"), [("v4_flash", 1), ("v4_flash_0731", 5)])
def test_what_drafts_is_held_and_not_read_by_a_plain_step(fixed_trace, model, tokens):
    """The released sizes of the draft module; a plain step reads only what makes its keys."""
    one = work("v5p:1x1x1", "data=1", model=model, batch=1)
    held = memory.count_arguments(one)
    whole = sum(held.drafts.values())
    if model == "v4_flash_0731":
        assert whole == 10_862_838_300
    times = roofline.estimate(one)
    keys = sum(w.bytes for w in programs.sharded_weights(one) if w.makes_draft_keys)
    assert 0.003 * whole < keys < 0.02 * whole
    chosen = 1 - (1 - 6 / 256) ** 1
    main = [w for w in programs.sharded_weights(one) if not w.drafts and w.path != "embed"]
    read = sum(w.bytes * (chosen if w.is_routed else 1) for w in main) + keys
    assert times.memory_bytes["weights"] == pytest.approx(read)
    chosen = 1 - (1 - 6 / 256) ** tokens
    drafting = [w for w in programs.sharded_weights(one) if w.drafts or w.path == "head"]
    read = sum(w.bytes * (chosen if w.is_routed else 1) for w in drafting)
    assert times.draft_bytes == pytest.approx(read)
    assert times.draft_seconds > 0 and times.seconds == max(
        times.compute_seconds, times.memory_seconds, times.link_seconds
    )


def test_experts_are_split_over_data_and_expert_when_serving():
    whole = memory.count_arguments(work("v5p:1x1x1", "data=1", batch=1)).weights
    split = memory.count_arguments(work("v6e-16", "data=2,expert=8")).weights
    assert split["fp4"] == whole["fp4"] / 16
    assert split["fp8"] == whole["fp8"]


def test_tensor_splits_heads_widths_and_vocabulary():
    half, share = work("v6e-4", "tensor=2,context=2"), {}
    for weight in programs.sharded_weights(half):
        mine = device_bytes(weight.value)
        share.setdefault(weight.path.rpartition(".")[2], set()).add(mine / weight.bytes)
    assert share["query_up"] == {0.5, 1.0}  # the indexer's own is whole
    assert share["embed"] == share["gate_up"] == share["output_up"] == {0.5}
    assert share["query_down"] == {1.0}


def test_training_keeps_sixteen_bytes_a_parameter():
    """bfloat16 weights and gradients, float32 weights, two float32 moments: 2 + 2 + 4 + 8."""
    one = work("v5p:1x1x1", "data=1", "train", context=4096, batch=1)
    arguments, made = memory.count_arguments(one), memory.fixed_temporaries(one)
    parameters = arguments.optimizer["float32 weights"] / 4
    held = sum(arguments.optimizer.values()) + sum(made.values())
    assert held / parameters == pytest.approx(16, rel=2e-3)  # mHC is float32 throughout
    assert parameters == pytest.approx(290.9e9, rel=2e-3)  # indexers are frozen
    frozen = [w for w in programs.sharded_weights(one) if not w.trained or ".indexer." in w.path]
    assert sum(arguments.weights.values()) < 1.01 * sum(w.bytes for w in frozen)


def test_muon_keeps_one_moment():
    adamw = work("v5p:1x1x1", "data=1", "train", context=4096, batch=1)
    muon = dataclasses.replace(adamw, training="muon")
    moments = memory.count_arguments(adamw).optimizer["adamw state"]
    # The embedding and the head are updated by AdamW.
    assert memory.count_arguments(muon).optimizer["muon state"] == pytest.approx(
        moments / 2, rel=0.01
    )


def test_adapters_by_hand():
    """Rank 16 on attention and experts of Flash and its MTP block; the base stays packed."""
    lora = work("v5p:1x1x1", "data=1", "train", context=4096, batch=1, training="lora")
    d, f, low = 4096, 2048, 8 * 1024
    attention = (d + 1024) + (1024 + 64 * 512) + (d + 512) + (low + 4096) + (low + d)
    experts = 257 * ((2 * (f + d)) + (d + f))  # gate and up apart, then down; one is shared
    held = memory.count_arguments(lora)
    assert held.optimizer["adapters"] == 44 * 16 * 4 * (attention + experts)
    assert sum(held.weights.values()) < 160e9


def test_training_splits_storage():
    alone = work("v5p:1x1x1", "data=1", "train", context=4096, batch=1)
    pod = work("v5p:4x4x8", "data=8,expert=16", "train", context=4096, batch=128)
    whole, held = (
        sum(device_bytes(weight.value) for weight in programs.sharded_weights(plan))
        for plan in (alone, pod)
    )
    assert whole / 128 <= held < whole / 16


def test_kinds_add_up(fixed_trace):
    """Temporaries that do not depend on tokens are told apart from the traced rest."""
    plan = work("v6e-16", "expert=16")
    held = memory.count_bytes(plan)
    assert held.total == held.arguments + 2**30
    scanned = 293 * 2**20  # FP8 projections and shared experts of one CSA and one HCA layer
    assert held.temporaries["a round's weights"] == pytest.approx(scanned, rel=0.03)
