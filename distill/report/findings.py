"""A finished run as a page reads it, and what the page says of it in sentences.

A finished run folder as the pages read it: manifests, metrics, loss curves; models and tasks in a fixed order.

run = read_run(Path("checkpoints/demo"))
run.models, run.scores("hard"), run.curves["student"]

What a page says in sentences: the verdict, and the other measurements, the most telling first.

    verdict = headline(run)            # {"verdict": "BETTER", "title": ..., "detail": ..., "notes": [...], ...}
    said = findings(run, verdict, experts)      # {"opening": [three sentences], "more": [...]}

The evaluation judged; nothing is tested here. `run` is a `Run`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from distill.data.ledger import STAGES
from distill.errors import UserError
from distill.evaluation.schema import METRICS_VERSION
from distill.files import like_it
from distill.report.pages import NB, absent, called, lookup, mark, p_value, percent, points, say, share
from distill.storage import read_json, unsealed, verify_folder

MODEL_ORDER = ["base", "control", "student", "teacher"]
TASK_ORDER = ["easy", "medium", "hard"]


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `curves[stage]` are the rows of that stage's metrics.jsonl."""

    path: Path
    recipe: str | None
    manifests: dict[str, dict]
    metrics: dict
    curves: dict[str, list[dict]]

    @property
    def models(self) -> dict[str, dict]:
        """Models of the evaluation, those of the demo first, from weakest to strongest."""
        return {name: self.metrics["models"][name] for name in ordered(self.metrics["models"], MODEL_ORDER)}

    def scores(self, task: str | None) -> dict[str, dict]:
        """{model: score} of those that were measured on `task`."""
        found = {name: model.get("tasks", {}).get(task) for name, model in self.models.items()}
        return {name: score for name, score in found.items() if score and not absent(score.get("accuracy"))}


def ordered(names, first: list[str]) -> list[str]:
    """`names` without repeats, those of `first` in front in that order; the others keep theirs."""
    names = list(dict.fromkeys(names))
    return [name for name in first if name in names] + [name for name in names if name not in first]


def tasks_in_order(metrics: dict) -> list[str]:
    return ordered((t for m in metrics["models"].values() for t in m.get("tasks", {})), TASK_ORDER)


def hardest(tasks: list[str]) -> str | None:
    """The last of the known levels; of tasks with other names the first."""
    return ([t for t in TASK_ORDER if t in tasks][-1:] or list(tasks)[:1] or [None])[0]


# ---- reading


def read_run(run_dir: Path) -> Run:
    """Reads a run folder. `UserError` where it or its evaluation is missing, damaged or of another schema."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is missing{like_it(run_dir)}; make it with `distill run RECIPE run_dir={run_dir}`"
        )
    path, fix = run_dir / "eval" / "metrics.json", f"`distill evaluate RECIPE run_dir={run_dir}`"
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with {fix}")
    metrics = read_json(path)
    for stage in (*STAGES, "eval"):
        verify_folder(run_dir / stage, but=".safetensors")
    version = metrics.get("schema_version")
    if version != METRICS_VERSION:
        raise UserError(f"{path} has schema_version {version}, not {METRICS_VERSION}; redo it with {fix}")
    manifests = {stage: run_dir / stage / "manifest.json" for stage in STAGES}
    curves = {stage: _steps(run_dir / stage / "metrics.jsonl") for stage in ("control", "student")}
    recipe = run_dir / "recipe.yaml"
    return Run(
        path=run_dir,
        recipe=unsealed(recipe.read_text(encoding="utf-8"))[0] if recipe.is_file() else None,
        manifests={stage: read_json(path) for stage, path in manifests.items() if path.is_file()},
        metrics=metrics,
        curves={stage: rows for stage, rows in curves.items() if rows},
    )


def _steps(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl in step order; where a resumed run wrote a step twice, the later row counts."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}); run `distill train RECIPE` again") from None
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def families(run: Run) -> list[tuple[str, str, list]]:
    """Rows (family, level, [a score or None per model])."""
    models = [model.get("families", {}) for model in run.models.values()]
    rank = {task: position for position, task in enumerate(tasks_in_order(run.metrics))}
    pairs = {(family, task) for model in models for family, levels in model.items() for task in levels}
    rows = sorted(pairs, key=lambda pair: (pair[0], rank.get(pair[1], len(rank)), pair[1]))
    return [(family, task, [m.get(family, {}).get(task) for m in models]) for family, task in rows]


def other_scores(models: dict[str, dict]) -> dict[str, list[tuple]]:
    """Rows of the tables beside the written answers, sorted by task, then in the order of the models."""
    rows: dict[str, list[tuple]] = {"likelihoods": [], "texts": [], "harness": []}
    for name, model in models.items():
        rows["likelihoods"] += [
            (t, name, s) for t, found in (model.get("likelihood") or {}).items() for s in found
        ]
        rows["texts"] += [(file, name, score) for file, score in (model.get("text") or {}).items()]
        for task, found in ((model.get("harness") or {}).get("tasks") or {}).items():
            errors = found.get("stderr") or {}
            rows["harness"] += [
                (task, name, _metric(m), v, errors.get(m), found) for m, v in found["metrics"].items()
            ]
    return {kind: sorted(found, key=lambda row: row[0]) for kind, found in rows.items()}


def _metric(key: str) -> str:
    """`acc,none` as people say it: accuracy; a filter of the harness stands in brackets."""
    name, _, how = key.partition(",")
    said = {"acc": say("accuracy"), "acc_norm": say("accuracy by length"), "exact_match": say("exact match")}
    return said.get(name, name.replace("_", " ")) + (f" ({how})" if how not in ("", "none") else "")


# ==== What a page says in sentences ====

OPPOSITE = {"BETTER": "WORSE", "WORSE": "BETTER"}
OPENING = 3  # sentences under the headline; the others are one click away
CALIBRATED = 1.0  # points between certainty and hit rate that need no warning
_IN_A_SENTENCE = {
    "student": mark("the student"),
    "base": mark("the base before training"),
    "control": mark("the same base trained without the teacher"),
    "teacher": mark("the teacher"),
}
_AT_ITS_START = {
    "student": mark("The student"),
    "base": mark("The base"),
    "control": mark("The control"),
    "teacher": mark("The teacher"),
}


def _named(name: str, words: dict[str, str]) -> str:
    return lookup(words[name]) % {} if name in words else name


# ---- the verdict


def _seen_from(comparisons: list[dict], model: str) -> list[dict]:
    """The comparisons of `model`, with `rival` and with difference and verdict as judgements of `model`.

    In the file both judge b against a: `difference` is b's accuracy minus a's.
    """
    seen = [{**c, "rival": c["a"]} for c in comparisons if c["b"] == model]
    for c in (c for c in comparisons if c["a"] == model):
        low, high = c["ci95"]
        turned = {"rival": c["b"], "difference": -c["difference"], "ci95": [-high, -low]}
        seen.append({**c, **turned, "verdict": OPPOSITE.get(c["verdict"], c["verdict"])})
    return seen


def headline(run: Run) -> dict:
    """The verdict in plain words: the hero (the student, else the first model judged) against its rival
    (control, else base, else any) on the hardest task they share. Without comparisons only `verdict`, `title`,
    `task` and `scores`."""
    comparisons = run.metrics.get("comparisons", [])
    hero = "student" if "student" in run.models else next((c["b"] for c in comparisons), None)
    seen = _seen_from(comparisons, hero)
    if not seen:
        task = hardest(tasks_in_order(run.metrics))
        title = say("No verdict: this evaluation compared no models.")
        return {"verdict": "NOT COMPARED", "title": title, "task": task, "scores": run.scores(task)}
    rival = ordered((c["rival"] for c in seen), ["control", "base"])[0]
    duels = {c["task"]: c for c in seen if c["rival"] == rival}
    duels = {task: duels[task] for task in ordered(duels, TASK_ORDER)}
    task = hardest(list(duels))
    duel, scores = duels[task], run.scores(task)
    said = {name: percent(score, 0) for name, score in scores.items()}
    title = say(
        "%(lead)s: %(hero)s solves %(own)s of the %(task)s problems, %(rival)s %(other)s.",
        lead=_lead(hero, rival, duel["verdict"]),
        hero=_named(hero, _IN_A_SENTENCE),
        own=said.get(hero, "–"),
        task=called(task),
        rival=_named(rival, _IN_A_SENTENCE),
        other=said.get(rival, "–"),
    )
    words = {"verdict": duel["verdict"], "title": title, "detail": _detail(duel)}
    words["worse"] = [_worse(c) for c in seen if _counts_as_worse(c, rival, duel)]
    words["notes"] = _notes(run, hero, scores, said, task)
    return {**words, "task": task, "scores": scores, "hero": hero, "rival": rival, "duels": duels}


def _lead(hero: str, rival: str, verdict: str) -> str:
    if verdict not in OPPOSITE:
        return say("No clear winner")
    if (hero, rival) == ("student", "control"):
        paid = verdict == "BETTER"
        return (
            say("Learning from the teacher paid off")
            if paid
            else say("Learning from the teacher did not pay off")
        )
    other = _named(rival, _IN_A_SENTENCE)
    return (
        say("Better than %(other)s", other=other)
        if verdict == "BETTER"
        else say("Worse than %(other)s", other=other)
    )


def _detail(duel: dict) -> str:
    chance = p_value(duel.get("p_value_holm", duel.get("p_value")))
    chance = f"p{NB}{chance}" if chance.startswith("<") else f"p{NB}={NB}{chance}"
    said = say(
        "The difference is %(points)s (%(chance)s, n = %(n)s problems).",
        points=points(duel), chance=chance, n=f"{duel['n']:,}",
    )  # fmt: skip
    if duel["verdict"] in OPPOSITE:
        return said
    return said + say(" Chance alone can give a difference of this size; only more problems could tell.")


def _counts_as_worse(comparison: dict, rival: str, duel: dict) -> bool:
    return (
        comparison["verdict"] == "WORSE" and comparison["rival"] in (rival, "base") and comparison is not duel
    )


def _worse(comparison: dict) -> str:
    said = say(
        "It is worse than %(other)s on %(task)s problems: %(points)s, n = %(n)s.",
        other=_named(comparison["rival"], _IN_A_SENTENCE), task=called(comparison["task"]),
        points=points(comparison), n=f"{comparison['n']:,}",
    )  # fmt: skip
    return said + (say(" Training made it forget.") if comparison["rival"] == "base" else "")


def _notes(run: Run, hero: str, scores: dict, said: dict, task: str) -> list[str]:
    notes = []
    if "teacher" in scores and hero != "teacher":
        costs = [run.models[name].get("model", {}).get("flops_per_token") for name in ("teacher", hero)]
        notes.append(
            say(
                "The teacher itself solves %(score)s of the %(task)s problems, with %(times)s times the operations "
                "per token.",
                score=said["teacher"], task=called(task), times=f"{costs[0] / costs[1]:.2g}",
            )
            if all(costs)
            else say(
                "The teacher itself solves %(score)s of the %(task)s problems.",
                score=said["teacher"], task=called(task),
            )
        )  # fmt: skip
    if hero == "student" and "teacher" in run.models and "control" not in run.models:
        notes.append(
            say("No control was trained: the gain may come from more training, not from the teacher.")
        )
    return notes


# ---- the other measurements


def findings(run: Run, verdict: dict, experts: list[dict]) -> dict[str, list[str]]:
    """`opening`, at most three sentences, and `more`. What went wrong comes first, then what concerns the hero."""
    hero = verdict.get("hero")
    own, others = [], []
    for name in ordered(run.models, [hero] if hero else []):
        said = [*_kept(run, name), *_imitates(run, name), *_certain(run, name)]
        (own if name == hero else others).extend(said)
    first = [verdict["detail"]] if "detail" in verdict else []
    told = [*first, *verdict.get("worse", []), *own, *verdict.get("notes", []), *others]
    told += [sentence for found in experts for sentence in _busiest(found)]
    told += _counted(run)
    return {"opening": told[:OPENING], "more": told[OPENING:]}


def _counted(run: Run) -> list[str]:
    rows = run.metrics.get("comparisons") or []
    counts = {word: sum(row.get("verdict") == word for row in rows) for word in (*OPPOSITE, "INCONCLUSIVE")}
    if not any(counts.values()):
        return []
    words = say(", ").join(f"{n} {called(word)}" for word, n in counts.items())
    return [say("%(n)s pairs of models were compared: %(verdicts)s.", n=sum(counts.values()), verdicts=words)]


def _kept(run: Run, name: str) -> list[str]:
    forgetting = run.metrics.get("forgetting") or {}
    kept = ((forgetting.get("models") or {}).get(name) or {}).get("all") or {}
    if absent(kept.get("kept")) or not kept.get("ci95"):
        return []
    score = percent({"accuracy": kept["kept"], "ci95": kept["ci95"]})
    base = called(forgetting["base"])
    return [
        say(
            "%(model)s still solves %(score)s of the %(n)s problems that %(base)s solved.",
            model=_named(name, _AT_ITS_START), score=score, n=f"{kept['n']:,}", base=base,
        )
    ]  # fmt: skip


def _imitates(run: Run, name: str) -> list[str]:
    close = run.models[name].get("fidelity") or {}
    if absent(close.get("top1_agreement")):
        return []
    return [
        say(
            "%(model)s would write the teacher's next token in %(share)s of the places.",
            model=_named(name, _AT_ITS_START), share=share(close["top1_agreement"]),
        )
    ]  # fmt: skip


def _certain(run: Run, name: str) -> list[str]:
    gap = over_confidence((run.models[name].get("calibration") or {}).get("bins"))
    if absent(gap):
        return []
    model, n = _named(name, _AT_ITS_START), f"{100 * abs(gap):.1f}"
    if 100 * abs(gap) < CALIBRATED:
        return [
            say(
                "%(model)s is well calibrated: certainty and hit rate are %(n)s points apart.",
                model=model,
                n=n,
            )
        ]
    if gap > 0:
        return [
            say(
                "%(model)s is overconfident: its stated certainty exceeds its hit rate by %(n)s points.",
                model=model, n=n,
            )
        ]  # fmt: skip
    return [
        say(
            "%(model)s is underconfident: its hit rate exceeds its stated certainty by %(n)s points.",
            model=model, n=n,
        )
    ]  # fmt: skip


def over_confidence(bins: list[dict] | None) -> float | None:
    """Mean confidence minus share that was right, over all predictions of the bins."""
    held = [b for b in bins or [] if b["n"] and not absent(b["confidence"]) and not absent(b["accuracy"])]
    total = sum(b["n"] for b in held)
    return sum(b["n"] * (b["confidence"] - b["accuracy"]) for b in held) / total if total else None


def _busiest(found: dict) -> list[str]:
    """`found` is a view of `distill.report.experts.moe_view`."""
    worst = max(found["rows"], key=lambda row: row[1].get("max_violation") or 0)
    violation, floor = worst[1].get("max_violation"), worst[1].get("max_violation_noise_floor")
    if absent(violation):
        return []
    said = [
        say(
            "In %(layer)s of %(model)s the busiest expert does %(share)s more than its even share.",
            layer=worst[0], model=called(found["name"]), share=share(violation),
        )
        if absent(floor)
        else say(
            "In %(layer)s of %(model)s the busiest expert does %(share)s more than its even share; chance alone "
            "would give %(floor)s.",
            layer=worst[0], model=called(found["name"]), share=share(violation), floor=share(floor),
        )
    ]  # fmt: skip
    dead = sum(values.get("dead_experts") or 0 for _, values, _ in found["rows"])
    said.append(
        say(
            "%(n)s experts of %(model)s are dead: no token reaches them.",
            n=f"{dead:,}",
            model=called(found["name"]),
        )
        if dead
        else say("No expert of %(model)s is dead.", model=called(found["name"]))
    )
    return said
