"""Models across `os.fork`: the child of a process with a model works, or says at once that it cannot.

The programs run in processes of their own, since a fork of this one would copy every framework that other tests loaded.
Budget: 15 s on two cores.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine.vocabulary import vocabulary
from weights.files import tiny_config, tiny_params

from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType

WORKS = """
import concurrent.futures, multiprocessing, os, sys, threading, warnings
import gemkit

PROMPTS = [[2, 40, 50, 60 + n, 70] for n in range(4)]
model = gemkit.load(sys.argv[1], threads=int(sys.argv[2]))


def answer(n):
    found = model.generate([PROMPTS[n % 4]], max_tokens=20, temperature=0, ignore_eos=True)[0].ids
    return found, model.score(PROMPTS[n % 4]).logprobs.tobytes()


def child(queue, n):
    queue.put(answer(n))
    if n == 3:  # a grandchild, and a model that its process closes
        process = context.Process(target=child, args=(queue, 1))
        process.start()
        process.join()
        model.close()


context = multiprocessing.get_context("fork")
expected = [answer(n) for n in range(4)]
stop, wrong, turns = threading.Event(), [], 0


def generate():
    global turns
    while not stop.is_set():
        turns += 1
        if answer(turns) != expected[turns % 4]:
            wrong.append(turns)


thread = threading.Thread(target=generate, daemon=True)
thread.start()
for turn in range(8):
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, turn % 4))
    process.start()
    assert queue.get(timeout=60) == expected[turn % 4], turn
    if turn % 4 == 3:
        assert queue.get(timeout=60) == expected[1]
    process.join(60)
    assert process.exitcode == 0
with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
    assert list(pool.map(answer, range(8))) == expected * 2
before = turns
while turns < before + 2:
    assert thread.is_alive()
stop.set()
thread.join()
assert not wrong, wrong

# A stream that was begun before the fork goes on in both
stream = model.stream(PROMPTS[0], max_tokens=20, temperature=0, ignore_eos=True)
begun = [next(stream).id for _ in range(5)]
if (pid := os.fork()) == 0:
    os._exit(begun + [piece.id for piece in stream] != expected[0][0])
assert begun + [piece.id for piece in stream] == expected[0][0]
assert os.waitpid(pid, 0)[1] == 0

# One that neither uses the model nor leaves by os._exit ends too
if os.fork() == 0:
    model.settle()
    sys.exit()
assert os.wait()[1] == 0
print("works")
"""

REFUSES = """
import os, sys
import gemkit

model = gemkit.load(sys.argv[1], backend="torch")
expected = model.generate([2, 40, 50], max_tokens=4, temperature=0, ignore_eos=True).ids
stream = model.stream([2, 40, 50], max_tokens=4, temperature=0, ignore_eos=True)
next(stream)
if os.fork() == 0:
    for use in (
        lambda: model.generate([2, 40, 50], max_tokens=4, temperature=0),
        lambda: model.score([2, 40, 50]),
        lambda: list(stream),
    ):
        try:
            use()
        except gemkit.GemkitError as error:
            assert "load it in the child" in str(error) and "\\n" not in str(error)
        else:
            os._exit(1)
    os._exit(0)
assert os.wait()[1] == 0
assert model.generate([2, 40, 50], max_tokens=4, temperature=0, ignore_eos=True).ids == expected
print("refuses")
"""


@pytest.fixture
def model(tmp_path) -> Path:
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary()))
    checkpoint = Checkpoint.from_params(config, tiny_params(config), GGMLType.Q8_0, vocabulary(), name="Tiny")
    return write_gguf(tmp_path / "model.gguf", checkpoint)


def run(program: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_child_generates_while_its_parent_does(threads, model):
    assert run(WORKS, str(model), str(threads)) == "works\n"


def test_a_child_is_told_that_a_framework_cannot(model):
    assert run(REFUSES, str(model)) == "refuses\n"
