"""The workshop: every lesson runs, its exercises' solutions hold, its notebooks are what their source makes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jupytext", reason="the extra `workshop` is not installed")
matplotlib.use("Agg")

import build as workshop  # noqa: E402

from distill import lessons  # noqa: E402
from distill.config.recipe import load_recipe  # noqa: E402
from distill.errors import UserError  # noqa: E402

NUMBERS = workshop.lesson_numbers()
FULL = workshop.results()["lessons"]


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.setenv(lessons.BUDGET, "short")
    monkeypatch.setenv(lessons.FOLDER, str(tmp_path))
    return tmp_path


# ---- every lesson -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_runs_and_its_solutions_hold(number, short, capsys):
    import matplotlib.pyplot as plt

    told = workshop.execute(workshop.read_lesson(number), solutions=True)
    plt.close("all")
    unsolved = [name for name, solved in told["exercises"].items() if not solved]
    assert 2 <= len(told["exercises"]) <= 3 and not unsolved, capsys.readouterr().out
    outside = [e for e in told["expected"] if e["checked"] and not e["met"]]
    assert sum(e["checked"] for e in told["expected"]) >= 3 and not outside


@pytest.mark.parametrize("number", NUMBERS)
def test_the_measured_run_was_of_this_code_and_within_its_ranges(number):
    """Without solutions: what a learner meets. An exercise that counts as solved before it is done proves nothing."""
    measured = FULL[str(number)]
    assert measured["code"] == workshop.read_lesson(number).code_hash
    assert all(e["met"] and e["checked"] for e in measured["expected"])
    assert not any(measured["exercises"].values())
    assert measured["cpu_seconds"] < 5 * 60  # of the ten minutes that a lesson may take


SMALL = """
# %% [markdown] lang="en"
# # Small

# %% [markdown] lang="zh"
# # 小

# %%
import sys

import matplotlib.pyplot as plt

from distill import lessons

plt.plot([1, 2, 4])
plt.show()
print("progress", file=sys.stderr)

# %% tags=["exercise"]
def double(x):
    return ...

# %% tags=["solution"]
def double(x):
    return 2 * x

# %%
lessons.exercise("1", lambda: double(2) == 4, "add")
lessons.expect("a number", 0.5, 0, 1, short=(0, 1))
"""


@pytest.mark.parametrize("lesson", ["small", pytest.param("real", marks=pytest.mark.slow)])
def test_a_lesson_runs_in_a_kernel(short, lesson, monkeypatch):
    """As Jupyter runs it: the notebook with its install cell, in a process of its own."""
    number = min(NUMBERS, key=lambda n: FULL[str(n)]["cpu_seconds"])
    read = workshop.read_lesson(number)
    if lesson == "small":  # a page of what every lesson has, without a model
        (short / f"lesson{number}.py").write_text(SMALL)
        with monkeypatch.context() as there:
            there.setattr(workshop, "FOLDER", short)
            read = workshop.read_lesson(number)
    made, told, _ = workshop.execute_in_kernel(read)
    kinds = {m for c in made.cells if c.cell_type == "code" for o in c.outputs for m in o.get("data", {})}
    assert "image/png" in kinds
    assert told["exercises"] and not any(told["exercises"].values())
    for outputs in workshop.clean_outputs(made):
        assert all(o.get("name") != "stderr" for o in outputs)


# ---- notebooks --------------------------------------------------------------------------------------------


def test_committed_notebooks_are_what_their_source_makes():
    assert workshop.stale(NUMBERS) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_both_languages_have_every_part(number):
    lesson = workshop.read_lesson(number)
    kinds = [c.kind for c in lesson.cells]
    assert kinds[0] == "text" and kinds.count("exercise") == kinds.count("solution") in (2, 3)
    for language, words in {
        "en": (
            "you can",
            "minutes",
            "2-core CPU",
            "8 GB",
            "no bf16",
            "24 GB",
            "commonly goes wrong",
            "## Check",
        ),
        "zh": ("你能够", "分钟", "双核 CPU", "8 GB", "不支持 bf16", "24 GB", "常见问题", "## 自测"),
    }.items():
        text = "\n".join(c.text[language] for c in lesson.cells if c.kind == "text")
        assert [w for w in words if w not in text] == []
        check = text.rpartition("## Check" if language == "en" else "## 自测")[2].partition("<details>")
        assert len(re.findall(r"(?m)^\d\. ", check[0])) == 3 == len(re.findall(r"(?m)^\d\. ", check[2]))
        assert bool(re.search("[\u4e00-\u9fff]", text)) == (language == "zh")
        cells = json.loads(lesson.notebook_path(language).read_text())["cells"]
        hidden = [c for c in cells if "solution" in c["metadata"].get("tags", [])]
        assert len(hidden) == kinds.count("solution") and all(c["cell_type"] == "markdown" for c in hidden)
        assert all("".join(c["source"]).startswith("<details>") for c in hidden)
        code = [c for c in cells if c["cell_type"] == "code"]
        assert "".join(code[0]["source"]) == workshop.install_cell()
        assert all(c["execution_count"] for c in code) and any(c["outputs"] for c in code)


def test_notebooks_are_small_and_outputs_the_same_in_both_languages():
    total = 0
    for number in NUMBERS:
        outputs = []
        for language in workshop.LANGUAGES:
            path = workshop.read_lesson(number).notebook_path(language)
            total += path.stat().st_size
            outputs.append(
                [c["outputs"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
            )
        assert outputs[0] == outputs[1]
        text = json.dumps(outputs[0])
        assert str(ROOT) not in text and "Traceback" not in text
    assert total < 3_000_000


def pages() -> dict[str, str]:
    texts = {p.name: p.read_text() for p in workshop.FOLDER.glob("*.md")}
    for number in NUMBERS:
        for language in workshop.LANGUAGES:
            cells = [c.text[language] for c in workshop.read_lesson(number).cells if c.kind == "text"]
            texts[f"lesson{number}.{language}"] = "\n".join(cells)
    return texts


def test_links_lead_somewhere():
    for name, text in pages().items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (workshop.FOLDER / target).exists(), f"{name}: {target}"


def test_overrides_in_the_texts_are_keys_of_a_recipe():
    found = set()
    for text in pages().values():
        for code in re.findall(r"`([^`\n]+)`", text):
            found |= {
                w for w in code.split() if re.fullmatch(r"(train|student|teacher|generate)\.[\w.]+=\S+", w)
            }
    assert found
    for word in found:
        load_recipe("recipes/demo.yaml", [word])


# ---- the install cell -------------------------------------------------------------------------------------


def run_install(cwd, tmp_path, installed: bool):
    """The cell in a process of its own, without site-packages if not `installed`; notes what `pip` is asked."""
    log = tmp_path / "asked.json"
    patch = (
        "import json, subprocess, sys\n"
        "def run(command, **_):\n"
        f"    json.dump(command, open({str(log)!r}, 'w'))\n"
        "    return subprocess.CompletedProcess(command, 0)\n"
        "subprocess.run = run\n"
    )
    code = patch + workshop.install_cell() + "\nprint(sys.path[0])\nimport distill.lessons"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if installed:
        env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *([] if installed else ["-S"]), "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done, json.loads(log.read_text()) if log.is_file() else None


def test_the_install_cell_does_nothing_where_it_is_installed(tmp_path):
    done, asked = run_install(tmp_path, tmp_path, installed=True)
    assert done.returncode == 0 and asked is None


def test_the_install_cell_pins_what_the_project_pins(tmp_path):
    done, asked = run_install(ROOT / "recipes" / "workshop", tmp_path, installed=False)
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert asked[1:5] == ["-m", "pip", "install", "--quiet"] and asked[5:] == pins
    assert done.stdout.splitlines()[-1] == str(ROOT)


def test_a_folder_of_the_name_is_not_the_package(tmp_path):
    """A clone in ./distill is found as a namespace without code by the name alone."""
    package = tmp_path / "distill" / "distill"
    package.mkdir(parents=True)
    (tmp_path / "distill" / "checkpoints" / "teacher").mkdir(parents=True)
    for name in ("__init__.py", "lessons.py"):
        (package / name).write_text("")
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked and done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "distill")


def test_the_install_cell_unpacks_an_uploaded_project(tmp_path):
    """Colab: the notebook alone, and distill.zip uploaded beside it."""
    with zipfile.ZipFile(tmp_path / "distill.zip", "w") as archive:
        archive.writestr("project/distill/lessons.py", "")
        archive.writestr("project/checkpoints/teacher/config.json", "{}")
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked and done.stdout.splitlines()[-1] == str(tmp_path / "project")


def test_the_install_cell_says_what_is_missing(tmp_path):
    done, asked = run_install(tmp_path, tmp_path, installed=False)
    assert asked is None and "Upload the project as distill.zip" in done.stderr
    assert "Traceback" not in done.stderr


# ---- what lessons stand on --------------------------------------------------------------------------------


def test_ranges_and_exercises_are_kept_and_printed(monkeypatch, capsys):
    monkeypatch.setenv(lessons.BUDGET, "full")
    lessons.EXPECTED.clear()
    lessons.expect("inside", 0.5, 0, 1)
    lessons.expect("outside", 2, 0, 1)
    monkeypatch.setenv(lessons.BUDGET, "short")
    lessons.expect("says nothing", 2, 0, 1)
    lessons.expect("its own range", 2, 0, 1, short=(1, 3))
    assert [(e.met, e.checked) for e in lessons.EXPECTED] == [
        (True, True),
        (False, True),
        (False, False),
        (True, True),
    ]
    lessons.EXERCISES.clear()
    lessons.exercise("raises", lambda: ... + 1, "add")
    lessons.exercise("wrong", lambda: 0, "add")
    lessons.exercise("right", lambda: True, "")
    assert lessons.EXERCISES == {"raises": False, "wrong": False, "right": True}
    assert "OUTSIDE" in capsys.readouterr().out
    monkeypatch.setenv(lessons.BUDGET, "tiny")
    with pytest.raises(UserError, match="use full"):
        lessons.short_budget()


def test_a_text_without_its_other_language_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workshop, "FOLDER", tmp_path)
    (tmp_path / "lesson1.py").write_text('# %% [markdown] lang="en"\n# # One\n\n# %%\nx = 1\n')
    with pytest.raises(UserError, match="pairs"):
        workshop.read_lesson(1)
    (tmp_path / "lesson1.py").write_text('# %% tags=["solution"]\nx = 1\n')
    with pytest.raises(UserError, match="before any exercise"):
        workshop.read_lesson(1)
    with pytest.raises(UserError, match="does not exist"):
        workshop.read_lesson(7)


def test_stale_notebooks_are_named(tmp_path, monkeypatch):
    number = NUMBERS[0]
    source = (workshop.FOLDER / f"lesson{number}.py").read_text()
    monkeypatch.setattr(workshop, "FOLDER", tmp_path)
    monkeypatch.setattr(workshop, "PROJECT_ROOT", ROOT)
    (tmp_path / f"lesson{number}.py").write_text(source + "\n# %%\nprint('more')\n")
    monkeypatch.setattr(workshop.Path, "relative_to", lambda self, _other: self)
    found = workshop.stale([number])
    assert sum("is not what its source makes" in line for line in found) == 2
    assert any("outputs of other code" in line for line in found)


def test_notebook_extra_is_named_where_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(UserError, match=r"\[workshop\]"):
        workshop.read_lesson(1)
    assert importlib.util.find_spec("distill")
