"""Training: every step draws one SDPoint instance and runs its program; validation, logs and checkpoints around it."""

import collections
import contextlib
import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import jax
from flax import serialization
from ml_collections import ConfigDict

from sdpoint_jax import progress
from sdpoint_jax.config import to_dict
from sdpoint_jax.programs.devices import is_main_host, prefetch, replicate
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training import restore as starting
from sdpoint_jax.training.logs import NoLog, RunLog
from sdpoint_jax.training.plan import Recipe, control
from sdpoint_jax.training.step import TrainState
from sdpoint_jax.training.stop import StopSignals, WorkdirLock

_STEPS_AHEAD = 2  # How far the host runs ahead of the devices: enough to keep them busy.
_STOP, _SAVE = 0, 1  # The flags of `control`: any host may ask for the first, the main one for the second.


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the state before the step is in a checkpoint."""


class Interrupted(RuntimeError):
    """A stop on request, after a checkpoint: the same command goes on from there."""


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Trains to the end in `workdir`, from its newest checkpoint where it has one.

    Returns:
        metrics of the last validation by instance name; see `Evaluator.evaluate`.

    Raises:
        ValueError: a config that does not fit, or a workdir that another run uses or has used.
        OSError: a checkpoint or log could not be written; names the path.
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
        starting.check_workdir(config, workdir)
        self._recipe = Recipe(config)
        self._experiment, self._total_steps = self._recipe.experiment, self._recipe.total_steps
        instances = self._experiment.validation_instances
        self._best_metric = _parse_best_metric(config.best_metric, instances) if config.keep_best_checkpoints else None
        self._evaluator = self._experiment.evaluator(instances)
        self._step, self._results, self._validated_at, self._skipped = 0, None, 0, 0

    def run(self, signals: StopSignals) -> dict[str, dict[str, Any]]:
        """See `train`."""
        self._signals = signals
        state = self._restore_or_create()
        self._programs = self._recipe.programs(state)
        self._compile()
        self._state = replicate(state)
        if is_main_host():
            starting.write_config(self._config, self._workdir)
        with contextlib.closing(self._open_checkpoints()) as self._checkpoints:
            with contextlib.closing(self._open_log()) as self._log:
                self._saved_at = time.monotonic()
                self._loop()
        if self._skipped:
            progress.say(f"skipped {self._skipped} of {self._total_steps} steps, which were not finite")
        return self._results

    def _restore_or_create(self) -> TrainState:
        state = self._recipe.create_state()
        if found := starting.restore_newest(self._config, self._workdir, state):
            state, record = found
            self._step, self._results = record["step"], record["validation"]
            self._validated_at, self._skipped = record["validated_at"], record["skipped"]
            progress.say(f"continuing after step {self._step} of {self._total_steps}")
        elif self._config.init_from:
            state = state.replace(params=starting.initial_params(self._experiment, state.params))
        return state

    def _compile(self):
        if self._step < self._total_steps:
            instances, workers = self._experiment.instances, self._experiment.compile_workers
            compiled = self._programs.compile(instances, workers)
            progress.compile_with_bar(compiled, len(instances) + 1, "one for each instance and the update")

    def _open_checkpoints(self):
        return checkpoint.RunCheckpoints(
            self._workdir / checkpoint.CHECKPOINTS,
            keep=self._config.keep_checkpoints,
            keep_best=self._config.keep_best_checkpoints,
            score=self._score,
            start_step=self._step,
        )

    def _open_log(self):
        if not is_main_host():
            return NoLog()
        validated = self._validated_at == self._step
        return RunLog(self._workdir, self._step, validated=validated, on_error=self._config.on_log_error)

    def _loop(self):
        config, pending = self._config, collections.deque()
        if self._step and self._validation_is_due():  # It was interrupted.
            self._validate()
            self._save(replace=True)
        batches = self._experiment.training_batches(self._step)
        images = dict(total=self._total_steps * config.batch_size, initial=self._step * config.batch_size)
        with batches, progress.bar(**images, desc="training", unit="img", unit_scale=True) as self._bar:
            self._clock = time.perf_counter()
            for batch in itertools.islice(prefetch(batches), self._total_steps - self._step):
                instance = self._recipe.draw(self._step)
                self._signals.unsaved = True
                said = control(self._step, self._signals.received, self._minutes_are_over())
                self._state, metrics = self._programs[instance](self._state, said, batch)
                pending.append((self._step, instance, metrics))
                self._step += 1
                validates = self._validation_is_due()
                saves = self._is_due(config.checkpoint_every_steps) or (validates and config.keep_best_checkpoints > 0)
                stops = False
                while len(pending) > (0 if validates or saves or stops else _STEPS_AHEAD):
                    flags = self._finish_step(*pending.popleft())
                    stops, saves = stops or flags[_STOP], saves or flags[_SAVE]
                if validates and not stops:
                    self._validate()
                if saves or stops:
                    self._save()
                if stops:
                    raise Interrupted(self._stopped())

    def _stopped(self):
        return f"stopped after step {self._step} of {self._total_steps}, which is saved"

    def _is_due(self, every):
        return self._step % every == 0 or self._step == self._total_steps

    def _validation_is_due(self):
        return self._is_due(self._recipe.validate_every) and self._validated_at != self._step

    def _minutes_are_over(self):
        """Whether to save for the time that has gone by, as the main host decides for all."""
        minutes = self._config.checkpoint_every_minutes
        over = minutes > 0 and is_main_host() and time.monotonic() - self._saved_at >= 60 * minutes
        if over:
            self._saved_at = time.monotonic()
        return over

    def _finish_step(self, step, instance, metrics) -> tuple[bool, bool]:
        """Waits for a step, checks and logs it; returns whether some host had asked to stop, and to save."""
        metrics = jax.device_get(metrics)
        row = {name: float(metrics[name]) for name in ("loss", "accuracy", "gradient_norm", "learning_rate")}
        if not metrics["finite"]:
            self._report_nonfinite(step, row)
            row["skipped"] = self._skipped
        now = time.perf_counter()
        rate, self._clock = self._config.batch_size / (now - self._clock), now
        self._bar.set_postfix_str(f"{instance.name}, loss {row['loss']:.3f}, step {step + 1}", refresh=False)
        self._bar.update(self._config.batch_size)
        if step % self._config.log_every_steps == 0 or not metrics["finite"]:
            self._log.step(step, {"instance": instance.name, **row}, rate)
        self._checkpoints.check()
        return tuple(metrics["flags"] > 0)

    def _report_nonfinite(self, step, row):
        what = f"{self._recipe.describe(step)}: loss {row['loss']}, gradient norm {row['gradient_norm']}"
        if self._config.on_nonfinite == "skip":
            self._skipped += 1
            progress.say(f"skipped a step that is not finite, the {self._skipped}. so far: {what}")
            return
        self._step = step
        self._save()
        self._checkpoints.wait()
        raise NonFiniteError(
            f"not finite: {what}; the state before it is checkpoint {step}; the same command with "
            f"--replay_step={step} shows which gradients are not finite"
        )

    def _validate(self):
        """Re-estimates and evaluates the validation instances."""
        config = self._config
        params = jax.device_get(self._state.params)
        with self._experiment.reestimation_batches(config.reestimate_images) as batches:
            chosen = itertools.islice(batches, config.reestimate_batches)
            statistics = self._evaluator.reestimate(params, self._until_stop(chosen))
        with self._experiment.evaluation_batches(config.dataset.validation_split) as batches:
            results = self._evaluator.evaluate(params, statistics, self._until_stop(batches))
        self._results = {instance.name: metrics for instance, metrics in results.items()}
        self._validated_at = self._step
        self._log.validation(self._step - 1, self._results)
        shown = ", ".join(f"{name} {100 * metrics['top1']:.2f} %" for name, metrics in self._results.items())
        progress.say(f"step {self._step}/{self._total_steps}: validation top-1: {shown}")
        self._clock = time.perf_counter()

    def _until_stop(self, batches: Iterable) -> Iterator:
        """A validation can take minutes: a stop leaves it undone. Of several hosts none can do so alone."""
        for batch in batches:
            if self._signals.received and jax.process_count() == 1:
                self._save()
                raise Interrupted(self._stopped())
            yield batch

    def _save(self, replace=False):
        self._log.flush()
        record = {
            "config": to_dict(self._config),
            "step": self._step,
            "examples_seen": self._step * self._config.batch_size,
            "class_names": list(self._experiment.dataset.class_names),
            "validation": self._results,
            "validated_at": self._validated_at,
            "skipped": self._skipped,
            "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        }
        arrays = serialization.to_state_dict(jax.device_get(self._state))
        self._checkpoints.save(self._step, arrays, record, replace=replace)

    def _score(self, record):
        if not self._best_metric or not record.get("validation") or record["validated_at"] != record["step"]:
            return None
        instance, metric = self._best_metric
        value = record["validation"].get(instance, {}).get(metric)
        return -value if metric == "loss" and value is not None else value


def _parse_best_metric(text, instances):
    instance, _, metric = text.partition("/")
    names = [instance.name for instance in instances]
    if instance not in names or metric not in ("top1", "loss"):
        raise ValueError(f"config.best_metric {text!r}: valid are {', '.join(names)}, each with /top1 or /loss")
    return instance, metric


def format_summary(results: dict[str, dict[str, Any]], workdir: str | pathlib.Path) -> str:
    """The end of a run in words: where things are, and what the last validation found."""
    lines = [f"trained; validation with re-estimated statistics (checkpoints and logs: {workdir}):"]
    for name, metrics in results.items():
        lines.append(
            f"  {name:<12} top-1 {100 * metrics['top1']:6.2f} %   loss {metrics['loss']:.4f}   n {metrics['count']}"
        )
    return "\n".join([*lines, f"next: python evaluate.py --workdir={workdir}"])
