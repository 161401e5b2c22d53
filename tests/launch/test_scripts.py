"""The launch scripts: what they would do, as golden text; what they refuse; local processes.

python -m tests.launch.test_scripts      # writes the golden files anew

Nothing here reaches a cloud: kubectl and sbatch are not called, and gcloud is a stand-in.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
HELPFUL = ("tpu_vm", "gke", "slurm", "local")

BATCH = "-- batch --model=/bucket/flash --input=/bucket/docs.jsonl --output=/bucket/out.jsonl"
GCS = "-- batch --model=gs://m/flash --input=gs://texts/docs.jsonl --output=gs://texts/out.jsonl"
ZONE = "--zone=us-east5-b"
DRY_RUNS = {
    "tpu_vm_batch": f"tpu_vm all --name=reader {ZONE} --accelerator=v6e-8 --bucket=texts {BATCH}",
    "tpu_vm_gcs": f"tpu_vm run --name=reader {ZONE} --accelerator=v6e-8 {GCS}",
    "tpu_vm_create": f"tpu_vm create --name=big {ZONE} --accelerator=v5p-128 --spot --project=mine",
    "tpu_vm_pod": f"tpu_vm run --name=pro {ZONE} --accelerator=v6e-64 --bucket=texts {BATCH} "
    "--mesh=expert=32,tensor=2 --shard=0/2",
    "tpu_vm_train": f"tpu_vm run --name=big {ZONE} --accelerator=v5p-128 -- train --config=c.py",
    "gke_batch": "gke --name=reader --accelerator=v6e-8 --image=eu.pkg.dev/p/v4jax:1 --shards=16 "
    f"--at_once=4 --bucket=texts --service_account=reader --spot {BATCH}",
    "gke_gcs": "gke --name=reader --accelerator=v6e-8 --image=v4jax:1 "
    f"--service_account=reader {GCS}",
    "gke_pod": f"gke --name=pro --accelerator=v6e-64 --image=v4jax:1 --bucket=texts {BATCH}",
    "gke_train": "gke --name=tuning --accelerator=v5p-128 --slices=2 --image=v4jax:1 "
    "-- train --config=c.py",
    "slurm_batch": "slurm --shards=16 --time=04:00:00 --partition=gpu -- batch --model=/m/flash",
    "slurm_pod": "slurm --nodes=2 --gpus=8 --shards=4 -- batch --model=/m/pro --mesh=expert=16",
    "slurm_train": "slurm --nodes=4 --gpus=8 --account=lab -- train --config=c.py",
    "slurm_s3": "slurm --shards=2 -- batch --model=s3://m/flash --input=gs://t/d --output=s3://t/a",
    "slurm_convert": "slurm -- convert --model=/models/flash --output=/models/plain",
    "local_batch": "local --devices=4 -- batch --model=nano --input=d.jsonl --output=a.jsonl",
    "local_s3": "local --shards=2 -- batch --model=nano --input=d.jsonl --output=s3://t/a.jsonl",
    "local_shards": "local --shards=2 -- batch --model=nano --input=d.jsonl --output=a.jsonl",
    "local_train": "local --processes=2 --devices=4 -- train --config=c.py",
}


def start(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a script with none of the variables that it reads, except those given."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | settings
    command = ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def dry_run(name: str) -> str:
    script, *arguments = DRY_RUNS[name].split()
    step = arguments[:1] if script == "tpu_vm" else []
    done = start(script, *step, "--dry-run", *arguments[len(step) :])
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "<repository>")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_golden(name):
    assert dry_run(name) == (GOLDEN / f"{name}.txt").read_text(), (
        "if this is intended: python -m tests.launch.test_scripts"
    )


@pytest.mark.parametrize("script", HELPFUL)
def test_help_explains_every_option(script):
    done = start(script, "--help")
    assert done.returncode == 0
    options = start(script, *(["run"] if script == "tpu_vm" else []), "--nonsense=1").stderr
    known = options.partition("known: ")[2].split()
    assert len(known) > 3
    assert [option for option in known if f"  {option}" not in done.stdout] == ["--help"]
    assert f"bash launch/{script}.sh" in done.stdout


REFUSED = {
    "unknown option": ("gke --nam=x", "unknown option --nam; known: --name --accelerator"),
    "no value": ("slurm --nodes", "--nodes needs a value: --nodes=…"),
    "value of a switch": ("gke --spot=1", "--spot is a switch and takes no value"),
    "no dashes": ("slurm batch", "unexpected batch; options are --name=value, and the job follows"),
    "no job": ("local", "no job: put a verb and its flags after --"),
    "unknown verb": ("local -- serve", "the job must begin with one of: batch train convert; got"),
    "no number": ("local --processes=0 -- batch", "--processes must be a number from 1, got '0'"),
    "no step": ("tpu_vm", "the first word must be a step: create, wait, run, delete or all"),
    "job of another step": (f"tpu_vm wait --name=a {ZONE} -- batch", "wait takes no job"),
    "no zone": ("tpu_vm wait --name=a", "--zone is required"),
    "bad zone": ("tpu_vm wait --name=a --zone=europe", "--zone must be a zone such as us-east5-b"),
    "bad name": (f"tpu_vm wait --name=A;b {ZONE}", "--name must be lower-case letters"),
    "bad accelerator": (
        f"tpu_vm create --name=a {ZONE} --accelerator=v9-8",
        "--accelerator must be v5e-N, v5p-N or v6e-N, got 'v9-8'",
    ),
    "tpu7x": (
        f"tpu_vm create --name=a {ZONE} --accelerator=tpu7x-8",
        "tpu7x is not offered as queued resources; use launch/gke.sh",
    ),
    "convert on several hosts": (
        f"tpu_vm run --name=a {ZONE} --accelerator=v6e-16 -- convert",
        "convert runs on one host, and v6e-16 has 4",
    ),
    "convert on several hosts of Kubernetes": (
        "gke --name=a --accelerator=v5p-16 --image=i -- convert",
        "convert runs on one host, got 2",
    ),
    "shards on slices of several hosts": (
        "gke --name=a --accelerator=v5p-16 --image=i --shards=4 -- batch",
        "--shards is for slices of one host, and v5p-16 has 2; start a job for each part, with -- "
        "batch --shard=i/4",
    ),
    "slices of a batch": (
        "gke --name=a --accelerator=v5p-16 --image=i --slices=2 -- batch",
        "give every slice of a batch its part of the input with --shard=i/N, in a job of its own",
    ),
    "topology that is none": (
        "gke --name=a --accelerator=v6e-24 --image=i -- batch",
        "--accelerator must be v5e-N or v6e-N with N of 1 4 8 16",
    ),
    "shards of train": (
        "gke --name=a --accelerator=v6e-16 --image=i --shards=2 -- train",
        "--shards divides the input of batch; train has none",
    ),
    "shard given twice": ("slurm --shards=4 -- batch --shard=1/4", "--shard is set here"),
    "convert on several machines": ("slurm --nodes=2 -- convert", "convert runs on one machine"),
    "shards of several processes": (
        "local --shards=2 --processes=2 -- batch",
        "--shards are processes of their own here; leave --processes out",
    ),
    "shards of train here": ("local --shards=2 -- train", "train has none"),
    "bad time": ("slurm --time=4h -- batch", "--time must be [D-]HH:MM:SS, got '4h'"),
    "convert in two": ("local -- convert", "convert runs in one process; add --processes=1"),
}


@pytest.mark.parametrize("command, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(command, message):
    script, *arguments = command.split()
    done = start(script, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("launch: error: ") and message in done.stderr


def test_job_arguments_arrive_unchanged():
    """Quoting for the shell, for JSON in YAML and against Kubernetes' own expansion."""
    yaml = pytest.importorskip("yaml")
    prompt = """it's a "q" \\ $HOME $(X) & {{name}}"""
    flags = ["--name=a", "--accelerator=v6e-8", "--image=i", "--dry-run", "--", "batch"]
    manifest = yaml.safe_load(start("gke", *flags, f"--system={prompt}").stdout)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["v4jax", "batch", "--system=" + prompt.replace("$(", "$$(")]

    line = start("slurm", "--dry-run", "--", "batch", f"--system={prompt}").stdout.splitlines()[-1]
    words = line.replace("srun", "printf '%s\\n'", 1).replace("--kill-on-bad-exit=1 ", "")
    read_back = subprocess.run(["bash", "-c", words], capture_output=True, text=True).stdout
    assert read_back.splitlines()[-1] == f"--system={prompt}"


def test_jobset_has_what_its_schema_requires():
    """Required by the CRD of jobset.x-k8s.io/v1alpha2 and by batch/v1; TPUs by GKE's labels."""
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load(dry_run("gke_pod"))
    (job,) = pod["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (1, 16, 16)
    check_pods(spec["template"]["spec"], "8x8", 4)
    manifest = yaml.safe_load(dry_run("gke_train"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "tuning"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"} and job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 16  # hosts of 4x4x4 with 4 chips each
    check_pods(spec["template"]["spec"], "4x4x4", 4)


def test_indexed_job_has_what_its_schema_requires():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load(dry_run("gke_batch"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    spec = manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 16, 4)
    pods = spec["template"]["spec"]
    check_pods(pods, "2x4", 8)
    (container,) = pods["containers"]
    assert container["command"][-1] == "--shard=auto/16"
    # backoffLimitPerIndex and podFailurePolicy are accepted with restartPolicy Never alone.
    assert spec["backoffLimitPerIndex"] and spec["podFailurePolicy"]["rules"]
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pods["volumes"]]
    assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def check_pods(pods: dict, topology: str, chips: int) -> None:
    assert pods["restartPolicy"] == "Never"
    assert pods["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    (container,) = pods["containers"]
    assert {"name", "image", "command", "env", "resources"} <= set(container)
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert all(isinstance(variable["value"], str) for variable in container["env"])


@pytest.fixture
def gcloud(tmp_path) -> Path:
    """A stand-in on the PATH that notes its calls; slices are what $STATE says, jobs fail."""
    calls = tmp_path / "calls"
    file = tmp_path / "gcloud"
    answer = 'case "$*" in *describe*) echo "$STATE" ;; *ssh*) exit 7 ;; esac'
    file.write_text(f'#!/bin/sh\necho "$*" >>{calls}\n{answer}\n')
    file.chmod(0o755)
    return calls


ENDS = {
    "the job fails": ("ACTIVE", 7, ["create", "describe", "scp", "ssh", "delete"]),
    "the slice fails": ("FAILED", 1, ["create", "describe", "delete"]),
}


@pytest.mark.parametrize("state, status, steps", ENDS.values(), ids=ENDS.keys())
def test_all_deletes_the_slice_however_it_ends(gcloud, tmp_path, state, status, steps):
    options = ["--name=a", ZONE, "--accelerator=v6e-8", "--", "batch"]
    path = f"{gcloud.parent}:{os.environ['PATH']}"
    done = start("tpu_vm", "all", *options, PATH=path, STATE=state, TMPDIR=str(tmp_path))
    assert done.returncode == status
    assert f"launch: a is {state}" in done.stderr
    words = "create", "describe", "scp", "ssh", "delete"
    called = [w for line in gcloud.read_text().splitlines() for w in line.split() if w in words]
    assert called == steps


@pytest.fixture
def environment(tmp_path) -> Path:
    """An environment that make_environment accepts as made; its v4jax says how it was called.

    It exits with the status in the flag --status; called as process 1 or shard 1 it waits for long.
    """
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    calls = {
        "python": f'exec "{sys.executable}" "$@"',
        "v4jax": 'echo "$V4JAX_PROCESS_INDEX of $V4JAX_PROCESS_COUNT: $*, $XLA_FLAGS"\n'
        'case "$*" in *--waits*1/2) exec sleep 100 ;; *--status=*) exit 3 ;; esac',
    }
    for name, call in calls.items():
        file = folder / "bin" / name
        file.write_text(f"#!/bin/sh\n{call}\n")
        file.chmod(0o755)
    metadata = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    for extras in ("plain", "train"):
        stamp = f"{hashlib.sha256(metadata).hexdigest()} {ROOT}\n"
        (folder / f"installed-{extras}").write_text(stamp)
    return folder


GPU_FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"  # harmless on a CPU
STARTED = {
    "batch": (
        ["--devices=4", "--", "batch", "--system=a b"],
        [f"{i} of 2: batch --system=a b, " for i in range(2)],
    ),
    "shards": (
        ["--shards=2", "--", "batch", "--system=a b"],
        [f" of : batch --system=a b --shard={i}/2, " for i in range(2)],
    ),
    "train": (
        ["--devices=4", "--", "train", "--config=c.py"],
        [f"{i} of 2: train --config=c.py, " for i in range(2)],
    ),
    "one": (["--processes=1", "--", "convert"], [" of : convert, "]),
}


@pytest.mark.parametrize("arguments, said", STARTED.values(), ids=STARTED.keys())
def test_local_processes(environment, tmp_path, arguments, said):
    logs = tmp_path / "logs"
    done = start("local", f"--logs={logs}", *arguments, V4JAX_VENV=str(environment))
    assert (done.returncode, done.stderr) == (0, "")
    devices = 4 if "--devices=4" in arguments else 1
    flags = f"{GPU_FLAGS} --xla_force_host_platform_device_count={devices}\n"
    others = [(logs / f"process-{i}.log").read_text() for i in range(1, len(said))]
    assert [done.stdout, *others] == [line + flags for line in said]


def test_a_local_process_that_fails_stops_the_others(environment, tmp_path):
    job = [f"--logs={tmp_path}/logs", "--shards=2", "--", "batch", "--waits", "--status=3"]
    begin = time.monotonic()
    done = start("local", *job, V4JAX_VENV=str(environment))
    assert done.returncode == 3
    assert "launch: a process ended with status 3, the others were stopped" in done.stderr
    assert time.monotonic() - begin < 90


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for golden in DRY_RUNS:
        (GOLDEN / f"{golden}.txt").write_text(dry_run(golden))
