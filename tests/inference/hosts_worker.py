"""One of two processes of a batch job with the fake model.

python hosts_worker.py INPUT OUTPUT       answers; process 1 has no memory for long documents
python hosts_worker.py INPUT OUTPUT -     process 1 cannot load its share of the model
python hosts_worker.py batch FLAGS…       the command, slowed down

Only process 0 is told where input and output are: the other must not look at them.
"""

import sys

import jax
from fake_model import FakeModel, make_engine

import v4jax
from v4jax.cli import main as command_line
from v4jax.errors import CheckpointError, V4JaxError
from v4jax.inference import BatchJob, SamplingOptions, run_batch, run_together
from v4jax.parallel.hosts import find_hosts, start_hosts


class SmallModel(FakeModel):
    """Has no memory for long caches on process 1."""

    def extend(self, tokens, cache, *arguments, **options):
        if cache.capacity > 64 and jax.process_index():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return super().extend(tokens, cache, *arguments, **options)


def load():
    """Returns the engine of this process."""
    if sys.argv[3:] and jax.process_index():
        raise CheckpointError("tensor head is missing here")
    return make_engine(SmallModel())


def main() -> None:
    """Joins, works, and prints the summary's counts."""
    if sys.argv[1] == "batch":
        slow = FakeModel(step_seconds=0.2)
        v4jax.load = lambda *arguments, **options: slow
        sys.exit(command_line.run(sys.argv[1:]))
    start_hosts(find_hosts(), timeout_seconds=60)
    source, output = (f"{path}{'-missing' * jax.process_index()}" for path in sys.argv[1:3])
    job = BatchJob(source, output, {"model": "fake"}, SamplingOptions(max_new_tokens=6))
    try:
        summary = run_together(load, lambda load_engine: run_batch(job, load_engine).to_json())
    except V4JaxError as error:
        sys.exit(f"v4jax: error: {error}")
    print([summary[name] for name in ("documents", "failed", "questions", "questions_before")])


if __name__ == "__main__":
    main()
