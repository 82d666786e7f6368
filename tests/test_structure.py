"""The house rules, from one table: folders in the order of the pipeline, sizes, faces, tests beside their modules."""

import ast
import functools
import subprocess
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT

PACKAGE = ROOT / "distill"
# A folder imports itself and what stands before it. Modules of the root that are not named stand at the bottom.
ORDER = (
    "(root)", "workers", "tasks", "config", "models", "moe", "data", "convert", "training/losses", "training",
    "evaluation", "report", "pipeline", "doctor", "bench", "cost", "play", "lessons", "commands",
    "__main__",
)  # fmt: skip
MOST_LINES, MOST_OF_A_FUNCTION, FEWEST_LINES, MOST_MODULES = 500, 90, 60, 16
MOST_IN_ALL = (
    130  # a reader of the tree sees every one of them: what is new finds its place or takes another's
)
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
FACES = sorted(PACKAGE.rglob("__init__.py"))
# A process of its own is started by its path, and what all stand on may be short.
SHORT = {"distill/workers/math_worker.py", "distill/__main__.py", "distill/errors.py"}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


KNOWN = {dotted(p): p for p in MODULES}
FOLDERS = {dotted(p.parent) for p in FACES}


def place(module: str) -> str:
    """The entry of ORDER that a dotted module, or a folder by its face, belongs to."""
    parts = module.split(".")[1:]
    if module in FOLDERS:
        return "/".join(parts) or "(root)"
    if len(parts) == 1:
        return parts[0] if parts[0] in ORDER else "(root)"
    return "/".join(parts[:-1])


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distill":
            inside = {f"{node.module}.{a.name}" for a in node.names}
            found |= (inside & (KNOWN.keys() | FOLDERS)) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "distill"}
    return found


@functools.cache  # not while tests are collected, which every worker does for itself
def graph() -> dict[str, set[str]]:
    return {name: imports(path) for name, path in KNOWN.items()}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_size_and_opening(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} must open with what it is"
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MOST_OF_A_FUNCTION, f"{path}: {node.name} is too long"


def test_a_limit_is_not_met_by_cutting_off_a_corner():
    """A module of a few lines that one neighbour alone imports belongs into that neighbour."""
    for name, path in KNOWN.items():
        if path.read_text().count("\n") >= FEWEST_LINES or str(path.relative_to(ROOT)) in SHORT:
            continue
        importers = {other for other, found in graph().items() if name in found}
        assert len(importers) != 1 or place(importers.pop()) != place(name), f"merge {path} into its importer"


def test_folders_import_in_one_direction():
    for name, found in graph().items():
        for other in found:
            assert ORDER.index(place(other)) <= ORDER.index(place(name)), (
                f"{name} imports {other}, against ORDER"
            )


def test_no_cycle_of_modules():
    def visit(name: str, trail: tuple[str, ...]):
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name not in seen:
            for other in graph().get(name, ()):
                visit(other, (*trail, name))
            seen.add(name)

    seen: set[str] = set()
    for name in graph():
        visit(name, ())


def test_folders_are_small_and_all_in_the_order():
    folders = {path.parent for path in MODULES}
    for folder in folders:
        assert len(list(folder.glob("*.py"))) - 1 <= MOST_MODULES, f"{folder} has too many modules"
        assert (folder / "__init__.py").is_file(), f"{folder} needs an __init__.py with its sentence"
    assert {place(name) for name in KNOWN} <= set(ORDER)
    assert len(MODULES) <= MOST_IN_ALL


@pytest.mark.parametrize("path", FACES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_a_face_says_its_sentence_and_defines_nothing(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assert isinstance(node, ast.Import | ast.Assign), (
            f"{path}: a face hands on names, line {node.lineno} does more"
        )
    names = {"lazy_loader"} if len(tree.body) > 1 else set()
    assert {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names} == names


@pytest.mark.parametrize("path", FACES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_every_name_of_a_face_is_there_and_none_is_a_module(path):
    import importlib

    face = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
    beside = {p.stem for p in path.parent.glob("*.py")}
    for name in getattr(face, "__all__", ()):
        assert getattr(face, name) is not None
        assert name not in beside, f"{path.parent.name}.{name} would hide the module of that name"


def test_the_import_is_quick_and_takes_no_torch():
    code = "import sys, time; t = time.perf_counter(); import distill; print(time.perf_counter() - t)"
    code += "; dir(distill); heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); print(heavy)"
    seconds = []
    for _ in range(3):  # the best of three: others work on this machine
        done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        first, heavy = done.stdout.splitlines()
        assert heavy == "set()"
        seconds.append(float(first))
    assert min(seconds) < 0.1


def test_tests_mirror_the_package():
    """tests/FOLDER/test_MODULE.py or test_MODULE_what.py; other folders of tests are named for what they try."""
    folders = {str(p.parent.relative_to(PACKAGE)) for p in MODULES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = str(path.parent.relative_to(ROOT / "tests"))
        if folder not in folders or path == Path(__file__):
            continue
        name = path.stem.removeprefix("test_")
        modules = [p.stem for p in (PACKAGE / folder).glob("*.py")]
        assert any(name == m or name.startswith(f"{m}_") for m in modules), f"{path}: no module of that name"
