"""Operations by component against numbers computed by hand."""

import random

import jax.numpy as jnp
import pytest

from v4jax.config.loading import load_model_config
from v4jax.config.model import DraftConfig
from v4jax.costs import flops
from v4jax.kernels.table import visible_entries
from v4jax.model import take_inventory

MILLION = 1 << 20


def at_a_million(name):
    return flops.count_tokens(inventory_of(name), MILLION - 1, MILLION)


def inventory_of(name):
    return take_inventory(load_model_config(name))


def test_decode_of_flash_by_hand():
    """140 GFLOP per token, 90 of them index scores."""
    work = flops.by_component(at_a_million("v4_flash"))
    scores = 21 * (MILLION // 4) * 64 * 128 * 2
    sparse = 21 * (128 + 512) * 64 * 512 * 4
    dense = (2 * 128 + 20 * (128 + MILLION // 128)) * 64 * 512 * 4
    assert work["index scores"] == scores == pytest.approx(90.19e9, rel=1e-4)
    assert work["sparse attention"] == sparse
    assert work["dense attention"] == dense
    assert work["routed experts"] == 43 * 6 * 3 * 2048 * 4096 * 2
    assert work["head"] == 129_280 * 4096 * 2
    assert sum(work.values()) == pytest.approx(140.36e9, rel=1e-4)


@pytest.mark.parametrize("name", ["tiny", "v4_flash"])
def test_reading_is_what_every_token_costs_and_what_grows(name):
    inventory = inventory_of(name)
    work = flops.reading_work(inventory)
    for first, end in ((0, 1), (0, 5000), (4096, 8192), (MILLION - 7, MILLION)):
        whole = flops.total(flops.count_tokens(inventory, first, end, logits=0))
        assert sum(work(first, end)) == pytest.approx(whole, rel=1e-12)
    assert work(0, 4096)[0] == work(MILLION - 4096, MILLION)[0]
    assert work(0, 4096)[1] < work(MILLION - 4096, MILLION)[1] / 10


def test_prefill_of_a_million_tokens_by_hand():
    """87 PFLOP for Flash, 47 of them index scores."""
    work = flops.count_tokens(inventory_of("v4_flash"), 0, MILLION)
    # Σ (p + 1) // 4 over a million positions is 4·Σ q over q < 2¹⁸, plus 2¹⁸ at the last.
    entries = 4 * (2**18) * (2**18 - 1) // 2 + 2**18
    assert flops.total(work, "index scores") == 21 * entries * 64 * 128 * 2
    assert flops.total(work, "index scores") == pytest.approx(47.29e15, rel=1e-3)
    assert flops.total(work) == pytest.approx(87.5e15, rel=1e-3)


# Matrix parameters per token by stored format, in billions (spec C.4).
ACTIVE = {"v4_flash": (5.86, 6.49, 0.918), "v4_pro": (22.70, 24.18, 1.97)}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    config = load_model_config(name)
    active = {"fp8": 0.0, "fp4": 0.0, "plain": 0.0}
    share = config.num_experts_per_tok / config.n_routed_experts
    for weight in inventory_of(name).weights:
        if weight.is_matrix and weight.component != "MTP":
            fmt = weight.fmt if weight.fmt in active else "plain"
            active[fmt] += weight.parameters * (share if weight.is_routed else 1) / 1e9
    assert tuple(active.values()) == pytest.approx(ACTIVE[name], abs=0.006)


@pytest.mark.parametrize("name", ["v4_flash", "tiny"])
def test_a_prefill_is_the_sum_of_its_tokens(name):
    inventory = inventory_of(name)
    whole = flops.by_component(flops.count_tokens(inventory, 0, 300, logits=300))
    parts = [flops.by_component(flops.count_tokens(inventory, p, p + 1)) for p in range(300)]
    for component, expected in whole.items():
        assert expected == pytest.approx(sum(part[component] for part in parts)), component


def test_sums_over_positions():
    random.seed(0)
    for _ in range(200):
        ratio, window = random.choice([3, 4, 128]), random.choice([1, 5, 128])
        first = random.randint(0, 600)
        end = first + random.randint(1, 900)
        limit = random.choice([None, 1, 2, 5])
        seen = visible_entries(jnp.arange(first, end), ratio).tolist()
        capped = [count if limit is None else min(count, limit) for count in seen]
        assert flops.sum_visible(ratio, first, end, limit) == sum(capped)
        expected = sum(min(p + 1, window) for p in range(first, end))
        assert flops.sum_window(window, first, end) == expected


def test_training_is_three_forwards_and_one_more_with_remat():
    inventory = inventory_of("v4_flash")
    forward = flops.by_component(flops.count_tokens(inventory, 0, 4096, logits=4096, mtp=True))
    plain = flops.by_component(flops.count_training(inventory, 4096, remat=False))
    again = flops.by_component(flops.count_training(inventory, 4096, remat=True))
    assert plain["routed experts"] == 3 * forward["routed experts"]
    assert again["dense attention"] == 4 * forward["dense attention"]
    assert plain["index scores"] == forward["index scores"]  # ids carry no gradient
    assert forward["MTP"] > 2 * 0.3186e9 * 4096  # the block's active weights, then the head


DRAFT_KEYS = {  # multiply-adds of a token
    "v4_flash": 5 * 4096**2 + 512 * 4096 + 24 * 4 * 4096,  # embedding, four streams; key; mHC
    "v4_flash_0731": 3 * 4096**2 + 3 * 512 * 4096,  # three taps; a key for each stage
}


@pytest.mark.parametrize("name", DRAFT_KEYS)
def test_keys_for_drafts_by_hand(name):
    inventory = take_inventory(load_model_config(name))
    plain = flops.count_tokens(inventory, 0, 7)
    assert not {"MTP", "draft module"} & {item.component for item in plain}
    more = flops.total(flops.count_tokens(inventory, 0, 7, draft_keys=True)) - flops.total(plain)
    assert more == pytest.approx(2.0 * 7 * DRAFT_KEYS[name])


def test_training_a_draft_module_by_hand():
    """The target runs once forward; a stage as often as a block has rows, three times with 64."""
    module = DraftConfig(stages=3, target_layer_ids=(40, 41, 42), markov_rank=256)
    inventory = take_inventory(load_model_config("v4_flash").with_draft(module))
    work = flops.by_component(flops.count_draft_training(inventory, 4096, 64, remat=False))
    forward = flops.by_component(flops.count_tokens(inventory, 0, 4096, logits=0))
    assert {name: work[name] for name in forward} == forward
    rows, d, heads, c = 64 * 5, 4096, 64, 512
    expert, groups = 3 * 2048 * d, 8 * 1024
    products = 1024 * (d + heads * c) + groups * (heads * c // 8) + d * groups + 256 * d
    products += 7 * expert + 2 * 24 * 4 * d  # six routed experts and the shared one; mHC
    stages = 3 * (rows * products + (4096 + rows) * c * d)
    heads_of_rows = rows * (4 * 4 * d + 129_280 * 256 + d + 256)
    scores = 3 * rows * (128 + 5) * 4 * heads * c
    context = 4096 * d * 3 * d
    logits = rows * 129_280 * d
    expected = 3 * (2 * (stages + heads_of_rows + context + logits) + scores)
    assert work["draft module"] == expected
    again = flops.by_component(flops.count_draft_training(inventory, 4096, 64, remat=True))
    assert again["draft module"] == expected / 3 * 4 + 2 * logits
