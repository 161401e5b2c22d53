"""Selection that truncates, against transformers: what differs are choices among equal scores.

A score is Σ_i w_i · ReLU(q_i · k). With few index heads all ReLUs are often closed at once, and
many entries have the score 0. Where the cut falls among them, any choice is right: ours takes the
smallest ids, torch.topk promises none. The released models have 64 heads.
"""

import numpy as np
import pytest
import small_models

from v4jax.model.layer_view import view_layers

from . import checkpoints

torch = pytest.importorskip("torch", reason="needs the [oracle] extra")
pytest.importorskip("transformers", "5.17", reason="needs the [oracle] extra")

from . import hf  # noqa: E402

pytestmark = pytest.mark.oracle

# Two index heads and a small selection. The CSA layer is the last one, whereby a choice at one
# position changes the logits of no other.
CONFIG = checkpoints.tiny_config(
    [0, 4], index_n_heads=2, index_head_dim=20, index_topk=9, qk_rope_head_dim=12, num_hash_layers=0
)
CONFIG.update(num_nextn_predict_layers=0, compress_ratios=CONFIG["compress_ratios"][:-1])
TOKENS = np.random.RandomState(3).randint(0, CONFIG["vocab_size"], 114)
FLOAT32_LOGITS = 2e-5  # of standard deviation 1; measured 7e-6


def test_differences_are_ties():
    tensors = checkpoints.random_checkpoint(CONFIG, 3, quantized=False)
    ours = small_models.load_tensors(tensors, CONFIG)
    theirs = hf.build(checkpoints.dequantize(tensors), CONFIG)
    found = {}

    def keep(name):
        return lambda module, inputs, output: found.update({name: output[0].numpy()})

    indexer = theirs.model.layers[1].self_attn.compressor.indexer
    indexer.register_forward_hook(keep("selected"))
    indexer.scorer.register_forward_hook(keep("scores"))
    expected = hf.forward(theirs, TOKENS)
    off = np.abs(np.asarray(ours(TOKENS[None]))[0] - expected).max(-1)
    selected = np.asarray(view_layers(ours, TOKENS[None])[1]["selected"])[0]

    ties = truncated = 0
    for position, (mine, other) in enumerate(zip(selected, found["selected"], strict=True)):
        mine, other = {*mine.tolist()} - {-1}, {*other.tolist()} - {-1}
        assert len(mine) == len(other) == min(9, (position + 1) // 4)
        truncated += (position + 1) // 4 > 9
        if mine == other:
            assert off[position] < FLOAT32_LOGITS, position
            continue
        ties += 1
        # Not close: all ReLUs are closed, and both sides have 0 to the bit.
        assert not found["scores"][position][[*(mine ^ other)]].any(), position
    assert (truncated, ties) == (75, 13)
