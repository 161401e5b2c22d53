"""The flags of the verbs that load a model: which one, where it lies, how it answers."""

import os
from typing import Any

NUMERICS = ("float32", "bfloat16", "released")
PROFILES = ("preview", "0731")
CHUNK_TOKENS = 4096  # read at once by one device
CHUNK_TOKENS_PER_DEVICE = 1024  # where a sequence is shared; as `v4jax plan` assumes


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
        "mesh",
        None,
        "Sizes of the mesh axes data, expert, context, tensor, such as expert=8; their product is "
        "the number of devices of all hosts. data=1: one device alone. By default all devices on "
        "expert, and on context what does not divide the experts. v4jax plan says what fits.",
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
        None,
        f"Tokens read at once. Larger chunks read faster and need more memory. By default "
        f"{CHUNK_TOKENS}; on a mesh {CHUNK_TOKENS_PER_DEVICE} for each device that shares a "
        "sequence, if that is more.",
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


def plan_engine(values: Any, questions_at_once: int | None = None) -> tuple[Any, Any]:
    """Returns the mesh over all devices, or None for one alone, and the EngineOptions for it.

    Args:
      questions_at_once: None where the verb answers no questions to documents.
    """
    from v4jax.config.loading import load_model_config
    from v4jax.inference import EngineOptions
    from v4jax.parallel.agreement import on_all
    from v4jax.parallel.mesh import choose_mesh

    frame = build_frame(values)
    # All of them read config.json, which may be missing on one.
    mesh = on_all(lambda: choose_mesh(values.mesh, load_model_config(values.model)))
    sizes = {"data": 1, "expert": 1, "context": 1} if mesh is None else mesh.shape
    chunk_tokens = values.chunk_tokens
    if chunk_tokens is None:
        sharing = sizes["expert"] * sizes["context"]
        chunk_tokens = max(CHUNK_TOKENS, CHUNK_TOKENS_PER_DEVICE * sharing)
    options = EngineOptions(
        frame=frame,
        chunk_tokens=chunk_tokens,
        questions_at_once=sizes["data"] if questions_at_once is None else questions_at_once,
        max_tokens=values.max_tokens,
    )
    options.check_data(sizes["data"])
    return mesh, options


def load_engine(values: Any, mesh: Any, options: Any) -> Any:
    """Returns the Engine of the model that the flags name."""
    from v4jax.inference import Engine

    return Engine(load_model(values, mesh), options)


def load_model(values: Any, mesh: Any) -> Any:
    """Returns the model that the flags name, and says so when its weights are random."""
    import v4jax
    from v4jax import log

    _say_mesh(values, mesh)
    with log.phase("model", f"loading {values.model}") as phase:
        model = v4jax.load(
            values.model, numerics=values.numerics, seed=values.weights_seed, mesh=mesh
        )
        phase.note(f"{values.model} is ready")
    if model.folder is None:
        log.warning(
            f"{values.model} has random weights, no trained ones: its answers mean nothing. They "
            "show that the machinery works, and how fast"
        )
    return model


def _say_mesh(values: Any, mesh: Any) -> None:
    """Says which devices work, where there are several."""
    import jax

    from v4jax import log

    count = len(jax.devices())
    if mesh is None and count > 1:
        log.once(f"mesh: one device, as --mesh={values.mesh} says; {count} are here")
    elif mesh is not None:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        one = "" if jax.process_count() > 1 else ", --mesh=data=1 takes one device"
        default = f"; --mesh names another{one}" if values.mesh is None else ""
        log.once(f"mesh: {sizes}, all {count} devices{default}")


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


def identify_model(values: Any, mesh: Any) -> str:
    """Returns a name for the model that does not depend on the working directory.

    Weights of a folder are the same on every mesh; random ones are others on a mesh.
    """
    from v4jax.config.loading import pretrained_names
    from v4jax.files import is_remote

    if os.path.isdir(values.model):
        return os.path.realpath(values.model)
    trained = values.model in pretrained_names() and values.weights_seed is None
    random = not (trained or is_remote(values.model))
    return f"{values.model} on a mesh" if random and mesh is not None else values.model
