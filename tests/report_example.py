"""A made-up run folder with everything in it, for the report: manifests, answers, metrics, loss curves.

`python tests/report_example.py FOLDER` writes one and its page, to be looked at.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FAMILIES = ["addition", "counting", "multiplication", "reversing"]
LEVELS = ["easy", "medium", "hard"]
SKILL = {  # chance to solve: easy, medium, hard
    "base": (0.88, 0.30, 0.04),
    "control": (0.86, 0.35, 0.09),
    "student": (0.93, 0.88, 0.80),
    "teacher": (0.99, 0.97, 0.94),
}
ATTACK = "</pre><script>alert('teacher')</script><img src=x onerror=alert(1)>\x07 & {{ 7*7 }}"


def score(verdicts: list[str], tokens: list[int]) -> dict:
    """The score dict of eval/metrics.json, with Wilson's interval."""
    n, p, z = len(verdicts), np.mean([v == "correct" for v in verdicts]), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {
        "n": n,
        "accuracy": float(p),
        "stderr": math.sqrt(p * (1 - p) / n),
        "ci95": [float(middle - half), float(middle + half)],
        "pass_at_k": {"1": float(p)},
        "truncated": verdicts.count("truncated"),
        "no_answer": verdicts.count("no_answer"),
        "errors": verdicts.count("error"),
        "mean_tokens": float(np.mean(tokens)),
    }


def fake_answers(per_cell: int) -> list[dict]:
    rng = np.random.default_rng(7)
    rows = []
    for model, skill in SKILL.items():
        for family in FAMILIES:
            for level, chance in zip(LEVELS, skill):
                for index in range(per_cell):
                    right = rng.random() < chance
                    verdict = "correct" if right else str(rng.choice(["wrong", "truncated", "no_answer"]))
                    steps = "\n".join(f"{k}+{k + 1}={2 * k + 1}, carry {k % 2}" for k in range(4))
                    rows.append(
                        {
                            "model": model,
                            "prompt_id": f"{family}-{level}-{index:03d}",
                            "family": family,
                            "level": level,
                            "prompt": f"{family}: 47{index} + 88{index} = ?",
                            "reference": str(135 + index),
                            "text": f"{steps}\nanswer: {135 + index if right else 7}"
                            if model != "base"
                            else "7",
                            "answer": str(135 + index if right else 7)
                            if verdict in ("correct", "wrong")
                            else None,
                            "verdict": verdict,
                            "tokens": int(rng.integers(20, 90)),
                        }
                    )
    return rows


def fake_model(name: str, rows: list[dict]) -> dict:
    def of(**wanted):
        mine = [r for r in rows if r["model"] == name and all(r[k] == v for k, v in wanted.items())]
        return score([r["verdict"] for r in mine], [r["tokens"] for r in mine])

    moe = name == "teacher"
    found = {
        "path": f"checkpoints/demo/{name}",
        "model": {
            "parameters_total": 3_650_000 if moe else 862_464,
            "parameters_adapter": 0 if moe else 137_216,
            "assumed_context": 96,
            "parameters_active": 1_480_000 if moe else 862_464,
            "parameters_active_without_embeddings": 1_460_000 if moe else 850_176,
            "flops_per_token": 2_920_000 if moe else 1_700_352,
            "kv_bytes_per_token": 960 if moe else 2048,
            "weight_bytes": 7_300_000 if moe else 1_724_928,
            "experts": 8 if moe else None,
            "experts_per_token": 2 if moe else None,
        },
        "tasks": {level: of(level=level) for level in LEVELS},
        "families": {f: {level: of(family=f, level=level) for level in LEVELS} for f in FAMILIES},
        "cost": {"seconds": 41.5, "generated_tokens": 48_211, "decode_tokens_per_second": 1161.7}
        | {"flops_per_answer": 1.23e8},
    }
    if not moe:
        found["fidelity"] = {
            "top1_agreement": 0.913,
            "top1_agreement_stderr": 0.0021,
            "tokens": 12_345,
            "forward_kl": 0.2468,
            "reverse_kl": 0.3579,
        }
        return found
    rng = np.random.default_rng(3)
    layers = {}
    for index in range(1, 4):
        load = rng.dirichlet(np.full(8, 200.0)).tolist()
        violation = max(load) * 8 - 1
        measured = {
            "load": load,
            "max_violation": violation,
            "max_violation_noise_floor": 0.021 if index < 3 else 0.9,
        }
        layers[f"model.layers.{index}.mlp"] = measured | {
            "tokens": 48_211,
            "experts": 8,
            "experts_per_token": 2,
            "load_entropy": 2.07,
            "load_entropy_normalised": 0.9955,
            "effective_experts": 7.92,
            "dead_experts": 0,
            "router_entropy": 1.734,
            "confidence": 0.4321,
        }
    return found | {"moe": {"layers": layers}}


def fake_comparison(a: dict, b: dict, names: tuple[str, str], task: str) -> dict:
    """As distill.evaluation.evaluate writes it: difference and verdict judge b against a."""
    one, two = b["tasks"][task], a["tasks"][task]
    difference, half = one["accuracy"] - two["accuracy"], 1.96 * math.hypot(one["stderr"], two["stderr"])
    low, high = difference - half, difference + half
    verdict = "BETTER" if low > 0 else "WORSE" if high < 0 else "INCONCLUSIVE"
    values = {
        "n": one["n"],
        "difference": difference,
        "ci95": [low, high],
        "p_value": 0.0001,
        "p_value_holm": 0.0004 if low > 0 else 0.4,
    }
    return {"a": names[0], "b": names[1], "task": task, **values, "verdict": verdict}


def fake_run(folder: Path, per_cell: int = 12, steps: int = 60) -> Path:
    """A whole run folder as the stages would leave it."""
    rows = fake_answers(per_cell)
    attacked = next(
        r for r in rows if (r["model"], r["verdict"], r["level"]) == ("teacher", "correct", "hard")
    )
    for row in rows:
        if row["prompt_id"] == attacked["prompt_id"]:
            row["verdict"] = "correct" if row["model"] in ("student", "teacher") else "wrong"
    attacked["text"] = ATTACK
    models = {name: fake_model(name, rows) for name in SKILL}
    pairs = [("base", "control"), ("base", "student"), ("control", "student"), ("student", "teacher")]
    compared = [fake_comparison(models[a], models[b], (a, b), level) for a, b in pairs for level in LEVELS]
    metrics = {"schema_version": 2, "models": models, "comparisons": compared}
    (folder / "eval" / "answers").mkdir(parents=True)
    half = len(rows) // 2
    for part, chunk in enumerate([rows[:half], rows[half:]]):
        pq.write_table(pa.Table.from_pylist(chunk), folder / "eval" / "answers" / f"part-{part:05d}.parquet")
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "recipe.yaml").write_text(
        "# resolved\nrun_dir: checkpoints/demo\nseed: 7\ntrain:\n  lr: 0.01\n"
    )
    precision = {"compute": "bfloat16", "reason": "the CPU has bf16 instructions"}
    counts = {
        "prompts": {"rows": 4000},
        "generations": {"rows": 4001, "tokens": 241_502, "errors": 3},
        "dataset": {"rows": 3456, "kept": 3456, "dropped": 545, "tokens": 207_777}
        | {"dropped_by_rule": {"wrong_answer": 412, "truncated": 33, "duplicate": 100}},
        "student": {
            "steps": steps,
            "tokens": 415_554,
            "parameters_trainable": 137_216,
            "parameters_total": 999_680,
        },
        "control": {
            "steps": steps,
            "tokens": 53_210,
            "parameters_trainable": 137_216,
            "parameters_total": 999_680,
        },
        "eval": {"rows": len(rows), "tokens": 192_844, "errors": 0},
    }
    before = {}
    for position, (stage, count) in enumerate(counts.items()):
        manifest = {
            "stage": stage,
            "config": {"seed": 7},
            "inputs": before,
            "fingerprint": f"{position:02d}ab{'c0de' * 7}",
            "versions": {"distill": "0.1.0", "torch": "2.13.0" if stage != "eval" else "2.12.1"},
            "counts": count,
            "seconds": 12.25 * (position + 1),
            "device": "cpu",
            "flops": None if stage in ("prompts", "dataset") else 1_500_000_000_000 * position,
        }
        (folder / stage).mkdir(exist_ok=True)
        trained = stage in ("student", "control")
        (folder / stage / "manifest.json").write_text(
            json.dumps(manifest | ({"precision": precision} if trained else {}))
        )
        before = {stage: manifest["fingerprint"]}
    for seed, stage in enumerate(["student", "control"]):
        rng = np.random.default_rng(seed)
        with open(folder / stage / "metrics.jsonl", "w") as file:
            for step in range(1, steps + 1):
                kl = float(0.3 + 1.4 * math.exp(-step / 15) + 0.08 * rng.random())
                row = {
                    "step": step,
                    "loss": 2 * kl,
                    "lr": 0.01,
                    "grad_norm": 0.7,
                    "tokens": 100,
                    "seconds": step * 0.5,
                }
                objectives = {"cross_entropy": 2 * kl} | ({"forward_kl": kl} if stage == "student" else {})
                file.write(json.dumps(row | {"objectives": objectives}) + "\n")
    return folder


if __name__ == "__main__":
    from distill.report.report import build_report

    print(build_report(fake_run(Path(sys.argv[1]), per_cell=60, steps=400)))
