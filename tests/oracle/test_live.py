"""Our model against transformers' on the spot: odd sizes, whole and in pieces, and its folders."""

import numpy as np
import pytest
import small_models
from model.test_golden_logits import extend_in_chunks
from model.test_pieces import run_piece

import v4jax
import v4jax.errors

from . import checkpoints, golden

torch = pytest.importorskip("torch", reason="needs the [oracle] extra")
transformers = pytest.importorskip("transformers", "5.17", reason="needs the [oracle] extra")

from . import hf, make_golden  # noqa: E402

pytestmark = pytest.mark.oracle

# What the project promises for 1,000 positions at logits of standard deviation 1.
FLOAT32_LOGITS = 1e-4
# Two float32 implementations of one module, on inputs of size 1 and outputs up to 10.
FLOAT32_PIECE = 2e-5

# Odd sizes in every direction; the selection truncates from position 4·index_topk on.
FLASH_LIKE = checkpoints.tiny_config(
    [0, 0, 4, 128, 4],
    hidden_size=72,
    num_attention_heads=5,
    head_dim=36,
    qk_rope_head_dim=12,
    q_lora_rank=28,
    o_groups=5,
    o_lora_rank=18,
    n_routed_experts=7,
    num_experts_per_tok=2,
    moe_intermediate_size=44,
    index_n_heads=24,
    index_head_dim=20,
    index_topk=13,
    vocab_size=113,
    num_hash_layers=2,
    swiglu_limit=0.6,
)
PRO_LIKE = checkpoints.tiny_config(
    [128, 128, 4, 128],
    hidden_size=88,
    num_attention_heads=6,
    head_dim=28,
    qk_rope_head_dim=20,
    q_lora_rank=52,
    o_groups=2,
    o_lora_rank=14,
    n_routed_experts=11,
    num_experts_per_tok=5,
    moe_intermediate_size=36,
    index_n_heads=18,
    index_head_dim=24,
    index_topk=31,
    vocab_size=139,
    num_hash_layers=1,
    routed_scaling_factor=2.5,
)
# Transformers drops MTP, so what it saves has none.
PRO_LIKE.update(num_nextn_predict_layers=0, compress_ratios=PRO_LIKE["compress_ratios"][:-1])
SEED = 11
# One compiled shape for every chunk of 1,000 tokens.
CHUNKS, CHUNK_SHAPE = (3, 128, 1, 200, 61, 7, 200, 129, 200, 71), 200


def tensors_of(config, seed=SEED):
    return checkpoints.random_checkpoint(config, seed, quantized=False)


def tokens_of(vocab_size):
    return np.random.RandomState(SEED).randint(0, vocab_size, sum(CHUNKS))


def logits_of(model):
    """Returns the logits of 1,000 tokens, in chunks: window, entries and state are all used."""
    model.folder = None  # is part of the compilation's key
    tokens = tokens_of(model.config.vocab_size)
    return extend_in_chunks(model, tokens, CHUNKS, CHUNK_SHAPE)


def check_logits(logits, theirs):
    expected = hf.forward(theirs, tokens_of(theirs.config.vocab_size))
    assert 0.8 < expected.std() < 1.2
    np.testing.assert_allclose(logits, expected, 0, FLOAT32_LOGITS)


def test_flash_like():
    tensors = tensors_of(FLASH_LIKE)
    theirs = hf.build(checkpoints.dequantize(tensors), FLASH_LIKE)
    check_logits(logits_of(small_models.load_tensors(tensors, FLASH_LIKE)), theirs)


@pytest.fixture(scope="module")
def both():
    """(our model, transformers' model) of the Flash-like configuration."""
    tensors = tensors_of(FLASH_LIKE, 21)
    return (
        small_models.load_tensors(tensors, FLASH_LIKE),
        hf.build(checkpoints.dequantize(tensors), FLASH_LIKE),
    )


@pytest.mark.parametrize("piece", golden.PIECES)
def test_pieces(both, piece):
    ours, theirs = both
    inputs = {k: v[None] for k, v in golden.piece_inputs(FLASH_LIKE, piece).items()}
    found = run_piece(ours, piece, **inputs)
    number = golden.PIECES[piece]["layer"]
    layer = None if number is None else theirs.model.layers[number]
    with torch.no_grad():
        expected = make_golden.run_piece(
            theirs, layer, number, piece, **{k: torch.tensor(v) for k, v in inputs.items()}
        )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name].squeeze(0).numpy()
        np.testing.assert_allclose(value[0], wanted, 0, FLOAT32_PIECE, err_msg=name)


# ---- a Pro-like model, and its folders ----


@pytest.fixture(scope="module")
def pro_like():
    """(our model, transformers' model, our logits) of float32 weights."""
    tensors = checkpoints.dequantize(tensors_of(PRO_LIKE))
    ours = small_models.load_tensors(tensors, PRO_LIKE)
    return ours, hf.build(tensors, PRO_LIKE), logits_of(ours)


def test_pro_like(pro_like):
    _, theirs, logits = pro_like
    check_logits(logits, theirs)


def test_we_load_what_transformers_saves(pro_like, tmp_path):
    _, theirs, logits = pro_like
    theirs.save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits_of(v4jax.load(tmp_path)), logits)


def test_we_load_the_names_of_transformers_modules(pro_like, tmp_path):
    """With the names of its modules and stacked experts, which it writes on demand."""
    _, theirs, logits = pro_like
    theirs.save_pretrained(tmp_path, save_original_format=False)
    np.testing.assert_array_equal(logits_of(v4jax.load(tmp_path)), logits)


def test_transformers_loads_what_we_save(pro_like, tmp_path):
    ours, theirs, _ = pro_like
    v4jax.save(ours, tmp_path / "saved", format="transformers")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        dtype="float32",
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    tokens = tokens_of(PRO_LIKE["vocab_size"])[:200]
    expected = hf.forward(theirs, tokens)
    np.testing.assert_array_equal(hf.forward(again.eval(), tokens), expected)
