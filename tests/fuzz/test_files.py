"""Every file that is read from outside: it is read, or one line says why not, soon and in little
memory.

The examples are the same every time. The longer run is marked slow.
"""

import json
import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4jax.checkpoint import read_abstract
from v4jax.checkpoint.adapters import read_adapters, write_adapters
from v4jax.checkpoint.orbax_store import Store
from v4jax.checkpoint.safetensors_file import read_header, read_tensor
from v4jax.config import SourceConfig
from v4jax.config.folder import read_folder_config
from v4jax.errors import V4JaxError
from v4jax.inference.document_files import DocumentFiles
from v4jax.inference.documents import build_document, parse_line, read_lines
from v4jax.inference.request import SamplingOptions
from v4jax.model.weights import read_weights, write_weights
from v4jax.quant import LowRank
from v4jax.tokenizer import load_tokenizer
from v4jax.tokenizer.tokenizer import Tokenizer
from v4jax.training.data.chat import ChatRecords
from v4jax.training.data.text import TextRecords

from .mutations import bounded, byte_mutations, json_mutations

LONGEST_LINE = 2000
FEW, TIMES = 60, 10  # examples, and how many times as many in the longer run


def fuzz(strategy, few=FEW):
    """Makes a fast test and a slow one of `test(self, data)`, which reads what was drawn."""

    def decorate(test):
        options = dict(derandomize=True, database=None, deadline=None)
        options["suppress_health_check"] = list(HealthCheck)

        @pytest.mark.parametrize(
            "examples",
            [few, pytest.param(TIMES * few, marks=pytest.mark.slow)],
            ids=("few", "many"),
        )
        def run(examples, tmp_path):
            @settings(max_examples=examples, **options)
            @given(strategy())
            def check(drawn):
                with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                    read_or_refuse(lambda: test(pathlib.Path(folder), drawn))

            check()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def read_or_refuse(read) -> None:
    """Calls what reads a file; all it may raise is one of our errors, in one line."""
    with bounded():
        try:
            read()
        except V4JaxError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < LONGEST_LINE, text


def small_folder() -> pathlib.Path:
    """Returns a checkpoint folder of three layers, made once."""
    if not MADE:
        MADE.append(pathlib.Path(tempfile.mkdtemp(prefix="v4jax-fuzz-")))
        folders.write(MADE[0], folders.tensors_of(folders.SINGLE), folders.SINGLE, shards=2)
    return MADE[0]


MADE: list[pathlib.Path] = []


@pytest.fixture(scope="module", autouse=True)
def _remove_folders():
    yield
    for folder in (*MADE, *ADAPTERS[1:], *STEPS):
        shutil.rmtree(folder)
    MADE.clear(), ADAPTERS.clear(), STEPS.clear()


def link_folder(folder: pathlib.Path, name: str, data: bytes) -> None:
    """Makes the small folder again out of links, with one file of its own."""
    for file in small_folder().iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    (folder / name).write_bytes(data)


def valid(name: str):
    """Returns the JSON of a file in the small folder."""
    return json.loads((small_folder() / name).read_text())


@fuzz(lambda: json_mutations(valid("config.json")), few=300)
def test_configurations(folder, data):
    """A configuration whose fields nobody meant."""
    (folder / "config.json").write_bytes(data)
    read_folder_config(folder)


@fuzz(lambda: json_mutations(valid("config.json")), few=20)
def test_configurations_of_a_folder(folder, data):
    """The same beside tensors: what is built from it is built for tensors that are there."""
    link_folder(folder, "config.json", data)
    read_abstract(folder)


@fuzz(lambda: json_mutations({"eos_token_id": [1, 2], "temperature": 1.0}))
def test_generation_configurations(folder, data):
    """Further tokens that end an answer."""
    (folder / "config.json").write_bytes((small_folder() / "config.json").read_bytes())
    (folder / "generation_config.json").write_bytes(data)
    read_folder_config(folder)


@fuzz(lambda: json_mutations(valid(folders.INDEX)))
def test_indices(folder, data):
    """An index that names other files, and tensors that are not there."""
    link_folder(folder, folders.INDEX, data)
    read_abstract(folder)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}


def headers():
    """Draws files of tensors: with a damaged header, or damaged anywhere."""

    def encode(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + bytes(range(40))

    whole = encode(json.dumps(HEADER).encode())
    return st.one_of(json_mutations(HEADER).map(encode), byte_mutations(whole))


@fuzz(headers, few=300)
def test_headers(folder, data):
    """A file of tensors, whose bytes are read where the header holds."""
    file = folder / "x.safetensors"
    file.write_bytes(data)
    for tensor in read_header(file):
        assert read_tensor(tensor).nbytes <= 40


ADAPTERS: list = []


def adapted():
    """Returns a model, and the folder of adapters for it, made once."""
    if not ADAPTERS:
        import small_models

        model = small_models.make_model(small_models.WINDOWS)
        weights, name = read_weights(model), "head"
        rows, columns = weights[name].shape
        down, up = jnp.ones((2, columns)), jnp.ones((rows, 2))
        value = LowRank(weights[name], down, up, 0.5, "float32", rounds_inputs=False)
        made = pathlib.Path(tempfile.mkdtemp(prefix="v4jax-fuzz-"))
        write_adapters(write_weights(model, {name: value}), made / "out")
        ADAPTERS.extend((model, made))
    return ADAPTERS[0], ADAPTERS[1] / "out"


@fuzz(
    lambda: json_mutations(json.loads((adapted()[1] / "adapter_config.json").read_text())), few=150
)
def test_adapter_configurations(folder, data):
    """Rank, scale and kind of adapters."""
    model, made = adapted()
    (folder / "adapter_model.safetensors").symlink_to(made / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(data)
    for value in read_weights(read_adapters(model, folder)).values():
        if isinstance(value, LowRank):
            assert np.isfinite(value.scale) and np.isfinite(np.asarray(value.down)).all()


@fuzz(lambda: byte_mutations((adapted()[1] / "adapter_model.safetensors").read_bytes()))
def test_adapter_tensors(folder, data):
    """The file of adapters."""
    model, made = adapted()
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").symlink_to(made / "adapter_config.json")
    for value in read_weights(read_adapters(model, folder)).values():
        if isinstance(value, LowRank):
            assert np.isfinite(np.asarray(value.down)).all()


STEPS: list[pathlib.Path] = []


def state_of(step: int) -> dict:
    """Returns the state of a step."""
    return {"x": jnp.asarray(np.random.RandomState(step).standard_normal(3000), jnp.float32)}


def two_steps() -> pathlib.Path:
    """Returns a folder with two checkpoints of a run, made once."""
    if not STEPS:
        STEPS.append(pathlib.Path(tempfile.mkdtemp(prefix="v4jax-fuzz-")))
        with Store(STEPS[0]) as store:
            for step in (1, 2):
                store.save(step, state_of(step), {"step": step})
    return STEPS[0]


@st.composite
def damaged_checkpoints(draw):
    """Draws which file of the newer checkpoint is gone, or what it holds."""
    files = sorted(path for path in (two_steps() / "2").rglob("*") if path.is_file())
    file = draw(st.sampled_from(files))
    data, arrays = file.read_bytes(), file.parent.name == "d"
    how = draw(st.sampled_from(("remove", "cut") if arrays else ("remove", "cut", "change")))
    if how == "remove":
        return file, None
    if how == "cut":
        return file, data[: draw(st.integers(0, max(len(data) - 1, 0)))]
    return file, draw(byte_mutations(data))


@fuzz(damaged_checkpoints, few=15)
def test_checkpoints_of_a_run(folder, drawn):
    """A damaged checkpoint is taken as it was saved, or the one before it is."""
    file, data = drawn
    shutil.copytree(two_steps(), folder / "run")
    place = folder / "run" / file.relative_to(two_steps())
    place.unlink()
    if data is not None:
        place.write_bytes(data)
    with Store(folder / "run", read_only=True) as store:
        found, extra = store.restore(None, state_of(0))
        if extra in ({"step": 1}, {"step": 2}):  # JSON that still holds says what it says
            assert np.array_equal(found["x"], state_of(extra["step"])["x"])


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "id": i,
            "content": content,
            "special": True,
        }
        for i, content in enumerate(
            ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
        )
    ],
    "model": {
        "type": "BPE",
        "vocab": {
            "<｜begin▁of▁sentence｜>": 0,
            "<｜end▁of▁sentence｜>": 1,
            "<｜▁pad▁｜>": 2,
            "a": 3,
            "b": 4,
            "ab": 5,
        },
        "merges": [["a", "b"]],
    },
}


@fuzz(lambda: json_mutations(TOKENIZER), few=200)
def test_tokenizers(folder, data):
    """A tokenizer, with which every id has bytes."""
    (folder / "tokenizer.json").write_bytes(data)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    tokenizer.encode("ab ba")
    tokenizer.decode_bytes(range(tokenizer.vocab_size))


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "S", "tools": [{"type": "function", "function": {}}]},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning_content": "r",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "c", "tool_call_id": "1"},
        {"role": "assistant", "content": "d"},
    ],
    "tools": [],
    "mode": "thinking",
}


@fuzz(lambda: json_mutations(CONVERSATION), few=200)
def test_conversations(folder, data):
    """A line of conversations to learn."""
    (folder / "x.jsonl").write_bytes(data)
    config = SourceConfig(kind="chat", paths=("x",))
    records = ChatRecords([folder / "x.jsonl"], config, load_tokenizer("byte"))
    for index in range(len(records)):
        for example in records.read(index):
            assert len(example.tokens) == len(example.weights)
            assert np.isfinite(example.weights).all()


@fuzz(lambda: json_mutations({"text": "It was …", "meta": {"source": "x"}}))
def test_texts(folder, data):
    """A line of texts to learn."""
    (folder / "x.jsonl").write_bytes(data)
    config = SourceConfig(kind="text", paths=("x",))
    records = TextRecords([folder / "x.jsonl"], config, load_tokenizer("byte"), 128)
    for index in range(len(records)):
        records.read(index)


LINE = {
    "id": "a7",
    "text": "It was a dark night",
    "questions": ["Who?", "When?"],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 3,
    "max_new_tokens": 64,
}


@fuzz(lambda: json_mutations(LINE), few=200)
def test_documents(folder, data):
    """A line of a batch."""
    (folder / "x.jsonl").write_bytes(data)
    files = DocumentFiles(str(folder))
    for line in read_lines(str(folder / "x.jsonl")):
        build_document(parse_line(line), files, SamplingOptions(), 1 << 20)
