"""ConfigDict → dataclass, and finding a model by name, file or folder."""

import dataclasses
import enum
import itertools
import json
from typing import Literal

import ml_collections
import pytest

from v4jax.config import LayerKind, ModelConfig, RouterKind
from v4jax.config.loading import build, load_model_config, packaged_names
from v4jax.config.model import StackPlan, plan_stack
from v4jax.errors import ConfigError

from .released import FLASH


class Colour(enum.Enum):
    """An enum with values unlike its names."""

    RED = "red light"


@dataclasses.dataclass(frozen=True)
class Inner:
    """A nested configuration."""

    size: int
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outer:
    """One field of every kind that a configuration uses."""

    inner: Inner
    name: str = "x"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    limit: int | None = None
    either: int | str = 1
    parts: tuple[Inner, ...] = ()
    flag: bool = False


def test_builds_nested_values_of_every_kind():
    config = ml_collections.ConfigDict(
        dict(
            inner=dict(size=3, rate=2),
            sizes=[1, 2],
            pair=(4, 5),
            mode="slow",
            colour="RED",
            either="three",
            parts=[dict(size=1)],
            flag=True,
        )
    )
    assert build(Outer, config) == Outer(
        inner=Inner(3, 2.0),
        sizes=(1, 2),
        pair=(4, 5.0),
        mode="slow",
        either="three",
        parts=(Inner(1),),
        flag=True,
    )


# {what is wrong: (the configuration, what the message must say)}
BROKEN = {
    "unknown": (dict(inner=dict(size=1), nmae="x"), r"run.nmae is no field.*mean 'name'\?"),
    "unknown below": (dict(inner=dict(size=1, rte=2.0)), r"run.inner.rte is no field.*'rate'"),
    "missing": (dict(name="x"), r"run.inner is missing; Outer needs it"),
    "missing below": (dict(inner={}), r"run.inner.size is missing"),
    "text for int": (dict(inner=dict(size="1")), r"run.inner.size must be int, got '1'"),
    "float for int": (dict(inner=dict(size=1.5)), r"run.inner.size must be int, got 1.5"),
    "bool for int": (dict(inner=dict(size=True)), r"run.inner.size must be int, got True"),
    "int for bool": (dict(inner=dict(size=1), flag=1), r"run.flag must be bool, got 1"),
    "bool for float": (dict(inner=dict(size=1, rate=True)), r"run.inner.rate must be float"),
    "none": (dict(inner=dict(size=None)), r"run.inner.size must be int, got None"),
    "number for object": (dict(inner=3), r"run.inner must be a ConfigDict, got 3"),
    "in a tuple": (dict(inner=dict(size=1), sizes=(1, "2")), r"run.sizes\[1\] must be int"),
    "tuple length": (dict(inner=dict(size=1), pair=(1,)), r"run.pair must have 2 entries"),
    "no tuple": (dict(inner=dict(size=1), sizes=7), r"run.sizes must be a tuple, got 7"),
    "literal": (
        dict(inner=dict(size=1), mode="slo"),
        r"run.mode must be one of \['fast', 'slow'\]",
    ),
    "enum": (
        dict(inner=dict(size=1), colour="green"),
        r"run.colour must be one of \['red light'\]",
    ),
    "union": (
        dict(inner=dict(size=1), either=1.5),
        r"run.either must be one of the types int, str",
    ),
    "optional": (dict(inner=dict(size=1), limit="4"), r"run.limit must be int, got '4'"),
    "in a nested tuple": (dict(inner=dict(size=1), parts=[{}]), r"run.parts\[0\].size is missing"),
}


@pytest.mark.parametrize("config, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_configurations(config, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, config, "run")


def test_short_forms_of_the_layers():
    config = load_model_config("tiny")
    assert config.layer_types == tuple(
        {0: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}[r]
        for r in config.compress_ratios
    )
    assert config.mlp_layer_types == (RouterKind.HASH,) + (RouterKind.TOPK,) * 5


def test_small_models_have_every_mechanism_and_enough_index_heads():
    for name in ("tiny", "nano"):
        config = load_model_config(name)
        assert set(config.layer_types) == set(LayerKind)
        assert set(config.mlp_layer_types) == set(RouterKind)
        # tiny drafts by an MTP block, nano by a draft module.
        assert config.num_nextn_predict_layers == int(name == "tiny")
        assert bool(config.draft) == (name == "nano") and config.tokenizer == "byte"
        assert config.index_n_heads >= 4 and config.stack_plan.repeats > 1
    assert config.layer_types.count(LayerKind.CSA) == 2  # nano: index scores dominate a CPU


def test_names_files_and_folders(tmp_path):
    assert {"nano", "tiny", "v4_flash", "v4_pro"} <= set(packaged_names())
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    assert load_model_config(tmp_path) == load_model_config("v4_flash")
    file = tmp_path / "mine.py"
    file.write_text(
        "from v4jax.config.models import tiny\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        "    config.index_topk = 99\n"
        "    return config\n"
    )
    assert load_model_config(str(file)) == dataclasses.replace(
        load_model_config("tiny"), index_topk=99
    )


def test_no_package_called_configs_is_asked(tmp_path, monkeypatch):
    """Another project's `configs`, first on the path, is neither a model nor imported."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise SystemExit('the wrong configs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in packaged_names():
        load_model_config(name)


def test_a_run_gives_its_model(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(
        "import ml_collections\nfrom v4jax.config.models import tiny\n"
        "def get_config():\n    return ml_collections.ConfigDict(dict(model=tiny.get_config()))\n"
    )
    assert load_model_config(file) == load_model_config("tiny")


# {file: (its text, what the message must say)}
BAD_FILES = {
    "no function": ("x = 1\n", r"must define get_config\(\)"),
    "raises": ("1 / 0\n", r"line 1, raises ZeroDivisionError"),
    "syntax": ("def\n", r"line 1, raises SyntaxError"),
    "returns nothing": ("def get_config():\n    pass\n", r"must return a ConfigDict, got NoneType"),
    "unknown field": (
        "from v4jax.config.models import tiny\n"
        "def get_config():\n    c = tiny.get_config()\n    c.index_top_k = 3\n    return c\n",
        r"model.index_top_k is no field of ModelConfig; did you mean 'index_topk'\?",
    ),
    "broken invariant": (
        "from v4jax.config.models import tiny\n"
        "def get_config():\n    c = tiny.get_config()\n    c.o_groups = 3\n    return c\n",
        r"model.num_attention_heads must be a multiple of o_groups = 3, got 4",
    ),
}


@pytest.mark.parametrize("text, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model_config(file)


def test_bad_names_and_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"got 'nanoo'; did you mean 'nano'\?"):
        load_model_config("nanoo")
    with pytest.raises(ConfigError, match=r"config.json cannot be read: No such file"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is no JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"must hold a JSON object, got list"):
        load_model_config(tmp_path)


def test_a_dataclass_passes_through():
    config = load_model_config("tiny")
    assert build(ModelConfig, config) is config


def plan_by_trial(layers):
    """Returns the plan with the fewest blocks, found by trying all."""
    count, best = len(layers), StackPlan(len(layers), 0, 0, 0)
    for prefix in range(count):
        for period in range(1, (count - prefix) // 2 + 1):
            unit, repeats = layers[prefix : prefix + period], 1
            while layers[prefix + repeats * period :][:period] == unit:
                repeats += 1
            plan = StackPlan(prefix, period, repeats, count - prefix - repeats * period)
            fewer = (
                plan.prefix + plan.period + plan.suffix < best.prefix + best.period + best.suffix
            )
            best = plan if repeats > 1 and fewer else best
    return best


def test_plan_of_layers():
    every = [kinds for length in range(8) for kinds in itertools.product("ab", repeat=length)]
    for kinds in [*every, *itertools.permutations("aabbcc")]:
        assert plan_stack(kinds) == plan_by_trial(kinds), kinds
