"""benchmarks/cpu/run.py with engines of known speed, and with gemkit against one. Budget: 15 s."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cpu"))

import engines
import run
from engines import OURS, Engine, Worker, first_token
from report import GOALS, Row
from works import GREEDY, SAMPLED, Session, Task, request, sessions

# Answers as engines.py says, with times that follow from two rates; it refuses what it does not know.
WORKER = """
import json, sys
setup = json.loads(sys.stdin.readline())
assert setup["threads"] in (1, 2) and setup["model"] and setup["text"] and setup["context"] > 64
about = {"version": "NAME 1.0", "vocabulary": 1000, "bos": 2, "token_bytes": 10**9, "body": 10**9, "prompt": [2, 7]}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    kind, ids = request.pop("do"), request.pop("ids", [])
    assert not ids or ids[0] == 2
    if kind == DIES:
        sys.exit(3)
    elif kind == "prefill":
        answer = {"seconds": len(ids) / PREFILL, "ids": [5]}
    elif kind == "decode":
        tokens, ways = request.pop("tokens"), request.pop("ways")
        each = tokens / DECODE * setup.get("slowness", 1)
        answer = {"seconds": [each, 2 * each][: len(ways)], "ids": [5] * tokens + [LAST]}
    elif kind == "batch":
        prompts, tokens = request.pop("prompts"), request.pop("tokens")
        assert len(set(map(tuple, prompts))) == len(prompts) <= setup["sequences"]
        answer = {"seconds": len(prompts) * tokens / BATCH}
    else:
        answer = {"memory": {"megabytes": MEMORY}, "limits": {"bandwidth": 40.0, "int8": 4000.0}}[kind]
    assert not request
    print(json.dumps(answer), flush=True)
"""


def fake(folder: Path, name: str, **rates: object) -> Engine:
    text = WORKER.replace("NAME", name)
    defaults = {"PREFILL": 100, "DECODE": 10, "BATCH": 40, "MEMORY": 300, "LAST": 6, "DIES": "None"}
    for key, value in {**defaults, **rates}.items():
        text = text.replace(key, str(value))
    script = folder / f"{name}.py"
    script.write_text(text, encoding="utf-8")
    return Engine(name, script, {"only": lambda *_: [name]}, rest=0.0)


@pytest.fixture
def peer(tmp_path):
    return fake(tmp_path, "llama.cpp")


@pytest.fixture
def first_seconds(monkeypatch):
    """Seconds to the first token by the command's first word, instead of running it."""
    seconds = {"ours": 0.3, "llama.cpp": 0.6, "cold": 0.9, "slow": 0.7}

    def first_token(command: list[str], cold_cache: bool = False) -> float:
        return seconds["cold" if cold_cache else command[0]]

    monkeypatch.setattr(run, "first_token", first_token)
    return seconds


def bench(folder: Path, ours: Engine, peers: list[Engine], *arguments: str) -> tuple[int, dict]:
    target = folder / "out" / "bench.json"
    code = run.main(["--rounds", "1", "--quick", "--json", str(target), *arguments], ours, peers)
    return code, json.loads(target.read_text(encoding="utf-8"))


def test_ratios_and_shares_follow_from_the_times(tmp_path, capsys, peer, first_seconds):
    ours = fake(tmp_path, "ours", PREFILL=250, DECODE=20, BATCH=160, MEMORY=150, LAST=7)
    results = tmp_path / "RESULTS.md"
    arguments = ("--model", "m.gguf", "--rounds", "2", "--check", "--write", "--results", str(results))
    code, record = bench(tmp_path, ours, [peer], *arguments)
    assert code == 0
    rows = {(row["threads"], row["name"]): row for row in record["rows"]}
    assert {threads for threads, _ in rows} == {1, 2}
    for threads in (1, 2):
        for depth in (0, 32, 64):
            row = rows[threads, f"decode 8 at depth {depth}"]
            assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((20, 10, 2))
            assert row["share"] == pytest.approx(0.5)  # 20 times 1 GB of 40 GB/s
            assert rows[threads, f"decode 8 at depth {depth}, sampled"]["ours"] == pytest.approx(10)
        row = rows[threads, "prefill 32"]
        assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((250, 100, 2.5))
        assert row["share"] == pytest.approx(0.125)  # 250 times 2 G of 4,000 GOPS
        assert rows[threads, "first token"]["ratio"] == pytest.approx(0.5)
        assert rows[threads, "first token, gemkit's cache empty"]["ratio"] == pytest.approx(1.5)
        assert rows[threads, "peak memory"]["ratio"] == pytest.approx(0.5)
    row = rows[2, "decode 4, 4 at once"]
    assert (row["ours"], row["ratio"]) == pytest.approx((160, 4))
    assert row["share"] == pytest.approx(1.0)  # 160 times a quarter of 1 GB of 40 GB/s
    assert (2, "decode 8 at depth 96") in rows and (1, "decode 8 at depth 96") not in rows
    # Two rounds at four depths, no warm-up in a quick run: eight equal tokens, the ninth differs
    assert record["chosen"]["demo, 2 threads"]["llama.cpp"]["agreed"] == [8] * 8
    line = "| 2 | prefill 32 | 250 tok/s | 100 tok/s | 2.50 | 2.50–2.50 | 4.5: missed | 12% of 4000 GOPS int8 (goal"
    assert line in capsys.readouterr().out
    section = results.read_text(encoding="utf-8")
    assert line in section and "m.gguf" in section and "llama.cpp 1.0" in section and "load average" in section


@pytest.mark.parametrize("slow", [{"PREFILL": 199}, {"DECODE": 17}, {}])
def test_check_fails_below_each_floor(tmp_path, capsys, peer, first_seconds, slow):
    ours = fake(tmp_path, "ours" if slow else "slow", **{"PREFILL": 200, "DECODE": 18, **slow})
    work = ("decode", "first") if "PREFILL" not in slow else ("prefill",)
    arguments = ("--model", "m.gguf", "--threads", "2", "--work", *work, "--check")
    assert bench(tmp_path, ours, [peer], *arguments)[0] == 1
    # Greedy and sampled at two depths; both prompts
    assert capsys.readouterr().out.count("the floor is") == {"DECODE": 4, "PREFILL": 2}.get(next(iter(slow), ""), 1)
    assert bench(tmp_path, ours, [peer], *arguments[:-1])[0] == 0


def test_the_floors_themselves_pass():
    for kind, ratio in {"prefill": 2.0, "decode": 1.8, "first": 0.7}.items():
        assert Row(2, kind, kind, ((ratio, 1.0),)).failure() is None
        worse = ratio + (0.01 if kind == "first" else -0.01)
        assert Row(2, kind, kind, ((worse, 1.0),)).failure()
        assert Row(1, kind, kind, ((worse, 1.0),)).failure() is None
        assert Row(2, kind, kind, ((worse, 1.0),), against="CTranslate2").failure() is None
        assert Row(2, kind, kind, ((worse, 1.0),), model="Q8_0").failure() is None


def test_the_ratio_is_the_median_of_the_rounds():
    assert Row(2, "decode", "decode", ((10.0, 10.0), (30.0, 10.0), (20.0, 4.0))).ratio == 3.0


def test_every_goal_is_of_a_row_that_is_measured():
    found = set()
    for session in sessions([2, 1], run.GROUPS, quick=False, own_file=False):
        for task in session.tasks:
            kind = "deep" if task.group == "deep" else task.kind
            found.add((session.model.split()[0], session.threads, kind))
    assert set(GOALS) <= found


def test_the_best_flags_are_used(tmp_path, capsys, peer):
    flags = ({"slowness": 3}, {"slowness": 1}, {"slowness": 2})
    session = Session("demo", 2, (Task("decode", 4, 8, (GREEDY, SAMPLED)), Task("prefill", 4)))
    rival = dataclasses.replace(peer, flags={"demo": flags})
    about = {"vocabulary": 100, "bos": 2}
    session = dataclasses.replace(session, tasks=(*session.tasks, Task("memory", 96)))
    # For the prompt all are the same, and one process is enough
    assert run.sweep(rival, "m.gguf", session, about, quick=False) == dict.fromkeys(("decode", "prefill"), flags[1])


def test_an_interrupted_run_goes_on(tmp_path, capsys, peer, first_seconds):
    ours = fake(tmp_path, "ours", DECODE=20)
    arguments = ("--model", "m.gguf", "--threads", "2")
    before = bench(tmp_path, ours, [peer], *arguments, "--work", "decode")[1]
    faster = fake(tmp_path, "ours", DECODE=40, PREFILL=300)
    record = bench(tmp_path, faster, [peer], *arguments, "--work", "decode", "prefill", "--resume")[1]
    rows = {row["name"]: row for row in record["rows"]}
    assert len(before["rows"]) == 4 and [rows[row["name"]] for row in before["rows"]] == before["rows"]
    assert rows["prefill 32"]["ours"] == pytest.approx(300)


def test_a_peer_that_fails_is_left_out_and_named(tmp_path, capsys, peer, first_seconds):
    ours, broken = fake(tmp_path, "ours"), fake(tmp_path, "broken", DIES='"prefill"')
    cannot = dataclasses.replace(fake(tmp_path, "cannot"), worker=tmp_path / "none.py")
    arguments = ("--model", "m.gguf", "--threads", "2", "--work", "decode", "prefill", "--write")
    results = tmp_path / "RESULTS.md"
    code, record = bench(tmp_path, ours, [peer, broken, cannot], *arguments, "--results", str(results))
    assert code == 0
    assert {row["name"] for row in record["rows"] if row["against"] == "broken"} == {
        row["name"] for row in record["rows"] if row["against"] == "llama.cpp" and row["kind"] == "decode"
    }
    assert "exit code 3" in record["missing"]["broken"] and "exit code 2" in record["missing"]["cannot"]
    assert "Not measured: broken" in results.read_text(encoding="utf-8")


def test_no_two_prompts_begin_alike():
    """Engines that cache prompts would read a repeated one for free."""
    about = {"vocabulary": 256_000, "bos": 2}
    for session in sessions([2, 1], run.GROUPS, quick=False, own_file=False):
        begins = []
        for task in session.tasks:
            for number in (1, 2):
                if task.kind in ("first", "memory"):
                    continue
                one = request(task, about, number)
                rows = one.get("prompts") or [one["ids"]]
                assert all(len(ids) == task.size and ids[0] == 2 for ids in rows)
                assert task.size + len(task.ways) * task.tokens <= session.context and len(rows) <= session.sequences
                begins += [tuple(ids[:5]) for ids in rows if task.size > 1]
        assert len(set(begins)) == len(begins)


def test_check_needs_two_threads(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--check", "--threads", "1"])
    assert "--check needs 2" in capsys.readouterr().err


def test_missing_peers_are_said_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    monkeypatch.setenv("GEMKIT_PEER_PYTHON", "no-such-python")
    monkeypatch.delenv("GEMKIT_PEER_PYTHON_OPENVINO", raising=False)
    with pytest.raises(SystemExit, match=r"no-such-python.*: run `make bench`"):
        run.main(["--model", "m.gguf"])
    # One that is there is enough; the others are named
    monkeypatch.setitem(engines.PEERS, "transformers", (engines.TRANSFORMERS, "json", ""))
    monkeypatch.setenv("GEMKIT_PEER_PYTHON", sys.executable)
    found, missing = engines.installed(["transformers", "OpenVINO GenAI"])
    assert [peer.name for peer in found] == ["transformers"] and list(missing) == ["OpenVINO GenAI"]


def test_first_token_takes_the_time_to_the_first_byte():
    code = "import time; time.sleep(0.2); print('a', flush=True); time.sleep(1)"
    assert 0.2 <= first_token([sys.executable, "-c", code]) < 1
    with pytest.raises(SystemExit, match=r"exit code 3.*broken"):
        first_token([sys.executable, "-c", "import sys; print('a'); sys.stderr.write('broken'); sys.exit(3)"])


def test_a_worker_that_dies_is_named(tmp_path, peer):
    worker = Worker(peer, "m.gguf", 2, {})
    with pytest.raises(SystemExit, match=r"worker of llama.cpp ended with exit code 1"):
        worker.ask(do="nonsense")
    worker.close()


def test_gemkit_against_a_fake_peer(tmp_path, capsys, monkeypatch, peer):
    times = {}

    def once(command: list[str], cold_cache: bool = False) -> float:
        key = (*command, cold_cache)
        times[key] = times.get(key) or first_token(command, cold_cache)
        return times[key]

    monkeypatch.setattr(run, "first_token", once)
    quick = dataclasses.replace(peer, first={"only": lambda *_: [sys.executable, "-c", "print('water')"]})
    work = ("decode", "prefill", "first", "memory", "batch")
    code, record = bench(tmp_path, OURS, [quick], "--threads", "2", "--work", *work)
    assert code == 0 and record["ours"].startswith("gemkit ")
    for row in record["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    by_name = {row["name"]: row for row in record["rows"]}
    row = by_name["decode 8 at depth 0"]
    assert row["peer"] == pytest.approx(10) and 0 < row["share"] < 1.5
    assert by_name["decode 4, 4 at once"]["ours"] > 10
    assert 250 < by_name["peak memory"]["ours"] < 4000
