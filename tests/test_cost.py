"""The published bill to the dollar, and a ledger that adds up and invents nothing."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.cost import STAGES, deepseek_v3_bill, format_bill, format_ledger, run_ledger
from distill.devices import describe_device
from distill.errors import UserError


def write_manifest(run_dir, stage, **manifest):
    (run_dir / stage).mkdir(parents=True)
    (run_dir / stage / "manifest.json").write_text(json.dumps({"stage": stage, "counts": {}, **manifest}))


@pytest.fixture
def finished_run(tmp_path):
    """Two finished stages whose numbers are easy to check by hand, and one that was interrupted."""
    write_manifest(tmp_path, "generations", counts={"tokens": 1000}, seconds=1800.0, device="cpu (2 threads)")
    write_manifest(
        tmp_path, "student", counts={"tokens": 500}, seconds=3600.0, flops=7e12, device="4 x NVIDIA H200"
    )
    (tmp_path / "eval").mkdir()
    return tmp_path


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


# ----------------------------------------------------------------------------------------------------- ledger


def test_ledger_by_hand(finished_run):
    ledger = run_ledger(finished_run, {"usd_per_device_hour": 2.0})
    assert ledger["stages"] == {
        "generations": {
            "tokens": 1000,
            "flops": None,
            "seconds": 1800.0,
            "device": "cpu (2 threads)",
            "devices": 1,
            "device_hours": 0.5,
            "usd": 1.0,
        },
        "student": {
            "tokens": 500,
            "flops": 7e12,
            "seconds": 3600.0,
            "device": "4 x NVIDIA H200",
            "devices": 4,
            "device_hours": 4.0,
            "usd": 8.0,
        },
    }
    assert ledger["totals"] == {
        "tokens": 1500,
        "flops": 7e12,
        "seconds": 5400.0,
        "device_hours": 4.5,
        "usd": 9.0,
    }


def test_what_was_not_recorded_is_null_and_named(finished_run):
    ledger = run_ledger(finished_run)
    items = [entry["item"] for entry in ledger["not_counted"]]
    assert ledger["totals"]["usd"] is None and all(s["usd"] is None for s in ledger["stages"].values())
    assert "USD" in items and "FLOPs of generations" in items
    assert any("eval" in item and "prompts" in item for item in items if "without a manifest" in item)
    text = " ".join(items)
    assert all(word in text for word in ("teacher", "energy", "people", "failed attempts"))
    assert not [item for item in items if item.startswith(("tokens of", "time of"))]


def test_a_total_is_null_where_no_stage_recorded_it(tmp_path):
    write_manifest(tmp_path, "prompts")
    totals = run_ledger(tmp_path, {"usd_per_device_hour": 1.0})["totals"]
    assert set(totals.values()) == {None}


@pytest.mark.parametrize("processes", [1, 2, 16])
def test_every_rank_of_a_stage_is_paid_for(tmp_path, processes):
    device = describe_device(torch.device("cpu"), processes)
    write_manifest(tmp_path, "student", seconds=3600.0, device=device)
    assert run_ledger(tmp_path)["stages"]["student"]["device_hours"] == processes


amounts = st.none() | st.integers(0, 10**15) | st.floats(0, 1e9)


@given(
    recorded=st.dictionaries(st.sampled_from(STAGES), st.tuples(amounts, amounts, amounts), min_size=1),
    price=st.floats(1e-6, 1e3),
)
def test_totals_are_the_sum_of_the_stages_and_scale_with_the_price(tmp_path_factory, recorded, price):
    run_dir = tmp_path_factory.mktemp("run")
    for stage, (tokens, flops, seconds) in recorded.items():
        write_manifest(run_dir, stage, counts={"tokens": tokens}, flops=flops, seconds=seconds)
    ledger = run_ledger(run_dir, {"usd_per_device_hour": price})
    assert list(ledger["stages"]) == [name for name in STAGES if name in recorded]
    for key, total in ledger["totals"].items():
        known = [stage[key] for stage in ledger["stages"].values() if stage[key] is not None]
        assert total == pytest.approx(sum(known)) if known else total is None
    if ledger["totals"]["seconds"] is not None:
        assert ledger["totals"]["usd"] == pytest.approx(ledger["totals"]["seconds"] / 3600 * price)
    assert json.loads(json.dumps(ledger)) == ledger
    assert len(format_ledger(ledger).splitlines()) == 4 + len(recorded) + len(ledger["not_counted"])


def test_ledger_prints_a_dash_for_null(finished_run):
    lines = format_ledger(run_ledger(finished_run)).splitlines()
    assert "no price given" in lines[0]
    generations = next(line for line in lines if line.startswith("  generations"))
    assert " ".join(generations.split()) == "generations 1,000 - 1,800.0 0.5000 - cpu (2 threads)"


@pytest.mark.parametrize(
    "prices",
    [
        {"usd_per_device_hour": 0},
        {"usd_per_device_hour": -1.0},
        {"usd_per_device_hour": float("nan")},
        {"usd_per_device_hour": "2"},
        {"usd_per_device_hour": True},
        {"usd_per_gpu": 2.0},
        {"usd_per_device_hour": 2.0, "usd_per_kwh": 0.3},
        {},
    ],
)
def test_what_is_not_a_price_is_refused(finished_run, prices):
    with pytest.raises(UserError, match="usd_per_device_hour"):
        run_ledger(finished_run, prices)


@pytest.mark.parametrize(
    "text",
    [
        "{half a mani",
        "[]",
        '{"seconds": 1}',
        '{"counts": 3}',
        '{"counts": {"tokens": -1}}',
        '{"counts": {}, "seconds": "long"}',
        '{"counts": {}, "flops": true}',
        '{"counts": {}, "seconds": NaN}',
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="run the stage again"):
        run_ledger(tmp_path)


def test_a_folder_without_a_finished_stage_is_refused(tmp_path):
    (tmp_path / "student").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no finished stage"):
            run_ledger(folder)


def test_importing_cost_loads_no_torch():
    code = "import sys, distill.cost; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
