"""The shape of the house: imports go one way, and nothing grows past a screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mixtral", "train")
SOURCES = [path for package in (*PACKAGES, "launch") for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The modules of our own that a file imports, inside functions too, submodules resolved."""
    names = set()
    known = {module_name(source) for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


GRAPH = {module_name(path): imports(path) for path in SOURCES}


def test_the_graph_holds_what_it_should():
    assert "mixtral.moe" in GRAPH["mixtral.modeling"]
    assert "train.loop" in GRAPH["train.run"]


def test_mixtral_never_imports_train():
    for name, targets in GRAPH.items():
        if name.startswith("mixtral"):
            assert not {target for target in targets if target.startswith("train")}, name


def test_ops_import_nothing_else_of_mixtral():
    for name, targets in GRAPH.items():
        if name.startswith("mixtral.ops"):
            assert all(target.startswith("mixtral.ops") for target in targets), name


def test_imports_have_no_circle():
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"circle: {' -> '.join((*path, name))}"
        if name in state:
            return
        state[name] = "open"
        for target in GRAPH.get(name, ()):
            visit(target, (*path, name))
        state[name] = "done"

    for name in GRAPH:
        visit(name, ())


def test_transformers_mixtral_is_imported_in_tests_and_benches_alone():
    for path in SOURCES:
        text = path.read_text()
        assert "models.mixtral" not in text, path
        assert "transformers import Mixtral" not in text, path


def test_only_the_engine_knows_accelerate_and_process_groups():
    for path in SOURCES:
        text = path.read_text()
        if "import accelerate" in text or "from accelerate" in text or "torch.distributed" in text:
            assert path.is_relative_to(ROOT / "train" / "parallel"), path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_function_is_longer_than_sixty_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_no_test_leaves_to_torch_how_far_apart_small_numbers_may_be():
    """By default they may differ by 1e-8, which is all there is of many a gradient in fp64."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "allclose":
                given = {keyword.arg for keyword in node.keywords}
                assert "atol" in given, f"{path}:{node.lineno}"


def test_the_table_of_contents_and_the_root_configuration_stay_short():
    assert len((ROOT / "train/run.py").read_text().splitlines()) < 70
    assert len((ROOT / "conf/config.yaml").read_text().splitlines()) < 50
