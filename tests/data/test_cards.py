"""Cards after an evaluation: what was measured stands in them once, and the folder stays whole."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from distill.config.recipe import load_recipe
from distill.config.training import StudentSection, Train
from distill.data.cards import refresh_cards, student_card, unmeasured
from distill.data.provenance import provenance
from distill.errors import UserError
from distill.stages import Stage
from distill.storage import read_json, write_json

COUNTS = {
    "parameters_trainable": 10,
    "parameters_total": 100,
    "steps": 4,
    "tokens": 1234,
    "tokens_read": 5678,
}


def score(correct: int, n: int, low: float, high: float) -> dict:
    return {"n": n, "accuracy": correct / n, "ci95": [low, high]}


def compared(a: str, b: str, difference: float, ci95: list, verdict: str) -> dict:
    return {"a": a, "b": b, "task": "easy", "difference": difference, "ci95": ci95, "verdict": verdict}


@pytest.fixture
def run_dir(make_recipe):
    """A run folder with two finished arms and an evaluation, as the stages leave them, without the training."""
    path, folder = make_recipe()
    recipe = load_recipe(path)
    for arm in ("student", "control"):
        stage = Stage(folder, arm, {"student": {}}, {})
        stage.begin()
        save_file({"w": torch.ones(2)}, stage.folder / "model.safetensors")
        (stage.folder / "README.md").write_text(student_card(recipe, arm, COUNTS))
        stage.finish(COUNTS, device="cpu (test, 1 threads)", flops=2.5e9, peak_memory_bytes=3_210_000_000)
    metrics = {
        "models": {
            "base": {"tasks": {"easy": score(1, 10, 0.018, 0.404)}},
            "control": {"tasks": {"easy": score(3, 10, 0.108, 0.603)}},
            "student": {
                "tasks": {"easy": score(7, 10, 0.397, 0.892)},
                "fidelity": {"tokens": 900, "top1_agreement": 0.875, "forward_kl": 0.25, "reverse_kl": 0.5},
            },
        },
        "comparisons": [
            compared("base", "control", 0.2, [-0.1, 0.5], "INCONCLUSIVE"),
            compared("base", "student", 0.6, [0.2, 0.8], "BEATS"),
            compared("control", "student", 0.4, [-0.05, 0.7], "INCONCLUSIVE"),
        ],
    }
    write_json(folder / "eval" / "metrics.json", metrics)
    return folder


def test_what_was_measured_is_in_both_cards(run_dir):
    assert [p.parent.name for p in refresh_cards(run_dir, usd_per_device_hour=3600.0)] == [
        "student",
        "control",
    ]
    student, control = ((run_dir / arm / "README.md").read_text() for arm in ("student", "control"))
    row = "| easy | 10 | 70.0% | 39.7% to 89.2% | +60.0 points (+20.0 to +80.0): BEATS | "
    assert row + "+40.0 points (-5.0 to +70.0): INCONCLUSIVE |" in student
    assert "| easy | 10 | 30.0% | 10.8% to 60.3% | +20.0 points (-10.0 to +50.0): INCONCLUSIVE |" in control
    assert (
        "(900 tokens)" in student and "87.5%" in student and "forward KL 0.2500, reverse KL 0.5000" in student
    )
    assert "forward KL" not in control
    manifest = read_json(run_dir / "student" / "manifest.json")
    for line in (
        "- trained tokens: 1,234",
        "- tokens read: 5,678",
        "- compute: 2.50e+09 FLOPs",
        "- peak memory: 3.21 GB",
        f"- cost of this arm: {manifest['seconds']:.4f} USD",  # at 1 USD a second
        f"- this folder: `{manifest['fingerprint']}`",
    ):
        assert line in student
    widths = {line.count("|") for line in student.splitlines() if line.startswith("|")}
    assert widths == {7}  # head, rule and rows of one table


def test_a_second_time_changes_nothing_and_no_price_is_no_cost(run_dir):
    before = (run_dir / "student" / "README.md").read_text()
    refresh_cards(run_dir)
    once = (run_dir / "student" / "README.md").read_text()
    assert "USD" not in once and once.startswith(before.rstrip("\n"))
    refresh_cards(run_dir)
    assert (run_dir / "student" / "README.md").read_text() == once
    assert unmeasured(once) == before.rstrip("\n") + "\n"


def test_the_folder_stays_whole(run_dir):
    refresh_cards(run_dir)
    assert Stage(run_dir, "student", {"student": {}}, {}).done()
    assert provenance(run_dir / "student")["whole"]
    assert "README.md" not in read_json(run_dir / "student" / "manifest.json")["files"]


def test_without_an_evaluation_it_says_so(run_dir):
    (run_dir / "eval" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json is missing"):
        refresh_cards(run_dir)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "LoRA rank 2 on all-linear, "),
        (
            ["student.lora.dora=true", "student.lora.targets=[q_proj, o_proj]"],
            "DoRA rank 2 on q_proj, o_proj, ",
        ),
        (
            ["student.lora.experts=true", "student.lora.router=true"],
            "all-linear and routed experts and router, ",
        ),
        (
            ["student.quantize=4bit", "student.lora.rslora=true"],
            "rsLoRA rank 2 on all-linear over a 4bit base",
        ),
        (["student.adapter=full"], "full, "),
    ],
)
def test_the_card_says_what_trained(make_recipe, overrides, words):
    path, _ = make_recipe()
    recipe = load_recipe(path, overrides)
    card = student_card(recipe, "student", COUNTS)
    assert f"- fine-tuning: {words}" in card or words in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == recipe.student.model
    written = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (
        Train(**written["train"]) == recipe.train and StudentSection(**written["student"]) == recipe.student
    )


def test_a_card_carries_no_tag_of_a_name(make_recipe):
    """Names of models, files and folders are other people's; pages of hubs render cards."""
    from distill.data.export import write_card

    evil = "org/<script>alert(1)</script>`<img src=x>"
    path, run_dir = make_recipe()
    overrides = [
        f"run_dir={run_dir.parent}/<script>x", f"teacher.model={evil}", f"student.model={evil}",
        "prompts.system='<script>`s'", f"prompts.source={evil}.jsonl", "evaluate.source=x.jsonl",
    ]  # fmt: skip
    recipe = load_recipe(path, overrides)
    counts = {"parameters_trainable": 1, "parameters_total": 2, "steps": 3, "tokens": 4}
    card = student_card(recipe, "student", counts)
    filtered = {"rows": 1, "kept": 1, "dropped": 0, "dropped_by_rule": {}, "prompts_covered": 1}
    write_card(recipe, run_dir, filtered, None)
    body = (run_dir / "README.md").read_text().rpartition("---\n")[2]
    for text in (card.partition("---\n")[2].partition("---\n")[2], body):
        assert "<script" not in text and "<img" not in text
        assert all(line.count("`") % 2 == 0 for line in text.splitlines() if "```" not in line), (
            "no code span is left open"
        )
    block = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block)["student"]["model"] == evil, "the recipe in the card still says what it said"
