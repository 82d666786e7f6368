"""A dataset of a few rows and runs on it: what the tests of training, resuming and launching compare."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config.recipe import load_recipe
from distill.data.batches import TokenRows
from distill.storage import DATASET_SCHEMA, PartWriter, fingerprint, write_json
from distill.training.arms import train_arms
from distill.training.step import StudentStep


def fake_dataset(run_dir, rows: int = 40, seed: int = 0, longest: int = 20) -> None:
    """A finished dataset/ folder of random ragged rows in the byte vocabulary.

    The control arm's rows are their last token or two: shorter than the student's, as final answers are.
    """
    rng = np.random.default_rng(seed)

    def ids(shortest: int):
        return rng.integers(2, 250, rng.integers(shortest, longest)).tolist()

    data = [
        {
            "prompt_id": f"p{i}",
            "sample_idx": 0,
            "prompt_ids": ids(1),
            "completion_ids": [*ids(0), 1],
            "messages": [{"role": "user", "content": f"question {i}"}],
            "text": "x",
            "family": "any",
            "level": ("easy", "hard")[i % 2],
        }
        for i in range(rows)
    ]
    PartWriter(run_dir / "dataset", DATASET_SCHEMA).write_all(data)
    answers = [row | {"completion_ids": row["completion_ids"][-2:]} for row in data]
    PartWriter(run_dir / "dataset" / "control", DATASET_SCHEMA).write_all(answers)
    counts = {"rows": rows, "tokens": sum(len(r["completion_ids"]) for r in data)}
    write_json(run_dir / "dataset" / "manifest.json", {"fingerprint": fingerprint(data), "counts": counts})


SGD = ["train.optimizer=sgd", "train.learning_rate=0.5", "control.enabled=false", "train.max_grad_norm=1000"]
MIXED = "train.objectives=[{name: cross_entropy}, {name: forward_kl, weight: 0.5, temperature: 2.0}]"


def trainer(make_recipe):
    """The fixture `trained` of tests/conftest.py."""

    def train(name: str, *overrides: str, student: str = "llama", teacher: str = "qwen3_moe"):
        path, run_dir = make_recipe(teacher, student, name)
        if not (run_dir / "dataset").is_dir():
            fake_dataset(run_dir)
        train_arms(load_recipe(path, list(overrides)))
        file = next((run_dir / "student").glob("*.safetensors"))
        return load_file(file), run_dir

    return train


def stopped_after(passes: int, monkeypatch, start) -> None:
    """Run `start()` until the student's forward has run so many times in training, then kill it as Ctrl-C does."""
    real, calls = StudentStep.forward, []

    def stops(module, *args, **named):
        calls.append(1) if module.training else None
        if len(calls) > passes:
            raise KeyboardInterrupt
        return real(module, *args, **named)

    monkeypatch.setattr(StudentStep, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        start()
    monkeypatch.setattr(StudentStep, "forward", real)


def assert_same(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def losses_of(run_dir) -> list[float]:
    import json

    return [
        json.loads(line)["loss"] for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()
    ]


def stored(rows: int = 12) -> TokenRows:
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(2, 250, rng.integers(1, 6)).tolist()  # noqa: E731
    return TokenRows([draw() for _ in range(rows)], [[*draw(), 1] for _ in range(rows)])
