"""benchmarks/cpu/plots.py and --scaling: pictures of figures that are known. Budget: 12 s."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cpu"))

import plots
import run
from report import Row

import gemkit


def row(name: str, kind: str, against: str, ours: float, peer: float, **facts: object) -> dict:
    pairs = ((ours, peer), (ours * 1.1, peer), (ours, peer * 1.1))
    return Row(2, kind, name, pairs, (200.0, "40.0 GB/s"), against=against, **facts).record()


def test_pictures_show_every_row(tmp_path):
    decode = {"bytes": 2e8, "operations": 5e8}
    rows = [
        row("decode 64 at depth 0", "decode", "llama.cpp", 100, 40, need=decode),
        row("decode 64 at depth 0", "decode", "CTranslate2", 100, 50, need=decode),
        row("prefill 512", "prefill", "llama.cpp", 900, 300, need={"operations": 2e8, "traffic": 4e5}),
        row("decode 16 at depth 0", "decode", "llama.cpp", 12, 8, model="2B Q4_0", need=decode),
        row("peak memory", "memory", "llama.cpp", 400, 300),
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows, "limits": {"2": {"bandwidth": 40, "int8": 600}}}))
    assert plots.main(["--json", str(tmp_path / "bench.json"), "--folder", str(tmp_path / "images")]) == 0
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {"speed-peers.svg", "speed-roofline.svg"}
    text = (tmp_path / "images" / "speed-peers.svg").read_text(encoding="utf-8")
    for label in ("decode 64 at depth 0", "prefill 512", "2B Q4_0: decode 16", "with CTranslate2", ">2.5<", ">3.0<"):
        assert label in text
    assert "peak memory" not in text and len(text) < 100_000
    text = (tmp_path / "images" / "speed-roofline.svg").read_text(encoding="utf-8")
    assert "600 GOPS int8" in text and "40.0 GB/s" in text and "prefill 512" in text
    ElementTree.fromstring(text)


def test_scaling_measures_gemkit_and_is_drawn(tmp_path, capsys):
    target = tmp_path / "bench.json"
    assert run.main(["--scaling", "--quick", "--json", str(target)]) == 0
    record = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert record["ours"].startswith(f"gemkit {gemkit.__version__}")
    assert {(each["threads"], each["batch"]) for each in record["batch"]} == {(2, 1), (2, 2), (1, 1), (1, 2)}
    assert {(each["threads"], each["depth"]) for each in record["depth"]} == {(2, 0), (2, 32), (1, 0), (1, 32)}
    assert all(each["rate"] > 0 and each["limit"] > 0 for each in record["batch"] + record["depth"])
    assert plots.main(["--json", str(target), "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "speed-scaling.svg").read_text(encoding="utf-8")
    assert "2 threads" in text and "sequences at once" in text
