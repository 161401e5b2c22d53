"""Flags from dataclasses: defaults, files, what goes before what, and every text of help."""

import dataclasses
import importlib
from typing import Literal

import pytest
from absl import flags

from v4jax.cli.flags import as_dict, define, read
from v4jax.config.inference import FrameConfig, InferenceConfig, SamplingConfig
from v4jax.config.run import MeshConfig
from v4jax.errors import V4JaxError

FILE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.numerics = "released"
    config.mesh = dict(expert=4)
    config.max_tokens = 4096
    config.questions_at_once = 2
    config.frame = dict(system="Be brief.")
    config.sampling = dict(temperature=0.5, seed=3)
    return config
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """A flag of every kind.

    Attributes:
      what: What to work on.
      many: Numbers, with a text that
        goes on.
      words: Given again and again.
      kind: One of two.
    """

    config: InferenceConfig = dataclasses.field(metadata={"without": ("frame",)})
    what: str = dataclasses.field(metadata={"positional": True})
    many: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = dataclasses.field(default=(), metadata={"repeated": True})
    kind: Literal["a", "b"] | None = None


def parse(record: type, *arguments: str):
    """Returns what a command's flags say."""
    values = flags.FlagValues()
    define(record, values)
    values.set_gnu_getopt(True)
    return read(record, values, values(["v4jax", *arguments])[1:], "leave it out")


def test_defaults_are_those_of_the_fields():
    assert parse(Flags, "--model=tiny", "--what=x") == Flags(
        config=InferenceConfig("tiny"), what="x"
    )


def test_values_of_every_kind():
    given = [
        "--model=tiny",
        "--mesh=data=2,expert=4",
        "x",
        "--many=5,6",
        "--words=a,b",
        "--words=c",
        "--kind=b",
    ]
    given += ["--top_p=1", "--seed=7"]
    assert parse(Flags, *given) == Flags(
        config=InferenceConfig(
            "tiny", mesh=MeshConfig(data=2, expert=4), sampling=SamplingConfig(top_p=1.0, seed=7)
        ),
        what="x",
        many=(5, 6),
        words=("a,b", "c"),
        kind="b",
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    return path


def test_flags_go_before_the_file(file):
    expected = InferenceConfig(
        "nano",
        "released",
        mesh=MeshConfig(expert=4),
        max_tokens=4096,
        questions_at_once=2,
        frame=FrameConfig("Be brief."),
        sampling=SamplingConfig(0.5, seed=3),
    )
    given = (f"--config={file}", "--what=x")
    assert parse(Flags, *given).config == expected
    changed = parse(Flags, *given, "--temperature=0", "--mesh=data=2", "--model=tiny").config
    assert changed == dataclasses.replace(
        expected,
        model="tiny",
        mesh=MeshConfig(data=2),
        sampling=dataclasses.replace(expected.sampling, temperature=0.0),
    )


@pytest.mark.parametrize("verb", ["batch", "generate", "evaluate"])
def test_every_verb_takes_the_file(verb, file):
    record = importlib.import_module(f"v4jax.cli.{verb}").Flags
    given = {"batch": ["--input=a", "--output=b"], "generate": ["--prompt=a"], "evaluate": []}
    found = parse(record, f"--config={file}", *given[verb])
    assert found.config.numerics == "released" and found.config.sampling.seed == 3
    values = as_dict(found)  # by the flags' names, as processes compare them
    assert (values["system"], values["top_k"], values["mesh"]["expert"]) == ("Be brief.", 0, 4)


# {what is wrong: (flags, what the message must say)}; {file} is a good one
BAD = {
    "no model": (["--what=x"], "--model is required; --help shows examples"),
    "empty": (["--model=", "--what=x"], "--model is required"),
    "two words": (["--model=tiny", "x", "y"], "unexpected argument 'y'; leave it out"),
    "flag and word": (["--model=tiny", "--what=x", "y"], "unexpected argument 'y'; leave it out"),
    "no number": (["--model=tiny", "x", "--many=5,K"], "--many takes whole numbers, got ['5', 'K"),
    "mesh": (["--model=tiny", "x", "--mesh=pipe=2"], "mesh must name each of data, expert, conte"),
    "rule": (
        ["--model=tiny", "x", "--max_tokens=0"],
        "--max_tokens must be between 1 and 268435456",
    ),
    "no file": (["--config=none.py", "x"], "config must be a Python file with get_config(), got"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_flags(arguments, message):
    with pytest.raises(V4JaxError) as error:
        parse(Flags, *arguments)
    assert message in str(error.value)


def test_a_bad_file_names_its_field(tmp_path):
    (tmp_path / "bad.py").write_text(FILE.replace("temperature", "temprature"))
    with pytest.raises(V4JaxError, match=r"sampling.temprature is no field .* mean 'temperature'"):
        parse(Flags, f"--config={tmp_path}/bad.py", "--what=x")
