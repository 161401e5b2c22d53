"""The entry point: `v4jax <verb> [flags]`.

    v4jax                  lists the verbs
    v4jax batch --help     explains one
    v4jax --version

Exit status: 0 done, 1 the verb says so, 2 an error in the request, 130 interrupted, 143 terminated.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import ModuleType

from absl import flags

from v4jax import compile_cache
from v4jax.cli.flags import define, read
from v4jax.errors import V4JaxError

# In the order of a newcomer's interest.
VERBS = ("generate", "batch", "score", "train", "evaluate", "convert", "plan", "inspect")
_HELP = ("--help", "-help", "-h")
_WIDTH = 96


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
      arguments: without the program's name; by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    try:
        with _ends_in_order():
            return _dispatch(arguments)
    except (V4JaxError, flags.Error) as error:
        print(f"v4jax: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except _Terminated:
        print("v4jax: terminated", file=sys.stderr)
        return _leave(143)
    except KeyboardInterrupt:
        print("v4jax: interrupted", file=sys.stderr)
        return _leave(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if _is_joined():
            traceback.print_exc()
            _leave(1)
        raise


def _is_joined() -> bool:
    """Says whether this is one of several processes of a job; does not import JAX."""
    distributed = getattr(sys.modules.get("jax"), "distributed", None)
    return distributed is not None and distributed.is_initialized()


def _leave(status: int) -> int:
    """Returns the status, or ends a process of several with it, at once.

    JAX would wait minutes for the others, who wait for this one; when it is gone they end as well.
    """
    if _is_joined():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    return status


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as ctrl-C does: progress bar and unfinished files go away."""


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """Makes SIGTERM an exception for a while, where signals can be handled at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in (*_HELP, "help"):
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(describe_program())
        return 0
    if arguments[0] == "--version":
        print(f"v4jax {metadata.version('v4jax')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    verb = _load(name)
    values = flags.FlagValues()
    define(verb.Flags, values)
    options = rest[: rest.index("--")] if "--" in rest else rest
    if any(option in _HELP for option in options):
        print(describe_verb(name, verb, values))
        return 0
    values.set_gnu_getopt(True)
    try:
        words = values([f"v4jax {name}", *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        nearest = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f"did you mean --{nearest[0]}?" if nearest else f"see v4jax {name} --help"
        raise flags.Error(f"unknown flag --{error.flagname}; {hint}") from error
    hint = getattr(verb, "HINT", f"see v4jax {name} --help")
    compile_cache.use()
    return verb.run(read(verb.Flags, values, words, hint))


def describe_program() -> str:
    """Returns the list of verbs."""
    rows = "\n".join(f"  {name:<10} {_load(name).SUMMARY}" for name in VERBS)
    return (
        "v4jax: DeepSeek-V4 in JAX and Flax.\n\nusage: v4jax <verb> [flags]\n\n"
        f"{rows}\n\nv4jax <verb> --help explains a verb and its flags."
    )


def describe_verb(name: str, verb: ModuleType, values: flags.FlagValues) -> str:
    """Returns what a verb does, examples, and every flag with its default."""
    parts = [f"v4jax {name}: {verb.SUMMARY}", "", verb.USAGE.strip("\n"), "", "flags:"]
    for flag in (values[flag] for flag in values):
        text = " ".join((flag.help or "").split())
        text = text.partition(">: ")[2] if text.startswith("<") else text  # absl repeats choices
        parts.append(f"  --{flag.name}{_describe_value(flag)}")
        parts += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(parts)


def _describe_value(flag: flags.Flag) -> str:
    if flag.boolean:
        return f" (default: {'on' if flag.default else 'off'}; --no{flag.name} switches off)"
    choices = getattr(flag.parser, "enum_values", None)
    kind = "|".join(choices) if choices else flag.parser.flag_type().upper()
    default = "none" if flag.default is None else flag.serialize().partition("=")[2] or '""'
    return f"={kind} (default: {default})"


def _load(name: str) -> ModuleType:
    if name not in VERBS:
        nearest = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(VERBS)}"
        raise flags.Error(f"unknown verb {name!r}; {hint}")
    return importlib.import_module(f"v4jax.cli.{name}")


if __name__ == "__main__":
    sys.exit(run())
