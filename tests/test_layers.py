"""The import rules of the package, read from its source: they hold for code that no test runs, too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dinosearch"
SEES = {
    "errors": set(),
    "lock": {"errors"},
    "images": {"errors"},
    "vit": {"errors"},
    "encoder": {"vit", "images", "errors"},
    "index": {"encoder", "vit", "images", "lock", "errors"},
    "pretrain": {"encoder", "vit", "images", "lock", "errors"},
    "query": {"index", "encoder", "vit", "images", "errors"},
    "demo": {"query", "index", "pretrain", "encoder", "vit", "images", "errors"},
    "api": {"query", "index", "encoder", "vit", "images", "errors"},
    "cli": {"demo", "query", "index", "pretrain", "encoder", "vit", "images", "errors"},
}
HEAVY = {"torch", "timm", "torchvision", "faiss", "sklearn", "scipy", "openvino", "safetensors", "filelock"}
HEAVY_FOR_HELP = HEAVY | {"numpy", "PIL", "rich", "sqlite3"}
PARTS = sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_of_the_package_has_its_layer():
    assert set(PARTS) - {"__init__", "__main__"} == set(SEES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    used = {name.split(".")[1] for name in all_imports(path) if name.startswith("dinosearch.")}
    assert used - {part, "__version__"} <= SEES[part]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_ever_unpickled(path):
    assert not {name.split(".")[0] for name in all_imports(path)} & {
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"  # what torch raises when it refuses to
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            assert [alias.name for alias in node.names] == ["UnpicklingError"]
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert keywords["weights_only"] == "True"
            assert keywords.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints_or_exits(path):
    if path.relative_to(PACKAGE).parts[0] == "cli":
        return
    called = {ast.unparse(c.func) for c in ast.walk(ast.parse(path.read_text())) if isinstance(c, ast.Call)}
    assert not called & {"print", "sys.exit", "exit", "quit", "input"}


def test_the_command_line_loads_nothing_heavy():
    loaded = loaded_by("import dinosearch.cli")
    assert not loaded & HEAVY_FOR_HELP


@pytest.mark.parametrize(
    "part", ["images", "index.sync", "index.contents", "query.search", "query.probe", "vit.resolve"]
)
def test_heavy_libraries_wait_for_who_needs_them(part):
    assert not loaded_by(f"import dinosearch.{part}") & HEAVY


def all_imports(path):
    """Dotted names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from dinosearch import errors` imports dinosearch.errors
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded_by(statement):
    """Top-level modules in a fresh process after a statement."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())
