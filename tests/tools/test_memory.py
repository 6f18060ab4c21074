"""Memory plans: of published models, of a loaded model, of a process, and sizes of types. Budget: 20 s."""

import json
import os
import subprocess
import sys

import pytest

import gemkit
from gemkit.arch.presets import preset
from gemkit.hub.demo import demo_path
from gemkit.tools import memory
from gemkit.weights.quant import GGMLType


def test_the_memory_plan_of_a_model_is_near_that_of_show():
    plan = memory.fit(str(demo_path()), 10**12, 50.0)
    with gemkit.load("demo") as model:
        truth = memory.plan(model, 0)
    assert plan["ctx_size"] == truth["ctx_size"] == 32768
    cache = sum(group["bytes"] for group in truth["cache"])
    assert plan["cache"] == pytest.approx(cache, rel=0.05)
    assert plan["weights"] == pytest.approx(truth["weights"], rel=0.05)
    assert plan["screen"] == pytest.approx(truth["screen"], rel=0.01)
    beside = truth["running"] - truth["program"]  # this process has more than a program needs
    assert beside < plan["total"] < beside + memory.ROOM
    assert plan["fits"] and plan["longest"] == 32768
    assert plan["rate"] == pytest.approx(50e9 / plan["weights"])


def test_published_sizes_have_the_bytes_of_their_types():
    rows = {row["name"]: row["types"] for row in memory.models(8 * 10**9, 20.0)}
    bf16 = memory.weight_bytes(preset("gemma-3-4b-pt").config, GGMLType.BF16, GGMLType.BF16)
    assert bf16 == 2 * preset("gemma-3-4b-pt").config.parameter_count()
    assert rows["gemma-3-4b-pt"]["Q8_0"]["rate"] == pytest.approx(20e9 / (bf16 * 8.5 / 16))
    assert [rows["gemma-3-4b-pt"][name]["fits"] for name in memory.TYPES] == [False, True, True]
    assert not any(cell["fits"] for cell in rows["gemma-3-27b-pt"].values())
    assert rows["gemma-3-270m"]["bf16"]["fits"]


def test_sliding_layers_cost_their_window():
    config = preset("gemma-3-1b-pt").config
    full = sum(layer.sliding_window is None for layer in config.layers)
    grown = memory.cache_bytes(config, 32_768) - memory.cache_bytes(config, 16_384)
    assert grown == 16_384 * full * 2 * 2 * config.num_key_value_heads * config.head_dim


# A sequence that fills the context, of tokens from all over the vocabulary
FILL = """
import sys
from gemkit.cli.common import import_numpy
from gemkit.host import peak_memory
import_numpy()
import gemkit
size = int(sys.argv[1])
with gemkit.load("demo", threads=2, ctx_size=size) as model:
    ids = [2, *((7919 * i) % 260_000 + 1000 for i in range(size - 8))]
    for _ in model.stream(ids, max_tokens=7, temperature=0, ignore_eos=True):
        peak = peak_memory()
print(peak)
"""


@pytest.mark.parametrize("packed", ["0", "1"])
def test_a_full_context_takes_what_show_plans(packed: str):
    with gemkit.load("demo") as model:
        model.settle()  # the packed copy is complete
    environment = os.environ | {"GEMKIT_PACKED": packed}
    size = "1024"

    def run(*command: str) -> str:
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment).stdout

    show = ["-m", "gemkit", "show", "demo", "--ctx-size", size, "--threads", "2", "--json"]
    planned = json.loads(run(*show))["memory"]["total"]
    assert int(run("-c", FILL, size)) == pytest.approx(planned, rel=0.05)
