"""Runs of a toy model: curves, evaluation, accumulation, stops and resumes, bad input. Budget: 10 s."""

import io
import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
from train.toy import ToyLoop, batches, rows, train, validation

from gemkit.data.batch import Batches
from gemkit.errors import GemkitError
from gemkit.train.checkpoint import Checkpoints
from gemkit.train.log import RunLog
from gemkit.train.loop import StepMetrics
from gemkit.train.metrics import read_metrics
from gemkit.train.options import TrainOptions
from gemkit.train.run import run

OPTIONS = TrainOptions(lr=0.1, steps=30, save_every=10, eval_every=15, batch_size=4, grad_accum=2)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr(RunLog, "finish", lambda self: None)


def logged(folder) -> tuple[io.StringIO, RunLog]:
    stream = io.StringIO()
    return stream, RunLog(folder, stream=stream)


class StopAt(ToyLoop):
    """A loop in which a signal arrives within a step."""

    def __init__(self, step: int, number: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.number, self.times = step, number, times

    def step(self, batches, lr):
        for _ in range(self.times if self.t + 1 == self.at else 0):
            signal.raise_signal(self.number)
        return super().step(batches, lr)


def same(one: ToyLoop, other: ToyLoop) -> None:
    a, b = one.state(), other.state()
    assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def figures(folder) -> list[tuple]:
    return [(r.step, r.loss, r.validation_loss, r.lr, r.grad_norm) for r in read_metrics(folder / "metrics.csv")]


def test_the_curves_fall_and_each_step_has_its_row(tmp_path):
    stream, log = logged(tmp_path)
    loop, result = train(tmp_path, replace(OPTIONS, steps=120), log=log)
    found = read_metrics(tmp_path / "metrics.csv")
    assert [row.step for row in found] == list(range(121))
    assert [row.step for row in found if row.validation_loss is not None] == list(range(0, 121, 15))
    first, last = found[0].validation_loss, found[-1].validation_loss
    assert first == pytest.approx(np.log(12)) and last < first - 0.5
    assert (result.first_validation_loss, result.validation_loss, result.loss) == (first, last, found[-1].loss)
    assert np.mean([row.loss for row in found[-20:]]) < np.mean([row.loss for row in found[1:21]]) - 0.3
    assert all(row.seconds is not None and row.memory_bytes > 1e6 for row in found[1:])
    assert (
        loop.t == 120 and f"step 120: validation loss {last:.4f} (before the first step: 2.4849)" in stream.getvalue()
    )


def test_the_validation_loss_is_the_mean_over_tokens(tmp_path):
    data = [*batches(rows(3, seed=3), 3).once(), *batches(rows(1, seed=4), 1).once()]
    loop = ToyLoop()
    loop.w = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    log = RunLog(tmp_path, quiet=True)
    result = run(loop, batches(rows(8), 2), data, replace(OPTIONS, steps=1), tmp_path, log=log)
    parts = [ToyLoop.evaluate(loop, one) for one in data]
    assert result.validation_loss == sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    losses = []
    for size, accumulate in ((8, 1), (4, 2), (2, 4)):
        options = replace(OPTIONS, steps=5, batch_size=size, grad_accum=accumulate)
        folder = tmp_path / str(size)
        run(ToyLoop(), batches(rows(40), size, shuffle=False), None, options, folder, log=RunLog(folder, quiet=True))
        losses.append([row.loss for row in read_metrics(folder / "metrics.csv")])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)


def test_epochs_give_the_number_of_steps(tmp_path):
    loop, _ = train(tmp_path, replace(OPTIONS, steps=None, epochs=3.0), log=RunLog(tmp_path, quiet=True))
    assert loop.t == 15  # 40 rows: 10 batches of 4, two a step


def test_samples_come_when_they_are_due(tmp_path):
    asked = []
    train(
        tmp_path,
        replace(OPTIONS, sample_every=12),
        samples=lambda step: asked.append(step) or [("Hello", f"answer {step}")],
        log=RunLog(tmp_path, quiet=True),
    )
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert asked == [line["step"] for line in lines] == [12, 24, 30] and lines[0]["answer"] == "answer 12"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_ends_as_if_uninterrupted(tmp_path, capfd, number: int, code: int):
    whole, result = train(tmp_path / "whole", OPTIONS, log=RunLog(tmp_path / "whole", quiet=True))
    folder = tmp_path / "parts"
    before = signal.getsignal(number)
    stream, log = logged(folder)
    with pytest.raises(SystemExit) as caught:
        train(folder, OPTIONS, loop=StopAt(17, number), log=log)
    assert caught.value.code == code and signal.getsignal(number) is before
    assert stream.getvalue().splitlines()[-1] == (
        f"stopped after step 17, saved as {folder / 'checkpoints' / 'step-000017'}; --resume goes on from there"
    )
    assert "stopping after this step" in capfd.readouterr().err
    stream, log = logged(folder)
    loop, resumed = train(folder, OPTIONS, resume=True, log=log)
    assert "resumed after step 17 of 30" in stream.getvalue()
    same(loop, whole)
    assert figures(folder) == figures(tmp_path / "whole") and resumed == result


def test_a_second_signal_stops_at_once(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, OPTIONS, loop=StopAt(17, signal.SIGINT, times=2), log=RunLog(tmp_path, quiet=True))
    assert os.listdir(tmp_path / "checkpoints") == ["step-000010"]


def test_a_run_in_another_thread_handles_no_signals(tmp_path):
    loops = []
    thread = threading.Thread(target=lambda: loops.append(train(tmp_path, OPTIONS, log=RunLog(tmp_path, quiet=True))))
    thread.start()
    thread.join()
    assert loops[0][0].t == 30


def test_a_finished_run_resumes_to_its_result_and_a_constant_rate_goes_on(tmp_path):
    options = replace(OPTIONS, schedule="constant")
    first, result = train(tmp_path, options, log=RunLog(tmp_path, quiet=True))
    again, same_result = train(tmp_path, options, resume=True, log=RunLog(tmp_path, quiet=True))
    same(first, again)
    assert result == same_result
    # warmup is a share of the steps: given as steps, it stays
    longer = replace(options, steps=45, warmup=1)
    loop, _ = train(tmp_path, longer, resume=True, log=RunLog(tmp_path, quiet=True))
    direct, _ = train(tmp_path / "direct", longer, log=RunLog(tmp_path / "direct", quiet=True))
    same(loop, direct)
    with pytest.raises(GemkitError, match="step-000045 is behind the 40 steps of the run"):
        train(tmp_path, replace(longer, steps=40), resume=True)


def test_resume_without_a_checkpoint_begins(tmp_path):
    stream, log = logged(tmp_path)
    loop, _ = train(tmp_path, OPTIONS, resume=True, log=log)
    assert loop.t == 30 and stream.getvalue().startswith(f"{tmp_path} has no checkpoint to resume from")


def test_broken_checkpoints_do_not_begin_the_run_again(tmp_path):
    train(tmp_path, OPTIONS, log=RunLog(tmp_path, quiet=True))
    stream, log = logged(tmp_path)
    (tmp_path / "checkpoints/step-000030/state.json").unlink()
    loop, _ = train(tmp_path, OPTIONS, resume=True, log=log)
    assert "step-000030 is broken and skipped" in stream.getvalue() and "resumed after step 20" in stream.getvalue()
    assert loop.t == 30 and Checkpoints(tmp_path, 2).newest(pytest.fail)[0].step == 30
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "state.json").unlink()
    with pytest.raises(GemkitError, match="has no valid checkpoint: train into another folder"):
        train(tmp_path, OPTIONS, resume=True, log=RunLog(tmp_path, quiet=True))


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    train(tmp_path, OPTIONS, log=RunLog(tmp_path, quiet=True))
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(GemkitError, match=r"has the checkpoints of a run: resume it \(--resume\), or give"):
        train(tmp_path, OPTIONS)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_resume_with_other_options_or_other_data_is_refused_and_loses_nothing(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, OPTIONS, loop=StopAt(17, signal.SIGINT), log=RunLog(tmp_path, quiet=True))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = batches(rows(40), 4), validation()
    for options, identity, message in [
        (replace(OPTIONS, batch_size=2), {"data set": "toy"}, "batch_size was 4 and is 2: give the same options"),
        (replace(OPTIONS, lr=0.2), {"data set": "toy"}, "lr was 0.1 and is 0.2, which changes the learning rate"),
        (replace(OPTIONS, steps=99), {"data set": "toy"}, "steps was 30 and is 99, which changes the learning rate"),
        (OPTIONS, {"data set": "other"}, "the data set is not that of .*step-000017: resume with the same"),
        (OPTIONS, {"data set": "toy", "model": "x"}, "the model is not that of"),
        (OPTIONS, {}, "the data set is not that of"),
    ]:
        with pytest.raises(GemkitError, match=message) as caught:
            run(ToyLoop(), *data, options, tmp_path, resume=True, identity=identity)
        assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    loop, _ = train(tmp_path, replace(OPTIONS, keep=9, eval_every=1), resume=True, log=RunLog(tmp_path, quiet=True))
    assert loop.t == 30


def test_other_versions_are_named_and_do_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.raises(SystemExit):
        train(tmp_path, OPTIONS, loop=StopAt(17, signal.SIGINT), log=RunLog(tmp_path, quiet=True))
    monkeypatch.undo()
    monkeypatch.setattr(RunLog, "finish", lambda self: None)
    stream, log = logged(tmp_path)
    train(tmp_path, OPTIONS, resume=True, log=log)
    assert f"numpy 1.0 is now {np.__version__}: the rest of the run may differ" in stream.getvalue()


class NotFinite(ToyLoop):
    def __init__(self, **fields: float) -> None:
        super().__init__()
        self.fields = fields

    def step(self, batches, lr):
        metrics = super().step(batches, lr)
        return replace(metrics, non_finite="layers.3.mlp.down_proj", **self.fields) if self.t == 13 else metrics


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"loss": float("nan")}, "the loss is nan"), ({"grad_norm": float("inf")}, "the gradient is inf")],
)
def test_a_value_that_is_not_finite_stops_the_run_and_is_named(tmp_path, fields: dict, words: str):
    with pytest.raises(GemkitError, match=rf"step 13: {words}, first in layers\.3\.mlp\.down_proj; train") as caught:
        train(tmp_path, OPTIONS, loop=NotFinite(**fields), log=RunLog(tmp_path, quiet=True))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000010"]
    assert [row.step for row in read_metrics(tmp_path / "metrics.csv")][-1] == 12


def test_batches_without_a_loss_token_are_refused(tmp_path):
    class Empty(Batches):
        def __next__(self):
            found = super().__next__()
            return replace(found, targets=np.full_like(found.targets, -1)) if self.state()["batch"] > 4 else found

    with pytest.raises(GemkitError, match="step 3: its batches have no token with loss"):
        run(ToyLoop(), Empty(rows(40), 4, 32, packing=False), None, OPTIONS, tmp_path, log=RunLog(tmp_path, quiet=True))
    with pytest.raises(GemkitError, match="the validation set has no token with loss"):
        empty = [replace(batch, targets=np.full_like(batch.targets, -1)) for batch in validation()]
        run(ToyLoop(), batches(rows(40), 4), empty, OPTIONS, tmp_path, log=RunLog(tmp_path, quiet=True))


def test_a_checkpoint_that_a_full_disk_refuses_does_not_end_the_run_until_the_last(tmp_path, monkeypatch):
    save = Checkpoints.save

    def full(self, state, arrays):
        if state.step >= 20:
            raise OSError(28, "No space left on device")
        return save(self, state, arrays)

    monkeypatch.setattr(Checkpoints, "save", full)
    stream, log = logged(tmp_path)
    with pytest.raises(GemkitError, match=r"step-000030 cannot be written \(No space left on device\): free"):
        train(tmp_path, OPTIONS, log=log)
    lines = [line for line in stream.getvalue().splitlines() if "cannot be written" in line]
    assert len(lines) == 1 and "step-000020" in lines[0] and "the run goes on" in lines[0]
    monkeypatch.setattr(Checkpoints, "save", save)
    loop, _ = train(tmp_path, OPTIONS, resume=True, log=RunLog(tmp_path, quiet=True))
    whole, _ = train(tmp_path / "whole", OPTIONS, log=RunLog(tmp_path / "whole", quiet=True))
    same(loop, whole)


def test_memory_and_rate_are_those_that_the_loop_gives(tmp_path):
    class Device(ToyLoop):
        def step(self, batches, lr):
            return StepMetrics(1.0, 640, 10, 1.0, memory=12_345)

    run(Device(), batches(rows(9), 2), None, replace(OPTIONS, steps=3), tmp_path, log=RunLog(tmp_path, quiet=True))
    assert {(row.memory_bytes, row.tokens, row.loss_tokens) for row in read_metrics(tmp_path / "metrics.csv")} == {
        (12_345, 640, 10)
    }
