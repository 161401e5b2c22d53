"""The recipes: what they would do, as golden text; local processes; manifests.

python -m tests.launch.test_scripts      # writes the golden files anew

Nothing here reaches a cloud or installs anything: gcloud, srun and v4jax are stand-ins.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4jax.config.loading import load_model_config
from v4jax.costs import chips
from v4jax.model import take_inventory

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
GPU_FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"  # harmless on a CPU
SLICE = {"NAME": "reader", "ZONE": "us-east5-b", "ACCELERATOR": "v6e-8"}
BATCH = ["batch", "--model=gs://m/flash", '--system=it\'s a "q" \\ $HOME $(X)']
DRY_RUNS = {
    "local": (["local"], {"DEVICES": "4", "PORT": "20000"}),
    "tpu_vm_finish": (["tpu_vm", "finish"], SLICE),
    "tpu_vm_stop": (["tpu_vm", "stop"], SLICE),
    "tpu_vm": (["tpu_vm", "all"], SLICE),
    "tpu_vm_mounted": (["tpu_vm", "run"], SLICE | {"SETUP": "mount it", "V4JAX_EXTRAS": "tpu"}),
}


def start(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a script with none of the variables that it reads, except those given."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | settings
    command = ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def dry_run(name: str) -> str:
    """Returns what a recipe prints, with a job whose flags need quotes."""
    words, settings = DRY_RUNS[name]
    done = start(*words, *BATCH, DRY_RUN="1", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(str(ROOT), "<repository>")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_golden(name):
    assert dry_run(name) == (GOLDEN / f"{name}.txt").read_text(), (
        "if this is intended: python -m tests.launch.test_scripts"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS if path.stem != "env"])
def test_help_is_the_comment_and_installs_nothing(script, tmp_path):
    done = start(script, "--help", V4JAX_VENV=str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "none").exists()
    text = (ROOT / "launch" / f"{script}.sh").read_text()
    assert f"launch/{script}.sh" in done.stdout
    # Every variable that a caller may set is explained.
    read = set(re.findall(r"\$\{([A-Z_]+)[:}]", text)) - {"BASH_SOURCE", "TMPDIR", "PORT"}
    unexplained = [name for name in read if name not in done.stdout]
    assert set(unexplained) <= {"JAX_PLATFORMS", "XLA_FLAGS"}


REFUSED = {
    "no step": (
        ["tpu_vm", "begin"],
        SLICE,
        "the first word must be a step: create, wait, run, follow",
    ),
    "no name": (["tpu_vm", "wait"], {"ZONE": "z"}, "NAME: a name for the request and its slice"),
    "no accelerator": (
        ["tpu_vm", "create"],
        {"NAME": "a", "ZONE": "z"},
        "ACCELERATOR: as gcloud names it, such as v6e-8",
    ),
    "another accelerator": (
        ["tpu_vm", "create"],
        SLICE | {"ACCELERATOR": "tpu7x-8"},
        "ACCELERATOR must be v5litepod-N, v5p-N or v6e-N, got 'tpu7x-8'; launch/gke_",
    ),
}


@pytest.mark.parametrize("words, settings, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(words, settings, message):
    done = start(*words, DRY_RUN="1", **settings)
    assert done.returncode == 1 and done.stdout == "" and message in done.stderr


def stand_in(file: Path, code: str) -> None:
    """Writes an executable."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{code}\n")
    file.chmod(0o755)


STEPS = ["create", "describe", "scp", "ssh", "delete"]
STARTED = [*STEPS[:4], "ssh"]
# {what happens: (state of the slice, status of ssh that starts, of ssh that follows, steps)}
ENDS = {
    "the job ends": ("ACTIVE", 0, 0, [*STARTED, "delete"]),
    "the job fails": ("ACTIVE", 0, 7, [*STARTED, "delete"]),
    "the job does not start": ("ACTIVE", 7, 0, STEPS),
    "the connection is lost": ("ACTIVE", 0, 255, STARTED),
    "the slice fails": ("FAILED", 0, 0, ["create", "describe", "delete"]),
}


@pytest.mark.parametrize("state, starts, follows, steps", ENDS.values(), ids=ENDS.keys())
def test_all_deletes_the_slice_unless_the_job_still_runs(tmp_path, state, starts, follows, steps):
    answer = f"*describe*) echo {state} ;; *--worker=0*) exit {follows} ;; *ssh*) exit {starts} ;;"
    stand_in(tmp_path / "gcloud", f'echo "$*" >>{tmp_path}/calls\ncase "$*" in {answer} esac')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = start("tpu_vm", "all", "batch", **SLICE, PATH=path, TMPDIR=str(tmp_path))
    assert done.returncode == (1 if state == "FAILED" else starts or follows)
    assert f"launch: reader is {state}" in done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [word for line in calls for word in line.split() if word in STEPS] == steps
    left = "the slice costs money until it is deleted: NAME=reader ZONE=us-east5-b bash launch/tpu"
    assert (left in done.stderr) == (follows == 255)


def test_a_job_on_a_slice_outlives_the_session(tmp_path):
    """The hosts are this machine with another home: the job is detached and logged."""
    home, code = tmp_path / "home", tmp_path / "code"
    stand_in(
        code / "launch" / "run.sh",
        'echo "$V4JAX_EXTRAS: $*"; [[ "$*" != *--waits* ]] || exec sleep 100; sleep 1; exit 3',
    )
    stand_in(tmp_path / "git", f'tar -czf "${{3#--output=}}" -C {code} launch')
    session = f'HOME={home} timeout --foreground --signal=KILL 60 bash -c "${{command#--command=}}"'
    gcloud = f"""
for command; do :; done
case "$*" in
  *scp*) mkdir -p {home}; cp "$5" {home}/v4jax.tar.gz ;;
  *ssh*) {session} ;;
esac"""
    stand_in(tmp_path / "gcloud", gcloud)
    settings = SLICE | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = start("tpu_vm", "run", "batch", "--system=it's $HOME", **settings)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "tpu,gcs,train: batch --system=it's $HOME\n"
    assert start("tpu_vm", "follow", **settings).stdout == done.stdout
    assert (home / "v4jax.status").read_text() == "3\n"

    begins = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "tpu_vm.sh"), "run", "batch", "--waits"],
        env=settings,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert begins.stdout.readline() == "tpu,gcs,train: batch --waits\n"
    os.killpg(begins.pid, signal.SIGKILL)  # the terminal is closed
    begins.communicate()
    again = start("tpu_vm", "run", "batch", **settings)
    assert again.returncode == 1 and "a job runs here; stop it first" in again.stderr
    assert start("tpu_vm", "stop", **settings).returncode == 0
    assert start("tpu_vm", "follow", **settings).returncode == 143


def test_slurm_starts_one_process_a_machine(tmp_path):
    stand_in(tmp_path / "srun", 'printf "%s\\n" "$V4JAX_EXTRAS" "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = start("slurm", *BATCH, PATH=path, SLURM_SUBMIT_DIR="/shared/v4jax")
    expected = ["cuda", "--kill-on-bad-exit=1", "bash", "/shared/v4jax/launch/run.sh", *BATCH]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected)
    text = (ROOT / "launch" / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and options["nodes"] == "1"
    # The example's model fits the GPUs of one process, with room for what is not divided.
    weights = sum(weight.bytes for weight in take_inventory(load_model_config("v4_flash")).weights)
    gpu = chips.CHIPS["h100"].device_limit_bytes
    assert gpu < weights < 0.5 * gpu * int(options["gpus-per-node"])


def read_manifest(name: str) -> tuple[dict, dict]:
    """Returns a manifest, and the spec of its pods, checked for what pods with TPUs need."""
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "launch" / name).read_text())
    job = manifest["spec"]
    if manifest["kind"] == "JobSet":
        job = job["replicatedJobs"][0]["template"]["spec"]
    pods = job["template"]["spec"]
    assert pods["restartPolicy"] == "Never"
    assert "cloud.google.com/gke-tpu-topology" in pods["nodeSelector"]
    (container,) = pods["containers"]
    assert {"name", "image", "command", "env", "resources"} <= set(container)
    assert container["command"][:2] == ["v4jax", "batch"]
    (variable,) = container["env"]
    assert variable["name"] == "LIBTPU_INIT_ARGS"
    assert f'tpu="{variable["value"]}"' in (ROOT / "launch" / "env.sh").read_text()
    return manifest, pods


def test_jobset_has_what_its_schema_requires():
    """Required by the CRD of jobset.x-k8s.io/v1alpha2 and by batch/v1; TPUs by GKE's labels."""
    manifest, pods = read_manifest("gke_jobset.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    spec = job["template"]["spec"]
    rows, columns = pods["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pods["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == int(rows) * int(columns) // chips == 16


def test_indexed_job_has_what_its_schema_requires():
    manifest, pods = read_manifest("gke_indexed_job.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    spec = manifest["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    (container,) = pods["containers"]
    assert container["command"][-1] == f"--shard=auto/{spec['completions']}"
    # backoffLimitPerIndex and podFailurePolicy are accepted with restartPolicy Never alone.
    assert spec["backoffLimitPerIndex"] and spec["podFailurePolicy"]["rules"]
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pods["volumes"]]
    assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An environment that make_environment accepts as made; its v4jax says how it was called.

    It exits with the status in the flag --status, and waits for long in process 1 with --waits.
    """
    folder = tmp_path / "venv"
    stand_in(folder / "bin" / "python", f'exec "{sys.executable}" "$@"')
    said = 'echo "$JOB_COMPLETION_INDEX of $V4JAX_PROCESS_COUNT: $*, $XLA_FLAGS"'
    waits = '[[ "$*$JOB_COMPLETION_INDEX" != *--waits*1 ]] || exec sleep 100'
    stand_in(folder / "bin" / "v4jax", f'{said}\n{waits}\n[[ "$*" != *--status=3* ]] || exit 3')
    metadata = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    key = subprocess.run(["cksum"], input=metadata, capture_output=True, check=True).stdout
    (folder / "installed-plain").write_text(f"{key.decode().strip()} {ROOT}\n")
    return {"V4JAX_VENV": str(folder), "LOGS": str(tmp_path / "logs")}


def test_local_processes(environment):
    done = start("local", "batch", "--system=a b", DEVICES="4", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    flags = f"{GPU_FLAGS} --xla_force_host_platform_device_count=4\n"
    other = Path(environment["LOGS"], "process-1.log").read_text()
    expected = [f"{i} of 2: batch --system=a b, {flags}" for i in range(2)]
    assert [done.stdout, other] == expected


def test_a_local_process_that_fails_stops_the_others(environment):
    begin = time.monotonic()
    done = start("local", "batch", "--waits", "--status=3", **environment)
    assert done.returncode == 3
    assert "launch: a process ended with status 3, the others are stopped" in done.stderr
    assert time.monotonic() - begin < 90


if __name__ == "__main__":
    for golden in DRY_RUNS:
        (GOLDEN / f"{golden}.txt").write_text(dry_run(golden))
