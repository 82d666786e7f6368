"""Pages in Chinese: every sentence has a translation with the same values, and nothing English is left on a page
outside names and code."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from dossier_example import example
from page_reading import VOID, Page
from report_example import fake_run

from distill.bench.page import build_bench_page
from distill.cost.break_even import SAID, Costs, break_even, measured_inputs
from distill.cost.page import write_page
from distill.errors import UserError
from distill.report import pages
from distill.report.dossier import build_dossier
from distill.report.pages import TEMPLATES, called, page_environment, retold, say, speaking, spoken
from distill.report.report import build_report

PAGES = (
    "parts",
    "dossier",
    "dossier_experts",
    "dossier_viewer",
    "report",
    "other_scores",
    "bench",
    "break_even",
)
FILES = (
    "report/*",
    "play/*",
    "lessons/*",
    "bench/page",
    "bench/judge",
    "bench/metrics",
    "cost/page",
    "cost/break_even",
)
# What a Chinese reader reads in Latin letters too: units, symbols, names of methods, of formats and of products.
LATIN = frozenset(
    re.findall(
        r"\w+",
        """AIME acc norm Brier CUDA DeepSeek ECE FLOP GFLOP GPU H800 Holm JavaScript KL KV MB MFLOP MaxVio McNemar Qwen
        R1 TFLOP Tango USD V3 bf16 bfloat16 cpu demo distill float16 float32 float8 fp16 fp32 fp8 emulated json kB lm
        evaluation harness log metrics nat pass recipe threads top yaml""",
    )
)
NAMES = {"later", "notes", "txt", "arc", "eval", "reference", "found", "script"}  # of the made-up evaluation


def sentences() -> dict[str, str]:
    """Every sentence that templates or code say -> where."""
    found: dict[str, str] = {}
    environment = page_environment()
    for name in PAGES:
        source = (TEMPLATES / f"{name}.html.j2").read_text()
        for line, _, message in environment.extract_translations(source):
            found.setdefault(message if isinstance(message, str) else message[0], f"{name}.html.j2:{line}")
    for pattern in FILES:
        for path in sorted((ROOT / "distill").glob(f"{pattern}.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "mark"):
                    for text in _texts(node.args[0]):
                        found.setdefault(text, f"{path.name}:{node.lineno}")
    return found


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value]
    return [*_texts(node.body), *_texts(node.orelse)] if isinstance(node, ast.IfExp) else []


def test_every_sentence_has_a_translation_and_no_other():
    said = sentences()
    assert len(said) > 400
    missing = {text: where for text, where in said.items() if text not in pages.catalogue()}
    assert not missing
    assert not set(pages.catalogue()) - set(said)  # a translation of nothing is a trap for whoever edits it


@pytest.mark.parametrize("pattern", [r"%\(\w+\)s", r"<[^>]+>", r"%%"])
def test_translations_keep_values_markup_and_percent_signs(pattern):
    for english, chinese in pages.catalogue().items():
        assert sorted(re.findall(pattern, english)) == sorted(re.findall(pattern, chinese)), english


def test_one_term_per_concept():
    for english, chinese in pages.catalogue().items():
        for rejected in (
            "论断",
            "校验器",
            "比特",
            "在策略",
            "噪声底",
            "令牌",
            "标记",
            "老师",
            "基座",
            "控制组",
        ):
            assert rejected not in chinese.replace("噪声下限", ""), english
        for term, chosen in (
            ("noise floor", "噪声下限"),
            ("teacher", "教师"),
            ("token", "词元"),
            ("router", "路由"),
        ):
            named = re.sub(r"%\(\w+\)s|--teacher", "", english)
            if re.search(rf"\b{term}\b", named):
                assert chosen in chinese, english


class Seen(Page):
    """The words that a reader is meant to read: no code, no text of models, no paths, no script."""

    QUIET = {"code", "pre", "script", "style", "select"}

    def __init__(self, text: str):
        self.seen: list[str] = []
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        known = dict(attributes)
        self.seen += [known[name] for name in ("aria-label", "title") if known.get(name)]
        if tag not in VOID and ("word" in known.get("class", "").split() or known.get("lang") == "en"):
            self.open[-1] = tag  # its words are those of a model or of a message
            self._foreign = len(self.open)

    def handle_data(self, data):
        super().handle_data(data)
        foreign = getattr(self, "_foreign", 0)
        if foreign and len(self.open) >= foreign:
            return
        self._foreign = 0
        if not self.QUIET & set(self.open):
            self.seen.append(data)


def latin_words(page: str) -> set[str]:
    found = set()
    for text in Seen(page).seen:
        found |= set(re.findall(r"[A-Za-z][A-Za-z0-9]+", text.replace("arc_easy", "")))
    return found - LATIN - NAMES


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> dict[str, str]:
    run = fake_run(tmp_path_factory.mktemp("runs") / "demo")
    folder = example(tmp_path_factory.mktemp("evaluations") / "eval-demo")
    return {"report": build_report(run, "zh").read_text(), "dossier": build_dossier(folder, "zh").read_text()}


def test_nothing_english_is_left(chinese):
    assert latin_words(chinese["report"]) == set()
    left = latin_words(chinese["dossier"])
    assert left <= {"fp16", "needs", "CUDA", "this", "is", "CPU"}, (
        left
    )  # why fp16 did not run: the machine's words


BENCHES = ("claims", "claims_combination", "claims_language")
# Of the claims: names of papers, formats, models and methods.
CLAIMS_LATIN = frozenset(
    re.findall(
        r"\w+",
        """BF16 FP8 MoE LoRA arXiv Student Thinking Machines without regret alpha INCONCLUSIVE SUPPORTED NOT EQUIVALENT
        COMPARABLE AMD EPYC Adam CPU Open deepseek generate docs data claims md small kN SmolLM2 Instruct Python
        on cost policy clean flawed python letters docs txt layers QAD QAT REAP MLP FLOPs On Policy Distillation""",
    )
)


def _said_by(bench: dict) -> set[str]:
    """Every sentence of a bench file that its page shows."""
    said = {
        bench["title"],
        *(about["about"] for about in bench["arms"].values() if about and "about" in about),
    }
    for claim in bench["claims"]:
        said |= {claim.get(key) for key in ("group", "sentence", "hypothesis", "axis", "scope")}
        said |= {claim["source"]} if "," in claim.get("source", "") else set()
    for fact in bench.get("facts", ()):
        said |= {fact[key] for key in ("sentence", "statement", "because")}
    for row in bench.get("evidence", ()):
        said |= {row[key] for key in ("sentence", "evidence", "ends")}
    for curve in bench.get("curves", ()):
        said |= {curve["title"], *curve["series"]}
    return said - {None, ""}


@pytest.mark.parametrize("name", BENCHES)
def test_every_sentence_of_the_claims_has_a_translation(name):
    read = [yaml.safe_load((ROOT / "recipes" / f / f"{name}.yaml").read_text()) for f in (".", "zh")]
    assert not _said_by(read[0]) - set(read[1])


@pytest.mark.parametrize("results", ["claims-full", "language-small", "combination-full"])
def test_nothing_english_is_left_on_the_page_of_a_grid(results, tmp_path):
    found = json.loads((ROOT / "recipes" / "results" / f"{results}.json").read_text())
    build_bench_page(found, tmp_path / "zh.html", "zh")
    page = (tmp_path / "zh.html").read_text()
    told = re.sub(r"(checkpoints|shared)/[\w/-]+|[\w.]+-[\w.]+-100", "", page)  # where checkpoints lie
    left = {
        word
        for word in latin_words(told) - CLAIMS_LATIN - {found["commit"]["id"]}
        if not re.search(r"\d", word)
    }
    assert left == set(), (
        left
    )  # names of claims and arms stand in Chinese; as code beside them, they are what they are
    assert f'<code class="quiet">{found["claims"][0]["id"]}</code>' in page
    assert "成立 SUPPORTED" in page and '<html lang="zh-CN">' in page and spoken() == "en"
    build_bench_page(found, tmp_path / "en.html")
    assert not re.search("[\u4e00-\u9fff]", (tmp_path / "en.html").read_text().split("</style>")[1])


def test_the_break_even_in_chinese(tmp_path):
    inputs = measured_inputs()
    found = {**break_even(Costs(**inputs["costs"]), 1e6, 1), "inputs": inputs}
    page = write_page(found, tmp_path, "zh").read_text()
    options = {
        "direct",
        "student",
        "multiple",
        "training",
        "prompts",
        "generations",
        "dataset",
        "checkpoints",
    }
    title = {
        "Distillation",
        "Scaling",
        "Laws",
        "arXiv",
        "AMD",
        "EPYC",
        "MFLOPs",
        "GFLOPs",
        "TFLOPs",
        "FLOPs",
        "e",
    }
    assert latin_words(page) - options - title == {"teacher"}  # of --teacher-training
    assert "从 181,387 次查询起，蒸馏" in page and "每词元 3.01e+06 FLOP" in page
    assert json.loads((tmp_path / "break_even.json").read_text())["inputs"]["notes"] == inputs["notes"]


def test_a_sentence_of_a_file_is_told_in_the_language_of_the_page():
    kept = SAID["left_out"] % {"why": SAID["behind"] % {"points": "69", "task": "hard"}}
    assert retold(kept, SAID.values()) == kept
    with speaking("zh"):
        told = retold(kept, SAID.values())
        assert "最多落后 69 个百分点，困难" in told and "--direct-student" in told
        assert retold("a note of somebody's own", SAID.values()) == "a note of somebody's own"


def test_what_an_evaluation_warns_of_has_its_form():
    """Every sentence of `warnings`, made by it."""
    from types import SimpleNamespace

    from distill.evaluation.measure import warnings
    from distill.models.chat import PLAIN_TEMPLATE

    score = {"truncated": 2, "n": 2, "samples": 1}
    result = {"tasks": {"hard": score}, "fidelity": {"not_finite": 3}}
    row = {"level": "hard", "verdict": "no_answer"}
    rows = [row | {"error": why} for why in ("non-finite logits", "no room", None)]
    section = SimpleNamespace(stop=[], max_new_tokens=64)
    tokenizer = SimpleNamespace(chat_template=PLAIN_TEMPLATE)
    found = warnings(rows, result, section, "no router was found", tokenizer)
    assert len(found) == len(pages.WARNINGS)
    with speaking("zh"):
        told = [pages.warning(text) for text in found]
    assert all(
        re.search("[\u4e00-\u9fff]", text) for text in told
    ) and "困难题的 3 个回答里，有 3 个" in "".join(told)
    assert [pages.warning(text) for text in found] == found


def test_a_sentence_left_in_english_would_be_seen(monkeypatch, tmp_path):
    known = dict(pages.catalogue())
    del known["What it cost"], known["optimizer step"]
    monkeypatch.setattr(pages, "catalogue", lambda: known)
    left = latin_words(build_report(fake_run(tmp_path / "demo", per_cell=3), "zh").read_text())
    assert {"What", "it", "cost", "optimizer", "step"} <= left


def test_the_page_says_its_language_and_the_data_of_the_viewer_does(chinese):
    assert '<html lang="zh-CN">' in chinese["report"] and '<html lang="zh-CN">' in chinese["dossier"]
    data = json.loads(re.search(r'id="viewer-data">(.*?)</script>', chinese["dossier"], re.S).group(1))
    assert data["words"]["token"].startswith("第 {n} 个词元") and data["models"][0]["title"] == "教师"
    assert data["models"][0]["name"] == "teacher" and data["models"][0]["layers"][0] == "第 1 层"
    assert spoken() == "en"  # the language was that of these pages alone


def test_chinese_labels_have_room(chinese):
    """An unknown letter would be measured as a narrow box, and the label would run into the axis."""
    from distill.report import figures

    def left_edge(name):
        score = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 9}
        svg = figures.accuracy_panel("t", {name: score})
        return float(re.search(r'<g id="f\w+-patch_2">\s*<path d="M ([\d.]+)', svg).group(1))

    assert left_edge("教师教师教师") == pytest.approx(left_edge("——————"), abs=0.5)
    assert left_edge("教师教师教师") > left_edge("nnnnnn") + 15


def test_words_and_numbers():
    with speaking("zh"):
        assert called("student") == "学生" and called("org/MyModel") == "org/MyModel"
        assert say("%(n)s tokens", n=3) == "3 个词元"
        assert pages.duration(125).replace(pages.NB, " ") == "2 分 5 秒"
        about = {"parameters_total": 837_888, "parameters_adapter": 155_648}
        assert pages.size(about).replace(pages.NB, " ") == "0.84 M + 适配器 0.16 M"
    assert pages.size(about).replace(pages.NB, " ") == "0.84 M + 0.16 M adapter"
    with pytest.raises(UserError, match="--lang fr: one of en, zh"):
        pages.speak("fr")


def test_a_language_is_left_again_after_an_error(tmp_path):
    run = fake_run(tmp_path / "demo", per_cell=3)
    (run / "eval" / "metrics.json").write_text(
        (run / "eval" / "metrics.json").read_text().replace('"load"', '"lost"')
    )
    with pytest.raises(KeyError):
        build_report(run, "zh")
    assert spoken() == "en" and Path(run / "report.html").exists() is False
