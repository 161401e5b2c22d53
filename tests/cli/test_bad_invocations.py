"""What no verb can do is said in one line with status 2, before anything is loaded or compiled.

A row is a verb's bad flags, and a part of the message. `{tmp}` is an empty folder, `{docs}` a good
input of batch, `{folder}` a checkpoint folder, `{file}` an empty file.
"""

import pathlib

import pytest
from checkpoint import folders

from v4jax.cli import main

HUGE = "99999999999999999999"

# Of every flag of InferenceConfig, for the verbs that answer: (flags, message).
ANSWERS = (
    ("--model=", "--model is required"),
    ("--model=nope", "model must be one of"),
    ("--model=nano2", "did you mean 'nano'?"),
    ("--model={tmp}", "config.json cannot be read: No such file"),
    ("--model={file}", "model must be one of"),
    ("--model=v4_flash", "v4_flash has 278 billion parameters, too many for random weights"),
    ("--model=s4://x/y", "s4://x/y: of paths with ://, those in gs://"),
    ("--adapters=", "--adapters must not be empty"),
    ("--adapters=nope", "nope/adapter_config.json cannot be read: No such file"),
    ("--adapters={file}", "adapter_config.json cannot be read: Not a directory"),
    ("--numerics=float16", "should be one of"),
    ("--numerics=", "should be one of"),
    ("--weights_seed=-1", "--weights_seed must be between 0 and 4294967295, got -1"),
    (f"--weights_seed={HUGE}", "--weights_seed must be between 0 and 4294967295"),
    ("--weights_seed=one", "flag --weights_seed="),
    ("--weights_seed=1.5", "flag --weights_seed="),
    ("--mesh=,", "mesh must name each of data, expert, context, tensor at most once"),
    ("--mesh=", "mesh must name each of"),
    ("--mesh=expert", "mesh must name each of"),
    ("--mesh=pipe=2", "mesh must name each of"),
    ("--mesh=expert=0", "mesh.expert must be between 1 and 1048576, got '0'"),
    ("--mesh=expert=-1", "mesh.expert must be between"),
    ("--mesh=expert=²", "mesh.expert must be between"),
    (f"--mesh=expert={HUGE}", "mesh.expert must be between"),
    ("--mesh=expert=2,expert=2", "at most once"),
    ("--mesh=expert=7", "devices"),
    ("--chunk_tokens=0", "--chunk_tokens must be between 1 and 268435456, got 0"),
    ("--chunk_tokens=-5", "--chunk_tokens must be between"),
    (f"--chunk_tokens={HUGE}", "--chunk_tokens must be between"),
    ("--max_tokens=0", "--max_tokens must be between 1 and"),
    (f"--max_tokens={HUGE}", "--max_tokens must be between 1 and"),
    ("--max_tokens=2000000", "max_tokens must be at most the model's max_position_embeddings"),
    ("--effort=max", "effort"),
    ("--speculate=0", "inference.speculate must be auto, off or a number"),
    ("--speculate=-1", "inference.speculate must be auto, off or a number"),
    ("--speculate=", "--speculate must not be empty"),
    (f"--speculate={'9' * 5000}", "inference.speculate must be auto, off or a number"),
    ("--profile=0815", "should be one of"),
    ("--config=nope.py", "config must be a Python file with get_config(), got 'nope.py'"),
    ("--config={tmp}", "config must be a Python file"),
    ("--config={file}", "config must be a Python file"),
    ("--config=", "--config must not be empty"),
    ("--coordinator=", "--coordinator must not be empty"),
    ("--process_index=-1", "--process_index must be between 0 and"),
    (f"--process_index={HUGE}", "--process_index must be between 0 and"),
    ("--process_count=0", "--process_count must be between 1 and"),
    ("--process_index=0 --process_count=2", "coordinator is missing"),
    ("--coordinator=nowhere --process_index=0 --process_count=2", "coordinator"),
    ("--coordinator=h:99999999 --process_index=0 --process_count=2", "coordinator"),
    ("--process_index=3 --process_count=2 --coordinator=h:1", "process_index"),
    ("--nope", "unknown flag --nope"),
    ("more", "unexpected argument 'more'"),
)
CONVERSES = ("--effort", "--profile", "--speculate")
SAMPLES = (
    ("--temperature=-1", "--temperature must be between 0 and"),
    ("--temperature=nan", "--temperature must be between 0 and"),
    ("--temperature=inf", "--temperature must be between 0 and"),
    (f"--temperature={'9' * 400}", "--temperature must be between 0 and"),
    ("--temperature=hot", "--temperature"),
    ("--top_p=0", "top_p must be a number greater than 0"),
    ("--top_p=1.1", "--top_p must be between 0 and 1, got 1.1"),
    ("--top_p=nan", "--top_p must be between 0 and 1, got nan"),
    ("--top_k=-1", "--top_k must be between 0 and"),
    (f"--top_k={HUGE}", "--top_k must be between 0 and"),
    ("--seed=-1", "--seed must be between 0 and 4294967295, got -1"),
    (f"--seed={HUGE}", "--seed must be between 0 and 4294967295"),
    ("--max_new_tokens=0", "--max_new_tokens must be between 1 and"),
    ("--max_new_tokens=1000000000000", "--max_new_tokens must be between 1 and"),
    ("--max_new_tokens=3000000", "max_new_tokens must be at most the model's"),
)
GROUPS = (
    ("--questions_at_once=0", "--questions_at_once must be between 1 and"),
    (f"--questions_at_once={HUGE}", "--questions_at_once must be between 1 and"),
)
# Of a job, from one file to another.
JOBS = (
    ("--input={tmp}/nope", "cannot read {tmp}/nope: No such file"),
    ("--input={tmp}", "not a regular file"),
    ("--input=", "--input is required"),
    ("--output=", "--output is required"),
    ("--output=/proc/x", "/proc/x"),
    ("--output={tmp}/no/out.jsonl", "{tmp}/no/out.jsonl"),
    ("--output={tmp}", "{tmp}"),
    ("--output={docs}", "same file"),
    ("--summary=", "--summary must not be empty"),
    ("--summary=/proc/x", "cannot write --summary=/proc/x"),
    ("--summary={tmp}/no/s.json", "cannot write --summary="),
    ("--summary={docs}", "--summary and --input are the same file"),
    ("--summary={tmp}/out.jsonl", "--summary and --output are the same file"),
    ("--shard=", "--shard must not be empty"),
    ("--shard=4/4", "is part 4 of 4, but indices run from 0 to 3"),
    ("--shard=1/0", "divides the input into no parts"),
    ("--shard=x", "--shard must be INDEX/COUNT"),
    ("--shard=auto/4", "shard"),
    ("--documents_under={tmp}/no", "--documents_under must be a folder"),
    ("--documents_under=", "--documents_under must not be empty"),
    ("--overwrite --retry_failed", "leave out"),
    ("--overwrite=maybe", "--overwrite"),
)

# {verb: (flags that are good, rows)}
VERBS = {
    "generate": (
        "--model=nano --prompt=x",
        (
            *ANSWERS,
            *SAMPLES,
            ("--prompt=", "--prompt is required"),
            ("--prompt=\n", "--prompt must not be empty"),
            ("--questions_at_once=2", "unknown flag"),
        ),
    ),
    "batch": (
        "--model=nano --input={docs} --output={tmp}/out.jsonl",
        (
            *ANSWERS,
            *SAMPLES,
            *GROUPS,
            *JOBS,
        ),
    ),
    "score": (
        "--model=nano --input={docs} --output={tmp}/out.jsonl",
        (
            *(row for row in ANSWERS if row[0].partition("=")[0] not in CONVERSES),
            *JOBS,
            *((flag, "unknown flag") for flag in (*CONVERSES, "--temperature=1")),
        ),
    ),
    "evaluate": (
        "--model=nano",
        (
            *ANSWERS,
            *GROUPS,
            ("--lengths=", "--lengths and --questions must name at least one number"),
            ("--lengths=511", "--lengths must be between 512 and 268435456, got (511,)"),
            ("--lengths=99999999999999", "--lengths must be between 512 and"),
            ("--lengths=many", "--lengths takes whole numbers"),
            ("--lengths=512,,", "--lengths takes whole numbers"),
            ("--questions=0", "--questions must be between 1 and 10000, got (0,)"),
            ("--questions=1000000", "--questions must be between 1 and"),
            ("--questions=1,2,3", "--questions takes one number, or one for each of 2"),
            ("--depths=0", "--depths must be between 1 and 100, got 0"),
            ("--depths=1000000", "--depths must be between 1 and 100"),
            ("--seed=-1", "--seed must be between 0 and 4294967295"),
            (f"--seed={HUGE}", "--seed must be between"),
            ("--folder={tmp}/no", "--folder must be a folder of text files"),
            ("--folder={file}", "--folder must be a folder of text files"),
            ("--folder=", "--folder must not be empty"),
            ("--answers=/proc/x", "cannot write --answers=/proc/x"),
            ("--answers={tmp}/no/a.jsonl", "cannot write --answers="),
            ("--answers=", "--answers must not be empty"),
            ("--plot={tmp}/x.foo", "--plot must end in .png, got '{tmp}/x.foo'"),
            ("--plot=/proc/x.png", "cannot write --plot=/proc/x.png"),
            ("--plot={tmp}/no/x.png", "cannot write --plot="),
            ("--plot={tmp}/x.png --answers={tmp}/x.png", "are the same file"),
            ("--temperature=1", "unknown flag"),
        ),
    ),
    "convert": (
        "--model={folder} --output={tmp}/out",
        (
            ("--model=", "--model is required"),
            ("--model=nope", "model must be one of"),
            ("--model={tmp}", "config.json cannot be read"),
            ("--model=v4_pro", "too many for random weights"),
            ("--output=", "--output is required"),
            ("--output=/proc/x", "/proc/x cannot be written"),
            ("--output=/dev/null", "/dev/null exists"),
            ("--output={folder}", "exists and is not empty"),
            ("--output={file}/x", "cannot be written: Not a directory"),
            ("--format=int4", "should be one of"),
            ("--adapters=", "--adapters must not be empty"),
            ("--adapters={tmp}/no", "adapter_config.json cannot be read: No such file"),
            ("--adapters={folder}", "adapter_config.json cannot be read: No such file"),
            ("--run=nope.py", "config must be a Python file"),
            ("--run={folder}/config.json", "config must be a Python file"),
            ("--run=configs/train/text.py", "--model must be the folder of a training run"),
            ("--step=3", "--step is a checkpoint of a training run"),
            ("--step=-1", "--step must be between 0 and"),
            ("--shard_gib=0", "--shard_gib must be between 1e-06 and 1048576, got 0.0"),
            ("--shard_gib=inf", "--shard_gib must be between 1e-06 and 1048576, got inf"),
            ("--shard_gib=nan", "--shard_gib must be between 1e-06 and 1048576, got nan"),
            ("--shard_gib=big", "--shard_gib"),
            ("--seed=-1", "--seed must be between 0 and"),
            (f"--seed={HUGE}", "--seed must be between 0 and"),
            ("more", "unexpected argument"),
            ("--mesh=expert=2", "unknown flag"),
        ),
    ),
    "train": (
        "--config=configs/train/text.py --output={tmp}/run",
        (
            ("--config=", "--config must not be empty"),
            ("--config=nope.py", "config must be a Python file"),
            ("--output=", "--output must not be empty"),
            ("--output=s3://x/y", "output must be on a disk or in gs://"),
            ("--output={file}", "{file}/checkpoints cannot be written: Not a directory"),
            ("--output=/proc/x", "/proc/x"),
            ("--set=steps", "--set takes FIELD=VALUE, got 'steps'"),
            ("--set==3", "--set takes FIELD=VALUE"),
            ("--set=stepz=3", "stepz is no field of TrainConfig; did you mean 'steps'?"),
            ("--set=steps=0", "steps must be at least 1"),
            ("--set=steps=many", "steps"),
            ("--set=steps.more=1", "steps"),
            ("--set=data.batch=0", "data.batch must be between 1 and 1048576, got 0"),
            ("--set=data.batch=1000000000000", "data.batch must be between 1 and 1048576"),
            ("--set=data.length=1280000000000", "data.length must be between 128 and"),
            ("--set=data.seed=-1", "data.seed must be between 0 and 4294967295, got -1"),
            ("--set=seed=-1", "train.seed must be between 0 and 4294967295, got -1"),
            (f"--set=seed={HUGE}", "train.seed must be between 0 and"),
            ("--set=lora.rank=1000000000", "train.lora.rank must be between 1 and 65536"),
            ("--set=optimizer.rate=1e999", "optimizer.rate must be finite, got inf"),
            (f"--set=optimizer.rate={'9' * 400}", "optimizer.rate must be finite"),
            (f"--set=data.length={'[' * 300}", "data.length must be int"),
            ("--set=data.sources=()", "data.sources must name at least one source"),
            ("--allow_changed=nope", "allow_changed: 'nope' is no field that is compared"),
            ("--set=data.length=100", "data.length must be a positive multiple of 128"),
            ("--set=data.sources.paths=3", "data.sources"),
            ("--set=mesh.expert=0", "mesh.expert must be between 1 and 1048576, got 0"),
            ("--set=mesh.pipe=2", "mesh.pipe is no field of MeshConfig"),
            ("--set=model=nope", "model must be one of"),
            ("--set=optimizer.rate=nan", "optimizer.rate must be float, got 'nan'"),
            ("--set=numerics=float16", "numerics must be one of"),
            ("--plot={tmp}/no", "{tmp}/no"),
            ("--plot=", "--plot must not be empty"),
            ("--process_count=0", "--process_count must be between 1 and"),
            ("more", "unexpected argument"),
        ),
    ),
    "plan": (
        "--topology=v6e-16",
        (
            ("--topology=", "--topology must not be empty"),
            ("--topology=v9-4", "v9"),
            ("--topology=v6e-0", "v6e"),
            (f"--topology=v6e-{HUGE}", "v6e"),
            ("--topology=v6e-1000000000", "v6e"),
            ("--slices=0", "--slices must be between 1 and 4096, got 0"),
            ("--slices=1000000000", "--slices must be between 1 and"),
            ("--model=", "--model must not be empty"),
            ("--model=nope", "model must be one of"),
            ("--mesh=expert=3", "devices"),
            ("--mesh=,", "mesh must name each of"),
            ("--regime=learn", "should be one of"),
            ("--context=0", "--context must be between 1 and"),
            ("--context=-1", "--context must be between 1 and"),
            ("--context=3000000", "max_position_embeddings"),
            (f"--context={HUGE}", "--context must be between 1 and"),
            ("--batch=0", "--batch must be between 1 and"),
            (f"--batch={HUGE}", "--batch must be between 1 and"),
            ("--chunk=0", "--chunk must be between 1 and"),
            ("--lora_rank=0", "--lora_rank must be between 1 and"),
            ("--training=sgd", "should be one of"),
            ("--numerics=float16", "should be one of"),
            ("--config=nope.py", "config must be a Python file"),
            ("more", "unexpected argument"),
        ),
    ),
    "inspect": (
        "",
        (
            ("", "--model is required"),
            ("nope", "model must be one of"),
            ("{tmp}", "has no config.json"),
            ("{file}", "model must be one of"),
            ("nano more", "unexpected argument 'more'"),
            ("nano --storage=int4", "should be one of"),
            ("nano --json=maybe", "--json"),
        ),
    ),
}
ROWS = [
    pytest.param(verb, good, bad, message, id=f"{verb} {bad[:60]!r}")
    for verb, (good, rows) in VERBS.items()
    for bad, message in rows
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    made = tmp_path_factory.mktemp("places")
    (made / "file").write_text("")
    (made / "docs.jsonl").write_text('{"text": "a", "question": "b"}\n')
    folder = folders.write(
        made / "folder", folders.tensors_of(folders.SINGLE), folders.SINGLE, shards=1
    )
    return {"folder": folder, "file": made / "file", "docs": made / "docs.jsonl"}


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails where a verb begins to load a model."""

    def load(*arguments, **options):
        raise AssertionError("a model is loaded")

    for name in (
        "v4jax.load",
        "v4jax.checkpoint.load",
        "v4jax.cli.engine.load_model",
        "v4jax.training.trainer.load_model",
        "v4jax.training.trainer.load_trained",
    ):
        monkeypatch.setattr(name, load)
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])


@pytest.mark.parametrize("verb, good, bad, message", ROWS)
def test_one_line_and_status_2(tmp_path, capsys, places, nothing_loads, verb, good, bad, message):
    names = {"tmp": str(tmp_path), **{name: str(path) for name, path in places.items()}}

    def fill(text: str) -> str:
        for name, path in names.items():
            text = text.replace("{" + name + "}", path)
        return text

    arguments = [fill(text) for text in (*good.split(), *bad.split(" ")) if text]
    replaced = {text.partition("=")[0] for text in bad.split(" ")} - {""}
    arguments = [
        text
        for i, text in enumerate(arguments)
        if i >= len(good.split()) or text.partition("=")[0] not in replaced
    ]
    status = main.run([verb, *arguments])
    output = capsys.readouterr()
    said = [line for line in output.err.splitlines() if line.startswith("v4jax: error: ")]
    assert (status, output.out) == (2, ""), output
    assert output.err.splitlines() == said and len(said) == 1, output.err
    assert fill(message) in said[0] and len(said[0]) < 1000


FILES = {
    "raises": ("def get_config():\n    return 1 / 0\n", "line 2, raises ZeroDivisionError"),
    "raises at once": ("\nimport nothing_of_that_name\n", "line 2, raises ModuleNotFoundError"),
    "exits": ("import sys\ndef get_config():\n    sys.exit(3)\n", "line 3, exits: 3"),
    "no Python": ("def get_config(:\n", "line 1, raises SyntaxError"),
    "empty": ("", "must define get_config()"),
    "another kind": ("get_config = 3\n", "must define get_config()"),
    "two lines": ("raise ValueError('a\\nb')\n", "line 1, raises ValueError: a b"),
    "gives nothing": ("def get_config():\n    pass\n", "get_config() must return a ConfigDict"),
}


@pytest.mark.parametrize("text, message", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("verb", ["generate --prompt=x", "train", "plan --topology=v6e-16"])
def test_configuration_files(tmp_path, capsys, nothing_loads, verb, text, message):
    (tmp_path / "run.py").write_text(text)
    status = main.run([*verb.split(), f"--config={tmp_path}/run.py"])
    output = capsys.readouterr()
    assert status == 2 and output.err.count("\n") == 1
    assert f"{tmp_path}/run.py" in output.err and message in output.err
