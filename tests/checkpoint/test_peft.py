"""PEFT attaches the adapters we write to transformers' model, and we read those it saves."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from v4jax.checkpoint import read_model, write_model  # noqa: E402
from v4jax.checkpoint.adapters import read_adapters, write_adapters  # noqa: E402
from v4jax.model.weights import read_weights, write_weights  # noqa: E402
from v4jax.quant import LowRank  # noqa: E402

from . import folders  # noqa: E402

pytestmark = pytest.mark.oracle

TOKENS = np.arange(60) * 7 % 90
# What is a module of transformers and takes vectors: neither routed experts nor the groups.
TARGETS = ("query_down", "query_up", "key_value", "output_up", "shared.gate_up", "shared.down")
TOLERANCE = 1e-4  # logits of deviation 1 in float32; measured 9e-6


def test_logits(tmp_path):
    folders.write(tmp_path / "base")
    model, random = read_model(tmp_path / "base", "float32"), np.random.RandomState(0)

    def adapt(base):
        *lead, rows, columns = base.shape
        down = random.standard_normal((*lead, 3, columns)).astype(np.float32) / np.sqrt(columns)
        up = 0.05 * random.standard_normal((*lead, rows, 3)).astype(np.float32)
        return LowRank(base, jnp.asarray(down), jnp.asarray(up), 2.0, "float32", False)

    weights = read_weights(model)
    names = [n for n in weights if n.endswith(TARGETS) and n.startswith("stack")]
    adapted = write_weights(model, {name: adapt(weights[name]) for name in names})
    write_model(model, tmp_path / "theirs", "transformers")
    write_adapters(adapted, tmp_path / "adapters", "transformers")
    theirs = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "theirs",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()

    def run(module):
        with torch.no_grad():
            return module(torch.tensor(TOKENS)[None]).logits.numpy()

    before = run(theirs)
    attached = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapters")).eval()
    logits = run(attached)
    np.testing.assert_allclose(adapted(TOKENS[None]), logits, atol=TOLERANCE)
    assert np.abs(logits - before).max() > 0.5

    attached.save_pretrained(str(tmp_path / "saved"))
    again = read_weights(read_adapters(model, tmp_path / "saved"))
    for name, value in read_weights(adapted).items():
        if isinstance(value, LowRank):
            np.testing.assert_array_equal(again[name].down, value.down)
            np.testing.assert_array_equal(again[name].up, value.up)
            assert again[name].scale == value.scale
