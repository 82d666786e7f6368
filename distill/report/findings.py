"""What a page says in sentences: the verdict, and the other measurements, the most telling first.

    verdict = headline(run)            # {"verdict": "BETTER", "title": ..., "detail": ..., "notes": [...], ...}
    said = findings(run, verdict, experts)      # {"opening": [three sentences], "more": [...]}

The evaluation judged; nothing is tested here. `run` is a `distill.report.runs.Run`.
"""

from distill.report.numbers import NB, absent, p_value, percent, points, share
from distill.report.runs import TASK_ORDER, Run, hardest, ordered, tasks_in_order
from distill.report.words import called, lookup, mark, say

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
