"""The verbs on eight simulated devices: every mesh gives the answers of one device.

A sampled answer is hundreds of comparisons of sums made in another order: here they differ by
1e-5 where logits have a deviation of 1.5, and no choice is that near.
"""

import json
from pathlib import Path

import pytest

from v4jax.cli import main
from v4jax.config import LayerKind

from .mesh_models import write_model

# Two layers, one capacity and three shapes: compiling is nearly all of the time.
FLAGS = ("--max_tokens=1024", "--chunk_tokens=512", "--max_new_tokens=6", "--questions_at_once=2")
TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 12  # 710 tokens: two chunks
LINES = [
    {"id": "a", "text": TEXT, "questions": ["Who?", "When was it?", "Why?"], "temperature": 0.9},
    {"text": "", "question": "Why?"},
    {"id": "c", "text": "Short.", "questions": ["Why?", "Where?"]},
]
ONE = "data=1"
MESHES = [
    "expert=2,context=2,tensor=2",
    "data=2,expert=4",
    pytest.param("expert=8", marks=pytest.mark.slow),
    pytest.param("context=8", marks=pytest.mark.slow),
    pytest.param("data=2,context=2,tensor=2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, and the answers of one device beside it."""
    folder = tmp_path_factory.mktemp("mesh")
    write_model(folder / "model", LayerKind.CSA, LayerKind.HCA)
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "docs.jsonl").write_text(lines)
    assert batch(folder, ONE) == 0
    return folder


def batch(folder: Path, mesh: str) -> int:
    """Answers the questions on a mesh, in a file of its name."""
    command = ["batch", f"--model={folder}/model", f"--input={folder}/docs.jsonl", *FLAGS]
    return main.run([*command, f"--mesh={mesh}", f"--output={folder}/{mesh}.jsonl"])


@pytest.mark.parametrize("mesh", MESHES)
def test_answers_are_those_of_one_device(folder, mesh):
    expected = (folder / f"{ONE}.jsonl").read_bytes()
    texts = [json.loads(line).get("answer") for line in expected.splitlines()]
    assert len(texts) == 6 and len(set(texts)) > 4  # the error line has none
    assert batch(folder, mesh) == 0
    assert (folder / f"{mesh}.jsonl").read_bytes() == expected


def test_a_job_begun_on_one_device_continues_on_a_mesh(folder):
    """Cut within the first group, whose open question is answered again in the same company."""
    whole = (folder / f"{ONE}.jsonl").read_bytes()
    output = folder / f"{MESHES[0]}.jsonl"
    output.write_bytes(whole[: whole.index(b"\n") + 10])
    assert batch(folder, MESHES[0]) == 0
    assert output.read_bytes() == whole


BAD = {
    "not the devices": (
        "expert=3",
        "mesh sizes must multiply to the 8 devices, got data 1 · expert 3 · context 1 · tensor 1 "
        "= 3; expert=8 would do",
    ),
    "not the model": (
        "data=2,tensor=4",
        "mesh.tensor = 4 does not divide model.o_groups = 2; sizes that would do: [1, 2]",
    ),
    "not the questions": (
        "data=4,expert=2",
        "mesh.data = 4 does not divide questions_at_once = 2, the questions of a document that it "
        "is to share out; sizes that would do: [1, 2], or questions_at_once = 4",
    ),
    "no axis": ("pipe=8", "mesh must name each of data, expert, context, tensor at most once"),
}


@pytest.mark.parametrize("mesh, message", BAD.values(), ids=BAD.keys())
def test_meshes_that_do_not_fit(folder, capsys, mesh, message):
    assert batch(folder, mesh) == 2
    assert message in capsys.readouterr().err
    assert not (folder / f"{mesh}.jsonl").exists()
