"""A batch job with the fake model in a process of its own, slow enough to be killed in the middle.

python batch_worker.py INPUT OUTPUT STEP_SECONDS [FOLDER]

With a FOLDER, its content is what s3:// names.
"""

import sys

import folder_bucket
from fake_model import FakeModel, make_engine

from v4jax.inference import BatchJob, SamplingOptions, run_batch

if __name__ == "__main__":
    source, output, step_seconds, *root = sys.argv[1:]
    if root:
        folder_bucket.install(root[0])
    job = BatchJob(source, output, {"model": "fake"}, SamplingOptions(max_new_tokens=10))
    run_batch(job, lambda: make_engine(FakeModel(step_seconds=float(step_seconds))))
