"""Event files, read by TensorBoard itself. Budget: 5 s."""

import sys
from types import ModuleType

from gemkit.train.events import EventFile


def curve(folder, tag: str = "loss/train") -> list[tuple[int, float]]:
    """The points of a curve as TensorBoard sees them."""
    sys.modules["tensorboard.compat.notf"] = ModuleType("notf")  # has TensorBoard leave TensorFlow out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_reads_the_curves(tmp_path):
    file = EventFile(tmp_path, 0)
    for step in (0, 1, 200, 40_000):
        file.write(step, {"loss/train": step / 4, "optimizer/lr": 0.5})
        assert curve(tmp_path)[-1] == (step, step / 4)  # flushed
    file.close()
    assert curve(tmp_path, "optimizer/lr") == [(0, 0.5), (1, 0.5), (200, 0.5), (40_000, 0.5)]


def test_points_behind_the_checkpoint_give_way_to_those_of_the_resumed_run(tmp_path):
    for first, last in ((0, 9), (5, 7), (6, 12)):
        file = EventFile(tmp_path, first)
        for step in range(first, last + 1):
            file.write(step, {"loss/train": first + step / 64})
        file.close()
    wanted = [(step, step / 64) for step in range(5)] + [(5, 5 + 5 / 64)]
    assert curve(tmp_path) == wanted + [(step, 6 + step / 64) for step in range(6, 13)]


def test_a_file_that_ends_within_a_record_is_read_so_far(tmp_path):
    file = EventFile(tmp_path, 0)
    for step in range(5):
        file.write(step, {"loss/train": 1.0})
    file.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    file = EventFile(tmp_path, 3)
    file.write(3, {"loss/train": 2.0})
    file.close()
    assert curve(tmp_path) == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]
