"""The flags that generate and batch share: which model, how it answers, how tokens are chosen."""

import os
from typing import Any

NUMERICS = ("float32", "bfloat16", "released")
PROFILES = ("preview", "0731")


def define_model_flags(flags: Any, values: Any) -> None:
    """Defines what says which model is loaded and how it answers."""
    flags.DEFINE_string(
        "model",
        None,
        "Checkpoint folder (released or transformers layout), or a packaged name: nano, a small "
        "trained model, or tiny, random weights for trying things out. Required.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "numerics",
        "float32",
        NUMERICS,
        "How the computation rounds: float32 for parity and research, bfloat16, or released: "
        "exactly as the published inference code.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "weights_seed",
        None,
        "Random weights of a packaged configuration, from this seed. Left out: its trained weights "
        "where it has some (nano), else seed 0.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "system", None, "System message. Trusted: it may hold control tokens.", flag_values=values
    )
    flags.DEFINE_boolean("thinking", False, "Reason before answering.", flag_values=values)
    flags.DEFINE_string(
        "effort",
        None,
        'How long to reason, with --thinking: "max" for as long as it takes; "high", and with '
        'profile 0731 "low".',
        flag_values=values,
    )
    flags.DEFINE_enum(
        "profile",
        "preview",
        PROFILES,
        "Generation of the checkpoint, which says how an effort is asked for: preview for V4-Flash "
        "and V4-Pro, 0731 for V4-Flash-0731 and V4-Pro-0813.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "chunk_tokens",
        4096,
        "Tokens read at once. Larger chunks read faster and need more memory.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_tokens",
        None,
        "Capacity of the cache, prompt and answer together. By default the length needed, rounded "
        "up to a power of two.",
        flag_values=values,
    )


def define_sampling_flags(flags: Any, values: Any) -> None:
    """Defines how the tokens of an answer are chosen."""
    flags.DEFINE_float(
        "temperature", 0.0, "0 takes the most probable token (greedy).", flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Keeps the most probable tokens that together reach this probability.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top_k", 0, "Keeps so many of the most probable tokens; 0 keeps all.", flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "The same seed and prompt give the same answer.", flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", 256, "Ends an answer that has not ended itself.", flag_values=values
    )


def build_sampling(values: Any) -> Any:
    """Returns the SamplingOptions that the flags describe."""
    from v4jax.inference import SamplingOptions

    return SamplingOptions(
        temperature=values.temperature,
        top_p=values.top_p,
        top_k=values.top_k,
        seed=values.seed,
        max_new_tokens=values.max_new_tokens,
    )


def build_frame(values: Any) -> Any:
    """Returns the Frame that the flags describe."""
    from v4jax.inference import Frame

    return Frame(
        system=values.system,
        thinking=values.thinking,
        effort=values.effort,
        profile=values.profile,
    )


def load_model(values: Any) -> Any:
    """Returns the model that the flags name, and says so when its weights are random."""
    import v4jax
    from v4jax import log

    with log.phase("model", f"loading {values.model}") as phase:
        model = v4jax.load(values.model, numerics=values.numerics, seed=values.weights_seed)
        phase.note(f"{values.model} is ready")
    if model.folder is None:
        log.warning(
            f"{values.model} has random weights, no trained ones: its answers mean nothing. They "
            "show that the machinery works, and how fast"
        )
    return model


def require(values: Any, *names: str) -> None:
    """Raises RequestError for the first flag that has no value."""
    from v4jax.errors import RequestError

    for name in names:
        if not getattr(values, name):
            raise RequestError(f"--{name} is required; --help shows examples")


def check_writable(name: str, path: str) -> None:
    """Raises RequestError now, and not after hours of work, if a flag's file could not be written.

    Args:
      name: of the flag.
    """
    from v4jax import files
    from v4jax.errors import RequestError

    try:
        files.check_writable(path)
    except OSError as error:
        remedy = "; name a file in a folder that exists and can be written"
        if files.is_remote(path):
            remedy = f": {error.strerror or error}; name a bucket that these credentials may write"
        raise RequestError(f"cannot write --{name}={path}{remedy}") from error


def identify_model(values: Any) -> str:
    """Returns a name for the model that does not depend on the working directory."""
    return os.path.realpath(values.model) if os.path.isdir(values.model) else values.model
