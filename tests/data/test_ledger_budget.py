"""Limits stop generation cleanly and continue; forecasts say what is known and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config.data import Prices
from distill.config.recipe import load_recipe
from distill.data.ledger import Spent, count_part, forecast
from distill.errors import UserError
from distill.storage import GENERATION_SCHEMA, PartWriter, hash_file, parts, read_json, read_rows, write_json


def make_parts(folder, rows_per_part) -> None:
    """rows_per_part: [[(prompt tokens, answer tokens, counted by an endpoint)]]."""
    writer = PartWriter(folder, GENERATION_SCHEMA)
    for index, rows in enumerate(rows_per_part):
        writer.write(
            index,
            [
                {"prompt_tokens": p, "completion_tokens": c}
                if counted
                else {"prompt_ids": [1] * p, "completion_ids": [2] * c}
                for p, c, counted in rows
            ],
        )


# ---- arithmetic ---------------------------------------------------------------------------------------


def test_usd_of_known_amounts():
    spent = Spent(answers=10, input_tokens=2_000_000, output_tokens=500_000, seconds=7200, devices=2)
    assert spent.usd(Prices()) is None, "nothing is assumed"
    assert spent.usd(Prices(usd_per_million_input_tokens=0.5)) == 1.0
    assert spent.usd(Prices(usd_per_million_output_tokens=4)) == 2.0
    assert spent.usd(Prices(usd_per_device_hour=3)) == 12.0
    every = Prices(usd_per_million_input_tokens=0.5, usd_per_million_output_tokens=4, usd_per_device_hour=3)
    assert spent.usd(every) == 15.0
    assert spent.usd(Prices(usd_per_million_output_tokens=0)) == 0.0, "free is a price"


@pytest.mark.parametrize("counted", [False, True])
def test_tokens_are_ids_or_what_an_endpoint_counted(tmp_path, counted):
    make_parts(tmp_path, [[(3, 7, counted), (2, 0, counted)], []])
    assert [count_part(p) for p in parts(tmp_path)] == [(2, 5, 7), (0, 0, 0)]


# ---- forecasts ----------------------------------------------------------------------------------------

BASE = ("usd_spent", "usd_expected", "usd_at_most")


def test_without_parts_only_the_bound_is_known(make_recipe):
    path, _ = make_recipe()
    found = forecast(load_recipe(path))
    assert found == {
        "answers": 48,
        "answers_finished": 0,
        "answer_tokens_at_most": 48 * 12,
        "answer_tokens_expected": None,
        "prompt_tokens_expected": None,
        "seconds_expected": None,
    }
    found = forecast(load_recipe(path, ["prices.usd_per_million_output_tokens=1000"]))
    assert [found[key] for key in BASE] == [0.0, None, 0.576]
    found = forecast(load_recipe(path, ["prices.usd_per_device_hour=2"]))
    assert [found[key] for key in BASE] == [0.0, None, None], "no speed is known, so no cost"


def begun(path, run_dir, seconds, *overrides, **changes):
    """A generations folder as an interrupted run leaves it, 12 of 48 answers done."""
    recipe = load_recipe(path, list(overrides))
    make_parts(run_dir / "generations", [[(20, 5, False)] * 8, [(40, 10, False)] * 4])
    config = {"generate": recipe.generate.model_dump(mode="json"), "teacher": {"model": recipe.teacher.model}}
    config["generate"] |= changes
    write_json(
        run_dir / "generations" / ".identity.json", {"config": config, "inputs": {}, "seconds": seconds}
    )
    return recipe


def test_with_parts_the_rest_is_expected_like_them(make_recipe):
    path, run_dir = make_recipe()
    tokens = "usd_per_million_input_tokens: 100, usd_per_million_output_tokens: 1000"
    found = forecast(begun(path, run_dir, 6.0, f"prices={{{tokens}, usd_per_device_hour: 36}}"))
    assert found["answers_finished"] == 12
    assert found["prompt_tokens_expected"] == 4 * (8 * 20 + 4 * 40) == 1280
    assert found["answer_tokens_expected"] == 4 * (8 * 5 + 4 * 10) == 320
    assert found["seconds_expected"] == 24.0
    assert found["usd_spent"] == pytest.approx(320e-4 + 80e-3 + 6e-2)
    assert found["usd_expected"] == pytest.approx(4 * found["usd_spent"])
    # The longest answers allowed: 576 tokens instead of 320, and as much longer to write.
    assert found["usd_at_most"] == pytest.approx(0.128 + 0.576 + 0.24 * 576 / 320, abs=1e-4)


def test_parts_of_other_settings_tell_nothing(make_recipe):
    path, run_dir = make_recipe()
    assert forecast(begun(path, run_dir, 6.0, max_new_tokens=99))["answer_tokens_expected"] is None
    assert forecast(begun(path, run_dir, 6.0))["answer_tokens_expected"] == 320
    assert forecast(begun(path, run_dir, 6.0, "generate.max_tokens=5"))["answer_tokens_expected"] == 320


def test_prompts_of_a_file_are_counted_once_read(make_recipe):
    path, run_dir = make_recipe()
    source = ["prompts.source=train.jsonl", "evaluate.source=test.jsonl"]
    assert forecast(load_recipe(path, source)) == {}
    write_json(run_dir / "prompts" / "manifest.json", {"counts": {"rows": 5}})
    assert forecast(load_recipe(path, source))["answers"] == 10


@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=20),
    parts_count=st.integers(1, 4),
)
def test_totals_do_not_depend_on_the_parts(tmp_path_factory, rows, parts_count):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder, [[(*row, False) for row in rows[i::parts_count]] for i in range(parts_count)])
    totals = [sum(column) for column in zip(*(count_part(p) for p in parts(folder)))]
    assert totals == [len(rows), sum(p for p, _ in rows), sum(c for _, c in rows)]


# ---- limits in a run ----------------------------------------------------------------------------------


def tokens(run_dir) -> int:
    return sum(len(row["completion_ids"]) for row in read_rows(run_dir / "generations"))


def test_max_tokens_stops_after_a_part_and_a_higher_limit_continues(make_recipe, run_cli):
    path, whole = make_recipe(name="whole")
    assert run_cli("generate", path)[0] == 0
    total = tokens(whole)

    path, run_dir = make_recipe(name="limited")
    code, out, err = run_cli("generate", path, "generate.max_tokens=1")
    (line,) = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert code == 1 and "Traceback" not in err
    assert "generate.max_tokens=1 is reached" in line and "1 of 3 parts are kept" in line
    assert f"{tokens(run_dir):,} answer tokens" in line and "higher limit continues" in line
    assert "USD" not in line, "no price was given"
    kept = {p.name: p.stat().st_mtime_ns for p in parts(run_dir / "generations")}
    assert len(kept) == 1 and not (run_dir / "generations" / "manifest.json").exists()

    # The same limit again spends nothing; the next stage does not start on half of the answers.
    code, _, err = run_cli("generate", path, "generate.max_tokens=1")
    assert code == 1 and "1 of 3 parts" in err
    code, _, err = run_cli("filter", path)
    assert code == 2 and "generations is not finished" in err
    code, _, err = run_cli("generate", path, f"generate.max_tokens={tokens(run_dir) + 1}")
    assert code == 1 and "2 of 3 parts" in err

    # A limit that the last part reaches, or passes, does not stop a finished stage.
    code, _, err = run_cli("generate", path, f"generate.max_tokens={total}")
    assert code == 0, err
    after = {p.name: p.stat().st_mtime_ns for p in parts(run_dir / "generations")}
    assert kept.items() <= after.items(), "finished parts are not made again"
    hashes = [[hash_file(p) for p in parts(d / "generations")] for d in (whole, run_dir)]
    assert hashes[0] == hashes[1], "a limit changes when it stops, not what it makes"
    config = read_json(run_dir / "generations" / "manifest.json")["config"]
    assert not {"max_tokens", "max_cost_usd"} & set(config["generate"])
    code, out, _ = run_cli("generate", path)
    assert code == 0 and out.count("done before") == 2, "without a limit it is the same stage"


def test_max_cost_stops_and_says_what_was_spent(make_recipe, run_cli):
    path, run_dir = make_recipe()
    price = "prices.usd_per_million_output_tokens=1000000"  # a dollar a token
    code, _, err = run_cli("generate", path, price, "generate.max_cost_usd=0.5")
    assert code == 1 and "generate.max_cost_usd=0.5 is reached" in err
    assert f", {tokens(run_dir):.4f} USD spent" in err and "1 of 3 parts" in err
    code, _, err = run_cli("generate", path, price, "generate.max_cost_usd=1000000")
    assert code == 0, err


def test_time_of_interrupted_runs_counts(make_recipe, run_cli):
    path, run_dir = make_recipe()
    assert run_cli("generate", path, "generate.max_tokens=1")[0] == 1
    identity = run_dir / "generations" / ".identity.json"
    write_json(identity, {**read_json(identity), "seconds": 7200.0})
    limit = ["prices.usd_per_device_hour=1", "generate.max_cost_usd=1.5"]
    code, _, err = run_cli("generate", path, *limit)
    assert code == 1 and "1 of 3 parts" in err and "7200 s, 2.00" in err


def test_dry_run_prints_the_forecast(make_recipe, run_cli):
    path, run_dir = make_recipe()
    code, out, _ = run_cli("generate", path, "--dry-run", "prices.usd_per_million_output_tokens=1000")
    assert code == 0 and "# answer_tokens_at_most: 576" in out and "# usd_at_most: 0.576" in out
    assert "# seconds_expected: unknown" in out and not run_dir.exists()
    assert run_cli("generate", path, "generate.max_tokens=1")[0] == 1
    code, out, _ = run_cli("generate", path, "--dry-run")
    assert "# answers_finished: 16" in out and "# seconds_expected: unknown" not in out


@pytest.mark.parametrize(
    "override, said",
    [
        ("generate.max_cost_usd=3", "needs `prices`"),
        ("generate.max_tokens=0", "generate.max_tokens"),
        ("prices.usd_per_device_hour=-1", "prices.usd_per_device_hour"),
        ("prices.usd_per_hour=1", "unknown key 'prices.usd_per_hour'"),
    ],
)
def test_unusable_limits_are_said(make_recipe, override, said):
    path, _ = make_recipe()
    with pytest.raises(UserError, match=said):
        load_recipe(path, [override])
