"""Every command that the documentation shows is right, and runs where this machine can run it."""

import contextlib
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from tests.docs.blocks import (
    PAGES,
    ROOT,
    Block,
    find_calls,
    find_inline_commands,
    read_blocks,
    split_commands,
)
from v4jax.cli import main
from v4jax.cli.flags import define

# Pages whose blocks take less than some eight seconds together; the others are slow tests.
QUICK = {"docs/training_data.md"}
SHELL, PYTHON = read_blocks("bash"), read_blocks("python")
# What stands for something to be filled in: flags that contain it are not checked further.
PLACEHOLDERS = ("…", "DIR", "FILE", "FOLDER")


def test_pages_have_blocks():
    """The search finds what a reader sees."""
    assert "README.md" in PAGES and "docs/first_steps.md" in PAGES
    fences = sum((ROOT / page).read_text().count("\n```bash\n") for page in PAGES)
    assert len(SHELL) == fences and len(PYTHON) > 5


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_is_valid(block: Block):
    result = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_is_valid(block: Block):
    compile(block.text, str(block), "exec")


def check_call(words: list[str]) -> None:
    """Checks verb, flags and values by the definitions that the command line itself uses."""
    verb, *arguments = words
    module = importlib.import_module(f"v4jax.cli.{verb}")
    values = flags.FlagValues()
    define(module.Flags, values)
    values.set_gnu_getopt(True)
    given = [word for word in arguments if not any(x in word for x in PLACEHOLDERS)]
    values([verb, *given])
    for word in arguments:
        name, _, value = word.partition("=")
        assert name.removeprefix("--") in values or not word.startswith("--"), word
        if name == "--config" and value.startswith("configs/"):
            assert (ROOT / value).is_file(), value


@pytest.mark.parametrize("block", SHELL + read_blocks("console"), ids=str)
def test_flags_of_blocks(block: Block):
    script = block.text
    if block.language == "console":
        script = "\n".join(line[2:] for line in script.splitlines() if line.startswith("$ "))
    for call in find_calls(script):
        check_call(call)


@pytest.mark.parametrize("page, command", list(find_inline_commands()))
def test_flags_in_text(page: str, command: str):
    for call in find_calls(command):
        if call[0].islower():  # not VERB
            check_call(call)


@pytest.mark.parametrize("verb", main.VERBS)
def test_flags_of_help(verb: str):
    usage = importlib.import_module(f"v4jax.cli.{verb}").USAGE
    examples = [line for line in usage.splitlines() if line.startswith("  v4jax ")]
    assert examples
    for call in find_calls("\n".join(examples)):
        check_call(call)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_scripts_and_modules_exist(block: Block):
    for words in split_commands(block.text):
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("benchmarks", "tests"):
            assert importlib.util.find_spec(words[2]), words[2]
        for word in words:
            if word.startswith(("launch/", "docs/tools/", ".ci/", "examples/")):
                assert (ROOT / word).is_file(), word


def runnable_pages():
    """Yields the pages that hold something to run."""
    for page in PAGES:
        if any(block.reason is None for block in read_blocks("bash", "python", page=page)):
            marks = [] if page in QUICK else [pytest.mark.slow]
            yield pytest.param(page, marks=marks, id=page)


@pytest.mark.parametrize("page", list(runnable_pages()))
def test_page_runs(page: str, tmp_path: pathlib.Path):
    """Runs a page's blocks from top to bottom, as a reader who copies them one by one."""
    folder = make_checkout(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in read_blocks("bash", "python", page=page):
        if block.reason is not None:
            continue
        if block.language == "bash":
            result = run_shell(block.text, folder)
            assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        else:
            with contextlib.chdir(folder):
                exec(compile(block.text, str(block), "exec"), namespace)


def make_checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a folder that looks like the repository, with `v4jax` and `python` on a PATH."""
    folder, programs = tmp_path / "v4jax", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name in ("README.md", "configs", "docs", "launch", "notebooks", "benchmarks", "examples"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for name, arguments in (("v4jax", "-m v4jax.cli.main"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    return folder


def run_shell(script: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs commands as on a machine with one CPU device."""
    flags = os.environ.get("XLA_FLAGS", "").split()  # those of conftest.py
    settings = {
        "PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | settings,
        text=True,
        capture_output=True,
    )


CONSOLE = [block for block in read_blocks("console") if block.reason is None]


@pytest.mark.slow
@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_output_is_what_the_page_shows(block: Block, tmp_path: pathlib.Path):
    """Compares a transcript with what its command prints; a line … stands for any lines."""
    command, _, shown = block.text.removeprefix("$ ").partition("\n")
    result = run_shell(command, make_checkout(tmp_path))
    output = result.stdout if result.returncode < 2 else result.stderr
    printed = iter(output.splitlines())
    skipping = False
    for line in shown.splitlines():
        if line == "…":
            skipping = True
            continue
        found = next((p for p in printed if p == line), None) if skipping else next(printed, None)
        assert found == line, output
        skipping = False
    assert skipping or next(printed, None) is None, output
