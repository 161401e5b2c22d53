"""The oracles against golden values, against each other, and against transformers.

Whole models are slow tests: they judge the tests' own truth, which no change of the package moves.
"""

import numpy as np
import pytest

from . import checkpoints, golden, numpy_oracle, quantizers
from . import released_numpy as released

# Two float64 implementations of the same formulas on logits of size 1.
SAME_MATHEMATICS = 1e-11
# The golden tables print six digits after the point, norms of the QAT rows four.
PRINTED = 1e-6
# Float32 through a few layers of size-1 logits; measured 8e-6.
FLOAT32_LOGITS = 5e-5
# The tolerance that the specification gives for the whole-model table.
SPECIFIED_PLAIN = 1e-4

J4_TOKENS = np.arange(300)
J4_IDS = (J4_TOKENS * 37 + J4_TOKENS**2 // 3) % numpy_oracle.V
J4_CONFIG = checkpoints.tiny_config(
    numpy_oracle.RATIOS[:-1],
    hidden_size=numpy_oracle.D,
    num_attention_heads=numpy_oracle.H,
    head_dim=numpy_oracle.C,
    qk_rope_head_dim=numpy_oracle.R,
    q_lora_rank=numpy_oracle.QL,
    o_groups=numpy_oracle.G,
    o_lora_rank=numpy_oracle.OL,
    n_routed_experts=numpy_oracle.E,
    num_experts_per_tok=numpy_oracle.K,
    moe_intermediate_size=numpy_oracle.FF,
    vocab_size=numpy_oracle.V,
    index_n_heads=numpy_oracle.IH,
    index_head_dim=numpy_oracle.IC,
    index_topk=numpy_oracle.TOPK,
    swiglu_limit=numpy_oracle.LIMIT,
    routed_scaling_factor=numpy_oracle.SCALE,
    num_hash_layers=numpy_oracle.NHASH,
)

# Position, argmax, norm, logits[:4]: plain, and with the trained quantisers (QAT). {qat: table}
J4_TABLE, J4_MTP_TABLE = {}, {}
J4_TABLE[False] = np.loadtxt(
    """
      0 25 16.248300 -1.152713  0.190352 -0.699940  1.658375
      3 64 14.730521  0.785547 -0.637277 -2.201966  2.149193
      4 64 15.649801  0.972165 -0.745031 -3.284885  0.400521
    126 25 16.623619 -0.551899  0.988525 -1.209404 -0.516749
    127 25 15.544478 -2.218330  0.298724 -0.824427 -1.199355
    128 25 15.396032 -1.743085 -0.190275 -0.442614 -0.163608
    200 70 16.286275 -0.418234 -0.070211 -0.285197  0.180044
    255 19 15.461705 -0.853249  1.213268 -0.074055 -0.739894
    256 19 15.680254 -1.331900  0.597931 -0.472078  0.073263
    299 19 16.319202 -0.818584  1.130259 -0.851323 -0.147679
    """.splitlines()
)
J4_MTP_TABLE[False] = np.loadtxt(
    """
      0 57 16.113205 -0.445220 -0.272797  1.514209  1.171359
    127 10 13.294207 -1.212987 -1.252541  1.255707 -3.338365
    298 81 13.738202 -1.613162 -2.184414  0.159111 -1.965525
    """.splitlines()
)
J4_TABLE[True] = np.loadtxt(
    """
      0 25   16.3218 -1.280890  0.322462 -0.850616  1.633004
      3 64   14.8504  0.873361 -0.615133 -2.333427  2.114336
      4 64   15.7494  1.041333 -0.796320 -3.342967  0.313133
    126 25   16.6228 -0.521032  0.875622 -1.275175 -0.563629
    127 25   15.6601 -2.203718  0.292601 -0.844289 -1.157038
    128 25   15.2561 -1.663451 -0.295511 -0.672783 -0.257999
    200 70   16.4271 -0.399626 -0.110883 -0.210744  0.206653
    255 19   15.4768 -0.778450  1.188194  0.079852 -0.666695
    256 19   15.7630 -1.315346  0.552480 -0.479733  0.093988
    299 19   16.3324 -0.729439  1.127448 -0.820625 -0.090793
    """.splitlines()
)
J4_MTP_TABLE[True] = np.loadtxt(
    """
      0 57   16.1045 -0.332325 -0.272631  1.585408  1.084177
    127 10   13.3471 -1.153102 -1.325889  1.161133 -3.355358
    298 81   13.7757 -1.590877 -2.188597  0.091544 -1.933935
    """.splitlines()
)
# Stream 0 at position 299, first four channels, after each layer (plain).
J4_STREAMS = [
    [0.417453, -0.324893, -0.248673, -0.141188],
    [0.677064, 0.056521, 0.010674, -1.402458],
    [3.559514, -0.154307, 1.147239, -3.975948],
    [-0.031731, 1.264281, 0.076758, -1.161545],
    [-0.966132, 3.280736, 2.362171, -4.444587],
]


# ---- number formats and single functions (golden values of section J.2) ----


def test_fp8_activations():
    x = 0.03 * (np.arange(64) - 31.5)
    x[5] = 3.3
    values, scales = quantizers.act_quant(x, 64)
    assert scales == [2.0**-7]
    first = quantizers.act_dequant(values, scales, 64)[:8]
    np.testing.assert_array_equal(
        first, [-0.9375, -0.9375, -0.875, -0.875, -0.8125, 3.25, -0.75, -0.75]
    )


def test_fp4_activations():
    values, scales = quantizers.fp4_act_quant(0.11 * (np.arange(32) - 15.5), 32)
    assert scales == [0.5]
    np.testing.assert_array_equal(values[:6] * 0.5, [-1.5, -1.5, -1.5, -1.5, -1.5, -1.0])
    np.testing.assert_array_equal(values[-6:] * 0.5, [1.0, 1.5, 1.5, 1.5, 1.5, 1.5])


def test_fp4_bytes():
    np.testing.assert_array_equal(quantizers.unpack_fp4(np.array([0x2F], np.int8)), [-6, 1])
    codes = np.random.RandomState(0).randint(0, 16, (3, 8))
    unpacked = quantizers.unpack_fp4(quantizers.pack_fp4(codes))
    np.testing.assert_array_equal(unpacked, quantizers.E2M1_VALUES[codes])


@pytest.mark.parametrize(
    "value, nearest",
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (6, 6), (0.26, 0.5)],
)
def test_fp4_ties_go_to_even(value, nearest):
    code = quantizers.round_e2m1(np.array([value, -value]))
    np.testing.assert_array_equal(quantizers.E2M1_VALUES[code], [nearest, -nearest])


def test_scale_bytes():
    scales = quantizers.encode_scales([1.0, 2.0**-7, 2.0**100, 2.0**-126])
    np.testing.assert_array_equal(scales.view(np.uint8), [127, 120, 227, 1])
    expected = [1.0, 2.0**-7, 2.0**100, 2.0**-126]
    for stored in (scales, scales.view(np.uint8), np.float32(expected)):
        np.testing.assert_array_equal(quantizers.decode_scales(stored), expected)


def test_scales_round_up():
    # 448·2 is exactly representable with scale 2; one ulp more needs 4.
    x = np.float32([896, np.nextafter(np.float32(896), np.float32(1000)), 0])[:, None]
    _, scales = quantizers.act_quant(x, 1)
    # 1e-4/448 lies between 2^-23 and 2^-22.
    np.testing.assert_array_equal(scales[:, 0], [2, 4, 2.0**-22])


@pytest.mark.parametrize("shape", [(128, 256), (200, 136)])
def test_weights_survive_requantisation(shape):
    """Values of a format are fixed points: quantising what was dequantised changes nothing."""
    weight = np.random.RandomState(1).standard_normal(shape).astype(np.float32)
    for quantize, dequantize in (
        (quantizers.quantize_fp8_weight, quantizers.dequantize_fp8_weight),
        (quantizers.quantize_fp4_weight, quantizers.dequantize_fp4_weight),
    ):
        once = dequantize(*quantize(weight))
        np.testing.assert_array_equal(dequantize(*quantize(once)), once)
        np.testing.assert_array_equal(quantizers.to_bf16(once), once)


def test_hadamard():
    np.testing.assert_array_equal(quantizers.hadamard(np.array([1.0, 2, 3, 4])), [5, -1, -2, 0])


def test_rope_frequencies():
    f = released.rope_frequencies(dict(J4_CONFIG, qk_rope_head_dim=64), True, np.float64)
    known = {0: 1, 8: 0.05, 15: 3.635538584e-3, 16: 2.265625e-3, 20: 2.969777783e-4}
    known |= {24: 1.953125e-5, 25: 5.372312671e-6, 31: 5.680529037e-7}
    for i, value in known.items():
        assert f[i] == pytest.approx(value, rel=1e-9)


def test_split_of_the_stream_mixes():
    i = np.arange(24)
    mixes, base = 0.1 * ((7 * i) % 11 - 5), 0.05 * ((5 * i) % 9 - 4)
    model = released.ReleasedModel({}, J4_CONFIG, released.FLOAT64)
    pre, post, mix = model.split_mixes(mixes[None], np.array([0.5, 1.5, 2.0]), base)
    np.testing.assert_allclose(pre[0], [0.389361766, 0.537430845, 0.437824499, 0.586618579], 1e-8)
    np.testing.assert_allclose(post[0], [1.024994793, 0.851114966, 1.268271182, 1.099667995], 1e-8)
    rows = [
        [0.179079589, 0.380976425, 0.290569722, 0.149373264],
        [0.270824977, 0.063840746, 0.439433940, 0.225899338],
        [0.200154641, 0.425811993, 0.207080100, 0.166952267],
        [0.349939794, 0.129369837, 0.062915238, 0.457774131],
    ]
    np.testing.assert_allclose(mix[0], rows, 0, 1e-9)
    np.testing.assert_allclose(mix[0].sum(0), 0.999999, 0, 1e-7)


def test_router_scores():
    known = {-5: 0.08194723, -1: 0.55969788, 0: 0.83255461, 1: 1.14597630, 5: 2.23756907, 25: 5.0}
    scores = np.sqrt(released.softplus(np.array(list(known), float)))
    # The specification prints eight digits, of which the last two of −1 are float32 noise.
    np.testing.assert_allclose(scores, list(known.values()), 0, 5e-8)


# ---- whole model: the golden table, and the transcription against the oracle ----


@pytest.fixture(scope="module")
def j4():
    """{qat: (streams, logits, draft logits)} of the specification's oracle."""
    results = {}
    for qat in (False, True):
        numpy_oracle.QAT = qat
        streams, logits = numpy_oracle.model(J4_IDS)
        results[qat] = streams, logits, numpy_oracle.mtp(streams[:-1], J4_IDS[1:])
    numpy_oracle.QAT = False
    return results


@pytest.mark.slow
@pytest.mark.parametrize("qat", [False, True])
def test_oracle_prints_the_golden_table(j4, qat):
    _, logits, drafts = j4[qat]
    for table, rows in ((J4_TABLE, logits), (J4_MTP_TABLE, drafts)):
        for t, argmax, norm, *first in table[qat]:
            t = int(t)
            assert rows[t].argmax() == argmax
            assert np.linalg.norm(rows[t]) == pytest.approx(norm, abs=1e-4 if qat else PRINTED)
            np.testing.assert_allclose(rows[t, :4], first, 0, PRINTED)


@pytest.mark.slow
def test_transcription_prints_the_golden_streams():
    model = released.ReleasedModel(numpy_oracle.W, J4_CONFIG, released.FLOAT64)
    for layers, expected in enumerate(J4_STREAMS, 1):
        streams = model.residuals(J4_IDS, layers)
        np.testing.assert_allclose(streams[299, 0, :4], expected, 0, PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "numerics, qat, tolerance",
    [
        (released.FLOAT64, False, SAME_MATHEMATICS),
        (released.QAT, True, SAME_MATHEMATICS),
        (released.FLOAT32, False, FLOAT32_LOGITS),
    ],
    ids=["float64", "qat", "float32"],
)
def test_transcription_equals_the_oracle(j4, numerics, qat, tolerance):
    _, logits, drafts = j4[qat]
    model = released.ReleasedModel(numpy_oracle.W, J4_CONFIG, numerics)
    streams = model.residuals(J4_IDS)
    np.testing.assert_allclose(model.head(streams, ""), logits, 0, tolerance)
    np.testing.assert_allclose(model.mtp_logits(streams[:-1], J4_IDS[1:]), drafts, 0, tolerance)


# ---- released numerics ----


@pytest.fixture(scope="module")
def released_checkpoint():
    return checkpoints.random_checkpoint(checkpoints.RELEASED_TINY, 3)


@pytest.mark.slow
def test_released_rounding_stays_near_the_mathematics(released_checkpoint):
    """Rounding moves logits of size 1 by about a tenth: a wrong formula moves them by about 1."""
    config = checkpoints.RELEASED_TINY
    ids = np.random.RandomState(0).randint(0, config["vocab_size"], 300)
    exact = released.ReleasedModel(released_checkpoint, config, released.FLOAT64).logits(ids)
    for numerics, limit in ((released.BFLOAT16, 0.1), (released.RELEASED, 0.3)):
        logits = released.ReleasedModel(released_checkpoint, config, numerics).logits(ids)
        assert logits.dtype == np.float32
        assert np.sqrt(np.mean((logits - exact) ** 2)) < limit


def test_fp8_linear_by_hand(released_checkpoint):
    """One output of an FP8 linear from its stored bytes, block by block."""
    name, row, x = "layers.0.attn.wq_a.", 5, np.random.RandomState(0).standard_normal((1, 256))
    x = quantizers.to_bf16(x)
    weight = released_checkpoint[name + "weight"][row].astype(np.float32)
    exponents = released_checkpoint[name + "scale"].view(np.uint8)[0].astype(int) - 127
    total = 0.0
    for block in range(2):
        part = x[0, block * 128 : block * 128 + 128]
        scale = 2.0 ** np.ceil(np.log2(np.abs(part).max() / 448))
        q = (part / scale).astype(quantizers.E4M3).astype(np.float32)
        total += q @ weight[block * 128 : block * 128 + 128] * scale * 2.0 ** exponents[block]
    model = released.ReleasedModel(released_checkpoint, checkpoints.RELEASED_TINY)
    assert model.linear(x, name + "weight")[0, row] == quantizers.to_bf16(total)


# ---- golden files of transformers against the transcription ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_golden_models(name):
    made = golden.load(name)
    model = released.ReleasedModel(golden.weights(made), made["config"], released.FLOAT32)
    ids = made["ids"].astype(int)
    logits = model.logits(ids, made["positions"])
    np.testing.assert_allclose(logits, made["logits"], 0, FLOAT32_LOGITS)
    for layer, expected in enumerate(made["streams"], 1):
        streams = model.residuals(ids, layer)[made["streams_positions"]]
        np.testing.assert_allclose(streams, expected, 0, 2 * FLOAT32_LOGITS)


# ---- transformers ----


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch", reason="needs the [oracle] extra")
    pytest.importorskip("transformers", "5.17", reason="needs the [oracle] extra")
    from . import hf

    return hf


@pytest.mark.oracle
@pytest.mark.parametrize(
    "chunks",
    [None, [1] * 5 + [295], [130] + [1] * 170, [5, 9, 17, 1, 13, 16, 128, 111]],
    ids=["one call", "decode then prefill", "prefill then decode", "chunks"],
)
def test_transformers_equals_the_oracle(hf, j4, chunks):
    model = hf.build(numpy_oracle.W, J4_CONFIG)
    logits = hf.forward(model, J4_IDS) if chunks is None else hf.chunked(model, J4_IDS, chunks)
    np.testing.assert_allclose(logits, j4[False][1], 0, SPECIFIED_PLAIN)


@pytest.mark.oracle
@pytest.mark.parametrize("options", [dict(), dict(quantized=False)], ids=["fp8 and fp4", "bf16"])
def test_transformers_reads_the_written_checkpoint(hf, tmp_path, options):
    """Transformers' own loader finds in the written folder what we wrote."""
    import transformers

    if not options:
        pytest.importorskip("accelerate", reason="transformers' FP8 loader needs it")
    config = checkpoints.RELEASED_TINY
    tensors = checkpoints.random_checkpoint(config, 3, **options)
    checkpoints.write_checkpoint(tmp_path, tensors, config)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype="bfloat16", output_loading_info=True
    )
    assert not any(report.values())
    expected = hf.state_dict(checkpoints.dequantize(tensors), config)
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value.float(), expected[name].float(), err_msg=name)


@pytest.mark.oracle
def test_transformers_saves_a_known_layout(hf, tmp_path):
    """Pins the names that save_pretrained writes: a reader of such folders relies on them."""
    config = checkpoints.tiny_config([0, 128, 4], num_hash_layers=1, n_routed_experts=4)
    tensors = checkpoints.random_checkpoint(config, 1, quantized=False)
    model = hf.build(checkpoints.dequantize(tensors), config)
    model.save_pretrained(tmp_path / "default")
    written, _ = checkpoints.read_checkpoint(tmp_path / "default")
    expected = {hf.saved_name(name): name for name in tensors if not name.startswith("mtp.")}
    assert written.keys() == expected.keys()
    for saved, name in expected.items():
        np.testing.assert_array_equal(written[saved], tensors[name].astype(written[saved].dtype))
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    written, _ = checkpoints.read_checkpoint(tmp_path / "modules")
    expected = hf.state_dict(checkpoints.dequantize(tensors), config)
    assert written.keys() == expected.keys()
