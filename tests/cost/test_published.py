"""Published bills to the dollar, held to each other, to their papers' other figures, and to `describe`."""

import json
import subprocess
import sys

import pytest
from transformers import AutoConfig

from distill.commands.cli import main
from distill.cost import published as cost_v3
from distill.cost.published import deepseek_r1_bill, deepseek_v3_bill, format_bill, format_r1
from distill.errors import UserError
from distill.models.describe import describe_config

# ----------------------------------------------------------------------------------------- DeepSeek-V3's bill


def test_v3_bill_is_table_1_exactly():
    bill = deepseek_v3_bill()
    assert bill["gpu_hours"] == 2_788_000 and bill["usd"] == 5_576_000
    assert bill["stages"] == {
        "pre_training": {"gpu_hours": 2_664_000, "usd": 5_328_000},
        "context_extension": {"gpu_hours": 119_000, "usd": 238_000},
        "post_training": {"gpu_hours": 5_000, "usd": 10_000},
    }


def test_v3_first_principles_agree_with_the_paper_and_with_each_other():
    first = deepseek_v3_bill()["first_principles"]
    assert first["flops"] == pytest.approx(3.2856e24, rel=1e-6)
    assert first["gpu_hours_from_rate"] == pytest.approx(2_664_000)  # 180K x 14.8 is the table's first row
    assert round(first["days_per_trillion_tokens"], 1) == 3.7  # "only 180K H800 GPU hours, i.e., 3.7 days"
    assert first["days_of_pre_training"] < 61  # "completed in less than two months"
    assert first["utilisation"]["bf16"] == pytest.approx(0.3464, abs=1e-4)
    # Running for the published hours at that share of the peak does the published work: closes the circle.
    for name, peak in first["peak_flops_per_second"].items():
        work = first["utilisation"][name] * peak * 2_664_000 * 3600
        assert work == pytest.approx(6 * 37e9 * 14.8e12)


def test_v3_exclusions_name_their_source_and_its_quality():
    entries = deepseek_v3_bill()["not_counted"]
    text = " ".join(entry["item"] for entry in entries)
    assert all(word in text for word in ("research", "ablation", "salaries", "data", "capital"))
    for entry in entries:
        assert set(entry) == {"item", "range", "source", "source_quality"} and entry["source_quality"]
        if entry["range"] is not None:
            low, high = entry["range"]
            assert 0 < low <= high and entry["source"] and "secondary" in entry["source_quality"]


def test_v3_bill_prints_and_serialises():
    bill = deepseek_v3_bill()
    assert json.loads(json.dumps(bill)) == bill
    text = format_bill(bill)
    assert "$5,576,000" in text and "2,788,000" in text and "34.6%" in text and "$944M" in text


def test_a_caller_cannot_change_the_next_bill():
    deepseek_v3_bill()["first_principles"]["peak_flops_per_second"].clear()
    assert deepseek_v3_bill()["first_principles"]["peak_flops_per_second"]


def test_v3_sizes_are_those_that_describe_counts():
    """A dozen numbers of the config against the model that transformers builds from it."""
    found = describe_config(AutoConfig.for_model("deepseek_v3"), context=4096)
    # describe counts norms too, a hundred-thousandth.
    weights = found["parameters_active_without_embeddings"]
    assert cost_v3.multiplied_weights() == pytest.approx(weights, rel=1e-4)
    attention = (
        found["flops_per_token"] - 2 * weights
    )  # all 4,096 keys; a causal pass averages half and half a key
    assert cost_v3.attention_flops(4096, 61) == pytest.approx(attention / 2 * 4097 / 4096, rel=1e-4)
    whole = 3 * (found["flops_per_token"] - attention / 2)
    assert cost_v3.training_flops_per_token() == pytest.approx(whole, rel=2e-4)


def test_counting_more_work_implies_more_utilisation():
    counts = deepseek_v3_bill()["first_principles"]["counts"]
    shares = [count["utilisation"]["bf16"] for count in counts]
    assert shares == pytest.approx([0.346, 0.391, 0.407], abs=1e-3)
    assert all(0 < c["utilisation"]["fp8"] < c["utilisation"]["bf16"] < 1 for c in counts)


def test_the_implied_utilisation_gives_the_table_back():
    for count in deepseek_v3_bill()["first_principles"]["counts"]:
        again = cost_v3.bill(count["flops"], count["utilisation"]["bf16"], 2)
        assert again["gpu_hours"] == pytest.approx(2_664_000) and again["usd"] == pytest.approx(5_328_000)
        usd = [b["usd"] for b in count["bills_at_bf16_utilisation"]]
        assert usd == sorted(usd, reverse=True), "GPUs used better cost less"


def test_context_extension_is_attention_for_the_most_part():
    longer = deepseek_v3_bill()["first_principles"]["context_extension"]
    assert longer["tokens"] == 1000 * 1920 * 32768 + 1000 * 480 * 131072
    assert 0.2 < longer["utilisation"]["bf16"] < 0.4
    weights = 3 * 2 * (cost_v3.multiplied_weights() + cost_v3.prediction_weights()) * longer["tokens"]
    assert longer["flops"] > 2 * weights


def test_another_price_keeps_the_hours():
    bill = deepseek_v3_bill(3.5)
    assert bill["gpu_hours"] == 2_788_000 and bill["usd"] == 2_788_000 * 3.5
    assert "(the paper: $2)" in format_bill(bill)
    for price in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            deepseek_v3_bill(price)


# ---- R1 ------------------------------------------------------------------------------------------------


def test_r1_table_adds_up_and_stands_on_v3():
    bill = deepseek_r1_bill()
    assert (bill["gpu_hours"], bill["usd"]) == (147_000, 294_000)
    assert all(stage["usd"] == 2 * stage["gpu_hours"] for stage in bill["stages"].values())
    assert bill["with_v3"]["usd"] == 294_000 + 5_576_000 and round(bill["with_v3"]["share_of_r1"], 2) == 0.05
    assert json.loads(json.dumps(bill)) == bill and "$294,000" in format_r1(bill)
    assert bill["source_quality"] and all(entry["source_quality"] for entry in bill["not_counted"])
    assert deepseek_r1_bill(1)["usd"] == 147_000


def test_r1_checks_tell_what_agrees_from_what_does_not():
    agrees = {check["gives"]: check["agrees"] for check in deepseek_r1_bill()["checks"]}
    assert agrees == {512 * 198: True, 512 * 80: True, 512 * 96: False, 648 * 198: False}


def test_importing_the_bills_loads_no_torch():
    code = (
        "import sys, distill.cost.published, distill.cost.break_even, distill.data.ledger; "
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def run_cost(capsys):
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["cost", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """A recipe with a price, and the run folder that it left."""
    run_dir = tmp_path / "run"
    (run_dir / "student").mkdir(parents=True)
    manifest = {"counts": {"tokens": 5}, "seconds": 7200.0, "device": "NVIDIA H200"}
    (run_dir / "student" / "manifest.json").write_text(json.dumps(manifest))
    text = f"run_dir: {run_dir}\nteacher: {{model: t}}\nstudent: {{model: s}}\nprices: {{usd_per_device_hour: 1.5}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (run_dir / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml", run_dir


def test_bills_as_json(run_cost):
    for words in (("deepseek-v3", "--json"), ("--json",)):
        code, out, _ = run_cost(*words)
        found = json.loads(out)
        assert code == 0 and (found["gpu_hours"], found["usd"]) == (2_788_000, 5_576_000)
    assert json.loads(run_cost("deepseek-r1", "--json")[1])["usd"] == 294_000


def test_a_ledger_is_at_the_recipe_s_prices(run_cost, recipe):
    path, run_dir = recipe
    for words, usd in [
        ((str(run_dir),), 3.0),
        ((str(path),), 3.0),
        ((str(path), "prices.usd_per_device_hour=4"), 8.0),
        ((str(run_dir), "--usd-per-hour", "2"), 4.0),
    ]:
        code, out, _ = run_cost(*words, "--json")
        assert code == 0 and json.loads(out)["totals"]["usd"] == usd, words
    (run_dir / "recipe.yaml").unlink()
    assert json.loads(run_cost(str(run_dir), "--json")[1])["totals"]["usd"] is None


def test_break_even_by_hand_and_by_the_committed_measurement(run_cost, tmp_path):
    amounts = (
        "--teacher-query",
        "3",
        "--student-query",
        "1",
        "--teacher-outputs",
        "6",
        "--distil-student",
        "4",
    )
    code, out, _ = run_cost("--break-even", *amounts, "--queries", "5", "--json")
    found = json.loads(out)
    assert code == 0 and found["by_queries"][0]["to"] == 5.0 and found["cheapest"] == ["teacher", "distil"]
    code, out, _ = run_cost("--break-even")
    assert code == 0 and "keep calling the teacher up to" in out and "FLOPs" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (("a", "b"), "'b': key=value goes with a RECIPE"),
        (("deepseek-v3", "--out", "x"), "--out goes with --break-even"),
        (("deepseek-r1", "--break-even"), "not with deepseek-r1"),
        (("--break-even", "--student-query", "1"), "--teacher-query is missing; give it, or a RUN_DIR"),
        (("--break-even", "--usd-per-hour", "1"), "needs a RUN_DIR"),
        (("absent", "--break-even"), "no folder of a run"),
    ],
)
def test_mistakes_are_told_in_a_line(run_cost, words, said):
    code, out, err = run_cost(*words)
    assert code == 2 and said in err and not out and "Traceback" not in err
