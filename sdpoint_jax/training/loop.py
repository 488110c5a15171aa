"""Training: every step draws SDPoint instances and runs their program; validation, logs and checkpoints around it."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from sdpoint_jax import progress
from sdpoint_jax.config import facts
from sdpoint_jax.data import Dataset
from sdpoint_jax.instance import set_name
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.registry import name_of
from sdpoint_jax.programs import hosts
from sdpoint_jax.programs.devices import Compilation, is_main_host, prefetch, replicate
from sdpoint_jax.programs.evaluator import Evaluator, Metrics
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.storage.lock import FolderLock
from sdpoint_jax.training import restore
from sdpoint_jax.training.logs import NoLog, RunLog
from sdpoint_jax.training.objective import STEP_METRICS, Loss
from sdpoint_jax.training.plan import Plan
from sdpoint_jax.training.restore import RunState
from sdpoint_jax.training.step import Control, TrainPrograms
from sdpoint_jax.training.stop import StopSignals

_STEPS_AHEAD = 2  # How far the host runs ahead of the devices: enough to keep them busy.
_PATIENCE = 0.2  # Seconds between looks at whether the run is to stop, while a step waits for its program.


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the state before the step is in a checkpoint."""


class Interrupted(RuntimeError):
    """A stop on request, after a checkpoint: the same command goes on from there."""


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    model: SDPointNet | type[SDPointNet] | None = None,
    *,
    loss: Loss | None = None,
    dataset: Dataset | Mapping[str, Any] | None = None,
) -> dict[str, Metrics]:
    """Train to the end in `workdir`, from its newest checkpoint where it has one.

    Args:
        config: See `config.default_config`.
        workdir: Folder of the run.
        model: A net of your own, or its class, instead of `config.model.name`.
        loss: A loss of your own instead of `config.loss`; see `training.objective`.
        dataset: A data set of your own, or objects with `__len__` and `__getitem__` by split, instead of
            `config.dataset.name`; see `data.from_sources`.

    Returns:
        metrics of the last validation, by instance name.

    Raises:
        ValueError: a config that does not fit, or a workdir that another run uses or has used.
        OSError: a checkpoint or log could not be written; names the path.
        NonFiniteError: see `config.on_nonfinite`.
        Interrupted: SIGTERM or SIGINT came.
    """
    workdir = pathlib.Path(workdir)
    if model is not None:
        config.model.name = name_of(model if isinstance(model, type) else type(model))
    if loss is not None:
        config.loss = name_of(loss)
    hosts.check_same(functools.partial(facts, config))
    plan = hosts.together(functools.partial(_make_plan, config, model, loss, dataset))
    progress.say(plan.data)
    lock = FolderLock(workdir, "workdir") if is_main_host() else contextlib.nullcontext()
    with contextlib.ExitStack() as held, StopSignals() as signals:
        hosts.together(lambda: held.enter_context(lock))
        restored, initial = hosts.together(functools.partial(_find_start, plan, workdir))
        hosts.check_same(functools.partial(restore.run_facts, plan, restored, initial))
        start_step = restored.step if restored else 0
        if start_step:
            progress.say(f"continuing after step {start_step} of {plan.total_steps}")
        programs = plan.programs(plan.shapes_of_state())
        with programs.compile_behind(plan.sets_by_first_use(start_step), config.compile_workers) as compilation:
            run = restored or restore.create(plan, initial)
            if run.step < plan.total_steps:
                progress.say(plan.describe_parameters(run.train))
                progress.say(plan.describe_cost())
            run.train = replicate(run.train)
            if is_main_host():
                restore.write_config(plan.config, workdir)
            with (
                contextlib.closing(_open_checkpoints(plan, workdir, run.step)) as checkpoints,
                contextlib.closing(_open_log(plan, workdir, run)) as log,
            ):
                Loop(plan, run, programs, compilation, checkpoints, log, signals).run()
    if run.skipped:
        progress.say(f"skipped {run.skipped} of {plan.total_steps} steps, which were not finite")
    return run.validation


def _make_plan(config, model, loss, dataset):
    plan = Plan(config, model, loss, dataset)
    if config.keep_best_checkpoints:
        restore.check_best_metric(plan)
    return plan


def _find_start(plan, workdir):
    """Return (state of the newest checkpoint, None), or (None, the parameters to start from, if any)."""
    restore.check_workdir(workdir)
    restored = restore.restore(plan, workdir)
    return restored, None if restored else restore.load_initial(plan.experiment, plan.shapes_of_state())


def _open_checkpoints(plan, workdir, start_step):
    return checkpoint.RunCheckpoints(
        workdir / checkpoint.CHECKPOINTS,
        keep=plan.config.keep_checkpoints,
        keep_best=plan.config.keep_best_checkpoints,
        score=functools.partial(restore.score, best_metric=plan.config.best_metric),
        start_step=start_step,
    )


def _open_log(plan, workdir, run):
    if not is_main_host():
        return NoLog()
    validated = run.validated_at == run.step
    return RunLog(workdir, run.step, validated=validated, on_error=plan.config.on_log_error)


class Loop:
    """The steps of one run, from where it starts to its end."""

    def __init__(
        self,
        plan: Plan,
        run: RunState,
        programs: TrainPrograms,
        compilation: Compilation,
        checkpoints: checkpoint.RunCheckpoints,
        log: RunLog | NoLog,
        signals: StopSignals,
    ):
        """Takes the parts of a run; `run.train` is on the devices, and all of `run` changes with the steps."""
        self._plan, self._run, self._programs, self._compilation = plan, run, programs, compilation
        self._checkpoints, self._log, self._signals = checkpoints, log, signals
        self._evaluator = Evaluator(
            plan.experiment.model,
            plan.validation_instances,
            image_shape=plan.experiment.image_shape,
            batch_size=plan.experiment.evaluation_batch_size // jax.process_count(),
            preprocess=plan.experiment.preprocess,
        )
        self._pending = collections.deque()  # Steps that were started, whose metrics have not been read.
        images = dict(total=plan.total_steps * plan.config.batch_size, initial=run.step * plan.config.batch_size)
        self._bar = progress.bar(**images, desc="training", unit="img", unit_scale=True)
        what = "instance" if plan.config.instances_per_step == 1 else "set of instances"
        self._compiling = progress.CompilingBehind(
            len(compilation), f"one for each {what} and the update", compilation.start
        )
        self._clock, self._saved_at = time.perf_counter(), time.monotonic()

    def run(self) -> None:
        """Trains to the end; see `train`."""
        if self._run.step and self._validation_is_due():  # It was interrupted.
            self._validate()
            self._save(replace=True)
        batches = self._plan.training_batches(self._run.step)
        with contextlib.closing(batches), self._bar:
            self._clock = time.perf_counter()
            try:
                for batch in itertools.islice(prefetch(batches), self._steps_left()):
                    self._train_on(batch)
            except ValueError:  # A bad image, of training or validation: what was trained before it is not lost.
                self._finish_steps(wait_for_all=True)
                self._save()
                raise

    def _train_on(self, batch):
        self._start_step(batch)
        validates, saves = self._validation_is_due(), self._checkpoint_is_due()
        asked = self._finish_steps(wait_for_all=validates or saves)
        if validates and not asked.stop:
            self._validate()
        if saves or asked.save or asked.stop:
            self._save()
        if asked.stop:
            raise Interrupted(self._stopped())

    def _steps_left(self):
        return max(0, self._plan.total_steps - self._run.step)  # Fewer images than before may mean fewer steps.

    def _start_step(self, batch):
        """Draws the instances of the next step and starts its programs."""
        run = self._run
        instances = self._plan.draw(run.step)
        self._wait_for_programs(instances)
        self._signals.unsaved = True
        control = Control(run.step, self._signals.received, self._minutes_are_over()).shard()
        run.train, metrics = self._programs[instances](run.train, control, batch)
        self._pending.append((run.step, set_name(instances), metrics))
        run.step += 1

    def _wait_for_programs(self, instances):
        """Waits until the programs of a step are there; a stop does not, if there is one host alone."""
        keys, start = self._programs.keys_of(instances), time.perf_counter()
        if self._compilation.wait(keys, 0):
            return
        is_alone = jax.process_count() == 1  # Several hosts must finish, save and stop at the same steps.
        if is_alone and self._finish_steps(wait_for_all=True).save:
            self._save()
        while not self._compilation.wait(keys, _PATIENCE):
            self._bar.set_postfix_str(f"{self._compiled()}waiting for that of {set_name(instances)}")
            if is_alone and self._signals.received:
                self._save()
                raise Interrupted(self._stopped())
        self._compiling.waited += time.perf_counter() - start

    def _compiled(self):
        return self._compiling.describe(len(self._compilation.seconds()))

    def _finish_steps(self, wait_for_all) -> Control:
        """Finishes steps until few enough are pending; all of them, once one says that some host asks for something."""
        stop = save = False
        while len(self._pending) > (0 if wait_for_all or stop or save else _STEPS_AHEAD):
            agreed = self._finish_step(*self._pending.popleft())
            stop, save = stop or bool(agreed.stop), save or bool(agreed.save)
        return Control(self._run.step, stop, save)

    def _finish_step(self, step, drawn, metrics) -> Control:
        """Waits for a step, checks and logs it; returns what the hosts agreed on."""
        metrics = jax.device_get(metrics)
        row = {name: float(metrics[name]) for name in ("loss", "accuracy", "gradient_norm", "learning_rate")}
        row |= {name: float(value) for name, value in metrics.items() if name not in STEP_METRICS}
        if metrics["instances"]:
            row["instances"] = jax.tree.map(float, metrics["instances"])
        if not metrics["finite"]:
            self._report_nonfinite(step, row)
            row["skipped"] = self._run.skipped
        self._compiling.report_step(self._compilation.seconds().values())
        batch_size, now = self._plan.config.batch_size, time.perf_counter()
        rate, self._clock = batch_size / (now - self._clock), now
        self._bar.set_postfix_str(f"{self._compiled()}{drawn}, loss {row['loss']:.3f}, step {step + 1}", refresh=False)
        self._bar.update(batch_size)
        if step % self._plan.config.log_every_steps == 0 or not metrics["finite"]:
            self._log.step(step, {"instance": drawn, **row}, rate)
        self._checkpoints.check()
        return metrics["agreed"]

    def _report_nonfinite(self, step, row):
        what = f"{self._plan.describe(step)}: loss {row['loss']}, gradient norm {row['gradient_norm']}"
        if self._plan.config.on_nonfinite == "skip":
            self._run.skipped += 1
            progress.say(f"skipped a step that is not finite, the {self._run.skipped}. so far: {what}")
            return
        self._run.step = step
        self._save()
        self._checkpoints.wait()
        raise NonFiniteError(
            f"not finite: {what}; the state before it is checkpoint {step}; the same command with "
            f"--replay-step={step} shows which gradients are not finite"
        )

    def _validate(self):
        """Re-estimates and evaluates the validation instances."""
        config, experiment, run = self._plan.config, self._plan.experiment, self._run
        params = jax.device_get(run.train.ema if config.validate_ema else run.train.params)
        with experiment.reestimation_batches(config.reestimate_images) as batches:
            chosen = itertools.islice(batches, config.reestimate_batches)
            statistics = self._evaluator.reestimate(params, self._until_stop(chosen))
        with experiment.evaluation_batches(experiment.validation_split) as batches:
            metrics = self._evaluator.evaluate(params, statistics, self._until_stop(batches))
        run.validation = {instance.name: metrics[instance] for instance in metrics}
        run.validated_at = run.step
        self._log.validation(run.step - 1, {name: dataclasses.asdict(m) for name, m in run.validation.items()})
        shown = ", ".join(f"{name} {100 * metrics.top1:.2f} %" for name, metrics in run.validation.items())
        progress.say(f"step {run.step}/{self._plan.total_steps}: validation top-1: {shown}")
        self._clock = time.perf_counter()

    def _until_stop(self, batches: Iterable) -> Iterator:
        """Passes batches on: a validation can take minutes, and a stop leaves it undone, if there is one host alone."""
        for batch in batches:
            if self._signals.received and jax.process_count() == 1:
                self._save()
                raise Interrupted(self._stopped())
            yield batch

    def _save(self, replace=False):
        self._log.flush()
        self._checkpoints.save(self._run.step, *self._run.to_record(self._plan), replace=replace)

    def _stopped(self):
        return f"stopped after step {self._run.step} of {self._plan.total_steps}, which is saved"

    def _is_due(self, every):
        return self._run.step % every == 0 or self._run.step == self._plan.total_steps

    def _validation_is_due(self):
        return self._is_due(self._plan.validate_every) and self._run.validated_at != self._run.step

    def _checkpoint_is_due(self):
        config = self._plan.config
        for_the_best = config.keep_best_checkpoints > 0 and self._validation_is_due()
        return self._is_due(config.checkpoint_every_steps) or for_the_best

    def _minutes_are_over(self):
        """Tells whether to save for the time that has gone by, as the main host decides for all."""
        minutes = self._plan.config.checkpoint_every_minutes
        over = minutes > 0 and is_main_host() and time.monotonic() - self._saved_at >= 60 * minutes
        if over:
            self._saved_at = time.monotonic()
        return over


def format_summary(results: Mapping[str, Metrics], workdir: str | pathlib.Path) -> str:
    """Formats the end of a run: where things are, and what the last validation found."""
    lines = [f"trained; validation with re-estimated statistics (checkpoints and logs: {workdir}):"]
    for name, found in results.items():
        lines.append(f"  {name:<12} top-1 {100 * found.top1:6.2f} %   loss {found.loss:.4f}   n {found.count}")
    return "\n".join([*lines, f"next: python evaluate.py --workdir={workdir}"])
