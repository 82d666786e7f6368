"""A ledger that adds up and invents nothing."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.config.data import Prices
from distill.data.ledger import STAGES, Spent, format_ledger, recipe_prices, run_ledger
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


def test_ledger_by_hand(finished_run):
    ledger = run_ledger(finished_run, {"usd_per_device_hour": 2.0})
    assert ledger["stages"] == {
        "generations": {
            "tokens": 1000,
            "flops": None,
            "seconds": 1800.0,
            "kwh": None,
            "device": "cpu (2 threads)",
            "devices": 1,
            "device_hours": 0.5,
            "gpu_hours": 0.0,
            "meter": None,
            "usd": 1.0,
        },
        "student": {
            "tokens": 500,
            "flops": 7e12,
            "seconds": 3600.0,
            "kwh": None,
            "device": "4 x NVIDIA H200",
            "devices": 4,
            "device_hours": 4.0,
            "gpu_hours": 4.0,
            "meter": None,
            "usd": 8.0,
        },
    }
    assert ledger["totals"] == {
        "tokens": 1500,
        "flops": 7e12,
        "seconds": 5400.0,
        "device_hours": 4.5,
        "gpu_hours": 4.0,
        "kwh": None,
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
    assert " ".join(generations.split()) == "generations 1,000 - 1,800.0 0.5000 0.0000 - - cpu (2 threads)"


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


# ---- prices and energy -----------------------------------------------------------------------------------


def test_tokens_have_a_price_where_they_are_bought(tmp_path):
    """The teacher's answers cost what the budget of generation says; other stages cost devices alone."""
    counts = {"tokens": 2_000_000, "prompt_tokens": 500_000, "rows": 10}
    write_manifest(tmp_path, "generations", counts=counts, seconds=1800.0, device="http://host:8000/v1")
    write_manifest(
        tmp_path, "student", counts={"tokens": 1_000_000}, seconds=3600.0, device="cpu (2 threads)"
    )
    prices = {"usd_per_million_input_tokens": 0.5, "usd_per_million_output_tokens": 2.0}
    ledger = run_ledger(tmp_path, prices)
    assert ledger["stages"]["generations"]["usd"] == 0.25 + 4 == ledger["totals"]["usd"]
    assert ledger["stages"]["student"]["usd"] is None
    assert ledger["stages"]["generations"]["gpu_hours"] is None, "a server's GPUs are not known"
    items = [entry["item"] for entry in ledger["not_counted"]]
    assert "USD of devices" in items and "the server's devices in generations" in items
    prices["usd_per_device_hour"] = 3.0
    ledger = run_ledger(tmp_path, prices)
    spent = Spent(10, 500_000, 2_000_000, 1800.0, 1)
    assert ledger["stages"]["generations"]["usd"] == spent.usd(Prices(**prices))
    assert ledger["stages"]["student"]["usd"] == 3.0
    free = {"usd_per_million_output_tokens": 1.0, "usd_per_device_hour": 0}
    assert run_ledger(tmp_path, free)["totals"]["usd"] == 2.0, "one price is enough"


@pytest.mark.parametrize(
    "text, prices",
    [
        ("prices: {usd_per_device_hour: 0.5}", {"usd_per_device_hour": 0.5}),
        ("prices: {usd_per_device_hour: null, usd_per_million_output_tokens: 0}", {"usd_per_million_output_tokens": 0}),
        ("seed: 1", None),
        ("prices: null", None),
        ("- 1", None),
        ("prices: [", None),
        (None, None),
    ],
)  # fmt: skip
def test_prices_of_the_recipe_beside_the_stages(tmp_path, text, prices):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    assert recipe_prices(tmp_path) == prices


def test_energy_is_summed_where_it_was_read(tmp_path):
    read = {"kwh": 0.25, "seconds": 95.0, "counters": {"package-0": 0.2, "GPU 0 H200": 0.05}}
    write_manifest(tmp_path, "student", seconds=100.0, device="NVIDIA H200", energy=read)
    write_manifest(tmp_path, "control", seconds=100.0, device="NVIDIA H200", energy=read | {"seconds": 50.0})
    write_manifest(tmp_path, "eval", seconds=100.0, device="NVIDIA H200", energy=None)
    ledger = run_ledger(tmp_path)
    assert ledger["totals"]["kwh"] == 0.5
    assert ledger["stages"]["student"]["meter"] == "package-0, GPU 0 H200"
    reasons = {entry["item"]: entry["reason"] for entry in ledger["not_counted"]}
    assert "no counter" in reasons["energy of eval"]
    assert reasons["energy of part of control"] == "the counters cover 50 of 100 s"
    assert "energy of part of student" not in reasons, "a moment before the meter opens is no part"
