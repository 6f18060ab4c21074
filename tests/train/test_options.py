"""Options of a run: one line for each bad value, JSON, and which ones a run can go on with. Budget: 2 s."""

import json
from dataclasses import fields

import numpy as np
import pytest

from gemkit.errors import UsageError
from gemkit.train.options import TrainOptions
from gemkit.train.schedule import WSD, Constant, Cosine, Linear

BAD = {
    "method": ["qlora", None, 3],
    "schedule": ["poly", None],
    "dtype": ["float16", None],
    "lr": [0, -1e-4, float("nan"), float("inf"), "1e-4", True],
    "floor": [-0.1, 1.1, None],
    "warmup": [-1, 1.5, float("nan"), "3"],
    "decay": [-1, 2.5],
    "weight_decay": [-0.1, None],
    "eps": [0, None],
    "clip": [0, -1, "1"],
    "batch_size": [0, 1.5, True, None],
    "grad_accum": [0, "2"],
    "max_length": [1],
    "seed": [-1, 0.5],
    "eval_every": [-1],
    "save_every": [-1, None],
    "sample_every": [-1],
    "keep": [0],
    "log_every": [0],
    "steps": [0, 2.5, "9"],
    "epochs": [0, -1, float("inf")],
    "packing": ["yes", 2, None],
    "betas": [(0.9,), (0.9, 1.0), "ab", None, (True, 0.9)],
    "sample_prompts": ["a text", [1], None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_named_in_one_line(name: str, value: object):
    with pytest.raises(UsageError, match=rf"^{name} is .+; (give|choose)") as caught:
        TrainOptions(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_every_option_is_checked():
    assert set(BAD) == {field.name for field in fields(TrainOptions)}


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(UsageError, match="steps and epochs are both given"):
        TrainOptions(steps=3, epochs=1)
    assert TrainOptions(steps=30).total_steps(7) == 30
    assert TrainOptions().total_steps(7) == 7
    assert TrainOptions(epochs=1.5, grad_accum=2).total_steps(7) == 6  # 5.25 rounds up: no row is left out
    assert TrainOptions(epochs=0.01).total_steps(7) == 1


def test_options_are_plain_values_whatever_was_given():
    options = TrainOptions(lr=np.float32(0.5), batch_size=np.int64(3), betas=[0, 0.5], sample_prompts=["a"], packing=1)
    assert json.loads(json.dumps(options.to_json())) == {
        **options.to_json(),
        "betas": [0.0, 0.5],
        "sample_prompts": ["a"],
    }
    assert TrainOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    with pytest.raises(UsageError, match="there is no training option 'rate'"):
        TrainOptions.from_json({"rate": 1})


def test_the_learning_rate_follows_the_method():
    assert TrainOptions(method="lora").lr == 2e-4 and TrainOptions(method="full").lr == 2e-5
    assert TrainOptions(method="full", lr=1).lr == 1.0


def test_schedules_are_made_of_steps_and_shares():
    assert TrainOptions(lr=1, warmup=0.1).make_schedule(100) == Cosine(1, 100, 10)
    assert TrainOptions(lr=2, warmup=7, schedule="linear", floor=0.1).make_schedule(100) == Linear(2, 100, 7, 0.2)
    assert TrainOptions(lr=1, warmup=0, schedule="constant").make_schedule(9) == Constant(1)
    assert TrainOptions(lr=1, warmup=0.1, schedule="wsd", decay=0.3).make_schedule(100) == WSD(1, 100, 10, 30)
    assert TrainOptions(lr=1, warmup=900, schedule="wsd", decay=30).make_schedule(100) == WSD(1, 100, 100, 0)


def test_what_changes_no_weight_may_change_on_resume():
    one = TrainOptions(lr=1, steps=100)
    for change in ({"keep": 9}, {"eval_every": 1}, {"save_every": 3}, {"sample_prompts": ("x",)}, {"log_every": 2}):
        assert TrainOptions(lr=1, steps=100, **change).difference(one, 50, 100, 100) is None


@pytest.mark.parametrize(
    "change",
    [
        {"method": "full"},
        {"batch_size": 8},
        {"grad_accum": 2},
        {"max_length": 64},
        {"packing": False},
        {"weight_decay": 0.1},
        {"betas": (0.9, 0.95)},
        {"eps": 1e-6},
        {"clip": None},
        {"dtype": "bfloat16"},
        {"seed": 1},
        {"lr": 2.0},
        {"schedule": "linear"},
        {"warmup": 0.5},
        {"floor": 0.5},
    ],
)
def test_what_changes_the_weights_may_not(change: dict):
    one = TrainOptions(lr=1, steps=100)
    found = TrainOptions(**{"lr": 1, "steps": 100} | change).difference(one, 50, 100, 100)
    assert found is not None and f"{next(iter(change))} was " in found


def test_a_run_is_prolonged_where_the_steps_so_far_stay_the_same():
    constant = TrainOptions(lr=1, warmup=5, schedule="constant", steps=100)
    longer = TrainOptions(lr=1, warmup=5, schedule="constant", steps=200)
    assert longer.difference(constant, 100, 200, 100) is None
    cosine = TrainOptions(lr=1, warmup=5, steps=100), TrainOptions(lr=1, warmup=5, steps=200)
    assert "steps was 100 and is 200" in cosine[1].difference(cosine[0], 50, 200, 100)
    assert cosine[1].difference(cosine[0], 5, 200, 100) is None  # both are in the warm-up
    wsd = [TrainOptions(lr=1, warmup=5, decay=20, schedule="wsd", steps=steps) for steps in (100, 200)]
    assert wsd[1].difference(wsd[0], 80, 200, 100) is None
    assert "steps was" in wsd[1].difference(wsd[0], 82, 200, 100)
