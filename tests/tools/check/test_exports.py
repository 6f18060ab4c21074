"""Random exports: what `check` passes loads, and it names no reason against loading what loads. Budget: 30 s."""

import shutil
import warnings

import pytest
from weights.hf.test_fuzz import maker  # noqa: F401

import gemkit
from gemkit.errors import GemkitError, GemkitWarning
from gemkit.tools.check import check

SEEDS, BATCH = 100, 25
# Rules that say that the files are no model as they are
AGAINST_LOADING = {
    *("unloadable", "unreadable", "truncated", "shard-missing", "weights-missing", "config-invalid", "engine-limits"),
    *("tensor-missing", "tensor-shape", "lora-names", "tokenizer-missing", "type-unread", "lfs-pointer"),
}


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_check_and_load_agree(maker, tmp_path, monkeypatch, first):  # noqa: F811
    monkeypatch.setenv("GEMKIT_PACKED", "0")
    loaded = 0
    for seed in range(first, first + BATCH):
        export = maker.make(seed, tmp_path / str(seed))
        errors = {finding.rule: finding.found for finding in check(export.path) if finding.level == "error"}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GemkitWarning)
                gemkit.load(export.path, threads=1).close()
        except GemkitError as error:
            assert errors, f"seed {seed} ({'; '.join(export.what)}): {error}"
        else:
            loaded += 1
            against = {rule: found for rule, found in errors.items() if rule in AGAINST_LOADING}
            assert not against, f"seed {seed} ({'; '.join(export.what)}): {against}"
        shutil.rmtree(export.path)
    assert loaded >= BATCH // 3
