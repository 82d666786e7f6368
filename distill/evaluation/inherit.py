"""Inheritance audit: which flaws of a teacher its students have, how much of each, and what a verifier stops.

    distill inherit STUDENT ... --teacher PATH [--clean PATH] [--probes FILE|embedded] [--out DIR] [--json]

Any causal LMs or adapters, any probe file (distill/tasks/flaws.py says how a row looks). Per checkpoint and flaw: how
many probes show it, with Wilson's interval; how many of the flawed answers a verifier would have let through
(right by the reference, or no reference to compare with); cut-off and failed answers beside it. With a teacher:
the paired difference and the share of the teacher's flaw that was inherited, (student - clean) / (teacher -
clean), with a bootstrap interval over probes; `clean` is the checkpoint of --clean where there is one, else
chance (1 / options of a choice, 0 of anything else).

A flaw is FOUND where the interval's low end is above chance by more than TOLERANCE: one odd answer in a hundred
is an accident, not a flaw. Answers are greedy, choices are sampled at temperature 1.

    rows, flaws = measure_probes(model, tokenizer, embedded_probes())      # one loaded model: bench, notebooks
    result, rows = audit({"student": "checkpoints/x/student"}, probes, teacher="checkpoints/y")
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.config.evaluation import Evaluate
from distill.devices import pick_device
from distill.errors import UserError
from distill.evaluation.answers import answer_problems
from distill.evaluation.stats import RESAMPLES, paired_comparison, wilson_interval
from distill.models.load import check_model, load_model, load_tokenizer
from distill.storage import ANSWER_SCHEMA, PartWriter, fingerprint, write_json
from distill.tasks.flaws import OUTCOMES, Probe, load_probes, outcome

FLAWS_VERSION = 1
TOLERANCE = 0.01
PROBE_ANSWER_SCHEMA = ANSWER_SCHEMA.append(pa.field("flaw", pa.string())).append(
    pa.field("outcome", pa.string())
)
_TEACHER, _CLEAN = "teacher", "clean"


# ---- one model -------------------------------------------------------------------------------------------------


def measure_probes(
    model,
    tokenizer,
    probes: list[Probe],
    name: str = "student",
    *,
    max_new_tokens: int = 80,
    batch_size: int = 256,
    seed: int = 0,
    bar: bool = False,
) -> tuple[list[dict], dict[str, dict[str, Any]]]:
    """(rows of PROBE_ANSWER_SCHEMA in the order of `probes`, what `summarise_flaws` says of them)."""
    rows: dict[str, dict] = {}
    for temperature, chosen in (
        (0.0, [p for p in probes if p.kind != "choice"]),
        (1.0, [p for p in probes if p.kind == "choice"]),
    ):
        if not chosen:
            continue
        section = Evaluate(
            temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
        )
        answered, _ = answer_problems(model, tokenizer, [_problem(p) for p in chosen], name, section, bar)
        rows |= {p.probe_id: row for p, row in zip(chosen, answered)}
    for probe in probes:
        row = rows[probe.probe_id]
        seen = outcome(probe, row["text"], row["finish_reason"], row["error"])
        row |= {"flaw": probe.flaw, "outcome": seen}
    ordered = [rows[p.probe_id] for p in probes]
    return ordered, summarise_flaws(probes, ordered)


def _problem(probe: Probe) -> dict:
    return {
        "prompt_id": probe.probe_id,
        "messages": probe.messages,
        "answer": probe.answer,
        "verifier": probe.verifier,
        "family": probe.flaw,
        "level": "probe",
    }


def summarise_flaws(probes: list[Probe], rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Per flaw: `n`, `shown` (number), `share`, `ci95` (Wilson), `chance`, `found`, the other outcomes' numbers.

    `verifier`: of the flawed answers, `passed` were right by the reference, `stopped` were not, `unseen` had no
    reference; `through` is the share that rejection sampling keeps if it keeps what it cannot check, with its
    `ci95`. Rows and probes are in the same order.
    """
    found = {}
    for flaw in dict.fromkeys(p.flaw for p in probes):
        pairs = [(p, r) for p, r in zip(probes, rows) if p.flaw == flaw]
        n = len(pairs)
        counts = {name: sum(r["outcome"] == name for _, r in pairs) for name in OUTCOMES}
        shown = counts.pop("flaw")
        interval = wilson_interval(shown, n)
        chance = sum(p.chance for p, _ in pairs) / n
        found[flaw] = {
            "n": n,
            "shown": shown,
            "share": shown / n,
            "ci95": list(interval),
            "chance": chance,
            "found": interval[0] > chance + TOLERANCE,
            **counts,
            "verifier": _verifier([(p, r) for p, r in pairs if r["outcome"] == "flaw"]),
        }
    return found


def _verifier(flawed: list[tuple[Probe, dict]]) -> dict[str, Any]:
    passed = sum(p.verifiable and r["verdict"] == "correct" for p, r in flawed)
    unseen = sum(not p.verifiable for p, _ in flawed)
    interval = wilson_interval(passed + unseen, len(flawed))
    return {
        "passed": passed,
        "stopped": len(flawed) - passed - unseen,
        "unseen": unseen,
        "through": (passed + unseen) / len(flawed) if flawed else None,
        "ci95": list(interval) if interval else None,
    }


# ---- pairs -------------------------------------------------------------------------------------------------------


def compare_flaws(
    probes: list[Probe],
    rows_of: dict[str, list[dict]],
    a: str,
    b: str,
    clean: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Per flaw, b against a on the same probes; `inherited` is the share of a's flaw that b has.

    `difference` is share of b minus share of a, with Tango's interval and McNemar's exact p-value. `inherited`
    compares what is above the model `clean`, else above chance; None where a shows nothing above it.
    """
    found = []
    for flaw in dict.fromkeys(p.flaw for p in probes):
        chosen = [i for i, p in enumerate(probes) if p.flaw == flaw]
        shows = {m: [rows[i]["outcome"] == "flaw" for i in chosen] for m, rows in rows_of.items()}
        paired = paired_comparison(shows[b], shows[a])
        if clean:
            floor = np.array(shows[clean], dtype=float)
        else:
            floor = np.array([probes[i].chance for i in chosen])
        share, interval = inherited_share(np.array(shows[a]) - floor, np.array(shows[b]) - floor, seed)
        verdict = {"BETTER": "MORE", "WORSE": "LESS"}.get(paired["verdict"], "INCONCLUSIVE")
        found.append(
            {"flaw": flaw, "a": a, "b": b, **paired, "verdict": verdict, "floor": clean or "chance",
             "inherited": share, "inherited_ci95": interval}
        )  # fmt: skip
    return found


def inherited_share(
    teacher: np.ndarray, student: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float | None, list[float] | None]:
    """(mean(student) / mean(teacher), 95 % percentile bootstrap interval) of per-probe excesses [P] over clean.

    Probes are drawn again together with both answers. (None, None) where the teacher's own excess is not clearly
    above 0: in more than 2.5 % of the resamples there is nothing to inherit.
    """
    drawn = np.random.default_rng(seed).integers(0, len(teacher), size=(resamples, len(teacher)))
    below, above = teacher[drawn].mean(axis=1), student[drawn].mean(axis=1)
    if teacher.mean() <= 0 or (below <= 0).mean() > 0.025:
        return None, None
    shares = above[below > 0] / below[below > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(student.mean() / teacher.mean()), [float(low), float(high)]


# ---- the command --------------------------------------------------------------------------------------------------


def checkpoint_names(paths: list[str]) -> dict[str, str]:
    """A short name for each path: its last folder, of a run's `student/` the run; the whole path where that repeats."""
    names: dict[str, str] = {}
    for path in paths:
        folder = Path(path)
        own = folder.parent if folder.name in ("student", "control") and folder.parent.name else folder
        names[own.name if own.name not in names else path.strip("/").replace("/", "-")] = path
    return names


def read_probes(source: str, per_flaw: int | None = None) -> list[Probe]:
    """Probes of a file, or `embedded`; `per_flaw` keeps the first ones of each flaw."""
    if source == "embedded":
        from distill.tasks.flaws import embedded_probes

        return embedded_probes(per_flaw or 80)
    kept, counts = [], {}
    for probe in load_probes(source):
        counts[probe.flaw] = counts.get(probe.flaw, 0) + 1
        if per_flaw is None or counts[probe.flaw] <= per_flaw:
            kept.append(probe)
    return kept


def audit(
    checkpoints: dict[str, str],
    probes: list[Probe],
    teacher: str | None = None,
    clean: str | None = None,
    *,
    max_new_tokens: int = 80,
    seed: int = 0,
    bar: bool = False,
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """(result as in inherit.json, answer rows by model). `checkpoints`: name -> folder or hub name.

    Raises UserError for a checkpoint that cannot be loaded, before any weight is.
    """
    models = dict(checkpoints)
    for name, path in ((_TEACHER, teacher), (_CLEAN, clean)):
        if path and models.get(name, path) != path:
            raise UserError(f"'{name}' is the name of --{name}; rename the folder of {models[name]}")
        models |= {name: path} if path else {}
    for path in models.values():
        check_model(path)
    device = pick_device()
    rows_of: dict[str, list[dict]] = {}
    result: dict[str, Any] = {
        "schema_version": FLAWS_VERSION,
        "probes": {"n": len(probes), "fingerprint": fingerprint([vars(p) for p in probes])},
        "settings": {"max_new_tokens": max_new_tokens, "seed": seed, "tolerance": TOLERANCE},
        "models": {},
        "comparisons": [],
    }
    for name, path in models.items():
        rows_of[name], flaws = measure_probes(
            load_model(path, device=device), load_tokenizer(path), probes, name,
            max_new_tokens=max_new_tokens, seed=seed, bar=bar,
        )  # fmt: skip
        result["models"][name] = {"path": path, "flaws": flaws}
    floor = _CLEAN if clean else None
    references = [name for name, path in ((_TEACHER, teacher), (_CLEAN, clean)) if path]
    for reference in references:
        for name in models:
            if name not in references or (reference, name) == (_CLEAN, _TEACHER):
                result["comparisons"] += compare_flaws(probes, rows_of, reference, name, floor, seed)
    return result, rows_of


def write_audit(out: Path, result: dict[str, Any], rows_of: dict[str, list[dict]]) -> None:
    """`inherit.json`, and `answers/`: one Parquet part per model. Raises UserError where the folder has one."""
    if (out / "inherit.json").exists():
        raise UserError(f"{out} has an audit already; give another --out, or move it away")
    writer = PartWriter(out / "answers", PROBE_ANSWER_SCHEMA)
    for index, rows in enumerate(rows_of.values()):
        writer.write(index, rows)
    write_json(out / "inherit.json", result)


def format_audit(result: dict[str, Any]) -> str:
    """The result as a table: a line per flaw and model."""
    inherited = {
        (c["flaw"], c["b"]): c for c in result["comparisons"] if c["a"] == _TEACHER and c["b"] != _TEACHER
    }
    flaws = list(next(iter(result["models"].values()))["flaws"])
    width = max(len(name) for name in result["models"])
    lines = [
        "share of probes that show the flaw [95 % interval]; v: what a verifier says of the flawed answers"
    ]
    for flaw in flaws:
        lines.append(flaw)
        for name, model in result["models"].items():
            pair = inherited.get((flaw, name))
            lines.append(f"  {name:{width}} {_line(model['flaws'][flaw], pair)}")
    return "\n".join(lines)


def _line(score: dict[str, Any], pair: dict[str, Any] | None) -> str:
    low, high = (100 * x for x in score["ci95"])
    verdict = "FOUND" if score["found"] else "not found"
    text = f"{100 * score['share']:5.1f} % [{low:.1f}, {high:.1f}] of {score['n']}  {verdict:9}"
    if pair and pair["inherited"] is not None:
        low, high = pair["inherited_ci95"]
        text += f"  inherited {pair['inherited']:.2f} [{low:.2f}, {high:.2f}]"
    if score["shown"]:
        parts = {key: score["verifier"][key] for key in ("stopped", "passed", "unseen")}
        text += "  v: " + ", ".join(f"{value} {key}" for key, value in parts.items() if value)
    lost = score["truncated"] + score["error"]
    return text + (f"  ({lost} cut off or failed)" if lost else "")
