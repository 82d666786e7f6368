"""The solver against brute force, exactly: costs are Fractions, so a tie is a tie and a crossing is a crossing."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.cost.break_even import (  # fmt: skip
    MARGIN,
    STRATEGIES,
    Costs,
    break_even,
    cheapest,
    crossing,
    direct_allowance,
    from_options,
    from_run,
    measured_inputs,
    segments,
    strategy_lines,
    student_lines,
    with_options,
)
from distill.cost.page import _most_queries, format_break_even, write_page
from distill.errors import UserError

settings.register_profile("exact", max_examples=40, deadline=None)
exact = settings.get_profile("exact")
amounts = st.integers(0, 24).map(lambda n: Fraction(n, 2))  # coarse, so that ties and parallels are common
costs = st.builds(
    Costs,
    teacher_query=amounts,
    student_query=amounts,
    teacher_outputs=amounts,
    distil_student=amounts,
    direct_student=st.none() | amounts,
    direct_query=st.none() | amounts,
    teacher_training=amounts | st.just(Fraction(0)),
)
students = st.integers(1, 40)
GRID = [Fraction(n, 3) for n in [*range(0, 60), *range(60, 600, 12)]]


def scaled(costs: Costs, factor) -> Costs:
    return Costs(**{k: None if v is None else v * factor for k, v in vars(costs).items()})


def owner(found, x) -> tuple[str, ...]:
    """Strategies whose segment holds x, its own ties included; two at a crossing."""
    held = [s for s in found if s.start <= x and (s.end is None or x <= s.end)]
    return tuple(name for s in held for name in (s.strategy, *s.ties))


# ---- the solver ----------------------------------------------------------------------------------------


@exact
@given(costs=costs, students=students)
def test_segments_are_the_brute_force_argmin(costs, students):
    found = segments(strategy_lines(costs, students))
    for x in GRID:
        named = owner(found, x)
        assert named and set(named) <= set(cheapest(costs, x, students))
    for segment in found:
        middle = segment.start + 1 if segment.end is None else (segment.start + segment.end) / 2
        assert set(owner(found, middle)) == set(cheapest(costs, middle, students)), (
            "inside, ties are all named"
        )


@exact
@given(costs=costs, queries=st.integers(0, 500))
def test_segments_in_students_are_the_brute_force_argmin(costs, queries):
    found = segments(student_lines(costs, queries), start=1)
    assert found[0].start == 1
    for number in range(1, 60):
        assert set(owner(found, number)) <= set(cheapest(costs, queries, number))


@exact
@given(costs=costs, students=students)
def test_segments_join_and_their_slopes_fall(costs, students):
    lines = {line.name: line for line in strategy_lines(costs, students)}
    found = segments(list(lines.values()))
    assert found[0].start == 0 and found[-1].end is None
    for before, after in pairwise(found):
        assert before.end == after.start > before.start
        assert lines[before.strategy].slope > lines[after.strategy].slope
        assert lines[before.strategy].at(before.end) == lines[after.strategy].at(before.end)
        assert crossing(lines[before.strategy], lines[after.strategy]) == before.end


@exact
@given(costs=costs, students=students, factor=st.fractions(Fraction(1, 7), 9, max_denominator=7))
def test_only_ratios_of_prices_matter(costs, students, factor):
    assert segments(strategy_lines(scaled(costs, factor), students)) == segments(
        strategy_lines(costs, students)
    )


@exact
@given(costs=costs, students=students, more=amounts)
def test_a_dearer_teacher_is_left_earlier(costs, students, more):
    dearer = Costs(**{**vars(costs), "teacher_query": costs.teacher_query + more})

    def left(c):
        """Up to how many queries the teacher is the cheapest; None: for ever; 0: never."""
        ends = [s.end for s in segments(strategy_lines(c, students)) if "teacher" in (s.strategy, *s.ties)]
        return max(ends, key=lambda e: (e is None, e or 0)) if ends else 0

    before, after = left(costs), left(dearer)
    assert before is None or (after is not None and after <= before)


@exact
@given(costs=costs, more=amounts, queries=st.integers(0, 500), students=students)
def test_more_students_favour_distilling_over_direct_training(costs, more, queries, students):
    """arXiv 2502.08606: what is paid once is shared; so once distilling has won, more students keep it won."""
    costs = Costs(**{**vars(costs), "direct_student": costs.distil_student + more})
    few, many = ({x.name: x.at(queries) for x in strategy_lines(costs, n)} for n in (students, students + 1))
    if few["distil"] <= few["direct"]:
        assert many["distil"] <= many["direct"]


@exact
@given(costs=costs, queries=st.integers(0, 500), students=students)
def test_the_allowance_is_where_direct_training_ties_with_distilling(costs, queries, students):
    most = direct_allowance(costs, Fraction(queries), students)
    assume(most >= 0)
    at = {
        x.name: x.at(queries)
        for x in strategy_lines(Costs(**{**vars(costs), "direct_student": most}), students)
    }
    assert at["direct"] == at["distil"]


def test_the_conclusion_of_the_scaling_laws():
    """Teacher exists or many students: distil. One student that pays for the teacher: train directly."""
    free = Costs(teacher_query=10, student_query=1, teacher_outputs=5, distil_student=10, direct_student=30)
    paid = Costs(**{**vars(free), "teacher_training": 1000})
    assert cheapest(free, 1e6, 1) == ["distil"]
    assert cheapest(paid, 1e6, 1) == ["direct"]
    assert cheapest(paid, 1e6, 51) == ["distil"] and cheapest(paid, 1e6, 50) == [
        "direct"
    ]  # 1005 / 20 = 50.25


# ---- ties and no crossing ------------------------------------------------------------------------------


def test_ties_and_no_crossing_are_said():
    same = Costs(teacher_query=1, student_query=1, teacher_outputs=0, distil_student=0)
    assert cheapest(same, 7, 3) == ["teacher", "distil"]
    assert segments(strategy_lines(same, 3)) == [("teacher", 0, None, ("distil",))]
    assert break_even(same, 7, 3)["crossings"][0]["meaning"] == "they cost the same"
    never = Costs(teacher_query=1, student_query=1, teacher_outputs=5, distil_student=0)
    assert [s.strategy for s in segments(strategy_lines(never, 1))] == ["teacher"]
    found = break_even(never, 1e9, 1)["crossings"]
    assert found == [
        {"between": ["teacher", "distil"], "queries": None, "meaning": "teacher is always cheaper"}
    ]
    point = Costs(
        teacher_query=3,
        student_query=1,
        teacher_outputs=4,
        distil_student=0,
        direct_student=2,
        direct_query=2,
    )
    assert crossing(*strategy_lines(point, 1)[:2]) == 2, "three lines through one point: the flattest goes on"
    assert [s.strategy for s in segments(strategy_lines(point, 1))] == ["teacher", "distil"]
    assert cheapest(point, 2, 1) == list(STRATEGIES)


@pytest.mark.parametrize("name", ["teacher_query", "distil_student", "teacher_training"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_what_is_no_amount_is_refused(name, value):
    good = {"teacher_query": 1, "student_query": 1, "teacher_outputs": 1, "distil_student": 1}
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        Costs(**{**good, name: value})
    with pytest.raises(UserError, match="--students"):
        break_even(Costs(**good), 1, 0.5)


# ---- inputs --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A finished run whose amounts are easy to check: 2 devices, one hour of training, 100 answers a model."""
    folder = tmp_path / "run"

    def manifest(stage, seconds, flops, **counts):
        (folder / stage).mkdir(parents=True)
        found = {"counts": counts, "seconds": seconds, "flops": flops, "device": "2 x NVIDIA H200"}
        (folder / stage / "manifest.json").write_text(json.dumps(found))

    manifest("prompts", 0.0, None)
    manifest("generations", 1800.0, 6_000, rows=50, tokens=500, prompt_tokens=100)
    manifest("dataset", 0.0, None)
    manifest("student", 3600.0, 4_000)
    manifest("control", 1800.0, 2_000)
    manifest("eval", 100.0, 9_000)

    def model(seconds, tokens, accuracy):
        cost = {"seconds": seconds, "generated_tokens": tokens, "flops": tokens * 100, "batch_size": 8,
                "decode_tokens_per_second": tokens / seconds}  # fmt: skip
        tasks = {
            "easy": {"n": 60, "samples": 1, "accuracy": accuracy},
            "hard": {"n": 40, "samples": 1, "accuracy": 0},
        }
        return {"cost": cost, "tasks": tasks, "model": {"flops_per_token": 10}}

    metrics = {
        "models": {"teacher": model(360.0, 2000, 1.0), "student": model(36.0, 1000, 0.5)},
        "comparisons": [{"a": "control", "b": "student", "task": "easy", "ci95": [-0.01, 0.02]}],
    }
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    return folder, metrics


def test_a_run_tells_its_costs(run):
    folder, _ = run
    found = from_run(folder, {"usd_per_device_hour": 3.0})
    # 2 devices x 3.6 s an answer = 0.002 device-hours; half an hour on two devices is one; at $3 each.
    assert found["costs"] == pytest.approx(
        {
            "teacher_query": 0.006,
            "student_query": 0.0006,
            "teacher_outputs": 3.0,
            "distil_student": 6.0,
            "direct_student": 3.0,
        }
    )
    assert set(found["sources"]) == set(found["costs"]) and found["unit"] == "usd"
    assert found["accuracy"] == {"teacher": 0.6, "student": 0.3}
    hours = from_run(folder, None)
    assert hours["unit"] == "device_hours"
    assert hours["costs"] == pytest.approx({k: v / 3 for k, v in found["costs"].items()})
    flops = from_run(folder, None, "flops")["costs"]
    assert (
        flops["teacher_query"] == 2000
        and flops["student_query"] == 1000
        and flops["teacher_outputs"] == 6_000
    )


def test_direct_training_needs_the_accuracy(run):
    """The control stands for direct training only where the whole interval of the student's lead is small."""
    folder, metrics = run
    for a, b, interval, reached in [
        ("control", "student", [-0.02, MARGIN], True),
        ("control", "student", [-0.02, MARGIN + 0.01], False),
        ("student", "control", [-MARGIN, 0.3], True),
        ("student", "control", [-0.4, -0.3], False),
    ]:
        metrics["comparisons"] = [{"a": a, "b": b, "task": "hard", "ci95": interval}]
        (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
        found = from_run(folder, None)
        assert ("direct_student" in found["costs"]) == reached
        assert any("--direct-multiple" in note for note in found["notes"]) == (not reached)
    assert from_run(folder, None, direct_multiple=10)["costs"]["direct_student"] == 10 * 1.0
    given = from_run(folder, None, given={"direct_student": 7.0})
    assert given["costs"]["direct_student"] == 7.0 and given["sources"]["direct_student"] == "given"
    assert not any(note.startswith("direct") for note in given["notes"])


def test_a_teacher_that_was_not_evaluated_costs_what_its_answers_did(run):
    folder, metrics = run
    del metrics["models"]["teacher"]
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    assert from_run(folder, None)["costs"]["teacher_query"] == 1.0 / 50
    del metrics["models"]["student"]
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="give --student-query"):
        from_run(folder, None)
    assert from_run(folder, None, given={"student_query": 0.5})["costs"]["student_query"] == 0.5


def test_numbers_by_hand():
    given = dict.fromkeys(["teacher_query", "student_query", "teacher_outputs", "distil_student"], 1.0)
    assert from_options(given, None)["unit"] == "usd"
    with pytest.raises(UserError) as error:
        from_options({"teacher_query": 1.0}, None)
    assert len(error.value.problems) == 3


# ---- page and text -------------------------------------------------------------------------------------


def test_page_and_text_say_the_same(run, tmp_path):
    folder, _ = run
    inputs = with_options(from_run(folder, {"usd_per_device_hour": 3.0}), {"direct_student": 30.0})
    found = {**break_even(Costs(**inputs["costs"]), 1e6, 1), "inputs": inputs}
    text = format_break_even(found)
    crossing = 9 / 0.0054  # (3 + 6) USD once, 0.0054 USD saved a query: 1,666.67
    assert found["by_queries"][0]["to"] == pytest.approx(crossing)
    assert "keep calling the teacher up to 1,666 queries" in text and "distil from 1,667 queries on" in text
    page = write_page(found, tmp_path / "out")
    html = page.read_text()
    assert html.count("<svg") == 2 and "distil from 1,667 queries on" in html and "://" not in html
    assert json.loads((tmp_path / "out" / "break_even.json").read_text()) == json.loads(json.dumps(found))
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_page(found, tmp_path / "out")


def test_the_axis_reaches_past_every_crossing():
    far = Costs(teacher_query=1.0, student_query=1 - 1e-6, teacher_outputs=10.0, distil_student=5.0)
    assert _most_queries(far, 1.0, 1) > segments(strategy_lines(far, 1000))[-1].start


def test_the_committed_measurement_is_whole():
    inputs = measured_inputs()
    found = {**break_even(Costs(**inputs["costs"]), 1e6, 1), "inputs": inputs}
    assert [s["strategy"] for s in found["by_queries"]][:2] == ["teacher", "distil"]
    assert inputs["device"] and set(inputs["sources"]) == set(inputs["costs"])
    assert format_break_even(found)
