"""One model over two processes with four devices each equals one process with eight."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import v4jax
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.config import LayerKind, RouterKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model import Transformer

from . import model_worker

WORKER = Path(model_worker.__file__)
ROOT = Path(__file__).parents[2]
# Between processes a sum is made in another order than within one. Logits are below 1 here.
TOLERANCE = 1e-5

# One layer, so that little is compiled; CSA has everything that meets other devices.
CONFIG = dataclasses.replace(
    load_model_config("tiny"),
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    compress_ratios=(4,),
    layer_types=(LayerKind.CSA,),
    mlp_layer_types=(RouterKind.TOPK,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights."""
    made = Transformer(CONFIG, get_numerics("float32"), storage="float32", rngs=nnx.Rngs(2))
    folder = tmp_path_factory.mktemp("model") / "folder"
    v4jax.save(made, folder, format="transformers")
    return folder


def run_two(*arguments: str) -> list[str]:
    """Returns what each of two workers printed last."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        "V4JAX_COORDINATOR": f"localhost:{port}",
        "V4JAX_PROCESS_COUNT": "2",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env=environment | {"V4JAX_PROCESS_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=580) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [out.splitlines()[-1] for out, _ in outputs]


@pytest.mark.slow
def test_prefill_and_decode(folder, tmp_path):
    """Both read their own shares, and together compute what one process does."""
    said = run_two(str(folder), str(tmp_path / "found.npz"))
    tensors = open_folder(folder).tensors.values()
    stored = sum(tensor.nbytes for tensor in tensors)
    experts = sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
    # `data` spans the processes and splits the experts; all else is whole on either.
    assert said == [f"read {stored - experts // 2} bytes of the checkpoint"] * 2
    found = np.load(tmp_path / "found.npz")
    for name, expected in model_worker.run(str(folder)).items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE, err_msg=name)
        assert np.abs(expected).max(initial=1.0) > 0.1
