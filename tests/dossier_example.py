"""A made-up evaluation with everything in it, for the dossier: metrics.json, answers/, routes/, manifest.json.

`python tests/dossier_example.py FOLDER [EXPERTS LAYERS]` writes one and its page, to be looked at.
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
SKILL = {"base": (0.88, 0.3, 0.04), "student": (0.93, 0.88, 0.8), "teacher": (0.99, 0.97, 0.94)}
ATTACK = "</pre></script><script>alert('model')</script><img src=x onerror=alert(1)>\x07 & {{ 7*7 }}"
N = 48
WARNED = [
    "3 of 48 answers to hard state nothing that the verifier can read, and count as not solved (verdict no_answer in "
    "answers/)"
]


def wilson(p: float, n: int) -> list[float]:
    z = 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def score(p: float, n: int, samples: int = 4) -> dict:
    p = round(p * n) / n
    short = {"n": n, "accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "ci95": wilson(p, n)}
    return short | {
        "interval": "bootstrap over problems",
        "samples": samples,
        "pass_at_k": {"1": p, "4": min(1.0, p + 0.11)},
        "pass_at_k_ci95": {"1": wilson(p, n), "4": wilson(min(1.0, p + 0.11), n)},
        "majority_at_k": {"4": min(1.0, p + 0.05)},
        "majority_at_k_ci95": {"4": wilson(min(1.0, p + 0.05), n)},
        "truncated": 3,
        "no_answer": 2,
        "unparsed": 2,
        "errors": 0,
        "mean_tokens": 40.0 + 30 * p,
        "mean_thinking_tokens": 30.0 + 30 * p,
        "mean_answer_tokens": 10.0,
    }


def bins(rng, n: int, shift: float) -> list[dict]:
    edges, found = np.linspace(0, 1, 16), []
    held = rng.multinomial(n, np.linspace(0.2, 3, 15) / np.linspace(0.2, 3, 15).sum())
    held[0] = 0
    for low, high, count in zip(edges, edges[1:], held.tolist()):
        middle = float((low + high) / 2)
        found.append(
            {
                "low": float(low),
                "high": float(high),
                "n": count,
                "confidence": middle if count else None,
                "accuracy": float(np.clip(middle - shift * middle * (1 - middle) * 4, 0, 1))
                if count
                else None,
            }
        )
    return found


def agreement(kl: float, answers: int = 40) -> dict:
    return {
        "answers": answers,
        "tokens": 2345,
        "not_finite": 0,
        "top1_agreement": 0.913 - kl / 10,
        "top1_agreement_stderr": 0.0061,
        "top1_agreement_ci95": [0.901 - kl / 10, 0.925 - kl / 10],
        "forward_kl": kl,
        "forward_kl_stderr": 0.012,
        "forward_kl_ci95": [kl - 0.024, kl + 0.024],
        "reverse_kl": kl * 1.3,
        "reverse_kl_stderr": 0.014,
        "reverse_kl_ci95": [kl * 1.3 - 0.028, kl * 1.3 + 0.028],
    }


def moe_layer(rng, experts: int, k: int) -> dict:
    load = rng.dirichlet(np.full(experts, 30.0))
    matrix = rng.dirichlet(np.full(experts, 2.0), size=experts) * (k - 1)
    np.fill_diagonal(matrix, 0)
    groups = {"family": FAMILIES, "level": LEVELS, "token_class": ["prompt", "thinking", "answer"]}
    special = {}
    for kind, names in groups.items():
        share = (rng.dirichlet(np.full(experts, 9.0), size=len(names)) * k).round(4)
        group, expert = divmod(int(share.argmax()), experts)
        strongest = {
            "group": names[group],
            "expert": expert,
            "share": float(share.max()),
            "overall": 0.2,
            "z": 17.3,
        }
        special[kind] = {
            "groups": names,
            "tokens": [5000 + 100 * i for i in range(len(names))],
            "answers": [48] * len(names),
            "baseline": k / experts,
            "share": share.tolist(),
            "critical_z": 3.9,
            "strongest": [strongest],
        }
    special["token"] = [
        {"expert": e % experts, "token": token, "id": e, "share": 0.97 - 0.03 * e, "n": 400 + e, "z": 9.0}
        for e, token in enumerate([ATTACK, "+", "7", " answer", "\n", "<think>"])
    ]
    return {
        "tokens": 48_211,
        "experts": experts,
        "experts_per_token": k,
        "load": load.tolist(),
        "max_violation": float(load.max() * experts - 1),
        "max_violation_noise_floor": 0.021,
        "batches": 20,
        "max_violation_batch_mean": float(load.max() * experts - 0.9),
        "max_violation_batch_max": float(load.max() * experts),
        "max_violation_batch_noise_floor": 0.09,
        "load_entropy": 2.05,
        "load_entropy_normalised": 0.9861,
        "effective_experts": 0.97 * experts,
        "load_cv": 0.18,
        "dead_experts": 1 if experts > 8 else 0,
        "router_entropy": 1.234,
        "confidence": 0.4321,
        "token_drop": {"1.0": 0.087, "1.25": 0.021, "1.5": 0.0034, "2.0": 0.0},
        "token_drop_batch": {"1.0": 0.127, "1.25": 0.042, "1.5": 0.0091, "2.0": 0.0007},
        "coactivation": {
            "uniform": (k - 1) / (experts - 1),
            "matrix": matrix.round(4).tolist(),
            "strongest": [[0, 1, 0.81], [3, 2, 0.66]],
        },
        "specialisation": special,
    }


def layer_name(index: int) -> str:
    return f"model.layers.{index + 1}.mlp"


def interventions(rng, experts: int, layers: int, k: int) -> list[dict]:
    """As `distill.evaluation.interventions` returns them: fewer and more experts, without each in turn, controls."""

    def entry(kind: str, value, label: str, shift: float, per_token: int = k) -> dict:
        compared = {"n": 3 * N, "difference": -shift, "ci95": [-shift - 0.05, -shift + 0.05], "p_value": 0.01}
        compared |= {"p_value_holm": 0.04, "verdict": "WORSE" if shift > 0.05 else "INCONCLUSIVE"}
        return {
            "kind": kind,
            "value": value,
            "label": label,
            "experts_per_token": per_token,
            "flops_per_token": 2_000_000 + 460_000 * per_token,
            "tasks": {t: score(max(0.0, p - shift), N, 1) for t, p in zip(LEVELS, SKILL["teacher"])},
            "comparison": None if kind == "none" else compared,
        }

    found = [entry("none", None, "unchanged", 0.0)]
    found += [entry("top_k", v, f"top-k {v}", 0.3 / v if v < k else 0.01, v) for v in (1, 2 * k)]
    drops = [f"{layer + 1}:{expert}" for layer in range(layers) for expert in range(experts)]
    found += [entry("drop", v, f"without {v}", float(rng.exponential(0.05))) for v in drops]
    found.append(entry("drop", "1:0+2:1", "without 1:0+2:1", 0.11))
    return found + [
        entry("route", how, f"{how} routing", shift)
        for how, shift in (("random", 0.7), ("uniform", 0.04), ("shuffled", 0.75))
    ]


def precisions(layers: int) -> list[dict]:
    """As `distill.evaluation.usage` returns them."""
    tasks = {t: score(p, N) for t, p in zip(LEVELS, SKILL["teacher"])}

    def entry(name: str, nll: float, flips: float) -> dict:
        signed = {other: (nll - base) / base for other, base in (("fp32", 0.51234), ("bf16", 0.51301))}
        error = {other: {"signed": x, "absolute": abs(x)} for other, x in signed.items()}
        entry = {"precision": name, "ran": True, "reason": f"{name} matmuls, emulated", "nll_per_token": nll}
        entry |= {"relative_loss_error": error, "tasks": tasks}
        if name != "fp32":
            by_layer = {
                layer_name(i): {"slots": flips * (i + 1) / 2, "tokens": flips * (i + 1)}
                | {"margin_all": 0.1432, "margin_flipped": 0.0021 * (i + 1) if flips else None}
                for i in range(layers)
            }
            entry["flips"] = {"layers": by_layer, "slots": flips, "tokens": min(1.0, flips * layers)}
        return entry

    return [
        entry("fp32", 0.51234, 0.0),
        entry("bf16", 0.51301, 0.0052),
        {"precision": "fp16", "ran": False, "reason": "fp16 needs CUDA: this is a CPU"},
        entry("fp8-emulated", 0.52177, 0.0301),
    ]


def likelihood(p: float) -> dict:
    short = {key: score(p, N)[key] for key in ("n", "accuracy", "stderr", "ci95")}
    return {"form": "plain", "options": "letter", "mean_options": 4.0, "errors": 0} | dict.fromkeys(
        ("sum", "per_character", "per_token", "per_byte"), short
    )


def example_model(name: str, rng, experts: int, layers: int, k: int) -> dict:
    moe = name == "teacher"
    cost = {
        "seconds": 41.5,
        "prompt_tokens": 9876,
        "generated_tokens": 48_211,
        "decode_tokens_per_second": 1161.7,
        "batch_size": 256,
        "flops": 140_000_000_000,
        "flops_per_answer": 123_000_000,
        "prefill_tokens": 512,
        "prefill_tokens_per_second": 8123.4,
        "decode_tokens_per_second_batch_1": 98.7,
        "weight_bytes": 7_300_000 if moe else 1_724_928,
        "kv_bytes_per_token": 960 if moe else 2048,
        "usd_per_hour": 0.4,
        "usd_per_million_input_tokens": 0.0137,
        "usd_per_million_output_tokens": 0.0956,
    }
    if moe:
        cost["ahead"] = {
            "answers": 32, "drafts": 1201, "acceptance": 0.8132, "tokens_per_pass": 1.79,
            "tokens_per_second": 131.4, "tokens_per_second_without": 98.7,
        }  # fmt: skip
    rows = {level: score(p, 4 * N) for level, p in zip(LEVELS, SKILL[name])}
    found = {
        "path": f"checkpoints/demo/{name}",
        "model": {
            "architecture": "DeepseekV3ForCausalLM" if moe else "Qwen3ForCausalLM",
            "dtype": "bfloat16",
            "layers": layers + 1,
            "parameters_total": 3_650_000 if moe else 862_464,
            "parameters_adapter": 0 if moe else 137_216,
            "assumed_context": 96,
            "parameters_active": 1_480_000 if moe else 862_464,
            "parameters_active_without_embeddings": 1_460_000 if moe else 850_176,
            "flops_per_token": 2_920_000 if moe else 1_700_352,
            "kv_bytes_per_token": 960 if moe else 2048,
            "weight_bytes": 7_300_000 if moe else 1_724_928,
            "experts": experts if moe else 0,
            "experts_per_token": k if moe else 0,
        },
        "tasks": rows,
        "families": {
            f: {t: score(float(np.clip(p + d, 0, 1)), N) for t, p in zip(LEVELS, SKILL[name])}
            for f, d in zip(FAMILIES, (0.05, 0.02, -0.1, 0))
        },
        "text": {
            "notes.txt": {
                "tokens": 12_000,
                "bytes": 31_000,
                "documents": 12,
                "nll_per_token": 1.2345 if moe else 1.5432,
                "nll_per_token_stderr": 0.0123,
                "nll_per_byte": 0.4779,
                "bits_per_byte": 0.6895,
                "perplexity": math.exp(1.2345 if moe else 1.5432),
                "window": 1024,
                "stride": 512,
                "not_finite": 0,
            }
        },
        "likelihood": {"arc": [likelihood(0.61 if moe else 0.37)]},
        "harness": {
            "lm_eval": "0.4.9",
            "limit": 50,
            "seconds": 12.0,
            "tasks": {
                "arc_easy": {"n": 50, "version": "1.0", "hash": None, "shots": 0}
                | {"metrics": {"acc,none": 0.5678}, "stderr": {"acc,none": 0.0321}}
            },
        },
        "cost": cost,
        "warnings": WARNED if name == "base" else [],
    }
    if moe:
        measured = {layer_name(i): moe_layer(rng, experts, k) for i in range(layers)}
        by_layer = {name: {"overlap": 0.91 - 0.02 * i, "top1": 0.88} for i, name in enumerate(measured)}
        alike = {"tokens": 9876, "overlap": 0.89, "top1": 0.87, "uniform": k / experts, "layers": by_layer}
        return found | {
            "moe": {"answers": 180, "answers_total": 192, "layers": measured, "saturation": {"later": alike}},
            "interventions": interventions(rng, experts, layers, k),
            "precision": precisions(layers),
        }
    tokens = {"tokens": 2345, "ece": 0.0456 if name == "base" else 0.0187, "brier": 0.321, "nll": 0.7}
    answers = {"n": 180, "ece": 0.0912, "brier": 0.1504, "bins": bins(rng, 180, 0.3)}
    shift = 0.25 if name == "base" else 0.06
    own = {"own_text": agreement(0.3 if name == "base" else 0.1, 44)}
    kl = 0.8 if name == "base" else 0.2468
    return found | {
        "fidelity": agreement(kl) | own,
        "calibration": tokens | {"bins": bins(rng, 2345, shift), "answers": answers},
    }


def comparison(models: dict, a: str, b: str, task: str) -> dict:
    one, two = models[b]["tasks"][task], models[a]["tasks"][task]
    difference, half = one["accuracy"] - two["accuracy"], 1.96 * math.hypot(one["stderr"], two["stderr"])
    interval = [difference - half, difference + half]
    verdict = "BETTER" if interval[0] > 0 else "WORSE" if interval[1] < 0 else "INCONCLUSIVE"
    return {
        "a": a,
        "b": b,
        "task": task,
        "n": one["n"],
        "difference": difference,
        "ci95": interval,
        "interval": "bootstrap over problems",
        "bootstrap_ci95": interval,
        "p_value": 0.0001,
        "test": "sign flips over problems, exact",
        "p_value_holm": 0.0009 if verdict != "INCONCLUSIVE" else 0.3,
        "correction": "holm",
        "family_size": 9,
        "level": 0.95,
        "verdict": verdict,
    }


def example_metrics(experts: int = 8, layers: int = 3, k: int = 2) -> dict:
    rng = np.random.default_rng(5)
    models = {name: example_model(name, rng, experts, layers, k) for name in SKILL}
    pairs = [("base", "student"), ("base", "teacher"), ("student", "teacher")]
    kept = {"n": 100, "kept": 0.96, "ci95": [0.9, 0.985], "gained": 0.55, "gained_n": 92}
    return {
        "schema_version": 2,
        "settings": {"samples": 4, "temperature": 0.7, "top_p": 0.95, "seed": 0}
        | {"max_new_tokens": 96, "bootstrap_resamples": 1000},
        "models": models,
        "comparisons": [comparison(models, a, b, task) for a, b in pairs for task in LEVELS],
        "forgetting": {
            "base": "base",
            "models": {name: dict.fromkeys(["all", *LEVELS], kept) for name in ("student", "teacher")},
        },
    }


def write_routes(path: Path, experts: int, layers: int, k: int, answers: int, tokens: int) -> None:
    """As the docstring of distill/evaluation/routes.py has it, written here without its help."""
    rng = np.random.default_rng(11)
    words = ["4", "7", "+", "8", " =", " ?", "\n", "carry", " the", "1", ""]
    rows = []
    for index in range(answers):
        drawn = rng.random((layers, tokens, experts)).argsort(-1)[:, :, :k].astype(np.uint8)
        weights = -np.sort(-rng.dirichlet(np.full(k, 2.0), size=(layers, tokens)), axis=-1)
        text = [words[i] for i in rng.integers(0, len(words), tokens)]
        text[-1] = ATTACK if index == 0 else "9"
        third = tokens // 3
        rows.append(
            {
                "prompt_id": f"{FAMILIES[index % 4]}-{index}",
                "family": FAMILIES[index % 4],
                "level": LEVELS[index % 3],
                "verdict": ["correct", "wrong", "truncated"][index % 3],
                "tokens": text,
                "token_ids": list(range(tokens)),
                "classes": ["prompt"] * third + ["thinking"] * third + ["answer"] * (tokens - 2 * third),
                "experts": drawn.tobytes(),
                "weights": weights.astype("<f2").tobytes(),
            }
        )
    about = {
        "layers": json.dumps([layer_name(i) for i in range(layers)]),
        "num_experts": json.dumps([experts] * layers),
        "experts_per_token": json.dumps([k] * layers),
        "null_experts": json.dumps([0] * layers),
        "experts_dtype": "uint8",
        "schema_version": "1",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(about), path)


def example(folder: Path, experts=8, layers=3, k=2, answers=24, tokens=150) -> Path:
    """A whole evaluated folder."""
    (folder / "answers").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(example_metrics(experts, layers, k)))
    write_routes(folder / "routes" / "teacher.parquet", experts, layers, k, answers, tokens)
    rows = [
        {
            "model": "teacher",
            "prompt_id": f"{FAMILIES[index % 4]}-{index}",
            "family": FAMILIES[index % 4],
            "level": LEVELS[index % 3],
            "prompt": f"47{index} + 88 = ?",
            "reference": f"reference {index} </script>",
            "text": ATTACK,
            "answer": f"found {index}",
            "verdict": "correct",
            "tokens": 45,
        }
        for index in range(answers)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers" / "part-00000.parquet")
    manifest = {"stage": "eval", "device": "cpu (2 threads)", "seconds": 123.4}
    manifest |= {"versions": {"distill": "0.1.0", "torch": "2.13.0"}, "fingerprint": "ab" * 16}
    manifest |= {"counts": {"rows": 576, "problems": 192, "errors": 0}, "flops": 1_500_000_000_000}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


if __name__ == "__main__":
    from distill.report.dossier import build_dossier

    sizes = dict(zip(("experts", "layers", "k"), map(int, sys.argv[2:])))
    print(build_dossier(example(Path(sys.argv[1]), **sizes)))
