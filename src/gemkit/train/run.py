"""Training run: steps, learning rate, evaluation, samples, checkpoints and stopping, for a loop of any framework.

The loop is passed in (`gemkit.train.loop`). A run that is stopped or killed and resumed gives bit for bit the weights
of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from gemkit.errors import GemkitError
from gemkit.host import peak_memory
from gemkit.train.checkpoint import Checkpoints, RunState, versions
from gemkit.train.log import RunLog
from gemkit.train.loop import Loop, StepMetrics
from gemkit.train.metrics import Row
from gemkit.train.objectives.sft import loss_tokens
from gemkit.train.options import TrainOptions

if TYPE_CHECKING:
    from gemkit.data.batch import TokenBatch


class Batches(Protocol):
    """Endless training data, such as `gemkit.data.batch.Batches`. per_epoch: batches of one pass over the data."""

    @property
    def per_epoch(self) -> int: ...

    def __next__(self) -> TokenBatch: ...

    def state(self) -> dict[str, object]: ...

    def restore(self, state: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class Result:
    """Last losses of a run, by its metrics.csv. first_validation_loss: before the first step."""

    loss: float | None
    validation_loss: float | None
    first_validation_loss: float | None


def run(
    loop: Loop,
    batches: Batches,
    validation: Sequence[TokenBatch] | None,
    options: TrainOptions,
    folder: Path,
    *,
    resume: bool = False,
    identity: Mapping[str, str] | None = None,
    samples: Callable[[int], Iterable[tuple[str, str]]] | None = None,
    log: RunLog | None = None,
) -> Result:
    """Train until the options' last step, and return the result; the loop then has the trained parameters.

    folder: gets the log (`gemkit.train.log`) and checkpoints/. resume: go on from the newest valid checkpoint, or begin
    if there is none. identity: digests of what the run depends on, such as {"data set": …, "model": …}, by the names
    that messages use; a resumed run must have the same. samples: called with the step; returns pairs of prompt and
    answer.
    Ctrl-C and SIGTERM end the run after the step in progress: a checkpoint is saved, and SystemExit has the code of a
    program that the signal ended, 130 or 143. A second signal ends it at once.
    Raises GemkitError if a value is not finite, if the folder has another run, if the data have no loss tokens, or if
    the last checkpoint cannot be written.
    """
    folder, identity = Path(folder), dict(identity or {})
    log = RunLog(folder, every=options.log_every) if log is None else log
    checkpoints = Checkpoints(folder, options.keep)
    total = options.total_steps(batches.per_epoch)
    step, seconds = 0, 0.0
    if resume:
        if (found := checkpoints.newest(log.say)) is not None:
            state, arrays = found
            _check_same(state, options, total, identity, checkpoints.path(state.step), log)
            step, seconds = state.step, state.seconds
            loop.restore(arrays)
            batches.restore(state.position)
            del arrays, found
            log.say(f"resumed after step {step:,} of {total:,}")
        elif checkpoints.exist():
            raise GemkitError(f"{checkpoints.folder} has no valid checkpoint: train into another folder")
        else:
            log.say(f"{folder} has no checkpoint to resume from: the run begins")
    elif checkpoints.exist():
        raise GemkitError(f"{folder} has the checkpoints of a run: resume it (--resume), or give another folder")
    with log, _Signals() as signals:
        log.start(step or -1, total)
        clock = _Clock(seconds)
        session = _Session(loop, batches, options, total, identity, checkpoints, log, clock)
        if validation is not None and not step:
            log.add(Row(0, validation_loss=session.evaluate(validation, 0), seconds=clock.seconds()))
        while step < total:
            step += 1
            last = step == total
            row = session.step(step)
            if validation is not None and (last or _due(step, options.eval_every)):
                row["validation_loss"] = session.evaluate(validation, step)
            log.add(Row(**row, seconds=clock.seconds()))
            if samples is not None and (last or _due(step, options.sample_every)):
                log.add_samples(step, samples(step))
            if last or signals.number or _due(step, options.save_every):
                session.save(step, must=last or bool(signals.number))
            if signals.number and not last:
                log.say(f"stopped after step {step:,}, saved as {checkpoints.path(step)}; --resume goes on from there")
                raise SystemExit(128 + signals.number)
        log.finish()
        return _result(log.rows)


class _Session:
    """Parts of a step, with all that they share."""

    def __init__(
        self,
        loop: Loop,
        batches: Batches,
        options: TrainOptions,
        total: int,
        identity: Mapping[str, str],
        checkpoints: Checkpoints,
        log: RunLog,
        clock: _Clock,
    ) -> None:
        self.loop, self.batches, self.options, self.total = loop, batches, options, total
        self.identity, self.checkpoints, self.log, self.clock = identity, checkpoints, log, clock
        self.schedule = options.make_schedule(total)

    def step(self, step: int) -> dict[str, float | int | None]:
        """Take one optimiser step and return its fields of a `Row`."""
        begun = time.monotonic()
        lr = self.schedule(step)
        metrics = self.loop.step(self._group(step), lr)
        took = max(time.monotonic() - begun, 1e-9)
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            raise GemkitError(self._not_finite(step, metrics))
        return {
            "step": step,
            "loss": metrics.loss,
            "lr": lr,
            "grad_norm": metrics.grad_norm,
            "tokens": metrics.tokens,
            "loss_tokens": metrics.loss_tokens,
            "tokens_per_second": metrics.tokens / took,
            "memory_bytes": peak_memory() if metrics.memory is None else metrics.memory,
        }

    def evaluate(self, validation: Sequence[TokenBatch], step: int) -> float:
        """Return the mean loss over the validation set, and show it."""
        total, count = 0.0, 0
        for batch in validation:
            loss, tokens = self.loop.evaluate(batch)
            total, count = total + loss, count + tokens
        if not count:
            raise GemkitError("the validation set has no token with loss: give other rows, or none")
        mean = total / count
        first = next((row.validation_loss for row in self.log.rows if row.step == 0), None)
        before = f" (before the first step: {first:.4f})" if step and first is not None else ""
        self.log.say(f"step {step:,}: validation loss {mean:.4f}{before}")
        return mean

    def save(self, step: int, *, must: bool) -> None:
        """Save a checkpoint. must: raise GemkitError if that fails; else training goes on without it."""
        seconds = self.clock.seconds()
        state = RunState(step, self.total, self.batches.state(), self.options.to_json(), self.identity, seconds)
        try:
            self.checkpoints.save(state, self.loop.state())
        except OSError as error:
            cause = f"checkpoint {self.checkpoints.path(step)} cannot be written ({error.strerror or error})"
            if must:
                raise GemkitError(f"{cause}: free some space and resume the run from the one before") from None
            self.log.say(f"{cause}: earlier ones are kept and the run goes on; free some space")

    def _group(self, step: int) -> list[TokenBatch]:
        """Return the batches of one step."""
        group = [next(self.batches) for _ in range(self.options.grad_accum)]
        if not loss_tokens(group):
            raise GemkitError(f"step {step:,}: its batches have no token with loss: leave such rows out of the data")
        return group

    def _not_finite(self, step: int, metrics: StepMetrics) -> str:
        name, value = ("loss", metrics.loss) if not math.isfinite(metrics.loss) else ("gradient", metrics.grad_norm)
        where = f", first in {metrics.non_finite}" if metrics.non_finite else ""
        return (
            f"step {step:,}: the {name} is {value}{where}; train again with a lower learning rate or in float32 "
            f"(checkpoints are in {self.checkpoints.folder})"
        )


class _Clock:
    """Time that a run has taken in all its sessions."""

    def __init__(self, before: float) -> None:
        self._before, self._begun = before, time.monotonic()

    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._begun, 3)


class _Signals:
    """Ctrl-C and SIGTERM as a wish to stop. number: the first signal that came, 0 for none.

    In another thread than the main one Python handles no signals, and nothing changes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        with contextlib.suppress(OSError):  # not through a buffer, which may be in use
            os.write(2, b"\nstopping after this step, with a checkpoint; a second signal stops at once\n")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _result(rows: Sequence[Row]) -> Result:
    losses = [row.loss for row in rows if row.loss is not None]
    evaluations = [row.validation_loss for row in rows if row.validation_loss is not None]
    first = next((row.validation_loss for row in rows if row.step == 0), None)
    return Result(losses[-1] if losses else None, evaluations[-1] if evaluations else None, first)


def _check_same(
    state: RunState, options: TrainOptions, total: int, identity: Mapping[str, str], path: Path, log: RunLog
) -> None:
    """Raise GemkitError if a run with these options cannot go on from a checkpoint, and name other versions."""
    for name in sorted({*state.identity, *identity}):
        if state.identity.get(name) != identity.get(name):
            raise GemkitError(f"the {name} is not that of {path}: resume with the same, or give another folder")
    earlier = TrainOptions.from_json(state.options)
    if reason := options.difference(earlier, state.step, total, state.steps):
        raise GemkitError(f"{path} cannot be resumed, {reason}: give the same options, or another folder")
    if total < state.step:
        raise GemkitError(f"{path} is behind the {total:,} steps of the run: give more steps, or another folder")
    now = versions()
    changed = [f"{name} {old} is now {now[name]}" for name, old in state.versions.items() if now.get(name, old) != old]
    if changed:
        log.say(f"{', '.join(changed)}: the rest of the run may differ in its last bits")
