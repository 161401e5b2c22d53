"""Whole reports as golden text, and what would make a plan fit.

The traced part is fixed: kernels may change without touching these texts. To write them anew:

    python -m tests.planning.test_report
"""

import json
import pathlib

import pytest

from v4jax.planning import remedies, report

from .plans import work

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "plans"
REPORTS = {
    "flash_decode_v6e_16": lambda: work("v6e-16", "expert=16"),
    "flash_train_v5p_128": lambda: work(
        "v5p:4x4x8", "data=8,expert=16", "train", context=4096, batch=128
    ),
    "pro_prefill_v6e_16_too_large": lambda: work("v6e-16", "expert=16", "prefill", model="v4_pro"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_golden(fixed_trace, name):
    model = "v4_pro" if name.startswith("pro") else "v4_flash"
    plan = report.make_plan(model, REPORTS[name]())
    expected = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert report.as_text(plan) + "\n" == expected


def test_json_says_the_same(fixed_trace):
    plan = report.make_plan("v4_flash", REPORTS["flash_decode_v6e_16"]())
    data = json.loads(json.dumps(report.as_data(plan)))
    assert data["fits"] and data["device_bytes"]["total"] == plan.held.total
    kinds = ("weights", "drafts", "cache", "optimizer", "temporaries")
    held = data["device_bytes"]
    assert held["total"] == sum(sum(held[kind].values()) for kind in kinds)
    assert data["seconds"]["step"] == max(data["seconds"].values())
    assert data["tokens_per_second"] == pytest.approx(4 / data["seconds"]["step"])


def test_batch_that_just_fits(fixed_trace):
    plan = report.make_plan("v4_flash", REPORTS["flash_decode_v6e_16"]())
    limit = plan.work.topology.chip.device_limit_bytes
    at, beyond = (
        remedies.expect_bytes(plan.work.changed(batch=batch), plan.work, plan.held)
        for batch in (plan.largest_batch, plan.largest_batch + 1)
    )
    assert at <= limit < beyond


def test_remedies_fit_and_are_the_smallest(fixed_trace):
    """Flash with 16 million-token sequences on 8 v6e chips: weights alone fit."""
    tight = work("v6e-8", "expert=8", batch=16)
    plan = report.make_plan("v4_flash", tight)
    assert not plan.fits and plan.largest_batch is None
    changes = {remedy.change.partition("=")[0]: remedy for remedy in plan.remedies}
    assert list(changes) == ["--batch", "--context", "--topology"]
    assert all(r.device_bytes <= tight.topology.chip.device_limit_bytes for r in plan.remedies)
    batch = int(changes["--batch"].change.partition("=")[2])
    one_more = remedies.expect_bytes(tight.changed(batch=batch + 1), tight, plan.held)
    assert one_more > tight.topology.chip.device_limit_bytes


def test_other_meshes_are_offered(fixed_trace):
    """Sequences split over data only leave experts whole: context does not."""
    plan = report.make_plan("v4_flash", work("v6e-16", "context=16"))
    assert not plan.fits
    assert plan.remedies[0].change.startswith("--mesh=")


def test_every_mesh_of_sixteen_devices():
    meshes = list(remedies.split_devices(16))
    assert len(meshes) == 35 == len({tuple(mesh.values()) for mesh in meshes})


if __name__ == "__main__":
    from v4jax.planning import communication, memory

    from .conftest import trace_nothing

    communication.trace_step = memory.trace_step = trace_nothing
    GOLDEN.mkdir(exist_ok=True)
    for name, build in REPORTS.items():
        model = "v4_pro" if name.startswith("pro") else "v4_flash"
        text = report.as_text(report.make_plan(model, build()))
        (GOLDEN / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
