"""PEFT attaches all adapters that we write to transformers' model, and we read what it trains."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from v4jax.checkpoint import read_model, write_model  # noqa: E402
from v4jax.checkpoint.adapters import read_adapters, write_adapters  # noqa: E402
from v4jax.config.run import LoraConfig  # noqa: E402
from v4jax.model.weights import read_weights, write_weights  # noqa: E402
from v4jax.quant import LowRank  # noqa: E402
from v4jax.training.lora import add_adapters, merge  # noqa: E402

from . import folders  # noqa: E402

pytestmark = pytest.mark.oracle

TOKENS = np.arange(60) * 7 % 90
TOLERANCE = 1e-4  # logits of deviation 1 in float32; measured 9e-6
DEFAULT = LoraConfig(rank=3, alpha=6.0)
# Every matrix but the embedding: the router, compressors, the indexer and the head as well.
EVERYTHING = LoraConfig(rank=3, alpha=6.0, targets=("attention", "moe", "head"))
GATE_UP = LoraConfig(rank=3, alpha=6.0, targets=("moe.experts.gate_up",))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(our model, the folder that transformers reads)."""
    folder = tmp_path_factory.mktemp("peft")
    folders.write(folder / "base")
    model = read_model(folder / "base", "float32")
    write_model(model, folder / "theirs", "transformers")
    return model, folder / "theirs"


def adapt(model, lora):
    """Returns the model with adapters that change its logits, none on MTP blocks."""
    random = np.random.RandomState(0)
    among = [name for name in read_weights(model) if not name.startswith("mtp.")]
    adapted = add_adapters(model, lora, among=among)

    def turn(value):
        up = 0.05 * random.standard_normal(value.up.shape).astype(np.float32)
        return dataclasses.replace(value, up=jnp.asarray(up))

    weights = read_weights(adapted).items()
    return write_weights(adapted, {n: turn(v) for n, v in weights if isinstance(v, LowRank)})


def load_theirs(folder):
    return transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def run(module):
    with torch.no_grad():
        return module(torch.tensor(TOKENS)[None]).logits.numpy()


def factors_of(module):
    """Returns {tensor as the file names it: values} of what PEFT has attached."""
    state = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
    return {name: tensor.numpy() for name, tensor in state.items()}


# {case: (targets, pairs of factors)}. Every layer has a pair for each matrix of attention (5) and
# of the shared expert (3), one for gate and up of all experts, one for their downs.
CASES = {
    "default targets": (DEFAULT, 6 * (5 + 3 + 2)),
    # Routers, two matrices of five compressors, four of three indexers, and the head.
    "every matrix": (EVERYTHING, 6 * (5 + 3 + 2 + 1) + 5 * 2 + 3 * 4 + 1),
    "gate and up alone": (GATE_UP, 6),
}


@pytest.mark.parametrize("lora, count", CASES.values(), ids=CASES.keys())
def test_all_are_attached(base, tmp_path, recwarn, lora, count):
    model, folder = base
    adapted = adapt(model, lora)
    write_adapters(adapted, tmp_path / "adapters")
    theirs = load_theirs(folder)
    before = run(theirs)
    attached = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapters")).eval()
    assert not [w for w in recwarn if "adapter" in str(w.message).lower()]
    written = safetensors.numpy.load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    found = factors_of(attached)
    assert found.keys() == written.keys()  # PEFT has no factor that is not in the file, either
    for name, values in written.items():
        np.testing.assert_array_equal(found[name], values)
    assert len(written) == 2 * count

    logits = run(attached)
    np.testing.assert_allclose(adapted(TOKENS[None]), logits, atol=TOLERANCE)
    assert np.abs(logits - before).max() > 0.5
    merged = attached.merge_and_unload()
    np.testing.assert_allclose(merge(adapted)(TOKENS[None]), run(merged), atol=TOLERANCE)


def test_what_peft_saves_is_read(base, tmp_path):
    """Our own adapters to the bit; those that PEFT trained, whose gate and up share their ranks."""
    model, folder = base
    adapted = adapt(model, DEFAULT)
    write_adapters(adapted, tmp_path / "ours")
    attached = peft.PeftModel.from_pretrained(load_theirs(folder), str(tmp_path / "ours"))
    attached.save_pretrained(str(tmp_path / "saved"))
    again = read_weights(read_adapters(model, tmp_path / "saved"))
    for name, value in read_weights(adapted).items():
        if isinstance(value, LowRank):
            np.testing.assert_array_equal(again[name].down, value.down)
            np.testing.assert_array_equal(again[name].up, value.up)
            assert again[name].scale == value.scale

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_b_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "o_a_proj.weight"],
    )
    trained = peft.get_peft_model(load_theirs(folder), config).eval()
    torch.manual_seed(0)
    for name, values in trained.named_parameters():
        if "lora_B" in name:
            values.data.normal_(0, 0.1)
    trained.save_pretrained(str(tmp_path / "trained"))
    read = read_adapters(model, tmp_path / "trained")
    np.testing.assert_allclose(read(TOKENS[None]), run(trained), atol=TOLERANCE)
    # Written again they are the same, in either naming.
    for naming in ("peft", "released"):
        write_adapters(read, tmp_path / naming, naming)
        same = read_weights(read_adapters(model, tmp_path / naming))
        for name, value in read_weights(read).items():
            if isinstance(value, LowRank):
                np.testing.assert_array_equal(same[name].down, value.down)
                np.testing.assert_array_equal(same[name].up, value.up)
