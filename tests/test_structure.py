"""The code's own rules: a module says what it is, and none outgrows what a reader can hold."""

import ast

import pytest
from conftest import ROOT

MODULES = sorted((ROOT / "distill").glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_size_and_opening(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path.name} must open with what it is"
    assert text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 90, f"{path.name}: {node.name} is too long"


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [p.name for p in MODULES if not p.name.startswith("__") and f"{p.name}" not in readme]
    assert not missing, f"add to the tree in README.md: {missing}"


def test_dependencies_point_one_way():
    """No import cycle between the package's modules, wherever the import stands."""
    graph = {}
    for path in MODULES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill"):
                _, _, child = node.module.partition(".")
                found |= {child} if child else {a.name for a in node.names}
        graph[path.stem] = found & {p.stem for p in MODULES}

    def visit(name: str, trail: tuple[str, ...]):
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        for other in graph[name]:
            visit(other, (*trail, name))

    for name in graph:
        visit(name, ())
