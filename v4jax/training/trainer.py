"""`Trainer`: a whole run, from its configuration to the finished model.

    trainer = Trainer(config)      # loads the model, opens data and checkpoints, resumes
    trainer.run()                  # until `config.steps`, a signal, or too many bad steps

A run's output folder is on a disk that all hosts share, or in a bucket:

    checkpoints/      state and position in the data; a run resumes from the newest
    metrics.jsonl     a line per logged step (`metrics.py`)
    model/            the finished model, in the released layout
    adapters/         with LoRA: the adapters alone, in PEFT's layout

A run that was killed at any moment continues from its newest checkpoint when it is started again
with the same configuration. It computes what it would have computed: the same data, the same
numbers.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from v4jax import log
from v4jax.checkpoint import api
from v4jax.checkpoint.adapters import choose_naming, read_adapters, write_adapters
from v4jax.checkpoint.orbax_store import Store
from v4jax.config.data import DataConfig
from v4jax.config.loading import load_run_model, pretrained_names
from v4jax.config.run import LossConfig, TrainConfig
from v4jax.errors import TrainingError
from v4jax.files import Path, find_model, is_remote, to_path
from v4jax.model import Transformer
from v4jax.parallel import make_mesh
from v4jax.parallel.agreement import gather_json, share_json
from v4jax.tokenizer import load_tokenizer
from v4jax.training.batch import Batch, put_batch, row_shares
from v4jax.training.data import Loader, merge_states
from v4jax.training.evaluate import (
    evaluate_drafts,
    evaluate_text,
    score_batch,
    score_drafts,
)
from v4jax.training.export import export
from v4jax.training.forward import Mode
from v4jax.training.identity import (
    check_allowed,
    describe_config,
    digest_arrays,
    digest_data,
    find_changes,
)
from v4jax.training.metrics import Metrics, Speed, check_receivers, flatten
from v4jax.training.optimizer import adam_epsilon, build_optimizer, build_schedule
from v4jax.training.samples import describe_sample, predict, write_samples
from v4jax.training.state import (
    Frozen,
    TrainState,
    abstract_state,
    compile_forward,
    finish,
    init_state,
)
from v4jax.training.step import build_step
from v4jax.training.stopping import AskedToEnd, others_asked
from v4jax.training.trainable import describe_heads, split_trained


class Trainer:
    """One run on all devices of the job; every process makes one with the same configuration."""

    def __init__(self, config: TrainConfig, allow_changed: Sequence[str] = ()):
        """Loads the model, opens data and checkpoints, and goes to the newest checkpoint.

        Args:
          allow_changed: fields that may differ from those the run began with, such as
            "optimizer.rate", "optimizer", "model" or "data". With other data it begins anew.

        Raises:
          ConfigError, CheckpointError, DataError: something named in the configuration is missing
            or does not fit; nothing was changed then.
        """
        self.config = config
        self.folder = to_path(config.output)
        check_receivers(config.report_to)
        check_allowed(allow_changed, config)
        checkpoint = config.checkpoint
        self.store = Store(
            self.folder / "checkpoints",
            keep=checkpoint.keep,
            every=checkpoint.every,
            model=load_run_model(config),
        )
        self._identity = describe_config(config)
        self._changed = self._compare(allow_changed)  # before weights are read
        model = load_model(config)
        self.frozen, weights, biases = split_trained(model, config)
        self.model_config, self.layout = self.frozen.config, model.layout
        self.tokenizer = load_tokenizer(model.folder or self.model_config.tokenizer)
        self._identity |= share_json(digest_data(config) if jax.process_index() == 0 else {})
        self._identity["model"] = digest_arrays(self.frozen.arrays | weights | biases, self.layout)
        self._changed = self._compare(allow_changed)
        self.loader = self._open_data(config.data)
        self._data_steps = None  # after which the data end on every host, where that is needed
        if config.data.epochs is not None and (config.steps is None or jax.process_count() > 1):
            self._data_steps = self._count_steps()
        if config.steps is None:
            config = self.config = dataclasses.replace(config, steps=self._data_steps)
        self.optimizer = build_optimizer(config.optimizer, self.model_config)
        self.rate = build_schedule(config.optimizer, config.steps)
        self.state = init_state(self.frozen, weights, biases, self.optimizer)
        del model, weights, biases
        _announce(self.state, self.frozen, config)
        self._resume()
        self.metrics = Metrics(self.folder, config.report_to, first_step=self.step + 1)
        self._steps: dict[tuple[Mode, LossConfig], Callable] = {}  # compiled
        self._skipped = int(self.state.skipped)
        self._step_tokens = config.data.batch * config.data.length * config.optimizer.accumulate
        self._speed = Speed(config, self.model_config)

    @property
    def step(self) -> int:
        """Updates made so far, skipped ones included."""
        return int(self.state.step)

    def run(self) -> str:
        """Trains to the end, and returns how it ended: "finished" or "stopped".

        SIGTERM, which spot machines send, and ctrl-C stop the run after it has written a
        checkpoint. The same command then resumes it.

        Raises:
          TrainingError: `max_skipped` steps in a row had a loss or gradient that is not finite; the
            data ended; or metrics could not be written.
          CheckpointError: a checkpoint could not be written; the older ones are untouched.
          DataError: a record is bad where that is fatal.
        """
        config = self.config
        step = self.step
        total = config.steps * self._step_tokens
        with AskedToEnd() as asked, log.Progress("train", total, "tokens") as progress:
            computing = None  # the step that the device may still compute
            while step < config.steps:
                try:
                    batches = self._next_batches(step)
                except StopIteration:
                    self._settle(computing, progress)
                    raise self._data_ended(step) from None
                found = self._make_step(step, batches)
                self._settle(computing, progress)
                step += 1
                computing = step, found
                evaluates = config.evaluation and step % config.evaluation.every == 0
                stops = asked.is_set() or others_asked(step)
                if evaluates or stops or step % self.store.every == 0 or step == config.steps:
                    self._settle(computing, progress)
                    computing = None
                if evaluates:
                    with self._speed.paused():
                        self.evaluate()
                self._save(step, force=stops)
                if stops:
                    self.store.wait()
                    log.info(
                        f"train: stopped at step {step} with a checkpoint; the same command goes on"
                    )
                    return "stopped"
            self._save(step, force=True)
            self.store.wait()
        log.info(self.loader.report())
        return "finished"

    def evaluate(self) -> dict:
        """Measures the model on `evaluation.data`, logs the result and returns it."""
        evaluation = self.config.evaluation
        with contextlib.closing(self._open_data(evaluation.data)) as held_out:
            batches = list(itertools.islice(held_out, evaluation.batches))
            most = max(gather_json(len(batches)))
            batches += [held_out.padding] * (most - len(batches))
        with log.phase("evaluation") as phase:
            measure = evaluate_drafts if self.config.draft else evaluate_text
            found = measure(self._score, self.state, batches, self.layout)
            phase.note(f"step {self.step}", f"loss {found['eval_loss']:.3f}")
        if evaluation.samples and batches and not self.config.draft:
            found["samples"] = write_samples(
                self._predict,
                self.state,
                batches[0],
                self.tokenizer,
                samples=evaluation.samples,
                tokens=evaluation.sample_tokens,
                layout=self.layout,
            )
            for sample in found["samples"]:
                log.info(describe_sample(sample))
        self.metrics.write(self.step, found)
        return found

    def close(self) -> None:
        """Ends data, metrics and checkpoints; waits for a checkpoint that is being written."""
        self.loader.close()
        try:
            self.metrics.flush()
        finally:
            self.store.close()

    def finished_model(self) -> Transformer:
        """Returns the trained model, with its adapters if it has some (`state.finish`)."""
        return finish(self.frozen, self.state)

    def has_exported(self) -> bool:
        """Returns whether `output`/model exists for process 0; the same on every process."""
        return gather_json((self.folder / "model").exists())[0]

    def export(self, format: str = "released") -> Path:
        """Writes the finished model to `output`/model in a format of `v4jax.save`.

        Adapters are merged in it, and written separately to `output`/adapters, as PEFT attaches
        them (released names if they are of draft modules alone). Every process calls this.
        """
        model, folder = self.finished_model(), self.folder / "model"
        if self.config.lora:
            write_adapters(model, self.folder / "adapters", choose_naming(model))
        export(model, folder, format)
        return folder

    def _phase(self, step: int) -> tuple[Mode, LossConfig]:
        """Returns the mode and the losses of the step after `step`."""
        config = self.config
        mode = Mode(
            config.remat,
            config.keep,
            config.offload,
            dense=step < config.dense_steps,
            distill=config.indexer == "distill",
            count_gaps=config.count_gaps,
        )
        loss, falling = config.loss, config.optimizer.spans(config.steps)[1]
        if step >= config.steps - falling:
            loss = dataclasses.replace(loss, mtp_weight=loss.mtp_weight * loss.late_mtp)
        return mode, loss

    @functools.cached_property
    def _score(self) -> Callable:
        score = score_batch
        if self.config.draft:
            score = functools.partial(score_drafts, training=self.config.draft)
        return compile_forward(self.frozen, score)

    @functools.cached_property
    def _predict(self) -> Callable:
        return compile_forward(self.frozen, predict)

    def _open_data(self, data: DataConfig) -> Loader:
        index, count = row_shares(self.layout)
        data = data.with_profile(self.model_config.profile)
        return Loader(data, self.tokenizer, shard_index=index, shard_count=count)

    def _count_steps(self) -> int:
        """Returns how many steps `data.epochs` make on the host whose rows last longest."""
        with log.phase("data") as phase:
            batches = max(gather_json(self.loader.count()))
            steps = math.ceil(batches / self.config.optimizer.accumulate)
            epochs = self.config.data.epochs
            phase.note(f"data.epochs = {epochs} makes {batches:,} batches, {steps:,} steps")
        if not steps:
            raise TrainingError(
                "train.data has no document to learn from: every record was bad and skipped"
            )
        return steps

    def _next_batches(self, step: int) -> Batch:
        """Returns the batches of the step after `step`, stacked.

        What is left at the end of the data is a step as well: padding is in place of what lacks,
        and of a host's rows that ended before those of another. Losses are means over targets, and
        padding has none.

        Raises:
          StopIteration: nothing is left.
        """
        count = self.config.optimizer.accumulate
        batches = list(itertools.islice(self.loader, count))
        if not batches and step >= (self._data_steps or 0):
            raise StopIteration
        batches += [self.loader.padding] * (count - len(batches))
        return put_batch(jax.tree.map(lambda *x: np.stack(x), *batches), self.layout)

    def _data_ended(self, step: int) -> TrainingError:
        """Writes a checkpoint, and returns the error."""
        if step:
            self._save(step, force=True)
        return TrainingError(
            f"train.data ended at step {step} of {self.config.steps}: every record was read "
            f"data.epochs = {self.config.data.epochs} times. The newest checkpoint is "
            f"{self._newest()}; leave train.steps out, and data.epochs says how long the run is"
        )

    def _make_step(self, step: int, batches: Batch) -> dict:
        """Starts the step after `step`; returns its metrics, which may not be computed yet."""
        phase = self._phase(step)
        if phase in self._steps:
            self.state, found = self._steps[phase](self.frozen, self.state, batches)
            return found
        mode, loss = phase
        kind = "dense" if mode.dense else "sparse"
        with self._speed.paused(), log.phase("train") as report:
            log.info(f"train: compiling a step ({kind} attention)")
            self._steps[phase] = self._build_step(mode, loss)
            self.state, found = self._steps[phase](self.frozen, self.state, batches)
            report.note("compiled")
        return found

    def _build_step(self, mode: Mode, loss: LossConfig):
        clip_norm, draft = self.config.optimizer.clip_norm, self.config.draft
        step = build_step(loss, self.optimizer, self.rate, mode, clip_norm, draft)
        return jax.jit(step, donate_argnums=1)

    def _settle(self, computing: tuple[int, dict] | None, progress: log.Progress) -> None:
        """Waits for a step, checks that it is finite, and logs it."""
        if computing is None:
            return
        step, found = computing
        self._check_finite(step, found)
        self._speed.add(self._step_tokens)
        if step % self.config.log_every == 0 or step in (1, self.config.steps):
            self._log(step, jax.device_get(found), progress)

    def _check_finite(self, step: int, found: dict) -> None:
        if found["finite"]:
            self._skipped = 0
            return
        self._skipped += 1
        log.warning(
            f"train: step {step} has loss {float(found['loss'])} and gradient norm "
            f"{float(found['grad_norm'])}; skipped ({self._skipped} in a row)"
        )
        if self._skipped >= self.config.max_skipped:
            raise TrainingError(
                f"train.max_skipped = {self._skipped} steps in a row had a loss or gradient that "
                f"is not finite, up to step {step}; the last good checkpoint is {self._newest()}. "
                "Lower the rate, or look at the data of these steps"
            )

    def _newest(self) -> str:
        newest = self.store.latest()
        return "none" if newest is None else f"step {newest} in {self.store.folder}"

    def _log(self, step: int, found: dict, progress: log.Progress) -> None:
        speed = self._speed.read()
        values = flatten(found) | speed
        self.metrics.write(step, values)
        rate, done = speed["tokens_per_second"], step * self._step_tokens
        progress.update(done, rate=rate, note=_describe(step, values))

    def _save(self, step: int, *, force: bool = False) -> None:
        if force or step % self.store.every == 0:
            self.metrics.flush()
            position = merge_states(gather_json(self.loader.state()))
            extra = {"data": position, "identity": self._identity}
            self.store.save(step, self.state, extra, force=force)

    def _resume(self) -> None:
        if self.store.latest() is None:
            return
        self.state, extra = self.store.restore(None, self.state)
        log.info(f"train: resumes at step {self.step} of {self.config.steps}")
        if any(field.startswith("data.") for field in self._changed):
            log.info(f"train: the data begins anew, because {', '.join(self._changed)} changed")
        else:
            self.loader.restore(extra["data"])

    def _compare(self, allow_changed: Sequence[str]) -> list[str]:
        """Returns the fields in which the newest checkpoint differs from this run, and may."""
        if self.store.latest() is None:
            return []
        return compare_run(self.store, None, self._identity, allow_changed)


def load_model(config: TrainConfig) -> Transformer:
    """Returns the model that a run starts from, on the run's mesh."""
    sizes = config.mesh.sizes
    mesh = None
    if jax.device_count() > 1 or any(size != 1 for size in sizes.values()):
        mesh = make_mesh(**sizes, slices=dict(config.mesh.slices))
    return _load(config, mesh=mesh, weight_layout="train")


def load_trained(config: TrainConfig, step: int | None = None) -> Transformer:
    """Returns `Trainer.finished_model` of a run's checkpoint; None is the newest.

    The run may continue meanwhile; its data is not opened, and its mesh is not needed.

    Raises:
      CheckpointError: there is no such checkpoint, or it is that of another run.
    """
    model = _load(config)
    frozen, weights, biases = split_trained(model, config)
    optimizer = build_optimizer(config.optimizer, frozen.config)
    state = abstract_state(frozen, weights, biases, optimizer)
    folder = to_path(config.output) / "checkpoints"
    identity = describe_config(config)
    identity["model"] = digest_arrays(frozen.arrays | weights | biases)
    with Store(folder, model=frozen.config, read_only=True) as store:
        compare_run(store, step, identity, ("data", "optimizer"))
        return finish(frozen, store.restore(step, state)[0])


def compare_run(
    store: Store, step: int | None, identity: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """Returns the fields in which a checkpoint differs from a run, and may.

    Raises:
      CheckpointError: it differs in another field.
    """
    stored = store.read_extra(step).get("identity")
    if stored is None:
        log.warning(f"checkpoint: {store.folder} does not say of which run it is")
        return []
    return find_changes(stored, identity, allowed, store.folder)


def _load(config: TrainConfig, **options) -> Transformer:
    """Returns the model that a run starts from, with the adapters it goes on from."""
    model = api.load(config.model, config.numerics, seed=_seed(config), **options)
    if config.lora and config.lora.start:
        return read_adapters(model, config.lora.start)
    return model


def _seed(config: TrainConfig) -> int | None:
    """Returns the seed of the weights that a run starts from, or None where they are stored."""
    packaged = config.model in pretrained_names() and not config.from_scratch
    name = find_model(config.model)
    stored = packaged or is_remote(name) or pathlib.Path(name).is_dir()
    return None if stored else config.seed


def _announce(state: TrainState, frozen: Frozen, config: TrainConfig) -> None:
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    kept = ", ".join(config.optimizer.undecayed) or "nothing"
    log.info(
        f"train: {trained / 1e6:.1f} M weights trained by {config.optimizer.kind}, state "
        f"{log.format_bytes(size)}; indexer {config.indexer}; no weight decay on: {kept}; "
        f"AdamW's epsilon: {adam_epsilon(config.optimizer):.1e}"
    )
    if said := describe_heads(frozen.config, config, state.weights):
        log.info(f"train: {said}")


def _describe(step: int, values: dict[str, Any]) -> str:
    parts = [f"step {step}", f"loss {values['loss']:.3f}"]
    if "accepted_length" in values:
        parts.append(f"accepted length {values['accepted_length']:.2f}")
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    return ", ".join(parts)
