"""The page on many machines: its recipes take its commands, with stand-ins for the clouds."""

import os
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT, Block, read_blocks

PAGE = "docs/pods.md"
BLOCKS = [block for block in read_blocks("bash", page=PAGE) if block.reason is not None]
# Each says how it was called; sbatch gives the rest of its words to the script, as Slurm does.
SAYS = 'echo "$(basename "$0") $*" >>"$CALLS"'
PROGRAMS = {
    **dict.fromkeys(
        ("gcloud", "kubectl", "hf", "pip", "nvidia-smi", "tail", "nohup", "srun"), SAYS
    ),
    "sbatch": f'{SAYS}\nwhile [[ "$1" == --* ]]; do shift; done\nexec bash "$@"',
    "v4jax": SAYS,
}


def run_block(block: Block, folder) -> tuple[subprocess.CompletedProcess, str]:
    """Runs a block's commands dry; returns the result, and what was called."""
    for name, code in PROGRAMS.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{code}\n")
        program.chmod(0o755)
    settings = {
        "PATH": f"{folder}/bin:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "DRY_RUN": "1",
        "HOME": str(folder),
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    # Paths of the page are relative to the repository; what is written lands beside.
    script = f"cd {folder}; ln -sfn {ROOT}/launch launch; {block.text}\nwait"
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    calls = folder / "calls"
    return done, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_recipes_take_their_commands(block, tmp_path):
    done, called = run_block(block, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    for word in ("gcloud", "hf", "sbatch"):
        if f"\n{word} " in block.text:
            assert f"{word} " in called


def test_the_way_to_a_slice_and_to_gpus_is_whole(tmp_path):
    """Weights, request, job, following, end: each is asked of a cloud's tool by some block."""
    said = ""
    for block in BLOCKS:
        done, called = run_block(block, tmp_path)
        said += done.stdout.replace("'", "") + called
    for step in (
        "hf download deepseek-ai/DeepSeek-V4-Flash-0731",
        "gcloud storage cp --recursive",
        "queued-resources create reader --zone=us-east5-b",
        "tpu-vm ssh reader --zone=us-east5-b --worker=all",
        "tpu-vm ssh reader --zone=us-east5-b --worker=0",
        "queued-resources delete reader",
        "--config=configs/inference/flash_v6e_16.py",
        "srun --kill-on-bad-exit=1",
        "nohup bash launch/run.sh batch --model=/models/v4-flash-0731 --mesh=expert=8",
    ):
        assert step in said, step
