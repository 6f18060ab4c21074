"""benchmarks/run.py with engines of known speed, and with gemkit beside one. Budget: 15 s."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import run
from engines import OURS, Engine, Worker, first_token
from report import Row

# Answers as engines.py says, with times that follow from two rates; it refuses what it does not know.
WORKER = """
import json, sys
setup = json.loads(sys.stdin.readline())
assert setup["threads"] in (1, 2) and setup["model"] and setup["text"]
about = {"version": "NAME 1.0", "vocabulary": 1000, "bos": 2, "token_bytes": 10**9, "body": 10**9, "prompt": [2, 7]}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    kind, ids = request.pop("do"), request.pop("ids", [])
    assert not ids or ids[0] == 2
    if kind == "prefill":
        answer = {"seconds": len(ids) / PREFILL, "ids": [5]}
    elif kind == "decode":
        tokens = request.pop("tokens")
        answer = {"seconds": tokens / DECODE * setup.get("slowness", 1), "ids": [5] * tokens + [LAST]}
    else:
        answer = {"memory": {"megabytes": MEMORY}, "limits": {"bandwidth": 40.0, "int8": 4000.0}}[kind]
    assert not request
    print(json.dumps(answer), flush=True)
"""


def fake(folder: Path, name: str, **rates: object) -> Engine:
    text = WORKER.replace("NAME", name)
    for key, value in {"PREFILL": 100, "DECODE": 10, "MEMORY": 300, "LAST": 6, **rates}.items():
        text = text.replace(key, str(value))
    script = folder / f"{name}.py"
    script.write_text(text, encoding="utf-8")
    return Engine(name, script, {"only": lambda *_: [name]})


@pytest.fixture
def peer(tmp_path):
    return fake(tmp_path, "peer")


@pytest.fixture
def first_seconds(monkeypatch):
    """Seconds to the first token by the command's first word, instead of running it."""
    seconds = {"ours": 0.3, "peer": 0.6, "cold": 0.9, "slow": 0.7}

    def first_token(command: list[str], cold_cache: bool = False) -> float:
        return seconds["cold" if cold_cache else command[0]]

    monkeypatch.setattr(run, "first_token", first_token)
    return seconds


def bench(folder: Path, ours: Engine, peer: Engine, *arguments: str) -> tuple[int, dict]:
    target = folder / "out" / "bench.json"
    code = run.main(["--rounds", "1", "--quick", "--json", str(target), *arguments], ours, peer)
    return code, json.loads(target.read_text(encoding="utf-8"))


def test_ratios_and_shares_follow_from_the_times(tmp_path, capsys, peer, first_seconds):
    ours = fake(tmp_path, "ours", PREFILL=250, DECODE=20, MEMORY=150, LAST=7)
    results = tmp_path / "RESULTS.md"
    arguments = ("--model", "m.gguf", "--rounds", "2", "--check", "--write", "--results", str(results))
    code, record = bench(tmp_path, ours, peer, *arguments)
    assert code == 0
    rows = {(row["threads"], row["name"]): row for row in record["rows"]}
    assert {threads for threads, _ in rows} == {1, 2}
    for threads in (1, 2):
        for depth in (0, 32):
            row = rows[threads, f"decode 8 at depth {depth}"]
            assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((20, 10, 2))
            assert row["share"] == pytest.approx(0.5)  # 20 times 1 GB of 40 GB/s
        row = rows[threads, "prefill 32"]
        assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((250, 100, 2.5))
        assert row["share"] == pytest.approx(0.125)  # 250 times 2 G of 4,000 GOPS
        assert rows[threads, "first token"]["ratio"] == pytest.approx(0.5)
        assert rows[threads, "first token, gemkit's cache empty"]["ratio"] == pytest.approx(1.5)
        assert rows[threads, "peak memory"]["ratio"] == pytest.approx(0.5)
    # Two depths in the warm-up and in each round: eight equal tokens, the ninth differs
    assert record["chosen"]["2"]["same greedy tokens before the first difference"] == [8] * 6
    line = "| 2 | prefill 32 | 250 tok/s | 100 tok/s | 2.50 | 2.50–2.50 | 12% of 4000 GOPS int8 |"
    assert line in capsys.readouterr().out
    section = results.read_text(encoding="utf-8")
    assert line in section and "m.gguf" in section and "peer 1.0" in section and "load average" in section


@pytest.mark.parametrize("slow", [{"PREFILL": 199}, {"DECODE": 17}, {}])
def test_check_fails_below_each_floor(tmp_path, capsys, peer, first_seconds, slow):
    ours = fake(tmp_path, "ours" if slow else "slow", **{"PREFILL": 200, "DECODE": 18, **slow})
    arguments = ("--model", "m.gguf", "--threads", "2", "--check")
    assert bench(tmp_path, ours, peer, *arguments)[0] == 1
    assert capsys.readouterr().out.count("the floor is") == (2 if "DECODE" in slow else 1)
    assert bench(tmp_path, ours, peer, *arguments[:-1])[0] == 0


def test_the_floors_themselves_pass():
    for kind, ratio in {"prefill": 2.0, "decode": 1.8, "first": 0.7}.items():
        assert Row(2, kind, kind, ((ratio, 1.0),)).failure() is None
        worse = ratio + (0.01 if kind == "first" else -0.01)
        assert Row(2, kind, kind, ((worse, 1.0),)).failure()
        assert Row(1, kind, kind, ((worse, 1.0),)).failure() is None


def test_the_ratio_is_the_median_of_the_rounds():
    assert Row(2, "decode", "decode", ((10.0, 10.0), (30.0, 10.0), (20.0, 4.0))).ratio == 3.0


def test_the_best_flags_are_used(tmp_path, capsys, peer):
    flags = ({"slowness": 3}, {"slowness": 1}, {"slowness": 2})
    best = run.sweep(dataclasses.replace(peer, flags=flags), "m.gguf", 2, [2, 3], quick=False)
    assert best["decode"] == {"slowness": 1}


def test_check_needs_two_threads(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--check", "--threads", "1"])
    assert "--check needs 2" in capsys.readouterr().err


def test_a_missing_peer_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("GEMKIT_PEER_PYTHON", "no-such-python")
    with pytest.raises(SystemExit, match="no-such-python: run `make bench`"):
        run.main(["--model", "m.gguf"])


def test_first_token_takes_the_time_to_the_first_byte():
    code = "import time; time.sleep(0.2); print('a', flush=True); time.sleep(1)"
    assert 0.2 <= first_token([sys.executable, "-c", code]) < 1
    with pytest.raises(SystemExit, match=r"exit code 3.*broken"):
        first_token([sys.executable, "-c", "import sys; print('a'); sys.stderr.write('broken'); sys.exit(3)"])


def test_a_worker_that_dies_is_named(tmp_path, peer):
    worker = Worker(peer, "m.gguf", 2, {})
    with pytest.raises(SystemExit, match="worker of peer ended with exit code 1"):
        worker.ask(do="nonsense")
    worker.close()


def test_gemkit_beside_a_fake_peer(tmp_path, capsys, monkeypatch, peer):
    times = {}

    def once(command: list[str], cold_cache: bool = False) -> float:
        key = (*command, cold_cache)
        times[key] = times.get(key) or first_token(command, cold_cache)
        return times[key]

    monkeypatch.setattr(run, "first_token", once)
    quick = dataclasses.replace(peer, first={"only": lambda *_: [sys.executable, "-c", "print('water')"]})
    code, record = bench(tmp_path, OURS, quick, "--threads", "2")
    assert code == 0 and record["ours"].startswith("gemkit ")
    for row in record["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    by_kind = {row["kind"]: row for row in record["rows"]}
    assert by_kind["decode"]["peer"] == pytest.approx(10) and 0 < by_kind["decode"]["share"] < 1.5
    assert 250 < by_kind["memory"]["ours"] < 4000
