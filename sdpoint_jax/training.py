"""Training: every step draws one SDPoint instance and runs its program; validation, logs and checkpoints around it."""

import collections
import contextlib
import itertools
import json
import pathlib
import time
from importlib import metadata
from typing import Any

import jax
import numpy as np
import optax
from flax import serialization, traverse_util
from ml_collections import ConfigDict

from sdpoint_jax import checkpoint, progress
from sdpoint_jax.config import differences, from_dict, to_dict
from sdpoint_jax.devices import is_main_host, prefetch, replicate, shard
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import sample_instance
from sdpoint_jax.interruption import StopSignals, WorkdirLock
from sdpoint_jax.logs import NoLog, RunLog
from sdpoint_jax.steps import TrainPrograms, TrainState, create_state, sgd

CONFIG = "config.json"
_STEPS_AHEAD = 2  # How far the host runs ahead of the devices: enough to keep them busy.


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the state before the step is in a checkpoint."""


class Interrupted(RuntimeError):
    """A stop on request, after a checkpoint: the same command goes on from there."""


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Learning rate at a step: linear warm-up, then a cosine to 0 or the milestones of the config."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - warmup))
    else:
        milestones = (round(epoch * steps_per_epoch) - warmup for epoch in config.milestones)
        main = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(milestones, config.decay))
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), main], [warmup])


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Trains to the end in `workdir`, from its newest checkpoint where it has one.

    Returns:
        metrics of the last validation by instance name; see `Evaluator.evaluate`.

    Raises:
        ValueError: a config that does not fit, or a workdir that another run uses or has used.
        NonFiniteError: see `config.on_nonfinite`.
        Interrupted: SIGTERM or SIGINT came.
    """
    workdir = pathlib.Path(workdir)
    trainer = Trainer(config, workdir)
    with WorkdirLock(workdir) if is_main_host() else contextlib.nullcontext(), StopSignals() as signals:
        return trainer.run(signals)


class Trainer:
    """One run."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        """Checks what can be checked before anything is compiled or written; see `train` for errors."""
        self._config, self._workdir = config, workdir
        _check_workdir(config, workdir)
        self._experiment = Experiment(config)
        self._evaluator = self._experiment.evaluator(self._experiment.validation_instances)
        self._optimizer = sgd(config.momentum, config.nesterov, config.weight_decay, config.clip_norm)
        self._steps_per_epoch = self._experiment.num_training_images / config.batch_size
        self._total_steps = max(1, round(config.num_epochs * self._steps_per_epoch))
        self._validate_every = max(1, round(config.validate_every_epochs * self._steps_per_epoch))
        self._results = None

    def run(self, signals: StopSignals) -> dict[str, dict[str, Any]]:
        """See `train`."""
        self._step, state = self._restore_or_create()
        self._programs = self._compile(state)
        self._state = replicate(state)
        if is_main_host():
            (self._workdir / CONFIG).write_text(json.dumps(to_dict(self._config), indent=2) + "\n")
        self._log = RunLog(self._workdir, self._step) if is_main_host() else NoLog()
        self._checkpoints = checkpoint.RunCheckpoints(
            self._workdir / checkpoint.CHECKPOINTS, keep=self._config.keep_checkpoints
        )
        try:
            self._loop(signals)
        finally:
            self._log.close()
            self._checkpoints.close()
        return self._results

    def _restore_or_create(self) -> tuple[int, TrainState]:
        state = create_state(self._experiment.model, self._optimizer, self._config.seed, self._experiment.image_shape)
        found = checkpoint.newest(self._workdir / checkpoint.CHECKPOINTS)
        if found:
            step, arrays, record = found
            self._results = record["validation"]
            progress.say(f"continuing after step {step} of {self._total_steps}")
            return step, serialization.from_state_dict(state, arrays)
        if self._config.init_from:
            state = state.replace(params=_initial_params(self._config, state.params))
        return 0, state

    def _compile(self, state):
        local_batch = self._config.batch_size // jax.process_count()
        images = np.empty((local_batch, *self._experiment.image_shape), np.uint8)
        programs = TrainPrograms(
            state,
            self._control(0, False),
            shard({"images": images, "labels": np.empty(local_batch, np.int32)}),
            model=self._experiment.model,
            optimizer=self._optimizer,
            schedule=learning_rate_schedule(self._config, self._steps_per_epoch, self._total_steps),
            preprocess=self._experiment.preprocess,
            label_smoothing=self._config.label_smoothing,
            microbatches=self._config.microbatches,
            skip_nonfinite=self._config.on_nonfinite == "skip",
        )
        if self._step < self._total_steps:
            instances, workers = self._experiment.instances, self._experiment.compile_workers
            compiled = programs.compile(instances, workers)
            progress.compile_with_bar(compiled, len(instances) + 1, "one for each instance and the update")
        return programs

    def _loop(self, signals):
        config, pending = self._config, collections.deque()
        batches = self._experiment.training_batches(self._step)
        images = dict(total=self._total_steps * config.batch_size, initial=self._step * config.batch_size)
        with batches, progress.bar(**images, desc="training", unit="img", unit_scale=True) as self._bar:
            self._clock = time.perf_counter()
            for batch in itertools.islice(prefetch(batches), self._total_steps - self._step):
                instance = sample_instance(config.seed, self._step, self._experiment.instances, config.sampling)
                control = self._control(self._step, signals.received)
                self._state, metrics = self._programs[instance](self._state, control, batch)
                pending.append((self._step, instance, metrics))
                self._step += 1
                validates = self._is_due(self._validate_every)
                saves = self._is_due(config.checkpoint_every_steps)
                stops = False
                while len(pending) > (0 if validates or saves or stops else _STEPS_AHEAD):
                    stops |= self._finish_step(*pending.popleft())
                if validates:
                    self._validate()
                if saves or stops:
                    self._save()
                if stops and self._step < self._total_steps:
                    raise Interrupted(f"stopped after step {self._step} of {self._total_steps}, which is saved")

    def _is_due(self, every):
        return self._step % every == 0 or self._step == self._total_steps

    def _control(self, step, stop):
        control = np.tile(np.array([step, stop], np.int32), jax.local_device_count())
        return shard({"control": control})["control"]

    def _finish_step(self, step, instance, metrics) -> bool:
        """Waits for a step, checks and logs it; returns whether some host was asked to stop by then."""
        metrics = jax.device_get(metrics)
        row = {name: float(metrics[name]) for name in ("loss", "accuracy", "gradient_norm", "learning_rate")}
        if not metrics["finite"]:
            self._report_nonfinite(step, instance, row)
        now = time.perf_counter()
        rate, self._clock = self._config.batch_size / (now - self._clock), now
        self._bar.set_postfix_str(f"{instance.name}, loss {row['loss']:.3f}, step {step + 1}", refresh=False)
        self._bar.update(self._config.batch_size)
        if step % self._config.log_every_steps == 0 or not metrics["finite"]:
            self._log.step(step, {"instance": instance.name, **row}, rate)
        return bool(metrics["flags"][0])

    def _report_nonfinite(self, step, instance, row):
        what = (
            f"step {step}, instance {instance.name}, training examples {step * self._config.batch_size} to "
            f"{(step + 1) * self._config.batch_size - 1}: loss {row['loss']}, gradient norm {row['gradient_norm']}"
        )
        if self._config.on_nonfinite == "skip":
            progress.say(f"skipped a step that is not finite: {what}")
            return
        self._step = step
        self._save()
        self._checkpoints.wait()
        raise NonFiniteError(f"not finite: {what}; the state before it is checkpoint {step}")

    def _validate(self):
        """Re-estimates and evaluates the validation instances."""
        config = self._config
        params = jax.device_get(self._state.params)
        with self._experiment.reestimation_batches(config.reestimate_images) as batches:
            statistics = self._evaluator.reestimate(params, itertools.islice(batches, config.reestimate_batches))
        with self._experiment.evaluation_batches(config.dataset.validation_split) as batches:
            results = self._evaluator.evaluate(params, statistics, batches)
        self._results = {instance.name: metrics for instance, metrics in results.items()}
        self._log.validation(self._step - 1, self._results)
        shown = ", ".join(f"{name} {100 * metrics['top1']:.2f} %" for name, metrics in self._results.items())
        progress.say(f"step {self._step}/{self._total_steps}: validation top-1: {shown}")
        self._clock = time.perf_counter()

    def _save(self):
        self._log.flush()
        record = {
            "config": to_dict(self._config),
            "step": self._step,
            "examples_seen": self._step * self._config.batch_size,
            "class_names": list(self._experiment.dataset.class_names),
            "validation": self._results,
            "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        }
        arrays = serialization.to_state_dict(jax.device_get(self._state))
        self._checkpoints.save(self._step, arrays, record)


def _check_workdir(config, workdir):
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        changed = differences(from_dict(json.loads(path.read_text())), config)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a config: {error}") from None
    if changed:
        raise ValueError(f"workdir {workdir} holds a run of another config (there, here): {'; '.join(changed)}")


def _initial_params(config, drawn):
    """The parameters in the checkpoint `config.init_from`, but for a classifier that is to be drawn anew."""
    arrays, _ = checkpoint.load_newest(config.init_from)
    ours, theirs = (traverse_util.flatten_dict(tree, sep="/") for tree in (drawn, arrays["params"]))
    if config.reset_head:
        theirs |= {name: value for name, value in ours.items() if name.startswith("head/dense/")}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name))
    if wrong:
        listed = ", ".join(f"{name} ({_shape(theirs, name)}, needs {_shape(ours, name)})" for name in wrong[:3])
        hint = "" if config.reset_head else "; config.reset_head=True draws a new classifier"
        raise ValueError(f"config.init_from {config.init_from}: does not fit {config.model.name}: {listed}{hint}")
    return traverse_util.unflatten_dict(theirs, sep="/")


def _shape(flat, name):
    return flat[name].shape if name in flat else None


def format_summary(results: dict[str, dict[str, Any]], workdir: str | pathlib.Path) -> str:
    """The end of a run in words: where things are, and what the last validation found."""
    lines = [f"trained; validation with re-estimated statistics (checkpoints and logs: {workdir}):"]
    for name, metrics in results.items():
        lines.append(
            f"  {name:<12} top-1 {100 * metrics['top1']:6.2f} %   loss {metrics['loss']:.4f}   n {metrics['count']}"
        )
    return "\n".join([*lines, f"next: python evaluate.py --workdir={workdir}"])
