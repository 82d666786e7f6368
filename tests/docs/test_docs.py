"""What the documentation tells a reader to type works, and what it links to exists."""

import ast
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT
from docs_examples import DEMO, PAGES, command, examples, lay_over_demo, recipe_examples, resolve
from transformers import AutoModelForCausalLM

from distill.config.recipe import load_recipe
from distill.errors import UserError

EXAMPLES = [e for page in PAGES for e in examples(page)]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHIPPED = [e for path in RECIPES for e in recipe_examples(path)]
CHEAP = [e for e in EXAMPLES if e.kind == "sh"]


def test_something_is_checked():
    """A page whose blocks lost their marks would pass everything."""
    kinds = [e.kind for e in EXAMPLES]
    assert kinds.count("sh") >= 5 and kinds.count("sh slow") >= 12
    assert kinds.count("yaml") >= 2 and kinds.count("overrides") >= 12
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize("example", [e for e in EXAMPLES + SHIPPED if e.kind.startswith("sh")], ids=str)
def test_commands_parse_and_their_keys_resolve(example):
    arguments, module = command(example.text)
    if arguments is not None:
        resolve(arguments)
    if module is not None:
        assert '__name__ == "__main__"' in module.read_text(), f"{module.name} is no command"


@pytest.mark.parametrize("example", CHEAP, ids=str)
def test_cheap_commands_run(example, run_cli, tmp_path, monkeypatch):
    arguments, _ = command(example.text)
    assert arguments is not None, "only `distill` runs here; mark the block as sh slow"
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*arguments)
    assert code == 0 and out and not err, err


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "overrides"], ids=str)
def test_overrides_resolve(example):
    load_recipe(DEMO, shlex.split(example.text, comments=True))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.kind == "yaml"], ids=str)
def test_parts_of_recipes_are_valid(example):
    lay_over_demo(example.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """Relative links name files that exist, and their #anchors headings that exist."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


def anchors(page) -> set[str]:
    """The anchors GitHub gives a page's headings: lower case, punctuation away, spaces to hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h).lower()) for h in headings)
    return {h.replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_text_exist(page):
    for name in re.findall(r"`((?:distill|recipes|tests|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    assert os.sep + "work" + os.sep not in page.read_text()


def test_tests_named_in_the_text_exist():
    """CONTRIBUTING names the test that each addition needs, alone or as file::test."""
    named = 0
    for page in PAGES:
        text = page.read_text()
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text):
            assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{test}"
            named += 1
        sources = "".join((ROOT / f).read_text() for f in re.findall(r"`(tests/[\w/]+\.py)[`:]", text))
        for test in re.findall(r"`(test_\w+)`", text):
            assert f"def {test}(" in sources, f"{page.name} names {test}, which is in none of its files"
            named += 1
    assert named >= 5


def test_glossary_has_both_languages_and_only_terms_in_use():
    page = ROOT / "docs" / "glossary.md"
    rows = re.findall(r"^\| (?!term|---)(.*?) \| (.*?) \| (.*?) \|$", page.read_text(), re.M)
    assert len(rows) > 60
    others = [p for p in PAGES if p != page] + sorted((ROOT / "distill").rglob("*.py"))
    others += sorted((ROOT / "distill" / "report" / "templates").glob("*.j2"))
    text = " ".join(" ".join(p.read_text().split()) for p in others).lower()
    for term, chinese, meaning in rows:
        assert chinese.strip(), term
        assert re.search("[\u4e00-\u9fff]", meaning) and re.search("[A-Za-z]{3}", meaning), term
        for word in term.split(", "):
            assert word.lower() in text or word.lower().replace("-", "") in text, f"nobody says '{word}'"


def test_error_lines_are_those_of_the_program():
    """Every quoted `distill: ...` line is a message of the source, word for word between its variable parts."""
    sources = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^distill: (.*)$", page, re.M)
    assert len(quoted) > 35
    for line in quoted:
        parts = [part for part in line.split("…") if part.strip(" ;:,.()'=")]
        assert max(len(part) for part in parts) > 10, f"too vague to be checked: {line}"
        assert any(in_order(parts, source) for source in sources), f"nowhere in the source: {line}"
    assert not any(in_order(["a message that nobody ever prints"], source) for source in sources)


def messages() -> list[str]:
    """All texts of the package: string constants, with … where an f-string has a value."""
    found = []
    for path in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def in_order(parts: list[str], source: str) -> bool:
    place = 0
    for part in parts:
        place = source.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize(
    "text",
    [
        "distill train recipes/demo.yaml train.stepz=3",
        "distill train recipes/none.yaml",
        "distill evaluate checkpoints/base --temprature 0.7",
        "distill evaluate checkpoints/base --temperature 70",
        "distill nothing",
        "accelerate launch --config_file recipes/accelerate/none.yaml -m distill train recipes/demo.yaml",
        "make nothing",
        'pip install -e ".[nothing]"',
        "python -m distill.nothing",
    ],
)
def test_a_wrong_example_would_be_caught(text):
    with pytest.raises((AssertionError, UserError, SystemExit)):
        resolve(command(text)[0] or [])


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.name)
def test_python_examples_run(page, hub):
    """With a tiny mixture of experts as `model`, and logits of the shapes that the examples name."""
    model = AutoModelForCausalLM.from_pretrained(hub["qwen3_moe"])
    rows = torch.arange(12).view(2, 6)
    given = {
        "model": model.eval(),
        "batch": {"input_ids": rows, "attention_mask": torch.ones_like(rows)},
        "student_logits": torch.randn(5, 9),
        "teacher_logits": torch.randn(5, 9),
    }
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, page.name, "exec"), dict(given))
