"""Little of something: cores, kernels, huge pages, memory. It works, or says in one line why not. Budget: 20 s."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from gemkit import host
from gemkit.cli import main
from gemkit.hub.demo import demo_path

GENERATE = [sys.executable, "-m", "gemkit", "generate", "demo", "--raw", "--max-tokens", "3", "--temp", "0"]
PROMPT = ["--prompt", "One, two, three,"]
TEXT = " four, five\n"
PR_SET_THP_DISABLE = 41


def generate(*arguments: str, before: Callable[[], None] | None = None, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*GENERATE, *PROMPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        preexec_fn=before,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def terms_were_shown():
    """The notice of the model's terms, once per machine, is over before a test looks at standard error."""
    demo_path()


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def no_huge_pages() -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0


@pytest.mark.parametrize(
    ("arguments", "before", "variables"),
    [
        ([], one_core, {}),
        (["--threads", "2"], one_core, {}),
        (["--threads", "8"], None, {}),
        ([], no_huge_pages, {"GEMKIT_PACKED": "0"}),
        (["--max-tokens", "1"], None, {"GEMKIT_ISA": "portable"}),
    ],
    ids=["one core", "more threads than the core", "more threads than cores", "no huge pages", "no AVX2"],
)
def test_it_works_with_less(arguments, before, variables):
    code, out, err = generate(*arguments, before=before, **variables)
    assert (code, err) == (0, "")
    assert out == (" four\n" if "--max-tokens" in arguments else TEXT)


@pytest.mark.parametrize("megabytes", [320, 600, 700])
def test_a_bound_on_memory_is_one_line(megabytes: int):
    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    code, out, err = generate(before=bounded, GEMKIT_PACKED="0", OPENBLAS_NUM_THREADS="1")
    assert (code, out) == (1, "")
    assert err.startswith("gemkit: ") and err.count("\n") == 1 and "close other programs" in err, err


@pytest.mark.parametrize(("megabytes", "what"), [(100, "the weights"), (2, "pages of the key-value cache")])
def test_memory_short_of_the_plan_is_one_line(monkeypatch, capsys, megabytes: int, what: str):
    # Linux would hand the memory out and end the process when it is used
    whole = host.free_memory()
    asked = []

    def free() -> int:
        asked.append(1)
        return megabytes * 10**6 if (what == "the weights" or len(asked) > 1) else whole

    monkeypatch.setattr(host, "free_memory", free)
    monkeypatch.setenv("GEMKIT_PACKED", "0")
    prompt = ["--prompt", "a " * 600] if "cache" in what else PROMPT
    with pytest.raises(SystemExit) as end:
        main([*GENERATE[3:], *prompt])
    output = capsys.readouterr()
    assert (end.value.code, output.out) == (1, "")
    assert output.err.startswith(f"gemkit: not enough memory for {what}") and output.err.count("\n") == 1
    assert "are free" in output.err


def test_what_is_free_is_what_the_machine_and_the_container_leave(monkeypatch, tmp_path):
    machine = host.free_memory()
    assert machine > 1 << 26
    for name, text in {"max": "3000000", "current": "2500000", "stat": "anon 5\nfile 400000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    assert host.free_memory() == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.free_memory() == pytest.approx(machine, rel=0.2)
