"""A grid end to end on the shipped pair, what it shares, what it refuses, and what it leaves behind."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from drafting import draft_pages
from grid_example import TINY, Inline, in_this_process, written

from distill.bench.grid import load_bench, pick_budget
from distill.bench.items import Records
from distill.bench.page import build_bench_page, claims_text
from distill.bench.plan import BUDGET, Task, plan, tuning_bench
from distill.bench.results import Clock
from distill.bench.run import _left, describe_plan, run_bench, run_tasks
from distill.commands.cli import main
from distill.data.prompts import held_out
from distill.errors import RunError, UserError
from distill.evaluation.evaluate import check_measured


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, folder, results, lines) of the small budget."""
    folder = tmp_path_factory.mktemp("bench")
    path, lines = written(folder), []
    return path, folder / "grid", run_bench(path, "small", jobs=1, say=lines.append), lines


def test_runs_are_ordinary_and_share_their_stages(small):
    _, grid, results, lines = small
    run = grid / "sequence-0"
    assert (run / "dataset" / "manifest.json").is_file() and (run / "generations").is_symlink()
    shared = {(grid / f"{arm}-0" / "generations").resolve() for arm in ("sequence", "control")}
    datasets = {(grid / f"{arm}-0" / "dataset").resolve() for arm in ("sequence", "control")}
    assert len(shared) == 1 or len({(s / "manifest.json").read_text() for s in shared}) == 1
    assert len(datasets) == 2 and len(list((grid / "shared").glob("answers-*"))) == 1
    assert main(["provenance", str(run)]) == 0
    assert lines[0].startswith("Tiny: 7 tasks in budget 'small'") and lines[-1].startswith("[7/7]")
    assert results["arms"]["base"]["budget"]["steps"] is None


def test_prices_are_of_the_measured_speed_and_the_front_leaves_out_what_is_beaten(small):
    _, grid, results, _ = small
    cost = json.loads((grid / "teacher-0" / "eval" / "metrics.json").read_text())["models"]["student"]
    entries = {e["experts_per_token"]: e for e in cost["interventions"]}
    metrics = results["arms"]["teacher"]["metrics"]
    for key, speed in (
        ("cost.usd_per_million", cost["cost"]["decode_tokens_per_second"]),
        ("k1.cost.usd_per_million", entries[1]["decode_tokens_per_second"]),
    ):
        assert metrics[key]["mean"] * speed * 3600 == pytest.approx(0.05 * 1e6)
    priced = results["curves"][1]
    assert priced["series"]["teacher"]["arms"] == ["teacher@k1", "teacher@k2"]
    points = {a: (x, y) for s in priced["series"].values() for a, x, y in zip(s["arms"], s["x"], s["y"])}
    assert min(points, key=points.get) == priced["front"][0] and set(priced["front"]) <= set(points)
    page = (grid / "bench.html").read_text()
    assert "No other is both cheaper and better: " + ", ".join(priced["front"]) in page
    run = json.loads((grid / "sequence-0" / "student" / "manifest.json").read_text())
    saved = results["arms"]["sequence"]["metrics"]["bytes.saved"]["mean"]
    assert saved == run["counts"]["saved_bytes"] > 0


def test_one_seed_decides_nothing_and_unequal_budgets_are_not_compared(small):
    _, _, results, _ = small
    gain, tokens = results["claims"]
    assert gain["effect"]["n"] == 1 and gain["verdict"] == "INCONCLUSIVE" and gain["comparable"]
    assert tokens["verdict"] == "NOT COMPARABLE" and "sequence" in tokens["unequal"][0]
    assert gain["cost"]["runs"] == 2 and gain["cost"]["flops"] > 0


def test_results_page_and_table_say_the_same(small, tmp_path):
    _, grid, results, _ = small
    assert json.loads((grid / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = pq.read_table(grid / "results.parquet").to_pylist()
    assert {(r["arm"], r["metric"]): r["value"] for r in rows}["sequence", "accuracy.easy"] == (
        results["arms"]["sequence"]["metrics"]["accuracy.easy"]["mean"]
    )
    page = (grid / "bench.html").read_text()
    assert "<script" not in page and "s &lt;b&gt;" in page and all(c["id"] in page for c in results["claims"])
    text = claims_text(results)
    assert "INCONCLUSIVE" in text and "not comparable: tokens" in text
    build_bench_page({**results, "claims": [], "curves": []}, tmp_path / "empty.html")


@pytest.mark.slow
def test_a_larger_budget_takes_over_and_a_failed_run_stops_nobody(small, tmp_path):
    path, grid, _, _ = small
    before = (grid / "sequence-0" / "student" / "manifest.json").read_text()
    clock = json.loads((grid / "clock.json").read_text())
    broken = {**TINY["arms"], "broken": {"set": {"train.max_length": 3}}}
    bad = written(tmp_path, run_dir=str(grid), arms=broken)
    with pytest.raises(RunError) as error:
        run_bench(bad, "full", jobs=1, say=lambda line: None)
    assert "3 of " in error.value.problems[0] and "takes 3" in error.value.problems[1]
    results = run_bench(path, "full", jobs=1, say=lambda line: None)
    assert (grid / "sequence-0" / "student" / "manifest.json").read_text() == before
    assert results["claims"][0]["effect"]["n"] == 3 and len(results["claims"]) == 3
    assert json.loads((grid / "clock.json").read_text())["wall"]["small"] == clock["wall"]["small"]
    assert (grid / "more-2" / "recipe.yaml").read_text().count("sequence-2/start") == 1


@pytest.mark.parametrize("asked, threads", [("1", 1), ("6", 3), ("", 4)])
def test_workers_share_the_threads_that_were_asked_for(monkeypatch, asked, threads):
    """Or else the cores: two of them, of eight."""
    seen = []

    class Pool(Inline):
        def __init__(self, jobs, context, *, initializer, initargs):
            seen.append((jobs, *initargs))

    monkeypatch.setattr("distill.bench.run.ProcessPoolExecutor", Pool)
    monkeypatch.setattr("distill.devices.cores", lambda: 8)
    monkeypatch.setenv("DISTILL_THREADS", asked)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    run_tasks({}, 2, False, None, print)
    assert seen == [(2, threads)]


def test_a_bench_says_what_it_is_at_while_nothing_finishes(monkeypatch):
    """One run of a real model takes ten minutes: silence looks like a hang."""
    said, lines = threading.Event(), []

    class Threads(ThreadPoolExecutor):
        def __init__(self, jobs, context, *, initializer, initargs):
            super().__init__(jobs)

    class Kept:
        data = {"tasks": {"a-0": {}, "b-0": {}}}
        begin = add = estimate = lambda *_: None
        seconds = lambda *_: 1.0  # noqa: E731
        records = property(lambda self: self)
        values = {}
        __getitem__ = lambda self, task: self  # noqa: E731

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    monkeypatch.setattr("distill.bench.run.ProcessPoolExecutor", Threads)
    monkeypatch.setattr("distill.bench.run.SILENT", 0.05)
    monkeypatch.setattr("distill.bench.run.run_task", lambda task, redo: said.wait(60))
    tasks = {name: Task("run", name, ROOT, None, arm=name[0]) for name in ("a-0", "b-0")}
    run_tasks(tasks, 1, False, Kept(), say)
    assert lines[0] == "[0/2] still at a-0" and lines[-1].startswith("[2/2] ")


def test_every_problem_of_a_bench_file_is_told_at_once(tmp_path):
    arms = {
        **TINY["arms"],
        "odd": {"like": "sequense"},
        "frozen": {"checkpoint": "x", "set": {"train.steps": 1}},
    }
    claims = [{**TINY["claims"][0], "effect": {"nobody": 1}}]
    with pytest.raises(UserError) as error:
        load_bench(written(tmp_path, arms=arms, claims=claims))
    text = str(error.value)
    for part in ("did you mean 'sequence'", "measured as it is", "no arm 'nobody'"):
        assert part in text
    with pytest.raises(UserError, match=r"unknown metric 'accuracy.hrd'; did you mean 'accuracy.hard'"):
        load_bench(written(tmp_path, claims=[{**TINY["claims"][0], "metric": "accuracy.hrd"}]))
    with pytest.raises(UserError, match="unknown key 'armz'"):
        load_bench(written(tmp_path, armz={}))


def test_doctor_looks_at_every_arm_before_anything_runs(tmp_path):
    arms = {
        **TINY["arms"],
        "half": {"set": {"train.precision": "fp16"}},
        "endless": {"set": {"generate.max_new_tokens": 5000}},
        "lost": {"checkpoint": str(tmp_path / "nowhere")},
    }
    with pytest.raises(UserError) as error:
        run_bench(written(tmp_path, arms=arms), "small", jobs=1, say=lambda line: None)
    told = {line.partition(":")[0]: line for line in error.value.problems}
    assert {"arm half", "arm endless", "arm lost"} == set(told)
    assert "fp16" in told["arm half"] and "5,000" in told["arm endless"] and "nowhere" in told["arm lost"]
    assert not list((tmp_path / "grid").glob("*-0"))


def test_arms_that_differ_by_more_than_the_technique_are_refused(tmp_path):
    arms = {**TINY["arms"], "longer": {"set": {"train.steps": 9}}}
    claims = [{**TINY["claims"][0], "effect": {"longer": 1, "control": -1}}]
    with pytest.raises(UserError, match=r"claim gain: arms differ in steps \(longer 9, control 2\)"):
        run_bench(written(tmp_path, arms=arms, claims=claims), "small", say=print)


def test_commands_know_a_grid_from_a_recipe(tmp_path, capsys):
    path = written(tmp_path)
    assert main(["run", path]) == 2 and "run it with `distill bench" in capsys.readouterr().err
    assert main(["bench", str(ROOT / "recipes" / "demo.yaml")]) == 2
    assert "has no arms to compare" in capsys.readouterr().err
    assert main(["bench", path, "--budget", "ful"]) == 2 and "did you mean 'full'" in capsys.readouterr().err
    assert main(["bench", path, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 4


def test_the_shipped_claims_hold_together():
    """Both budgets plan; the full one contains the small one; every claim has the seeds that a verdict needs."""
    path = str(ROOT / "recipes" / "claims.yaml")
    recipe, file = load_bench(path)
    small, full = (plan(recipe, budget, file) for budget in ("small", "full"))
    assert set(small) < set(full) and pick_budget(recipe, None) == "small"
    found = describe_plan(path, "full")
    groups = {claim.group for claim in recipe.claims}
    assert len(groups) >= 8 and set(found["claims"]) == {claim.id for claim in recipe.claims}
    # One generation serves all arms of a seed that ask the same teacher the same questions.
    asked = {
        t.needs[-1]: None for t in small.values() if t.arm in ("sequence", "control", "shuffled", "full")
    }
    answers = {tuple(small[rows].needs) for rows in asked}
    assert len(answers) == recipe.budgets["small"].seeds >= 5
    for claim in recipe.claims:
        seeds = recipe.claim_seeds(claim, "full")
        assert len(seeds) >= 6 and min(seeds) >= 100, "the first registration used seeds 0 to 4"
        assert claim.why or not (claim.margin or claim.trivial), f"{claim.id}: why this margin?"
    assert recipe.claim_seeds(next(c for c in recipe.claims if c.id == "distillation"), "full") == [
        *range(100, 110)
    ]
    bases = {t.seed for t in full.values() if t.arm == "base-moe"}
    assert len(bases) == 6, "a base of each kind per seed"


@pytest.mark.parametrize("name", ["claims", "claims_combination"])
def test_what_the_shipped_claims_evaluate_can_be_measured(name):
    """Doctor looks at every arm before a budget begins, and an arm that it refuses stops them all."""
    bench, file = load_bench(str(ROOT / "recipes" / f"{name}.yaml"))
    grids = [(bench, budget) for budget in bench.budgets]
    if bench.tuning:
        grids.append((tuning_bench(bench), BUDGET))
    sections = {}
    for grid, budget in grids:
        for task in plan(grid, budget, file).values():
            section = task.recipe.evaluate
            if task.kind == "run" and not section.source:  # a file that `prepare` makes first
                sections[section.model_dump_json()] = (section, task.recipe)
    for section, recipe in sections.values():
        few = section.model_copy(update={"levels": dict.fromkeys(section.levels, 2)})
        check_measured(held_out(few, recipe.prompts, recipe.seed), few)
    assert len(sections) >= 2


def test_what_an_earlier_call_finished_takes_no_time_any_more(small, tmp_path):
    path, *_ = small
    tasks = plan(load_bench(path)[0], "small", load_bench(path)[1])
    (tmp_path / "clock.json").write_text(json.dumps({"tasks": {}, "wall": {}}))
    clock = Clock(tmp_path, "small", Records(tmp_path))
    runs = [t for t in tasks.values() if t.kind == "run"]
    assert clock.estimate(runs) is None
    clock.add(runs[0], 40.0)
    assert clock.estimate(runs) == 40.0 * (len(runs) - 1)


def test_a_run_made_again_in_the_place_of_a_removed_one_is_of_the_code_that_made_it(small, tmp_path):
    """A claim refuses runs of code from before its registration; who removes such a run and makes it anew may judge."""
    path, *_ = small
    tasks = plan(load_bench(path)[0], "small", load_bench(path)[1])
    there, gone = (replace(task, folder=tmp_path / task.name) for task in list(tasks.values())[:2])
    there.folder.mkdir()
    old = {"arm": "x", "seconds": 7.0, "commit": "older"}
    (tmp_path / "clock.json").write_text(
        json.dumps({"tasks": {t.name: old for t in (there, gone)}, "wall": {}})
    )
    clock = Clock(tmp_path, "small", Records(tmp_path))
    for task in (there, gone):
        clock.begin(task)
        clock.add(task, 1.0)
    assert clock.data["tasks"][there.name] == {**old, "seconds": 8.0}, "it goes on where older code began"
    assert clock.data["tasks"][gone.name]["commit"] != "older" and clock.seconds(gone.name) == 1.0


def test_a_dry_run_of_the_learning_rates_is_of_their_grid():
    found = describe_plan(str(ROOT / "recipes" / "claims.yaml"), tuning=True)
    assert found["arms"]["sequence=0.01"] == 2 and "claims" not in found and found["runs"] > 88


def test_the_shipped_claims_are_what_a_referee_asked_for():
    recipe, _ = load_bench(str(ROOT / "recipes" / "claims.yaml"))
    assert sum(recipe.set["evaluate.levels"].values()) >= 2800
    assert "bf16" not in recipe.factorial.factors and set(recipe.controls.doses.values()) == {0.1, 0.25, 1.0}
    assert recipe.controls.nulls == 20
    balanced = {c.id for c in recipe.claims if c.id.startswith("bias-")}
    weights = ("1e-4", "1e-3", "1e-2")
    assert balanced == {f"bias-{how}-{w}" for how in ("as-batch", "below-sequence") for w in weights} | {
        "bias-as-none"
    }
    for arm in ("lora-2", "lora-64", "sequence"):
        assert "student.lora.alpha" not in recipe.changes(arm)
    tuned = {name for arm, of in recipe.tuning.arms.items() for name in (arm, *of.serves)}
    assert {"sequence", "control", "full", "scratch", "lora-2", "lora-64", "on-policy", "off-policy"} <= tuned
    tuning = range(recipe.tuning.first_seed, recipe.tuning.first_seed + recipe.tuning.seeds)
    used = {seed for arm in recipe.all_arms() for seed in recipe.seeds_of(arm, "full")}
    assert not used & set(tuning)


@pytest.mark.parametrize("budget, minutes", [("small", 45), ("full", 240)])
def test_a_budget_is_planned_to_end_in_time(budget, minutes):
    found = describe_plan(str(ROOT / "recipes" / "claims.yaml"), budget)["forecast"]
    assert 0.3 * minutes < found["wall_minutes"] < minutes and found["jobs"] == 2
    assert found["from"].startswith("recipes/results/claims-") and "EPYC" in found["on"]


@pytest.mark.parametrize("budget", ["small", "full"])
def test_the_committed_results_open_as_a_page(budget, tmp_path):
    results = json.loads((ROOT / "recipes" / "results" / f"claims-{budget}.json").read_text())
    build_bench_page(results, tmp_path / "bench.html")
    page = (tmp_path / "bench.html").read_text()
    assert all(claim["id"] in page for claim in results["claims"]) and "±" in page


def test_a_grid_on_plain_text_with_a_student_made_from_a_model(tmp_path):
    """As recipes/claims_language.yaml: the student is made once, nothing is generated, texts are the metrics."""
    recipe = {
        "run_dir": "x",
        "prompts": {"documents": True, "source": str(ROOT / "recipes/language/letters.txt"), "window": 32},
        "teacher": {"model": str(ROOT / "checkpoints/base")},
        "student": {"from": {"model": str(ROOT / "checkpoints/base"), "layers": 2}, "adapter": "full"},
        "train": {
            "objectives": [{"name": "forward_kl"}], "steps": 2, "warmup_steps": 1, "batch_size": 2,
            "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "fp32",
        },
        "evaluate": {
            "source": str(ROOT / "recipes/language/prompts.jsonl"), "limit": 1, "max_new_tokens": 4, "speed": False,
            "text": [str(ROOT / "recipes/language/letters.txt")], "fidelity_rows": 0,
            "models": ["student", "teacher"],
        },
    }  # fmt: skip
    claim = {"group": "G", "sentence": "s", "hypothesis": "h", "expect": "less", "equal": [], "axis": "steps"}
    bench = {
        "title": "T", "recipe": recipe, "run_dir": str(tmp_path / "grid"), "budgets": {"small": {"seeds": 2}},
        "set": {"evaluate.models": ["student", "teacher"]},
        "arms": {
            "pruned": {"checkpoint": "student.from", "once": True},
            "teacher": {"checkpoint": str(ROOT / "checkpoints/base"), "once": True},
            "text": {"set": {"train.objectives": [{"name": "cross_entropy"}]}},
            "taught": {},
        },
        "claims": [
            {**claim, "id": "kl", "metric": "text.letters.txt.kl", "effect": {"taught": 1, "pruned": -1}},
            {**claim, "id": "nll", "metric": "text.letters.txt.nll", "effect": {"taught": 1, "text": -1}},
        ],
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(bench))
    with in_this_process(), draft_pages():  # workers of their own, and figures: the fixture `small`
        results = run_bench(str(path), "small", jobs=1, say=lambda line: None)
    grid = tmp_path / "grid"
    assert len(list((grid / "shared").glob("base-*"))) == 1 and not list(grid.glob("*/generations"))
    arms = {name: arm["metrics"] for name, arm in results["arms"].items()}
    assert arms["teacher"]["text.letters.txt.kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert arms["teacher"]["text.letters.txt.agreement"]["mean"] == 1
    assert arms["pruned"]["parameters.total"]["mean"] < arms["teacher"]["parameters.total"]["mean"]
    for arm in ("text", "taught"):  # what was made is where they started, and both moved away from it
        found = arms[arm]["text.letters.txt.nll"]["values"]
        assert (
            set(found) == {"0", "1"} and arms["pruned"]["text.letters.txt.nll"]["mean"] not in found.values()
        )
        assert json.loads((grid / f"{arm}-1/student/manifest.json").read_text())["counts"]["steps"] == 2
    (kl,) = [c for c in results["claims"] if c["id"] == "kl"]
    assert kl["unit"] == "nats/token"
    with pytest.raises(UserError, match="letters"):
        bench["claims"][0]["metric"] = "text.letters.txt.kll"
        path.write_text(yaml.safe_dump(bench))
        load_bench(str(path))


# ---- a grid shared out over machines ------------------------------------------------------------------------


@pytest.fixture
def moved(small):
    """The grid's folder put aside, with an empty one in its place: another machine, where only records may come."""
    _, grid, *_ = small
    aside = grid.with_name("aside")
    grid.rename(aside)
    grid.mkdir()
    yield aside
    shutil.rmtree(grid)
    aside.rename(grid)


def test_records_alone_give_the_same_results_and_nothing_runs_again(small, moved):
    path, grid, results, _ = small
    shutil.copy(moved / "records.parquet", grid / "records-2.parquet")
    lines = []
    again = run_bench(path, "small", jobs=1, say=lines.append)
    assert lines == ["Tiny: 7 tasks in budget 'small', 7 of them known from records, 1 at a time"]
    assert not list(grid.glob("*-0")) and not (grid / "shared").exists()
    of_today = ("seconds", "commit")
    assert {k: v for k, v in again.items() if k not in of_today} == {
        k: v for k, v in results.items() if k not in of_today
    }
    assert again["seconds"]["work"] == results["seconds"]["work"]
    answers = [pq.read_table(folder / "items.parquet") for folder in (grid, moved)]
    assert answers[0].equals(answers[1]) and answers[0].num_rows > 20


def test_another_recipe_is_not_what_a_record_knows(small, moved, tmp_path):
    path, grid, *_ = small
    shutil.copy(moved / "records.parquet", grid / "records.parquet")
    records = Records(grid)
    known, other = (
        plan(load_bench(file)[0], "small", load_bench(file)[1])
        for file in (path, written(tmp_path, run_dir=str(grid), set={**TINY["set"], "train.steps": 3}))
    )
    assert all(records.knows(task) for task in known.values())
    asked = {name: records.knows(other[name]) for name in ("base-0", "sequence-0", "control-0")}
    assert asked == {"base-0": False, "sequence-0": False, "control-0": False}
    shared = [task for task in other.values() if task.kind != "run"]
    assert shared and all(records.knows(task) for task in shared if task.name in known)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", "a table"])
def test_a_file_of_records_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "records-3.parquet"
    if content == "a table":
        pq.write_table(pa.table({"arm": ["x"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"records-3.parquet holds no records .* copy it again"):
        Records(tmp_path)


def test_parts_are_the_whole_and_each_has_what_its_runs_need(tmp_path):
    bench, file = load_bench(written(tmp_path))
    tasks = plan(bench, "full", file)
    nothing = SimpleNamespace(knows=lambda task: False)
    parts = [_left(bench, tasks, nothing, False, (k, 2)) for k in (1, 2)]
    seeds = [{task.seed for task in part.values() if task.kind == "run"} for part in parts]
    assert seeds == [{0, 2}, {1}]
    assert {n for part in parts for n in part} == set(tasks)
    assert all(set(task.needs) <= set(part) for part in parts for task in part.values())


def test_what_a_record_stands_for_is_made_again_only_where_its_weights_are_needed(tmp_path):
    bench, file = load_bench(written(tmp_path))
    tasks = plan(bench, "full", file)
    records = SimpleNamespace(knows=lambda task: task.name != "more-1")
    left = _left(bench, tasks, records, False, (1, 1))
    assert [name for name in left if tasks[name].kind == "run"] == ["sequence-1", "more-1"]
    assert {tasks[name].kind for name in left} == {"answers", "rows", "run"}
    assert set(_left(bench, tasks, records, True, (1, 1))) == set(tasks), "--redo makes everything"


def test_a_part_is_judged_by_whoever_has_all(small, moved, capsys):
    """A part whose records are there already, as seed 0 of one: 1/2 has nothing to do, and says what comes next."""
    path, grid, *_ = small
    shutil.copy(moved / "records.parquet", grid / "records.parquet")
    records = Records(grid)
    gone = next(iter(records._known))
    del records._known[gone]
    records.write()
    assert main(["bench", path, "--part", "2/2"]) == 0
    told = capsys.readouterr().out
    assert "part 2/2 is done: 6 of 7 tasks" in told and str(grid / "records.parquet") in told
    with pytest.raises(SystemExit):
        main(["bench", path, "--part", "3/2"])
    assert "2/3 is the second of three" in capsys.readouterr().err
