"""The report page, on a fake run folder made here: every number on it is one of the inputs, and what models
wrote stays text. The run is in report_example.py."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reading import Page, points
from report_example import ATTACK, FAMILIES, LEVELS, SKILL, fake_run

from distill.errors import UserError
from distill.report import drawing, figures, pages
from distill.report.findings import headline, read_run
from distill.report.report import build_report, summary_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(whole) -> Page:
    return Page(build_report(whole).read_text())


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "demo"))


def edit(run: Path, change) -> None:
    path = run / "eval" / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))


def rebuilt(run: Path) -> Page:
    return Page(build_report(run).read_text())


# ---- numbers on the page are the inputs


def test_comparison_table_holds_the_measured_scores(whole, page):
    metrics = json.loads((whole / "eval" / "metrics.json").read_text())
    for model, values in metrics["models"].items():
        for task, s in values["tasks"].items():
            low, high = s["ci95"]
            accuracy = f"{100 * s['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            cells = [
                task,
                model,
                accuracy,
                str(s["n"]),
                str(s["truncated"]),
                str(s["no_answer"]),
                str(s["errors"]),
                f"{s['mean_tokens']:.1f}",
            ]
            assert cells in page.cells
    for c in metrics["comparisons"]:
        low, high = c["ci95"]
        row = next(r for r in page.cells if r[:2] == [c["task"], f"{c['b']} against {c['a']}"])
        assert row[2].endswith(c["verdict"])
        assert row[3] == points(100 * c["difference"], 100 * low, 100 * high).replace(" points", "")
        assert row[4:6] == [str(c["n"]), "< 0.001" if c["p_value_holm"] < 0.001 else "0.400"]


def test_accuracies_agree_with_a_recount_of_the_answers(whole, page):
    """From the Parquet rows, not through metrics.json: the fixture and the page cannot share a mistake."""
    rows = pq.read_table(whole / "eval" / "answers").to_pylist()
    for family in FAMILIES:
        mine = [
            r["verdict"] for r in rows if (r["model"], r["family"], r["level"]) == ("student", family, "hard")
        ]
        position = next(i for i, row in enumerate(page.cells) if row[:2] == [family, "easy"])
        cell = page.cells[position + 2]
        assert cell[1] == "hard"
        share = 100 * mine.count("correct") / len(mine)
        assert cell[4].startswith(f"{share:.0f} %") and cell[4].endswith(f"n = {len(mine)}")


def test_stages_models_experts_and_cost(whole, page):
    cells = page.cells
    assert next(r[:6] for r in cells if r[0] == "student" and "cpu" in r) == [
        "student",
        "–",
        "415,554",
        "4.5 TFLOP",
        "49.0 s",
        "cpu",
    ]
    # 12.25 s * (1+2+3+4+5+6); the two stages without a FLOP count are left out of the sum.
    assert ["total", "", "", "19.5 TFLOP", "4 min 17 s", "", ""] in cells
    teacher = next(r for r in cells if r[0] == "teacher" and r[-1] == "2 of 8")
    assert teacher[1:9] == [
        "3.65 M",
        "1.48 M",
        "1.46 M",
        "2.92 MFLOP",
        "96",
        "960 B",
        "7.3 MB",
        "2 of 8",
    ]
    assert ["base", "91.3 %", "0.21 %", "0.2468", "0.3579", "12,345"] in cells
    assert ["student", "41.5 s", "48,211", "1,160", "123 MFLOP"] in cells
    layers = json.loads((whole / "eval" / "metrics.json").read_text())["models"]["teacher"]["moe"]["layers"]
    for name, layer in layers.items():
        violation, floor = max(layer["load"]) * 8 - 1, layer["max_violation_noise_floor"]
        row = [
            f"layer {name.split('.')[2]}",
            "48,211",
            "2 of 8",
            f"{violation:.3f}",
            f"{floor:.3f}",
            f"{violation / floor:.1f} ×",
            "0",
        ]
        assert [*row, "0.996", "7.92", "1.734", "0.432"] in cells
    assert ["torch", "2.13.0 (prompts, generations, dataset, student, control); 2.12.1 (eval)"] in cells
    assert ["distill", "0.1.0"] in cells
    assert next(r for r in cells if r[0] == "student" and "cpu" in r)[6] == "bfloat16"
    facts = "tokens 207,777 kept 3,456 dropped 545 – wrong answer 412 – duplicate 100 – cut off 33"
    assert facts in page.text and "parameters 0.86 M + 0.14 M adapter – trained 0.14 M" in page.text
    assert next(r for r in cells if r[0] == "student" and r[-1] == "dense")[1] == "0.86 M + 0.14 M adapter"
    assert "run_dir: checkpoints/demo" in page.text and "Not in this folder" not in page.text


def test_training_table_and_curves(whole, page):
    rows = [json.loads(line) for line in (whole / "student" / "metrics.jsonl").read_text().splitlines()]
    # 60 steps: a window of 3, cut to 2 at either end.
    first, last = np.mean([r["loss"] for r in rows[:2]]), np.mean([r["loss"] for r in rows[-2:]])
    assert ["student", "60", "6,000", f"{first:.3f}", f"{last:.3f}", "3 steps", "0", "30.0 s"] in page.cells
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert sum("optimizer step" in label for label in labels) == 3  # total, cross entropy, forward KL
    assert any(label.startswith("forward KL") and label.endswith(": student") for label in labels)


def test_examples_follow_the_rule(whole, page):
    rows = pq.read_table(whole / "eval" / "answers").to_pylist()
    verdicts = {}
    for row in rows:
        verdicts.setdefault((row["family"], row["prompt_id"]), {})[row["model"]] = row["verdict"]
    for family in FAMILIES:
        hard = [v for key, v in verdicts.items() if key[1].startswith(f"{family}-hard")]
        won = [v["student"] == "correct" and "correct" not in (v["base"], v["control"]) for v in hard]
        assert f"{family}, hard – learned: {sum(won)} of these {len(hard)} problems" in page.text
    lost = sum(v["student"] != "correct" for v in verdicts.values())
    assert f"not solved by student: {lost} of all {len(verdicts)} problems" in page.text


# ---- the words


def test_headline_when_the_student_wins(whole, page):
    s = {
        m: json.loads((whole / "eval" / "metrics.json").read_text())["models"][m]["tasks"]["hard"]
        for m in SKILL
    }
    said = {
        m: f"{100 * v['accuracy']:.0f} % [{100 * v['ci95'][0]:.0f}, {100 * v['ci95'][1]:.0f}]"
        for m, v in s.items()
    }
    assert (
        f"Learning from the teacher paid off: the student solves {said['student']} of the hard problems, "
        f"the same base trained without the teacher {said['control']}." in page.text
    )
    price = f"with {2_920_000 / 1_700_352:.1f} times the operations per token"
    assert f"The teacher itself solves {said['teacher']} of the hard problems, {price}." in page.text


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("WORSE", "did not pay off: the student"), ("INCONCLUSIVE", "No clear winner: the student")],
)
def test_headline_when_the_student_does_not_win(run, verdict, words):
    def change(metrics):
        named = {(c["a"], c["b"], c["task"]): c for c in metrics["comparisons"]}
        duel, easy = named["control", "student", "hard"], named["base", "student", "easy"]
        duel.update(verdict=verdict, difference=-0.02, ci95=[-0.05, 0.01], p_value_holm=0.3)
        easy.update(verdict="WORSE", difference=-0.4, ci95=[-0.5, -0.3])

    edit(run, change)
    text = rebuilt(run).text
    assert words in text and "paid off" not in text
    assert f"The difference is {points(-2, -5, 1)} (p = 0.300, n = 48 problems)." in text
    assert ("Chance alone can give" in text) == (verdict == "INCONCLUSIVE")
    forgot = f"on easy problems: {points(-40, -50, -30)}, n = 48. Training made it forget."
    assert f"It is worse than the base before training {forgot}" in text


def test_a_comparison_stored_the_other_way_round_reads_the_same(run):
    before = headline(read_run(run))

    def turn(metrics):
        for c in metrics["comparisons"]:
            low, high = c["ci95"]
            c.update(a=c["b"], b=c["a"], difference=-c["difference"], ci95=[-high, -low])
            c["verdict"] = {"BETTER": "WORSE", "WORSE": "BETTER"}.get(c["verdict"], c["verdict"])

    edit(run, turn)
    after = headline(read_run(run))
    for words in ("title", "detail", "worse", "notes", "verdict", "rival"):
        assert before[words] == after[words]
    accuracy = {name: score["accuracy"] for name, score in after["scores"].items()}
    for task, duel in after["duels"].items():
        assert duel["verdict"] == before["duels"][task]["verdict"]
    assert after["duels"]["hard"]["difference"] == pytest.approx(accuracy["student"] - accuracy["control"])


def test_other_names_and_tasks(run):
    def change(metrics):
        one, two = metrics["models"]["student"], metrics["models"]["base"]
        for model in (one, two):
            model["tasks"] = {"gsm8k": model["tasks"]["hard"], "math $x^2$": model["tasks"]["easy"]}
            model.pop("families")
        metrics["models"] = {"org/Some-Model-1.5B-with-a-very-long-name": one, "<b>other</b>": two}
        duel = metrics["comparisons"][5] | {"a": "<b>other</b>", "task": "gsm8k"}
        metrics["comparisons"] = [duel | {"b": "org/Some-Model-1.5B-with-a-very-long-name"}]

    edit(run, change)
    for part in (run / "eval" / "answers").iterdir():
        rows = pq.read_table(part).to_pylist()
        names = {"student": "org/Some-Model-1.5B-with-a-very-long-name", "base": "<b>other</b>"}
        rows = [row | {"model": names[row["model"]]} for row in rows if row["model"] in names]
        pq.write_table(pa.Table.from_pylist(rows), part)
    page = rebuilt(run)
    assert "Better than <b>other</b>: org/Some-Model-1.5B-with-a-very-long-name solves" in page.text
    assert "of the gsm8k problems" in page.text and "math $x^2$" in page.text
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert (
        "long-name solved and <b>other</b> did not" in page.text and "addition, hard – learned" in page.text
    )


# ---- one safe, whole, repeatable file


def test_model_text_stays_text(whole, page):
    assert ATTACK.replace("\x07", "\u2407").replace("\n", " ") in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "link")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "49" not in page.text.split("alert(1)>")[1][:20]


def test_one_file_without_network(whole, page):
    text = (whole / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:image/png;base64,")) or target == "eval/dossier.html"
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not [p for p in whole.iterdir() if p.name.startswith(".")]  # no temporary left behind


def test_ids_are_unique_and_every_reference_resolves(whole, page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", (whole / "report.html").read_text()))
    assert wanted and wanted <= set(ids)


def test_same_folder_gives_same_bytes(run, whole):
    first = build_report(run).read_bytes()
    assert first == build_report(run).read_bytes() == build_report(whole).read_bytes()


def test_figures_take_the_colours_of_the_page():
    svg = figures.accuracy_panel("hard", {"student": {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 9}})
    assert "var(--ink)" in svg and "var(--line)" in svg
    assert not [colour for colour in drawing.CSS_COLOURS if colour in svg]


# ---- what is missing


def test_no_run_and_no_evaluation(tmp_path, run):
    with pytest.raises(UserError, match=r"nowhere is missing.*distill run"):
        build_report(tmp_path / "nowhere")
    (run / "eval" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json is missing.*distill evaluate"):
        build_report(run)


def test_damaged_files_are_named(run):
    with open(run / "student" / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')
    with pytest.raises(UserError, match=r"student/metrics\.jsonl is damaged"):
        build_report(run)
    edit(run, lambda metrics: metrics.update(schema_version=99))
    with pytest.raises(UserError, match="schema_version 99"):
        build_report(run)


def test_no_control_and_a_dense_teacher(run):
    shutil.rmtree(run / "control")

    def change(metrics):
        metrics["models"].pop("control")
        metrics["models"]["teacher"].pop("moe")
        metrics["comparisons"] = [c for c in metrics["comparisons"] if "control" not in (c["a"], c["b"])]

    edit(run, change)
    page = rebuilt(run)
    assert "Better than the base before training: the student solves" in page.text
    assert (
        "No control was trained" in page.text
        and "Not in this folder, or not finished: control/." in page.text
    )
    assert "All are dense" in page.text and "MaxVio" not in page.text
    assert "learned:" in page.text


def test_evaluation_alone(run):
    for stage in ("prompts", "generations", "dataset", "student", "control", "eval/answers"):
        shutil.rmtree(run / stage)
    (run / "eval" / "manifest.json").unlink()
    (run / "recipe.yaml").unlink()

    def change(metrics):
        metrics["comparisons"] = []
        metrics["models"] = {"student": metrics["models"]["student"]}
        metrics["models"]["student"].pop("fidelity")

    edit(run, change)
    page = rebuilt(run)
    for said in ("No verdict", "evaluation only", "without a recipe", "no eval/answers/", "Not measured"):
        assert said in page.text
    assert "Training curves" not in page.text and "Fingerprints" not in page.text


def test_holes_in_the_numbers(run):
    """Nothing measured, a null loss, an unfinished control, no tasks at all: dashes, no crash."""
    (run / "control" / "manifest.json").unlink()
    lines = (run / "student" / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[9]) | {"loss": None, "objectives": {"cross_entropy": None, "forward_kl": None}}
    (run / "student" / "metrics.jsonl").write_text("\n".join([*lines[:9], json.dumps(broken), *lines[10:]]))

    def change(metrics):
        metrics["models"]["base"] = {"path": "x", "model": {}, "tasks": {}, "cost": {}}
        metrics["models"]["teacher"]["moe"]["layers"]["model.layers.1.mlp"]["load"] = [0.0] * 7 + [1.0]
        metrics["models"]["control"]["tasks"]["hard"]["accuracy"] = None

    edit(run, change)
    page = rebuilt(run)
    assert ["base", "–", "–", "–", "–"] in page.cells
    assert next(r for r in page.cells if r[0] == "student" and r[1:3] == ["60", "6,000"])[6] == "1"
    assert "the same base trained without the teacher –." in page.text
    edit(run, lambda metrics: metrics.update(models={"m": {"path": "m", "model": {}}}, comparisons=[]))
    assert "No verdict" in rebuilt(run).text


def test_a_step_written_twice_counts_once(run):
    path = run / "student" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with open(path, "a") as file:
        file.write(json.dumps(last | {"tokens": 700}) + "\n")
    assert next(r for r in rebuilt(run).cells if r[0] == "student" and r[1] == "60")[2] == "6,600"


# ---- formats and the plain table


def test_formats():
    zero = {"accuracy": 0.0, "ci95": [-1e-17, 0.3]}
    assert pages.percent(zero, 0).replace(pages.NB, " ") == "0 % [0, 30]"  # not -0
    nb = {value: text.replace(" ", pages.NB) for value, text in {1: "1", 999: "999", 1500: "1.5 k"}.items()}
    assert {value: pages.si(value) for value in nb} == nb
    assert pages.si(999_700, "B") == f"1{pages.NB}MB" and pages.si(None) == pages.si(float("nan")) == "–"
    times = {5: "5.0 s", 59.97: "1 min 0 s", 61: "1 min 1 s", 3599.6: "1 h 0 min", 7260: "2 h 1 min"}
    assert {value: pages.duration(value).replace(pages.NB, " ") for value in times} == times
    assert (
        pages.number(1234567) == "1,234,567"
        and pages.number([3, 5]) == "2"
        and pages.number(0.12345) == "0.123"
    )


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_percent_loses_at_most_half_a_digit(a, low, high):
    shown = re.findall(r"[-\d.]+", pages.percent({"accuracy": a, "ci95": [low, high]}))
    assert np.allclose([float(x) for x in shown], [100 * a, 100 * low, 100 * high], atol=0.0501)


@given(st.lists(st.floats(-10, 10) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_smoothing_is_the_mean_of_the_finite_neighbours(values, window):
    got = figures.smooth(np.array(values), window)
    width = min(window, len(values))
    for i in range(len(values)):
        last = i + (width - 1) // 2
        near = [v for v in values[max(0, last - width + 1) : last + 1] if not math.isnan(v)]
        assert np.isnan(got[i]) if not near else abs(got[i] - np.mean(near)) < 1e-9


def test_the_summary_of_a_text_has_the_columns_that_somebody_fills():
    model = {"tasks": {}, "text": {"a.txt": {"nll_per_token": 1.23456}}}
    alone = summary_table({"models": {"student": model}}).splitlines()
    assert [line.split() for line in alone] == [
        ["text:", "a.txt", "nats", "per", "token"],
        ["student", "1.235"],
    ]
    close = {"nll_per_token": 2.0, "teacher": {"forward_kl": 0.5, "top1_agreement": 0.25}}
    both = {"student": {"tasks": {}, "text": {"a.txt": close}}, "teacher": model}
    lines = summary_table({"models": both}).splitlines()
    assert lines[0].endswith("KL from the teacher  same top-1")
    assert [line.split() for line in lines[1:]] == [
        ["student", "2.000", "0.500", "25.0", "%"],
        ["teacher", "1.235", "–", "–"],
    ]


def test_the_summary_of_the_harness_has_each_metric_with_its_error():
    """`evaluate --harness TASK` alone says nothing else: neither an empty table of accuracies nor silence."""
    metrics = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    errors = {"exact_match,strict-match": 0.125, "exact_match,flexible-extract": None}
    found = {"tasks": {"gsm8k": {"n": 12, "metrics": metrics, "stderr": errors}}}
    lines = summary_table({"models": {"m": {"harness": found}}}).splitlines()
    assert [re.split(r"  +", line) for line in lines] == [
        ["lm-evaluation-harness", "task", "metric", "value"],
        ["m", "gsm8k (n=12)", "exact_match,strict-match", "0.250 ± 0.125"],
        ["m", "gsm8k (n=12)", "exact_match,flexible-extract", "0.500"],
    ]


def test_summary_table(whole):
    metrics = json.loads((whole / "eval" / "metrics.json").read_text())
    lines = summary_table(metrics).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["base", "control", "student", "teacher"]
    assert re.findall(r"(\w+) \(n=(\d+)\)", lines[0]) == [(level, "48") for level in LEVELS]
    for line in lines[1:]:
        values = metrics["models"][line.split()[0]]["tasks"]
        shown = [float(x) for x in re.findall(r"([\d.]+) %", line)]
        assert shown == [float(f"{100 * values[level]['accuracy']:.1f}") for level in LEVELS]
        assert line.index("%") < 30 and "\u00a0" not in line
    starts = {line.index("[", 20) - len(re.search(r"[\d.]+ % (?=\[)", line).group()) for line in lines[1:]}
    assert starts == {lines[0].index("easy")}  # columns line up
    metrics["models"]["base"]["tasks"].pop("hard")
    metrics["models"]["control"]["tasks"]["hard"]["n"] = 40
    assert "hard (n=40-48)" in summary_table(metrics) and "–" in summary_table(metrics).splitlines()[1]
    assert summary_table({"models": {"m": {}}}).splitlines() == ["accuracy [95 %]", "m"]
