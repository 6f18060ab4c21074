"""Options of a training run, with the one set of defaults; importing this file imports no NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from gemkit.errors import UsageError, brief, check_flag, whole_number
from gemkit.train.schedule import WSD, Constant, Cosine, Linear, Schedule

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
DTYPES = ("auto", "bfloat16", "float32")
# Rates that work for most data; an adapter starts at zero and bears a larger one.
_LR = {"lora": 2e-4, "full": 2e-5}
# Whole numbers and their smallest values.
_COUNTS = {
    "batch_size": 1,
    "grad_accum": 1,
    "max_length": 2,
    "seed": 0,
    "eval_every": 0,
    "save_every": 0,
    "sample_every": 0,
    "keep": 1,
    "log_every": 1,
}
# Options that change no number of the run: a resumed one may have others. Steps and schedule are compared by the
# learning rates that they gave.
_FREE = {"eval_every", "save_every", "sample_every", "sample_prompts", "keep", "log_every"}
_OF_SCHEDULE = {"lr", "schedule", "warmup", "decay", "floor", "steps", "epochs"}


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run, checked on construction (UsageError); all of them are JSON values.

    method: "lora" trains an adapter, "full" all weights.
    lr: the highest learning rate; by default 2e-4 with an adapter and 2e-5 without.
    schedule: "cosine" or "linear" fall over the whole run, "constant" does not, "wsd" falls in the last steps.
    warmup: steps in which the rate rises, or below 1 their share of the run.
    decay: steps in which "wsd" falls, or below 1 their share of the run.
    floor: share of lr that the fall would reach one step after the end.
    steps: optimiser steps of the run. epochs: passes over the data instead, also a fraction; one by default.
    batch_size: rows of a batch. grad_accum: batches of an optimiser step. max_length: most tokens of a row.
    packing: several samples in a row, each of which sees only itself.
    weight_decay, betas, eps: AdamW's. clip: largest norm of the gradient, beyond which it is scaled; None is off.
    dtype: type of the activations and of frozen weights; trained weights and the optimiser are float32. "auto" is
        bfloat16 on accelerators that have it and else float32.
    seed: of the order of the data, of dropout and of a new adapter.
    eval_every: steps between evaluations on the validation set; 0 evaluates before the first step and after the last.
    save_every: steps between checkpoints; 0 saves after the last step. keep: how many checkpoints stay.
    sample_every: steps between answers to `sample_prompts`; 0 answers after the last step.
    log_every: steps between lines of progress where these are not shown on a terminal.
    """

    method: str = "lora"
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    decay: float = 0.2
    floor: float = 0.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    grad_accum: int = 1
    max_length: int = 1024
    packing: bool = True
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    dtype: str = "auto"
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    log_every: int = 10

    def __post_init__(self) -> None:
        self._choose("method", METHODS)
        self._choose("schedule", SCHEDULES)
        self._choose("dtype", DTYPES)
        if self.lr is None:
            object.__setattr__(self, "lr", _LR[self.method])
        self._number("lr", lambda x: x > 0, "a number above 0, such as 2e-4")
        self._number("floor", lambda x: 0 <= x <= 1, "a share from 0 to 1")
        for name in ("warmup", "decay"):
            remedy = "a whole number of steps, or a share of them from 0 to below 1"
            self._number(name, lambda x: 0 <= x < 1 or x == int(x) > 0, remedy)
        self._number("weight_decay", lambda x: x >= 0, "a number from 0")
        self._number("eps", lambda x: x > 0, "a number above 0, such as 1e-8")
        if self.clip is not None:
            self._number("clip", lambda x: x > 0, "a number above 0, or None for no clipping")
        for name, minimum in _COUNTS.items():
            self._count(name, minimum)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("steps and epochs are both given: leave one of them out")
        if self.steps is not None:
            self._count("steps", 1)
        else:
            object.__setattr__(self, "epochs", 1 if self.epochs is None else self.epochs)
            self._number("epochs", lambda x: x > 0, "a number above 0")
        object.__setattr__(self, "packing", check_flag("packing", self.packing))
        betas = self.betas
        good = isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
        if not good:
            raise UsageError(f"betas is {brief(betas)}; give two numbers from 0 to below 1")
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        prompts = self.sample_prompts
        if not isinstance(prompts, tuple | list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError(f"sample_prompts is {brief(prompts)}; give a list of texts")
        object.__setattr__(self, "sample_prompts", tuple(prompts))

    def total_steps(self, batches_per_epoch: int) -> int:
        """Return the optimiser steps of the run, at least one."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * batches_per_epoch / self.grad_accum))

    def make_schedule(self, steps: int) -> Schedule:
        """Return the schedule of a run of `steps` steps."""
        warmup, floor = _steps(self.warmup, steps), self.lr * self.floor
        if self.schedule == "constant":
            return Constant(self.lr, warmup)
        if self.schedule == "wsd":
            return WSD(self.lr, steps, warmup, min(_steps(self.decay, steps), steps - warmup), floor)
        return (Cosine if self.schedule == "cosine" else Linear)(self.lr, steps, warmup, floor)

    def to_json(self) -> dict[str, object]:
        """Return the options as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> TrainOptions:
        """Return the options that `to_json` gave; raises UsageError for an unknown name or a bad value."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"there is no training option {brief(unknown[0])}: choose from {', '.join(sorted(known))}")
        return cls(**values)

    def difference(self, earlier: TrainOptions, step: int, total: int, earlier_total: int) -> str | None:
        """Return the reason why a run with `earlier` options cannot go on with these after `step`; None if it can.

        total, earlier_total: the steps of the two runs. More steps, or another schedule, are fine if all steps so far
        would have had the same learning rate.
        """
        for field in fields(self):
            name, old, new = field.name, getattr(earlier, field.name), getattr(self, field.name)
            if name not in _FREE | _OF_SCHEDULE and old != new:
                return f"{name} was {brief(old)} and is {brief(new)}"
        before, after = earlier.make_schedule(earlier_total), self.make_schedule(total)
        if any(before(done) != after(done) for done in range(1, step + 1)):
            pairs = {name: (getattr(earlier, name), getattr(self, name)) for name in sorted(_OF_SCHEDULE)}
            pairs["steps"] = (earlier_total, total)
            changes = (f"{name} was {brief(a)} and is {brief(b)}" for name, (a, b) in pairs.items() if a != b)
            return f"{', '.join(changes)}, which changes the learning rate of steps that are done"
        return None

    def _choose(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise UsageError(f"{name} is {brief(value)}; choose from {', '.join(choices)}")

    def _count(self, name: str, minimum: int) -> None:
        value = whole_number(getattr(self, name))
        if value is None or value < minimum:
            raise UsageError(f"{name} is {brief(getattr(self, name))}; give a whole number from {minimum}")
        object.__setattr__(self, name, value)

    def _number(self, name: str, good, remedy: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not good(value):
            raise UsageError(f"{name} is {brief(value)}; give {remedy}")
        object.__setattr__(self, name, float(value))


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number of any type, NumPy's too."""
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)
    except TypeError:
        return False


def _steps(value: float, steps: int) -> int:
    """Return a number of steps that is given as such or as a share."""
    return min(steps, int(value) if value >= 1 else round(value * steps))
