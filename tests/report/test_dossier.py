"""The dossier: every number on it is one of the inputs, what models wrote stays text, and what was not measured is
left out. The made-up evaluation is in dossier_example.py."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dossier_example import ATTACK, FAMILIES, LEVELS, N, example, example_metrics, write_routes
from page_reading import Page, points

from distill.errors import UserError
from distill.evaluation.routes import read_routes
from distill.evaluation.schema import check
from distill.report import drawing, experts, pages
from distill.report import figures as dossier_plots
from distill.report.dossier import build_dossier, viewer_data
from distill.report.drawing import in_order
from distill.report.experts import few, moe_view
from distill.report.findings import over_confidence


def build(folder: Path) -> Page:
    return Page(build_dossier(folder).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """With figures, once: they are most of the time."""
    folder = example(tmp_path_factory.mktemp("evaluations") / "eval-demo")
    build_dossier(folder)
    return folder


@pytest.fixture(scope="module")
def text(whole) -> str:
    return (whole / "dossier.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


DRAWINGS = [
    (dossier_plots, name)
    for name in (
        "family_panel",
        "verdict_panel",
        "compute_panel",
        "score_dots",
        "log_dots",
        "layer_lines",
    )
] + [(dossier_plots, "reliability"), (dossier_plots, "accuracy_panel")]
DRAWINGS += [(experts, name) for name in ("expert_load", "heat_map", "loss_map")]


@pytest.fixture
def copy(whole, tmp_path, monkeypatch) -> Path:
    """A copy that a test may change, without figures: they would take most of the time."""
    for module, name in DRAWINGS:
        monkeypatch.setattr(module, name, lambda *_, **__: "")
    return Path(shutil.copytree(whole, tmp_path / "eval-demo"))


@pytest.fixture
def drawn(whole, tmp_path, monkeypatch) -> Path:
    """The same, with figures that are made but not written out."""
    for module in (drawing, dossier_plots):
        monkeypatch.setattr(module, "to_svg", lambda *_, **__: "")
    return Path(shutil.copytree(whole, tmp_path / "eval-demo"))


def edit(folder: Path, change) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    change(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def spaced(text: str) -> str:
    return text.replace(pages.NB, " ")


# ---- numbers on the page are the inputs


def test_the_example_is_what_an_evaluation_writes():
    check(example_metrics())


def test_comparison_and_verdicts(whole, page):
    metrics = json.loads((whole / "metrics.json").read_text())
    for model, values in metrics["models"].items():
        for task, s in values["tasks"].items():
            low, high = s["ci95"]
            row = next(r for r in page.cells if r[:2] == [task, model] and len(r) == 11)
            assert row[2] == f"{100 * s['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            voted = [100 * x for x in (s["majority_at_k"]["4"], *s["majority_at_k_ci95"]["4"])]
            assert row[5] == f"{voted[0]:.0f} % [{voted[1]:.0f}, {voted[2]:.0f}]"
            assert row[3] == str(s["n"]) and row[6:9] == ["3", "2", "0"]
    for c in metrics["comparisons"]:
        row = next(r for r in page.cells if r[:2] == [c["task"], f"{c['b']} against {c['a']}"])
        assert row[2].endswith(c["verdict"])
        assert row[3] == points(100 * c["difference"], *(100 * bound for bound in c["ci95"]))
        assert row[6] == ("0.300" if c["verdict"] == "INCONCLUSIVE" else "< 0.001")
    assert (
        "the number of comparisons (Holm, 9 of them)" in page.text and "corrected p below 0.05" in page.text
    )
    assert "The student still solves 96.0 % [90.0, 98.5] of the 100 problems that base solved." in page.text


def test_tables_of_the_other_blocks(whole, page):
    metrics = json.loads((whole / "metrics.json").read_text())
    layer = metrics["models"]["teacher"]["moe"]["layers"]["model.layers.2.mlp"]
    violation = max(layer["load"]) * 8 - 1
    measured = ["layer 2", "48,211", "2 of 8", f"{violation:.3f}", "0.021", f"{violation / 0.021:.1f} ×"]
    assert any(row[:6] == measured for row in page.cells)
    assert ["layer 2", "8.7 % (12.7 %)", "2.1 % (4.2 %)", "0.3 % (0.9 %)", "0.0 % (0.1 %)"] in page.cells
    assert ["layer 3", "87.0 %", "88.0 %"] in page.cells  # saturation
    special = layer["specialisation"]["family"]["strongest"][0]
    share = f"{100 * special['share']:.1f} %"
    row = ["layer 2", special["group"], str(special["expert"]), share, "20.0 %", "25.0 %"]
    assert [*row, f"{special['share'] / 0.25:.1f} ×", "17.3"] in page.cells
    assert [
        "layer 1",
        "tokens of expert 0 also reach expert 1",
        "81.0 %",
        f"{0.81 / (1 / 7):.1f} ×",
    ] in page.cells
    assert next(r for r in page.cells if r[0] == "bf16")[:7] == [
        "bf16",
        "0.51301",
        "–",
        "+0.131 %",
        "+0.000 %",
        "0.52 %",
        "1.56 %",
    ]
    assert ["fp8-emulated", "layer 3", "4.51 %", "9.03 %", "0.00630", "0.14320"] in page.cells
    assert "fp16: did not run: fp16 needs CUDA: this is a CPU" in page.text
    assert next(r for r in page.cells if r[:2] == ["student", "its own text"])[:4] == [
        "student",
        "its own text",
        "90.3 % [89.1, 91.5]",
        "0.1000 [0.0760, 0.1240]",
    ]
    assert ["student", "0.0187", "0.3210", "0.7000", "2,345", "0.0912", "0.1504", "180"] in page.cells
    speeds = ["8,120", "98.7", "1,160", "256", "123 MFLOP", "48,211", "41.5 s", "0.40", "0.0137", "0.0956"]
    assert ["teacher", *speeds] in page.cells
    sizes = ["3.65 M", "1.48 M", "1.46 M", "2.92 MFLOP", "96", "960 B", "7.3 MB"]
    assert ["teacher", *sizes] in page.cells
    assert sum("0.86 M + 0.14 M adapter" in row for row in page.cells) == 4  # two models, two tables


def test_interventions_worst_first(whole, page):
    metrics = json.loads((whole / "metrics.json").read_text())
    single = [
        e
        for e in metrics["models"]["teacher"]["interventions"]
        if e["kind"] == "drop" and "+" not in e["value"]
    ]
    order = sorted(single, key=lambda entry: entry["comparison"]["difference"])
    places = [re.fullmatch(r"without expert (\d) of layer (\d)", row[0]) for row in page.cells]
    shown = [f"{found[2]}:{found[1]}" for found in places if found]
    assert shown == [entry["value"] for entry in order[:12]] and "12 more experts were taken out" in page.text
    row = next(r for r in page.cells if r[0] == "1 expert per token")
    assert row[1:3] == ["▼ WORSE", points(-30, -35, -25)] and row[5:7] == ["1", "2.46 MFLOP"]


def test_layers_and_levels_stand_as_a_reader_counts(whole):
    """JSON keys are sorted as text, layer 10 before layer 2 and hard before medium."""
    metrics = json.loads((whole / "metrics.json").read_text())
    moe = metrics["models"]["teacher"]["moe"]
    moe["layers"] = {f"model.layers.{n}.mlp": next(iter(moe["layers"].values())) for n in (1, 10, 11, 2)}
    view = moe_view("teacher", metrics["models"]["teacher"])
    assert [row[0] for row in view["rows"]] == ["layer 1", "layer 2", "layer 10", "layer 11"]
    assert in_order(["hard", "easy", "zebra 10", "zebra 9", "medium"])[:3] == ["easy", "medium", "hard"]
    assert in_order(["zebra 10", "zebra 9"]) == ["zebra 9", "zebra 10"]


def test_groups_too_small_to_judge_are_said_to_be(whole):
    teacher = json.loads((whole / "metrics.json").read_text())["models"]["teacher"]
    for layer in teacher["moe"]["layers"].values():
        block = layer["specialisation"]["family"]
        block["strongest"], block["answers"] = [], [9] * len(block["groups"])
    kinds = {kind["words"]: kind for kind in moe_view("teacher", teacher)["specialisation"]}
    assert kinds["kind of problem"]["unjudged"] and not kinds["part of the text"]["unjudged"]


MUTATIONS = [  # where, a value found nowhere else, how it reads
    ("models.base.tasks.hard.accuracy", 0.06173, "6.2 %"),
    ("models.base.tasks.hard.pass_at_k.4", 0.4861, "49 %"),
    ("models.base.tasks.hard.mean_thinking_tokens", 77.77, "77.8"),
    ("models.base.text.notes.txt.nll_per_token", 3.14159, "3.1416"),
    ("models.base.likelihood.arc.0.per_byte.accuracy", 0.7357, "73.6 %"),
    ("models.base.harness.tasks.arc_easy.metrics.acc,none", 0.8462, "0.8462"),
    ("models.base.families.counting.easy.accuracy", 0.1357, "14 %"),
    ("comparisons.0.p_value_holm", 0.0271, "0.027"),
    ("comparisons.1.difference", 0.12345, "+12.3 points"),
    ("forgetting.models.student.easy.gained", 0.6319, "63.2 %"),
    ("models.teacher.moe.layers.model.layers.1.mlp.router_entropy", 1.9753, "1.975"),
    ("models.teacher.moe.layers.model.layers.1.mlp.token_drop.1.25", 0.3217, "32.2 %"),
    ("models.teacher.moe.layers.model.layers.1.mlp.coactivation.strongest.0.2", 0.7123, "71.2 %"),
    ("models.teacher.moe.layers.model.layers.1.mlp.specialisation.token.0.n", 987, "987"),
    ("models.teacher.moe.saturation.later.uniform", 0.1928, "19.3 %"),
    ("models.teacher.interventions.1.comparison.difference", -0.2222, "−22.2 points"),
    ("models.teacher.precision.1.flips.slots", 0.07419, "7.42 %"),
    ("models.student.calibration.answers.ece", 0.28374, "0.2837"),
    ("models.student.fidelity.own_text.reverse_kl", 0.54545, "0.5454"),
    ("models.student.cost.usd_per_million_output_tokens", 0.6543, "0.6543"),
    ("models.student.model.kv_bytes_per_token", 7770, "7.77 kB"),
]


def put(value, path: str, new) -> None:
    """Set the leaf at a dotted path, whose keys may hold dots themselves."""
    if isinstance(value, list):
        head, _, path = path.partition(".")
        key = int(head)
    else:
        key = max((k for k in value if path == k or path.startswith(f"{k}.")), key=len)
        path = path[len(key) + 1 :]
    if path:
        put(value[key], path, new)
    else:
        value[key] = new


def test_a_changed_number_changes_the_page(copy, page):
    before = page.text.split()
    edit(copy, lambda metrics: [put(metrics, path, new) for path, new, _ in MUTATIONS])
    after = build(copy).text
    for path, _, said in MUTATIONS:
        assert spaced(said) in after, path
        assert said.split()[0] not in before or said.endswith("%"), f"{said} was there before"


def test_figures_show_the_numbers(text):
    labels = re.findall(r'aria-label="([^"]*)"', spaced(text))
    for begin in (
        "Accuracy on hard: base 4 %, student 80 %",
        "Accuracy per family on easy",
        "Differences in accuracy on medium",
        "Share of tokens per expert and layer of teacher",
        "layer 1: also at expert",
        "layer 3: part of the text by expert",
        "Accuracy on easy against operations per token",
        "teacher: points of accuracy lost without one expert",
        "Accuracy on hard: as it is, without expert 0 of layer 1 and expert 1 of layer 2, random routing",
        "teacher: loss error, % of the fp32 loss: bf16 0.131, fp8-emulated 1.84",
        "Reliability of whole answers: base, student",
    ):
        assert any(label.startswith(begin) for label in labels), begin


def colours_of_cells(svg: str) -> dict[str, str]:
    """What a cell says under the pointer -> its colour."""
    return dict(re.findall(r"<g><title>([^<]*)</title>.*?fill: (#\w+)", svg, re.S))


def test_heat_map_writes_every_cell():
    cells = np.array([[1.25, np.nan], [25.0, 100.0]])
    svg = drawing.heat_map("layer 1", ["a", "b<b>"], cells, uniform=25.0, what="family")
    for said in (
        "1.2",
        "25.0",
        "100",
        "even: 25 %",
        "b&lt;b&gt;",
        "a, expert 0: 1.2 %, 0.05 × the even share",
    ):
        assert said in svg
    assert len(colours_of_cells(svg)) == 3  # nothing for the one that is empty
    assert not [colour for colour in drawing.CSS_COLOURS if colour in svg]


WHITE = "#f7f7f6"  # the middle of the scale


def test_one_scale_of_colours_for_all_maps():
    """A share that is twice the even one has the same colour whatever else the figure holds; even is white."""

    def colour(values, uniform, say):
        svg = drawing.heat_map("", ["a"], np.array([values]), uniform=uniform, what="family")
        return next(c for said, c in colours_of_cells(svg).items() if say in said)

    assert colour([50.0, 25.0], 25.0, "expert 0") == colour([10.0, 1.0, 39.0], 5.0, "expert 0")
    load = colours_of_cells(drawing.expert_load("m", {"model.layers.1.mlp": [0.25, 0.25, 0.4, 0.1]}))
    assert load["layer 1, expert 0: 25.0 %, 1.00 × the even share"] == WHITE
    assert colour([30.0, 70.0], 30.0, "expert 0") == load["layer 1, expert 0: 25.0 %, 1.00 × the even share"]
    more, less = colour([100.0, 1.0], 25.0, "expert 0"), colour([1.0, 100.0], 25.0, "expert 0")
    assert int(more[1:3], 16) > int(more[5:], 16) and int(less[5:], 16) > int(less[1:3], 16)  # orange, purple
    assert more == colour([400.0, 1.0], 25.0, "expert 0")  # the scale ends at 4 times
    assert more != colour([50.0, 1.0], 25.0, "expert 0")  # and not before


def test_a_loss_is_coloured_around_zero():
    cells = colours_of_cells(drawing.loss_map("lost", ["layer 1"], np.array([[-4.0, 0.0, 40.0]])))
    gain, none, loss = cells.values()
    assert (
        none == WHITE and int(loss[1:3], 16) > int(loss[5:], 16) and int(gain[5:], 16) >= int(gain[1:3], 16)
    )
    assert list(cells) == [f"layer 1, expert {e}: {n} points" for e, n in enumerate(("−4.0", "0.0", "40.0"))]


def test_bins_with_few_answers_are_faded():
    def opacity(n):
        bins = [{"low": 0.0, "high": 0.5, "n": n, "confidence": 0.4, "accuracy": 0.3},
                {"low": 0.5, "high": 1.0, "n": 500, "confidence": 0.8, "accuracy": 0.7}]  # fmt: skip
        svg = dossier_plots.reliability("tokens", {"m": {"ece": 0.1, "brier": 0.2, "bins": bins}}, ["m"])
        mark = re.search(rf"n = {n}</title>.*?</g>\s*</g>", svg, re.S).group()
        return "opacity: 0.25" in mark

    assert opacity(dossier_plots.FEW_ANSWERS - 1) and not opacity(dossier_plots.FEW_ANSWERS)


def test_over_confidence_by_hand():
    bins = [
        {"n": 30, "confidence": 0.9, "accuracy": 0.6},
        {"n": 10, "confidence": 0.5, "accuracy": 0.7},
        {"n": 0, "confidence": None, "accuracy": None},
    ]
    assert over_confidence(bins) == pytest.approx((30 * 0.3 - 10 * 0.2) / 40)
    assert over_confidence([]) is None


def test_few_layers():
    names = [f"layer {i}" for i in range(16)]
    assert few(names) == ["layer 0", "layer 8", "layer 15"] and few(names[:2]) == names[:2]


# ---- the answer viewer


def embedded(text: str) -> dict:
    found = re.findall(r'<script type="application/json" id="viewer-data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def test_viewer_data_are_the_recorded_decisions(whole, text):
    [model] = embedded(text)["models"]
    rows = pq.read_table(whole / "routes" / "teacher.parquet").to_pylist()
    assert model["layers"] == ["layer 1", "layer 2", "layer 3"] and len(model["answers"]) == len(rows) == 24
    for answer, row in zip(model["answers"], rows):
        tokens = len(row["tokens"])
        assert answer["id"] == row["prompt_id"] and answer["left"] == 0 and len(answer["tokens"]) == tokens
        assert base64.b64decode(answer["e"]) == row["experts"]
        weights = np.frombuffer(row["weights"], "<f2").astype(float)
        shown = np.frombuffer(base64.b64decode(answer["w"]), np.uint8) / model["scale"]
        assert np.abs(shown - weights).max() <= 0.00501
        assert [label for label, n in answer["runs"] for _ in range(n)] == row["classes"]
        assert "".join(answer["tokens"]).replace("·", "").replace("␣", " ").replace("↵", "\n") == "".join(
            row["tokens"]
        ).replace("\x07", "\u2407")
    assert model["answers"][0]["reference"] == "reference 0 </script>"


def test_viewer_without_a_script_shows_the_first_layer(whole, page, text):
    row = pq.read_table(whole / "routes" / "teacher.parquet").to_pylist()[0]
    experts = np.frombuffer(row["experts"], np.uint8).reshape(3, -1, 2)[0]
    numbers = re.findall(r'<span class="numbers"><b>(\d+)</b> <span>(\d+)</span>', text)
    assert [[int(n) for n in pair] for pair in numbers] == experts.tolist()
    assert text.count('<span class="token c') == len(experts)
    for label in ("prompt", "thinking", "answer"):
        assert f'<div class="tokens in-{label}">' in text


def test_size(text):
    data = re.search(r'id="viewer-data">(.*?)</script>', text, re.S).group(1)
    assert len(data.encode()) < 1_000_000
    assert len(text.encode()) < 2_500_000


def test_a_large_model_keeps_to_the_budget(tmp_path):
    write_routes(tmp_path / "routes" / "big.parquet", experts=64, layers=16, k=8, answers=6, tokens=400)
    write_routes(tmp_path / "routes" / "small.parquet", experts=8, layers=2, k=2, answers=6, tokens=30)
    routes = {name: read_routes(tmp_path / "routes" / f"{name}.parquet") for name in ("big", "small")}
    view = viewer_data(routes, {}, budget=200_000)
    big, small = view["data"]["models"]
    assert len(json.dumps(view["data"], ensure_ascii=False).encode()) < 210_000
    assert len(small["answers"]) == 6 and 0 < len(big["answers"]) < 6
    assert view["shown"] == len(small["answers"]) + len(big["answers"]) and view["of"] == 12
    first = big["answers"][0]
    kept = len(first["tokens"])
    assert 0 < kept < 400 and first["left"] == 400 - kept and sum(n for _, n in first["runs"]) == kept
    original = routes["big"].rows[0].experts[:, :kept].tobytes()
    assert base64.b64decode(first["e"]) == original
    shown = np.frombuffer(base64.b64decode(first["w"]), np.uint8) / big["scale"]
    assert np.abs(shown - routes["big"].rows[0].weights[:, :kept].astype(float).ravel()).max() <= 0.00501
    assert viewer_data({}, {}, 1000) is None


# ---- one safe, whole, repeatable file


def test_model_text_stays_text(text, page):
    scripts = [a for tag, a in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "viewer-data"}, {}]
    assert text.index('id="viewer-data"') < text.index('id="comparison"')  # the viewer comes first
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "link", "base", "form")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    body = text.split('id="viewer-data">')[0]
    assert "alert('model')" not in body and "&lt;script&gt;alert(&#39;model&#39;)" in body
    assert embedded(text)["models"][0]["answers"][0]["tokens"][-1].startswith(ATTACK.split(" ")[0])


def test_only_this_script_may_run(text, page):
    [script] = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script and "eval(" not in script


def test_one_file_without_network(whole, text, page):
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    assert wanted <= set(ids)
    assert not [p for p in whole.iterdir() if p.name.startswith(".")]


def test_same_folder_gives_same_bytes(copy):
    assert build_dossier(copy).read_bytes() == build_dossier(copy).read_bytes()


# ---- what is missing


def test_almost_nothing_measured(copy):
    for folder in ("routes", "answers"):
        shutil.rmtree(copy / folder)
    (copy / "manifest.json").unlink()
    edit(copy, lambda m: (m.clear(), m.update(schema_version=2, models={"only": {}}, comparisons=[])))
    page = build(copy)
    for absent in (
        "MaxVio",
        "Who is better",
        "capacity",
        "KL divergence",
        "In other precisions",
        "forgot",
        "Tokens and experts",
    ):
        assert absent not in page.text
    assert not [tag for tag, _ in page.tags if tag == "figure"]
    assert ["only", *["–"] * 7] in page.cells and "No verdict" in page.text and "nan" not in page.text.lower()


def test_holes_in_every_block(drawn):
    """A null or an absent key anywhere is a dash or a missing figure."""

    def change(metrics):
        teacher, student, base = (metrics["models"][name] for name in ("teacher", "student", "base"))
        base["tasks"]["hard"] |= {"accuracy": None, "ci95": None, "stderr": None}
        base["families"]["counting"]["easy"] |= {"accuracy": None, "ci95": None}
        base["calibration"] = {"answers": {"n": 0, "ece": None, "brier": None, "bins": []}}
        del student["calibration"]["answers"], student["fidelity"]["own_text"]
        student["fidelity"]["forward_kl_ci95"] = None
        layers = teacher["moe"]["layers"]
        first, second, third = layers.values()
        first["router_entropy"] = first["confidence"] = None
        del first["specialisation"], second["token_drop"], third["coactivation"]
        second["coactivation"] |= {"matrix": None, "strongest": []}
        second["specialisation"]["level"] |= {"share": None, "strongest": []}
        del teacher["moe"]["saturation"]
        teacher["interventions"] = [e for e in teacher["interventions"] if e["kind"] in ("none", "route")]
        teacher["interventions"][1]["tasks"].pop("easy")
        teacher["precision"][1] |= {"nll_per_token": None, "relative_loss_error": None, "flips": None}
        base["interventions"] = [{"kind": "skipped", "value": None, "label": "dense model"}]
        metrics["comparisons"][0] |= {"difference": None, "ci95": None, "p_value": None, "p_value_holm": None}
        metrics["forgetting"]["models"]["student"]["hard"] |= {"kept": None, "ci95": None}

    edit(drawn, change)
    page = build(drawn)
    row = next(r for r in page.cells if r[0] == "layer 1" and len(r) == 13)
    assert row[-2:] == ["–", "–"]
    assert next(r for r in page.cells if r[:2] == ["student", "the teacher's text"])[:4] == [
        "student",
        "the teacher's text",
        "88.8 % [87.6, 90.0]",
        "0.2468",
    ]
    assert ["student", "hard", "–", "100", "55.0 %", "92"] in page.cells
    assert "without one expert" not in page.text and "random routing" in page.text
    assert "nan" not in page.text.lower().split() and "None" not in page.text


def test_two_samples_and_a_missing_answer(copy):
    part = copy / "answers" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)
    data = embedded(build_dossier(copy).read_text())
    first, second = data["models"][0]["answers"][:2]
    assert "reference" not in first and second["reference"].startswith("reference 1")


def test_mistakes_are_told(copy):
    edit(copy, lambda metrics: metrics.update(schema_version=1))
    with pytest.raises(UserError, match=r"schema_version 1, not 2.*--redo"):
        build_dossier(copy)
    (copy / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json is missing.*distill evaluate"):
        build_dossier(copy)
    with pytest.raises(UserError, match="missing"):
        build_dossier(copy / "nowhere")


def test_families_are_a_panel_per_task(page):
    rows = [row for row in page.cells if row[0] in FAMILIES and row[1] in LEVELS and row[-1] == str(N)]
    assert len(rows) == len(FAMILIES) * len(LEVELS)
