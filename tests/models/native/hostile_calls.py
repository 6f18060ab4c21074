"""Calls the native module with arguments that do not fit; run as: hostile_calls.py SOURCE_FOLDER.

Prints a line "WRONG ..." for every call that was not refused as it should be, then how many were refused.
"""

import copy
import random
import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
from models.native.running import tiny

from gemkit import _native
from gemkit.engine.sampling import SAMPLING, Sampling, sampling_records
from gemkit.models.native.plan import build_plan

i32, i64, u64, f32, f64 = np.int32, np.int64, np.uint64, np.float32, np.float64
plan = build_plan(*tiny())
model = _native.Model.create(plan, 2, False, 16)
model.reserve(0, 4)
model.reserve(1, 4)
tables = [np.array([[0, 1], [2, 3]], i32), np.array([[3, 2], [1, 0]], i32)]
batch = [np.arange(5, dtype=i32), np.array([0, 2, 5], i32), np.zeros(2, i32), tables, np.zeros(0, i32)]
records, bias_ids, bias_values = sampling_records((Sampling(logprobs=2),) * 2)
records["row"], records["draws"] = (0, 1), 1
no_masks = [None, None]
rest = [
    records.view(np.uint8).reshape(2, -1),
    bias_ids,
    bias_values,
    np.zeros(0, i32),
    no_masks,
    np.zeros(5, i32),
]
good = {"step": batch + rest, "logits": batch, "hidden": batch}
for name, arguments in good.items():
    getattr(model, name)(*arguments)
expected = model.logits(*batch)
refused = accepted = 0
wrong = set()


def attempt(call, *arguments, must_fail=False):
    global refused, accepted
    try:
        call(*arguments)
        accepted += 1
        if must_fail:
            wrong.add(f"accepted: {str(arguments)[:200]}")
    except (ValueError, TypeError) as error:
        refused += 1
        if isinstance(error, ValueError) and "\\n" in str(error):
            wrong.add(f"several lines: {error}")
    except BaseException as error:
        wrong.add(f"{type(error).__name__}: {error}: {getattr(call, '__name__', call)}")


# Each argument replaced by what is not the expected array.
strange = [
    None,
    1,
    "text",
    b"bytes",
    [],
    [1, 2],
    {},
    object(),
    np.zeros(0),
    np.zeros((2, 2, 2, 2), i32),
    np.array(5, i32),
    np.zeros(3, bool),
    np.zeros(3, complex),
    np.array(["a"]),
    np.zeros(3, object),
]
for name, arguments in good.items():
    for at, value in enumerate(arguments):
        for other in strange:
            if value is no_masks and np.shape(other) == (0,):
                continue  # no draw has a mask
            attempt(getattr(model, name), *arguments[:at], other, *arguments[at + 1 :], must_fail=True)
        if isinstance(value, np.ndarray):
            changed = [value.astype(t) for t in (np.int8, np.uint32, f32, f64, i64, i32, u64) if t != value.dtype]
            if value.shape[0] > 1:
                changed += [np.repeat(value, 2, 0)[::2], value[::-1], value[:-1], np.repeat(value, 2, 0)]
                changed += [value.astype(value.dtype.newbyteorder())]
            for other in changed:
                reordered = other.shape == value.shape and other.flags.c_contiguous
                fails = other.dtype != value.dtype or not other.flags.c_contiguous
                attempt(getattr(model, name), *arguments[:at], other, *arguments[at + 1 :], must_fail=fails)
    attempt(getattr(model, name), must_fail=True)
    attempt(getattr(model, name), *arguments, 1, must_fail=True)
    attempt(getattr(_native.Model, name), *arguments, must_fail=True)
    attempt(getattr(_native.Model, name), object(), *arguments, must_fail=True)
    empty = getattr(_native.Model.__new__(_native.Model), name)
    attempt(empty, *arguments, must_fail=True)
for bad in (
    [np.zeros((2, 2), i64)],
    [np.zeros(4, i32)],
    [np.zeros((1, 2), i32)],
    [np.zeros((2, 4), i32)[:, ::2]],
    [np.zeros((2, 0), i32)],
    [None],
    [tables],
    (),
    tables * 9,
    [np.full((2, 2), 99, i32)],
    [np.full((2, 2), -5, i32)],
    [np.full((2, 2), 2**31 - 1, i32)],
    np.zeros((2, 2, 2, 2), i32),
):
    table = [tables[0], *bad] if isinstance(bad, list) and len(bad) == 1 else bad
    for name, arguments in good.items():
        attempt(getattr(model, name), *arguments[:3], table, *arguments[4:], must_fail=True)
for field in SAMPLING.names[:8]:
    for value in (-1, 99, 2**62):
        other = records.copy()
        other[field][1] = value
        fails = field not in ("counter", "prompt_length")
        attempt(model.step, *batch, other.view(np.uint8).reshape(2, -1), *rest[1:], must_fail=fails)
for masks in (
    [np.zeros(1, np.uint32), None],
    [None],
    [None] * 3,
    [np.ones(64, np.uint32), None],
    [np.ones(1, i64), None],
):
    attempt(model.step, *batch, *rest[:4], masks, rest[5], must_fail=True)
fields = {name: (offset, kind.itemsize) for name, (kind, offset) in SAMPLING.fields.items()}
for other in (
    fields | {"seed": (0, 8)},
    fields | {"seed": (80, 4)},
    fields | {"more": (136, 8)},
    {},
    fields | {"row": 1},
):
    attempt(_native.check_sampling, other, SAMPLING.itemsize, must_fail=True)
attempt(_native.check_sampling, fields, SAMPLING.itemsize + 8, must_fail=True)
_native.check_sampling(fields, SAMPLING.itemsize)
attempt(_native.Model, must_fail=True)
# Random values in every place.
r = random.Random(5)
extremes = [0, 1, -1, 2, 3, 5, 16, 17, 63, 64, 511, 512, 4095, 4096, 2**31 - 1, -(2**31)]
reals = [0.0, 1.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), 0.5]
for _ in range(3000):
    name = r.choice(list(good))
    arguments = copy.deepcopy(good[name])
    for _ in range(r.randint(1, 3)):
        at = r.randrange(len(arguments))
        array = r.choice(arguments[at]) if at == 3 and arguments[at] else arguments[at]
        if isinstance(array, list):
            continue
        if r.random() < 0.15:
            length = r.choice([0, 1, 2, 3, 5, 6, 40])
            shape = (length, *array.shape[1:])
            array = np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
            if at == 3:
                arguments[3] = [array] * r.choice([0, 1, 2, 2, 3])
            else:
                arguments[at] = array
        if array.size:
            place = tuple(r.randrange(n) for n in array.shape)
            if array.dtype.kind == "f":
                array[place] = r.choice(reals)
            elif array.dtype == np.uint8:
                array[place] = r.choice([0, 1, 127, 128, 255])
            else:
                array[place] = r.choice(extremes + ([2**62, -(2**63)] if array.dtype == i64 else []))
    attempt(getattr(model, name), *arguments)
# Plans: a wrong type or a random value in every field.
values = [
    None,
    "text",
    1.5,
    -1,
    0,
    7,
    2**31,
    2**63,
    -(2**70),
    [],
    {},
    [None],
    [{}],
    [[]],
    [(1, 2)],
    [(0, 1, 4, b"")],
    [(0, 1, 1, np.zeros(4, np.uint8))],
    [(0, 2**40, 2**40, np.zeros(4, np.uint8))],
    float("nan"),
    object(),
]
for key in plan:
    for value in values:
        attempt(_native.Model.create, plan | {key: value}, 1, False, 8)
for key in plan["layers"][0]:
    for value in values:
        layers = [plan["layers"][0] | {key: value}, *plan["layers"][1:]]
        attempt(_native.Model.create, plan | {"layers": layers}, 1, False, 8)
for arguments in (
    (plan, 0, False, 8),
    (plan, -1, False, 8),
    (plan, 2**31, False, 8),
    (plan, 1, None, 8),
    (plan, 1, False, 0),
    (plan, 1, False, 2**62),
    (None, 1, False, 8),
    ({}, 1, False, 8),
    ([], 1, False, 8),
    (plan,),
    (),
):
    attempt(_native.Model.create, *arguments, must_fail=True)
for group, count in ((-1, 1), (2, 1), (2**62, 1), (0, 2**62), (0, 2**24 + 1), (None, 1), (0, "1"), (0, 1.5)):
    attempt(model.reserve, group, count, must_fail=True)
for group in (-1, 2, 2**62, None):
    attempt(model.page_bytes, group, must_fail=True)
attempt(_native.measure_bandwidth, 0, must_fail=True)
attempt(_native.measure_int8_peak, 0, must_fail=True)
attempt(_native.measure_int8_peak, -1, must_fail=True)
assert np.array_equal(model.logits(*batch), expected), "the model still works"
for line in sorted(wrong):
    print("WRONG", line)
print("refused", refused, "accepted", accepted)
