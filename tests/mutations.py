"""Breaks the code on purpose, one place at a time, and sees whether tests notice.

    python -m tests.mutations [--only=WORD]

Every fault is applied in a copy of the tree, and the tests named for it run there until one fails:
all of them are tests that launch/test.sh runs. The table is printed as Markdown. It is an error if
a fault survives, or if the text that it replaces is no longer there exactly once.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKED = "not slow and not oracle and not tpu_compiler"
SKIPPED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is broken: `old` becomes `new` in a file of the package; which tests should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str

    def change(self, text: str) -> str:
        """Returns the file with the fault."""
        if text.count(self.old) != 1:
            raise SystemExit(
                f"tests/mutations.py: {self.what}: the text to replace is {text.count(self.old)} "
                f"times in {self.file}; say what it is now:\n{self.old}"
            )
        return text.replace(self.old, self.new)


ATTENTION = "tests/kernels/attention/test_attention.py"
CACHE = "tests/cache tests/model/test_conformance.py"
PIECES = "tests/model/test_pieces.py"
FAULTS = [
    # Masks
    Fault(
        "the window is one key too wide",
        "kernels/attention/portable.py",
        "(distance_bqs < window)",
        "(distance_bqs <= window)",
        ATTENTION,
    ),
    Fault(
        "an entry is seen one token late",
        "kernels/table/__init__.py",
        "return (positions + 1) // ratio",
        "return positions // ratio",
        ATTENTION,
    ),
    Fault(
        "the window reaches into the previous document",
        "kernels/attention/portable.py",
        "key_positions_bs[:, None, :] >= begin_bq1",
        "key_positions_bs[:, None, :] >= 0",
        ATTENTION,
    ),
    Fault(
        "entries of the previous document are seen",
        "kernels/attention/portable.py",
        "seen_bqw &= ids_w >= self.begin_bq[..., None] // self.call.ratio",
        "seen_bqw &= ids_w >= 0",
        ATTENTION,
    ),
    # Rotations
    Fault(
        "the output is not rotated back",
        "model/attention.py",
        "inverse=True",
        "inverse=False",
        PIECES,
    ),
    Fault(
        "YaRN is left out",
        "model/rope.py",
        "if rope.scaling is None:",
        "if True:",
        "tests/model/test_rope.py",
    ),
    Fault(
        "an entry is rotated by its window's number",
        "cache/full_sequence.py",
        "positions=self.positions[:, :whole:ratio],",
        "positions=self.positions[:, :whole:ratio] // ratio,",
        PIECES,
    ),
    # Scales and number formats
    Fault(
        "e8m0 scales round down",
        "quant/formats.py",
        "exponent + ((bits & 0x7FFFFF) != 0)",
        "exponent",
        "tests/quant/test_formats.py",
    ),
    Fault(
        "FP4 loses the sign of a zero",
        "quant/formats.py",
        "jnp.signbit(scaled).astype",
        "(scaled < 0).astype",
        "tests/quant/test_formats.py",
    ),
    Fault(
        "attention scores are not scaled",
        "kernels/attention/portable.py",
        "scores_bqhs *= jnp.float32(queries_bqhc.shape[-1] ** -0.5)",
        "scores_bqhs *= jnp.float32(1)",
        ATTENTION,
    ),
    Fault(
        "the sink has no mass",
        "kernels/softmax.py",
        "total = partial.mass * scale + jnp.exp(sink - maximum)",
        "total = partial.mass * scale",
        ATTENTION,
    ),
    # Router and experts
    Fault(
        "the router's bias enters the weights",
        "model/router.py",
        "chosen_tk = jnp.take_along_axis(scores_te, ids_tk, axis=-1)",
        "biased = scores_te if self.bias is None else scores_te + self.bias[...]\n"
        "        chosen_tk = jnp.take_along_axis(biased, ids_tk, axis=-1)",
        "tests/model/test_router.py",
    ),
    Fault(
        "router weights are not normalized",
        "model/router.py",
        "chosen_tk / total * self",
        "chosen_tk * self",
        "tests/model/test_router.py",
    ),
    Fault(
        "tokens of a partly filled tile are dropped",
        "kernels/grouped_matmul/portable.py",
        "used_n = plan.valid[::together, 0]",
        "used_n = plan.valid[::together, -1]",
        "tests/kernels/grouped_matmul/test_grouped_matmul.py",
    ),
    Fault(
        "an assignment reads another one's output",
        "kernels/grouped_matmul/portable.py",
        "outputs_nqd.shape[-1])[plan.places]",
        "outputs_nqd.shape[-1])[plan.places - 1]",
        "tests/kernels/grouped_matmul/test_grouped_matmul.py",
    ),
    Fault(
        "the clamp of the up projection is missing",
        "kernels/grouped_matmul/portable.py",
        "up = jnp.clip(up.astype(jnp.float32), -limit, limit)",
        "up = up.astype(jnp.float32)",
        "tests/kernels/grouped_matmul/test_grouped_matmul.py",
    ),
    # Hyper-connections
    Fault(
        "one Sinkhorn iteration too few",
        "model/hyper_connections.py",
        '"iterations": config.hc_sinkhorn_iters',
        '"iterations": config.hc_sinkhorn_iters - 1',
        "tests/model/test_hyper_connections.py",
    ),
    Fault(
        "the sublayer's output enters with half its weight",
        "kernels/hyper_connections/portable.py",
        "post_nbt = 2.0 * jax.nn.sigmoid",
        "post_nbt = jax.nn.sigmoid",
        PIECES,
    ),
    # Indexer
    Fault(
        "index scores lack the ReLU",
        "kernels/indexer/portable.py",
        "weights_bq1 * jax.nn.relu(products[:, head])",
        "weights_bq1 * products[:, head]",
        "tests/kernels/indexer/test_indexer.py",
    ),
    Fault(
        "head weights of the indexer are not applied",
        "model/indexer.py",
        "weights_bti = matmul(",
        "weights_bti = 1 + 0 * matmul(",
        PIECES,
    ),
    Fault(
        "of tied index scores a larger id wins",
        "kernels/indexer/largest.py",
        "chosen & (~ties | (find_position(ties, allowed)[:, None] > jnp.arange(keys.shape[1])))",
        "chosen & (~ties | (find_position(ties, allowed)[:, None] >= jnp.arange(keys.shape[1])))",
        "tests/kernels/indexer",
    ),
    # Cache and slots
    Fault(
        "the ring is read from one place on",
        "cache/ring.py",
        "take_rows(ring, (start[:, None] - count + jnp.arange(count)) % ring.shape[1])",
        "take_rows(ring, (start[:, None] + 1 - count + jnp.arange(count)) % ring.shape[1])",
        CACHE,
    ),
    Fault(
        "the unfinished window is taken for a fresh one",
        "cache/hybrid.py",
        "phase_b = self.start % ratio",
        "phase_b = 0 * self.start",
        CACHE,
    ),
    Fault(
        "a slot that was reset keeps its length",
        "cache/hybrid.py",
        "lengths=jnp.where(slots, 0, self.lengths)",
        "lengths=jnp.where(slots, self.lengths, self.lengths)",
        CACHE,
    ),
    Fault(
        "padding is written into the ring",
        "cache/ring.py",
        "last_b = end[:, None] - 1",
        "last_b = start[:, None] + tokens - 1 + 0 * end[:, None]",
        CACHE,
    ),
    Fault(
        "the entry that a call completes is not kept",
        "cache/hybrid.py",
        "end // ratio - first_window",
        "end // ratio - first_window - 1",
        CACHE,
    ),
    Fault(
        "the last logits are those of the padding",
        "parallel/context_parallel.py",
        "jnp.maximum(lengths - 1, 0)\n    real_bt",
        "jnp.full_like(lengths, x.shape[1] - 1)\n    real_bt",
        "tests/model/test_conformance.py",
    ),
    # Inference
    Fault(
        "every token draws the same noise",
        "inference/sampling.py",
        'jax.random.key(seed, impl="threefry2x32"), step)',
        'jax.random.key(seed, impl="threefry2x32"), 0)',
        "tests/inference/test_sampling.py",
    ),
    Fault(
        "top-p drops the token that reaches it",
        "inference/sampling.py",
        "(before_v < top_p)",
        "(jnp.cumsum(probabilities_v) < top_p)",
        "tests/inference/test_sampling.py",
    ),
    Fault(
        "a short sequence takes the logits of a later chunk",
        "inference/steps.py",
        "jnp.where(lengths[:, None] > 0, logits_bv, last_bv)",
        "logits_bv",
        "tests/inference/test_steps.py",
    ),
    Fault(
        "a rejected draft is replaced from the whole distribution",
        "model/speculation.py",
        "jnp.maximum(p_bv - q_bv, 0)",
        "p_bv",
        "tests/inference/test_speculation.py",
    ),
    Fault(
        "drafts behind a rejected one count",
        "model/speculation.py",
        "jnp.cumprod(counted_br, axis=1, dtype=jnp.int32).sum(axis=1)",
        "counted_br.astype(jnp.int32).sum(axis=1)",
        "tests/inference/test_speculation.py",
    ),
    Fault(
        "rejected drafts stay in the cache",
        "model/passes.py",
        "cache.take_back(before + jnp.minimum(lengths, accepted + 1))",
        "cache",
        "tests/model/test_draft.py",
    ),
    Fault(
        "an MTP block pairs a token with itself",
        "model/passes.py",
        "before = jnp.concatenate([before, streams[:, :-1]], axis=1)",
        "before = streams",
        "tests/model/test_draft.py",
    ),
    Fault(
        "an answer is accepted twice",
        "inference/answer_log.py",
        "if _key(record) in self.records:",
        "if False:",
        "tests/inference/test_answer_log.py",
    ),
    Fault(
        "a torn line is kept",
        "inference/answer_output.py",
        "os.ftruncate(self.descriptor, end)",
        "pass",
        "tests/inference/test_answer_log.py tests/inference/test_batch.py",
    ),
    # Training and resuming
    Fault(
        "the moments do not move",
        "training/step.py",
        "optimizer=keep(moved, moments)",
        "optimizer=moments",
        "tests/training/test_step.py",
    ),
    Fault(
        "the step counter stands still",
        "training/step.py",
        "step=state.step + 1",
        "step=state.step",
        "tests/training/test_step.py tests/training/test_trainer.py",
    ),
    Fault(
        "a resumed run begins its data anew",
        "training/trainer.py",
        'self.loader.restore(extra["data"])',
        "pass",
        "tests/training/test_trainer.py",
    ),
    Fault(
        "a resumed run forgets its state",
        "training/trainer.py",
        "self.state, extra = self.store.restore(None, self.state)",
        "_, extra = self.store.restore(None, self.state)",
        "tests/training/test_trainer.py",
    ),
    Fault(
        "targets cross from one document into the next",
        "training/losses.py",
        "jnp.where(shift(batch.begin, ahead, -1) == batch.begin, weights, 0.0)",
        "weights",
        "tests/training/test_losses.py",
    ),
    Fault(
        "documents do not begin with a window",
        "training/data/packing.py",
        "begin = round_up(end, ALIGN)",
        "begin = end",
        "tests/training/data/test_packing.py",
    ),
    Fault(
        "a compressed entry takes over the previous document",
        "cache/full_sequence.py",
        "jnp.maximum(begin[:, :whole:ratio], 0) // ratio",
        "jnp.zeros_like(begin[:, :whole:ratio])",
        "tests/model/test_packing.py",
    ),
    Fault(
        "LoRA's scale lacks the rank",
        "training/lora.py",
        "lora.alpha / lora.rank",
        "lora.alpha",
        "tests/training/test_lora.py tests/checkpoint/test_adapters.py",
    ),
    # Merging and meshes
    Fault(
        "partial softmaxes are added without their scale",
        "kernels/softmax.py",
        "a.mass * scale_a + b.mass * scale_b",
        "a.mass + b.mass * scale_b",
        ATTENTION,
    ),
    Fault(
        "shares of the entries are merged without their mass",
        "parallel/context_parallel.py",
        "scale = jnp.exp(log_mass - largest)",
        "scale = jnp.exp(0 * log_mass)",
        "tests/parallel/test_model.py",
    ),
    Fault(
        "window and entries are joined with the wrong mass",
        "model/attend.py",
        "mass = jnp.logaddexp(entry_mass, window_mass)",
        "mass = jnp.maximum(entry_mass, window_mass)",
        "tests/parallel/test_model.py",
    ),
    Fault(
        "heads are not summed over devices",
        "model/attention.py",
        'return context.axes.psum(self._linear(low_btr, self.output_up, context), "heads")',
        "return self._linear(low_btr, self.output_up, context)",
        "tests/parallel/test_model.py",
    ),
    Fault(
        "experts are not summed over devices",
        "parallel/expert_parallel.py",
        "output_td = jax.lax.psum(output_td, repeated)",
        "pass",
        "tests/parallel/test_expert_parallel.py",
    ),
    Fault(
        "an exchanged row comes back to another slot",
        "parallel/expert_parallel.py",
        "slot_a = jnp.where(sent_a, destinations.owner * bound + place_a, slots + every_a)",
        "slot_a = jnp.where(sent_a, destinations.owner * bound + place_a - 1, slots + every_a)",
        "tests/parallel/test_expert_parallel.py",
    ),
    # Checkpoints
    Fault(
        "gate and up change places",
        "checkpoint/names.py",
        "experts.{expert}.w1.weight  moe.experts.gate_up              expert   0\n"
        "    ffn.experts.{expert}.w3.weight  moe.experts.gate_up              expert   1",
        "experts.{expert}.w1.weight  moe.experts.gate_up              expert   1\n"
        "    ffn.experts.{expert}.w3.weight  moe.experts.gate_up              expert   0",
        "tests/model/test_golden_logits.py",
    ),
    Fault(
        "two names are exchanged",
        "checkpoint/names.py",
        "attn.compressor.wkv.weight    attention.compressor.key_value      bfloat16\n"
        "    attn.compressor.wgate.weight  attention.compressor.gate           bfloat16",
        "attn.compressor.wkv.weight    attention.compressor.gate           bfloat16\n"
        "    attn.compressor.wgate.weight  attention.compressor.key_value      bfloat16",
        "tests/model/test_golden_logits.py",
    ),
    Fault(
        "transformers' name of the final norm is unknown",
        "checkpoint/names.py",
        'r"model.norm.weight"',
        'r"norm.weight"',
        "tests/checkpoint/test_names.py tests/checkpoint/test_hf_writer.py",
    ),
    # Tokenizer
    Fault(
        "a number is read as a string of a tool call",
        "tokenizer/tools.py",
        'is_string=kind == "true"',
        "is_string=True",
        "tests/tokenizer",
    ),
    Fault(
        "a prompt lacks its BOS",
        "tokenizer/chat.py",
        "markup(BOS) if add_bos and not context else []",
        "[]",
        "tests/tokenizer/test_chat.py",
    ),
    # Planning
    Fault(
        "the planner counts one byte per value",
        "costs/inventory.py",
        "math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.value)",
        "math.prod(x.shape) for x in jax.tree.leaves(self.value)",
        "tests/planning tests/costs",
    ),
    Fault(
        "the planner leaves padding out of the cache",
        "costs/inventory.py",
        "return math.prod(self.value.shape) * self.value.dtype.itemsize",
        "return math.prod(self.value.shape[:-1]) * self.value.dtype.itemsize",
        "tests/planning tests/costs",
    ),
]


def find_places() -> None:
    """Raises unless every fault has its place in the package."""
    for fault in FAULTS:
        fault.change((ROOT / "v4jax" / fault.file).read_text())


def run(fault: Fault, root: pathlib.Path) -> tuple[str, float]:
    """Returns which test notices the fault in a copy of the tree ("": none), and the seconds."""
    file = root / "v4jax" / fault.file
    whole, begin = file.read_text(), time.monotonic()
    file.write_text(fault.change(whole))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", MARKED]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    try:
        ended = subprocess.run(
            [*command, *fault.tests.split()], cwd=root, env=environment, capture_output=True
        )
    finally:
        file.write_text(whole)
    said = ended.stdout.decode()
    if ended.returncode not in (0, 1):
        raise SystemExit(f"tests/mutations.py: {fault.what}: the tests did not run\n{said}")
    found = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    noticed = found[0].split(" - ")[0].partition(" ")[2] if ended.returncode else ""
    return noticed, time.monotonic() - begin


def main() -> None:
    """Runs the faults whose description holds a word, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a word of the fault's description or file")
    word, survived = parser.parse_args().only, []
    find_places()
    print("| fault | where | noticed by | s |\n|---|---|---|--:|")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(shutil.copytree(ROOT, f"{folder}/tree", ignore=SKIPPED))
        for fault in FAULTS:
            if word not in f"{fault.what} {fault.file}":
                continue
            noticed, seconds = run(fault, root)
            survived += [] if noticed else [fault.what]
            shown = f"`{noticed.removeprefix('tests/')}`" if noticed else "**nothing**"
            print(f"| {fault.what} | `{fault.file}` | {shown} | {seconds:.0f} |", flush=True)
    if survived:
        raise SystemExit(f"{len(survived)} survived: {'; '.join(survived)}")


if __name__ == "__main__":
    main()
