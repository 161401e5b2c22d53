"""The cases of `benchmarks.kernels`: operations, and the shapes at which they are compiled.

A case is one call of an operation with abstract arguments, at the released models' sizes and a
context of 1,048,576 tokens. Each of its Pallas kernels says what it must compute and move, and how
often loops run whose rounds depend on data. Such assumptions are printed with the figures.

Read `case.py` first. To add a case, extend the list of its operation. Loops and regions have the
names that `python -m benchmarks.kernels --loops` prints.
"""

import functools

from benchmarks.kernels.cases.attention import (
    dense_attention_cases,
    indexer_cases,
    sparse_attention_cases,
)
from benchmarks.kernels.cases.case import CHUNK, CONTEXT, Case, Kernel
from benchmarks.kernels.cases.experts import grouped_matmul_cases, scaled_matmul_cases
from benchmarks.kernels.cases.streams import hyper_connections_cases, rotation_cases
from v4jax.config.loading import load_model_config
from v4jax.config.model import ModelConfig
from v4jax.errors import RequestError
from v4jax.kernels import Target

MODELS = ("v4_flash", "v4_pro")
_BUILDERS = (
    indexer_cases,
    sparse_attention_cases,
    dense_attention_cases,
    rotation_cases,
    hyper_connections_cases,
    grouped_matmul_cases,
    scaled_matmul_cases,
)


def find(key: str, target: Target) -> Case:
    """Returns the case of a key; its kernels are those of the target.

    Raises:
      RequestError: there is none.
    """
    for build in _BUILDERS:
        for model in MODELS:
            for case in build(model, _config(model), target):
                if case.key == key:
                    return case
    raise RequestError(f"there is no benchmark case {key!r}")


def select(target: Target, models: tuple[str, ...], only: tuple[str, ...] = ()) -> list[Case]:
    """Returns the cases of some models, and if `only` is given those whose key contains a word."""
    found = [
        case
        for build in _BUILDERS
        for model in models
        for case in build(model, _config(model), target)
    ]
    if not only:
        return found
    for word in only:
        if not any(word in case.key for case in found):
            known = sorted({case.op for case in found})
            raise RequestError(f"no case contains {word!r}; operations are {', '.join(known)}")
    return [case for case in found if any(word in case.key for word in only)]


@functools.cache
def _config(model: str) -> ModelConfig:
    return load_model_config(model)


__all__ = ["CHUNK", "CONTEXT", "MODELS", "Case", "Kernel", "find", "select"]
