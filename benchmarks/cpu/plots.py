"""Plots of run.py's results: speed against each peer, by batch and depth, and against this machine's limits.

    python benchmarks/cpu/plots.py                       # of build/bench.json and build/scaling.json, into docs/images/
    python benchmarks/cpu/plots.py --json FILE --folder FOLDER

Needs matplotlib, which the environment of `make bench` has; gemkit is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
INK, PALE = "#22303c", "#d5dbe0"
OURS, GOAL = "#0b7a75", "#c8553d"
PEERS = {"llama.cpp": "#4062bb", "CTranslate2": "#a05195", "OpenVINO GenAI": "#7a8b99", "transformers": "#d08c2c"}
STYLE = {
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "gemkit",
}
SPEEDS = ("decode", "deep", "prefill", "batch")


def save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def titles(rows: list[dict]) -> dict[tuple, str]:
    """The work of each row, as a label."""
    found = {}
    for row in rows:
        if row["kind"] in SPEEDS:
            key = row["model"], row["threads"], row["name"]
            file = "" if row["model"] == "demo" else f"{row['model']}: "
            found[key] = f"{file}{row['name']}" + ("" if row["threads"] > 1 else ", 1 thread")
    return found


def beside_peers(record: dict, path: Path) -> Path:
    """A panel a peer: how many times its rate, with the lowest and highest round, and the goal."""
    labels = titles(record["rows"])
    peers = [name for name in PEERS if any(row["against"] == name for row in record["rows"])]
    figure, panels = plt.subplots(
        1, len(peers), sharey=True, squeeze=False, figsize=(2.2 + 2.3 * len(peers), 1.2 + 0.24 * len(labels))
    )
    places = {key: -n for n, key in enumerate(labels)}
    for panel, peer in zip(panels[0], peers, strict=True):
        for row in record["rows"]:
            place = places.get((row["model"], row["threads"], row["name"]))
            if row["against"] != peer or place is None:
                continue
            ratios = [ours / theirs for ours, theirs in row["pairs"]]
            panel.barh(place, row["ratio"], height=0.66, color=PEERS[peer])
            panel.plot([min(ratios), max(ratios)], [place, place], color=INK, linewidth=0.9)
            panel.annotate(
                f"{row['ratio']:.1f}",
                (max(row["goal"] or 0, *ratios), place),
                (3, 0),
                "data",
                "offset points",
                va="center",
            )
            if row["goal"]:
                panel.plot([row["goal"]] * 2, [place - 0.42, place + 0.42], color=GOAL, linewidth=2)
        panel.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        panel.margins(x=0.16)
        panel.set_xlim(left=0)
        panel.set_title(f"compared with {peer}", fontsize=9, loc="left")
        panel.tick_params(axis="y", length=0)
    panels[0][0].set_yticks(list(places.values()), list(labels.values()))
    figure.supxlabel("times as many tokens a second; line: lowest to highest round; red: the goal", fontsize=8, y=0.0)
    figure.tight_layout()
    return save(figure, path)


def roofline(record: dict, path: Path) -> Path:
    """Operations a second over operations a byte, with 2 threads or the most there were."""
    threads = max((int(count) for count in record["limits"]), default=0)
    limits = record["limits"][str(threads)]
    figure, panel = plt.subplots(figsize=(6.4, 4.2))
    ridge = limits["int8"] / limits["bandwidth"]
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in record["rows"]:
        need = row["need"]
        if row["model"] != "demo" or row["threads"] != threads or "operations" not in need or row["kind"] not in SPEEDS:
            continue
        if "sampled" in row["name"] or row["kind"] == "deep" or row["against"] not in ("llama.cpp", "CTranslate2"):
            continue
        intensity = need["operations"] / (need.get("bytes") or need["traffic"])
        mine = points.setdefault("gemkit", [])
        if all(name != row["name"] for _, _, name in mine):
            mine.append((intensity, row["ours"] * need["operations"] / 1e9, row["name"]))
        points.setdefault(row["against"], []).append((intensity, row["peer"] * need["operations"] / 1e9, row["name"]))
    every = [point for group in points.values() for point in group]
    left = min([point[0] for point in every], default=1) / 2
    right = max([point[0] for point in every] + [ridge]) * 4
    roof = [left, ridge, right]
    panel.plot(roof, [min(x * limits["bandwidth"], limits["int8"]) for x in roof], color=INK, linewidth=1.4)
    panel.annotate(
        f"{limits['int8']:.0f} GOPS int8", (right, limits["int8"]), (0, 4), "data", "offset points", ha="right"
    )
    angle = (left * limits["bandwidth"]) * 1.9
    panel.annotate(f"{limits['bandwidth']:.1f} GB/s", (left * 1.5, angle), (-4, 6), "data", "offset points")
    for name, group in points.items():
        color = PEERS.get(name, OURS)
        panel.scatter([x for x, _, _ in group], [y for _, y, _ in group], s=26, color=color, label=name, zorder=3)
        if name == "gemkit":
            for n, (x, y, text) in enumerate(group):
                # A point next to the previous one has its label above
                near = n and abs(math.log(x / group[n - 1][0])) < 0.2
                panel.annotate(text, (x, y), (5, 5 if near else -9), "data", "offset points", fontsize=7)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations for each byte that gemkit has to read")
    panel.set_ylabel("10⁹ operations a second")
    panel.set_title(f"compared with the limits of this machine, {threads} threads", fontsize=9, loc="left")
    panel.grid(color=PALE, linewidth=0.5)
    if points:
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def scaling(record: dict, path: Path) -> Path:
    """Tokens a second by batch and by depth; dashed: this machine's limit."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6))
    for panel, kind in zip(panels, ("batch", "depth"), strict=True):
        rows = record[kind]
        marks = sorted({row[kind] for row in rows})
        place = {mark: n for n, mark in enumerate(marks)}
        for threads in sorted({row["threads"] for row in rows}):
            color = OURS if threads > 1 else PEERS["transformers"]
            mine = sorted((row for row in rows if row["threads"] == threads), key=lambda row: row[kind])
            at = [place[row[kind]] for row in mine]
            label = f"{threads} thread{'s' if threads > 1 else ''}"
            panel.plot(at, [row["rate"] for row in mine], marker="o", markersize=4, color=color, label=label)
            limits = [row["limit"] or math.nan for row in mine]
            panel.plot(at, limits, color=color, linestyle="--", linewidth=0.9)
        panel.set_xticks(list(place.values()), [f"{mark:,}" for mark in marks])
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color=PALE, linewidth=0.5)
        panel.legend(frameon=False)
    panels[0].set_xlabel("sequences at once")
    panels[0].set_ylabel("tokens a second, all together")
    panels[1].set_xlabel("depth: tokens before")
    panels[1].set_ylabel("tokens a second, one sequence")
    figure.suptitle("dashed: what this machine's bandwidth and int8 peak allow", fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    return save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", help="of run.py")
    parser.add_argument("--scaling", type=Path, help="of run.py --scaling; default: scaling.json next to --json")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(arguments)
    other = options.scaling or options.json.with_name("scaling.json")
    with plt.rc_context(STYLE):
        if options.json.exists():
            record = json.loads(options.json.read_text(encoding="utf-8"))
            if record["rows"]:
                print(beside_peers(record, options.folder / "speed-peers.svg"))
                print(roofline(record, options.folder / "speed-roofline.svg"))
        if other.exists():
            print(scaling(json.loads(other.read_text(encoding="utf-8")), options.folder / "speed-scaling.svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
