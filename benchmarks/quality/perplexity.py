"""Cost of each file type: perplexity against speed and size, gemkit's and the peers'.

    python benchmarks/quality/perplexity.py --text FILE             # makes the files, measures, prints the table
    python benchmarks/quality/perplexity.py --text FILE --plot docs/images/quality.svg
    python benchmarks/quality/perplexity.py --plot docs/images/quality.svg         # of what was measured before

Perplexity is that of the first 2,048 tokens of the text (the documentation's figures: WikiText-2, validation), in
windows of 512 with BOS in front. Every file is made from the demo model by `gemkit quantize` and kept in build/quality;
what has been measured is kept in build/quality.json and not measured again. The engines run one after another for each
file. The peers' interpreter is GEMKIT_PEER_PYTHON, by default that of .venv-bench; an engine that it lacks is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOKENS = 2048
SOURCE = "as published"  # Q4_K_M
# By name, the arguments of `gemkit quantize`.
FILES: dict[str, list[str]] = {
    SOURCE: [],
    **{name: ["--type", name] for name in ("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_1")},
    "q4_0": ["--type", "q4_0"],
    "q4_0, head too": ["--type", "q4_0", "--embedding-type", "q4_0"],
}
MODULES = {"llama.cpp": "llama_cpp", "ctranslate2": "ctranslate2", "transformers": "transformers"}
COLOURS = {"gemkit": "#0b6e99", "llama.cpp": "#d9730d", "ctranslate2": "#448361", "transformers": "#9065b0"}


def gemkit(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "gemkit", *arguments], check=True, stdout=subprocess.DEVNULL)


def make(model: str, name: str, folder: Path) -> Path:
    """Return the file of this name, made if it does not exist."""
    if not FILES[name]:
        from gemkit.api.load import find

        return find(model)
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"  making {path.name}", flush=True)
        gemkit("quantize", model, str(path), *FILES[name], "--no-measure")
    return path


def folders(model: str, folder: Path, python: str, engine: str) -> Path:
    """The model as a Hugging Face folder in float32, or what CTranslate2 makes of that."""
    plain = folder / "float32-folder"
    if not plain.exists():
        folder.mkdir(parents=True, exist_ok=True)
        gemkit("convert", model, str(plain), "--to", "hf")
    if engine == "transformers":
        return plain
    target = folder / "ctranslate2-int8"
    if not target.exists():
        subprocess.run([python, str(HERE.parent / "peers" / "convert.py"), engine, str(plain), str(target)], check=True)
    return target


def size(path: Path, engine: str) -> int:
    """Bytes of the weights' files."""
    pattern = {"transformers": "*.safetensors", "ctranslate2": "model.bin"}
    return sum(file.stat().st_size for file in path.glob(pattern[engine])) if path.is_dir() else path.stat().st_size


def measure(engine: str, python: str, path: Path, threads: int, ids: list[int]) -> dict[str, float]:
    command = [python, str(HERE / "worker.py"), engine, str(path), str(threads)]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"quality: {engine} with {path.name}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1]) | {"bytes": size(path, engine)}


def installed(python: str) -> list[str]:
    """The peers that an interpreter can import."""
    test = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m)])"
    try:
        done = subprocess.run([python, "-c", test, *MODULES.values()], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [name for name, module in MODULES.items() if module in done.stdout.split()]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def table(rows: list[dict]) -> str:
    lines = [
        "| file | engine | MB | perplexity | decode, tok/s | prefill of 512, tok/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['file']} | {row['engine']} | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.3f} | "
        f"{row['decode']:.1f} | {row['prefill']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict], target: Path) -> None:
    """Perplexity against tokens per second, and against bytes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("quality: --plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "quality", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    values = [row["perplexity"] for row in rows]
    low, high, step = min(values), max(values), 0.004 * min(values)
    panels = (("decode", 1, "decoded tokens per second"), ("bytes", 1e6, "file, MB"))
    for panel, (key, unit, label) in zip(axes, panels, strict=True):
        # Near the best in even steps, further away in ever larger ones
        panel.set_yscale(
            "function", functions=(lambda y: np.arcsinh((y - low) / step), lambda v: low + step * np.sinh(v))
        )
        ticks = [low + part * low for part in (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]
        panel.set_yticks([tick for tick in ticks if tick < high * 1.1])
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:.2f}")
        panel.set_ylim(low - step, high + 0.15 * (high - low) + step)
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.2 * max(row[key] / unit for row in rows))
        panel.grid(alpha=0.3)
        for engine, colour in COLOURS.items():
            mine = [row for row in rows if row["engine"] == engine]
            if mine:
                points = [row[key] / unit for row in mine], [row["perplexity"] for row in mine]
                marker = "o" if engine == "gemkit" else "D"
                panel.scatter(*points, s=28, color=colour, marker=marker, label=engine, zorder=3)
    axes[0].set_ylabel("perplexity (lower is better)")
    axes[1].legend(frameon=False, loc="upper right")
    figure.draw_without_rendering()
    for panel, (key, unit, _) in zip(axes, panels, strict=True):
        _label(panel, [(row[key] / unit, row["perplexity"], row["file"], COLOURS[row["engine"]]) for row in rows])
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _label(panel, points: list[tuple[float, float, str, str]]) -> None:
    """Names each point at the first place around it that is still free."""
    places = [panel.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x, y, name, colour), (left, bottom) in zip(points, places, strict=True):
        width = 5.0 * len(name)
        for distance in (0, 9, 18, 27):
            for side, up in ((1, 0), (-1, 0), (1, distance), (-1, distance), (1, -distance), (-1, -distance)):
                begin = left + 8 if side > 0 else left - 8 - width
                box = (begin, bottom + up - 4, begin + width, bottom + up + 5)
                if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                    break
            else:
                continue
            break
        taken.append(box)
        panel.annotate(
            name,
            (x, y),
            xytext=(6 * side, up * 0.72 - 2.5),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=7,
            color=colour,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="UTF-8; without it nothing new is measured")
    parser.add_argument("--model", default="demo", help="the model to convert")
    parser.add_argument("--file", nargs="+", choices=list(FILES), default=list(FILES), help="only these")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "quality", help="folder of the files")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "quality.json", help="where the figures go")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again the rows that exist")
    options = parser.parse_args(arguments)
    rows = read(options.json)
    if options.text is not None:
        measure_all(options, rows)
    if not rows:
        raise SystemExit("quality: nothing was measured: give --text FILE")
    order = [*FILES, "int8", "float32"]
    rows.sort(key=lambda row: (order.index(row["file"]), row["engine"]))
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


def measure_all(options: argparse.Namespace, rows: list[dict]) -> None:
    """Measure the missing rows; each is written as soon as it is measured."""
    import gemkit

    with gemkit.load(options.model) as model:
        text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
        ids = [int(token) for token in model.tokenizer.encode(text)[: options.tokens]]
    if len(ids) < options.tokens:
        raise SystemExit(f"quality: {options.text} has only {len(ids)} tokens of {options.tokens}")
    python = os.environ.get("GEMKIT_PEER_PYTHON") or str(ROOT / ".venv-bench" / "bin" / "python")
    peers = [] if options.no_peers else installed(python)
    for name in MODULES.keys() - set(peers):
        print(f"  left out: {name}, which {python} does not have", flush=True)
    work = [(name, engine) for name in options.file for engine in ("gemkit", "llama.cpp")]
    if options.file == list(FILES) or not options.again:
        work += [("int8", "ctranslate2"), ("float32", "transformers")]
    for name, engine in work:
        known = next((row for row in rows if (row["file"], row["engine"]) == (name, engine)), None)
        if (engine != "gemkit" and engine not in peers) or (known and not options.again):
            continue
        if engine in ("ctranslate2", "transformers"):
            path = folders(options.model, options.folder, python, engine)
        else:
            path = make(options.model, name, options.folder)
        mine = engine == "gemkit"
        found = measure(engine, sys.executable if mine else python, path, options.threads, ids)
        row = {"file": name, "engine": engine, **found}
        print(f"  {table([row]).splitlines()[-1]}", flush=True)
        if known:
            rows[rows.index(known)] = row
        else:
            rows.append(row)
        write(options.json, rows)


if __name__ == "__main__":
    raise SystemExit(main())
