"""A batch job with the fake model in a process of its own, slow enough to be killed in the middle.

python batch_worker.py INPUT OUTPUT STEP_SECONDS
"""

import sys

from fake_model import FakeModel, make_engine

from v4jax.inference import BatchJob, SamplingOptions, run_batch

if __name__ == "__main__":
    source, output, step_seconds = sys.argv[1:]
    job = BatchJob(source, output, {"model": "fake"}, SamplingOptions(max_new_tokens=10))
    run_batch(job, lambda: make_engine(FakeModel(step_seconds=float(step_seconds))))
