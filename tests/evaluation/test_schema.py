"""metrics.json: the schema file is that of the models, every key is explained, and what does not fit is named."""

import json
from typing import get_args

import pytest
import torch

from distill.config.evaluation import Evaluate
from distill.config.section import BlockPrecision
from distill.errors import RunError
from distill.evaluation.schema import METRICS_VERSION, SCHEMA_FILE, check, json_schema
from distill.models.precision import resolve_precision

SCORE = {"n": 2, "accuracy": 0.5, "stderr": 0.35, "ci95": [0.1, 0.9]}
TASK = {
    **SCORE, "interval": "wilson", "samples": 1, "pass_at_k": {"1": 0.5}, "truncated": 0, "no_answer": 0,
    "unparsed": 0, "errors": 0, "mean_tokens": 3.0, "mean_thinking_tokens": 1.0, "mean_answer_tokens": 2.0,
}  # fmt: skip
SIZE = dict.fromkeys(
    ("parameters_total", "parameters_active", "flops_per_token", "kv_bytes_per_token", "weight_bytes"), 1
)
COST = {
    "seconds": 1.0, "prompt_tokens": 4, "generated_tokens": 6, "decode_tokens_per_second": 6.0, "batch_size": 2,
    "flops": 10, "flops_per_answer": 5, "weight_bytes": 1, "kv_bytes_per_token": 1,
}  # fmt: skip
SETTINGS = {
    "samples": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "max_new_tokens": 4,
    "bootstrap_resamples": 9,
}


def smallest() -> dict:
    model = {
        "path": "x",
        "model": SIZE,
        "tasks": {"easy": TASK},
        "families": {},
        "cost": COST,
        "warnings": [],
    }
    return {"schema_version": 2, "settings": SETTINGS, "models": {"x": model}, "comparisons": []}


def test_the_file_is_exported_from_the_models():
    again = "python -m distill.evaluation.schema"
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), f"the schema changed: run `{again}`"
    assert METRICS_VERSION == 2


def test_what_fits_fits():
    check(smallest())
    check(json.loads(json.dumps(smallest())))
    loose = smallest()
    loose["models"]["x"] |= {"precision": [{"precision": "bf16"}], "interventions": [{"kind": "drop"}]}
    loose["models"]["x"]["moe"] = {
        "layers": {"l": {"load": [0.5, 0.5], "new": {"deep": 1}}},
        "saturation": {"a": 1},
    }
    check(loose)
    none = smallest()
    none["models"]["x"]["tasks"]["easy"] = {**TASK, "n": 0, "accuracy": None, "stderr": None, "ci95": None}
    check(none)


@pytest.mark.parametrize(
    "where, key, value",
    [
        (("models", "x", "tasks", "easy"), "acuracy", 0.5),
        (("models", "x", "tasks", "easy"), "n", "2"),
        (("models", "x"), "fidelty", {}),
        (("models", "x", "cost"), "seconds", None),
        (("settings",), "samples", 1.5),
        ((), "schema_version", 1),
    ],
)
def test_what_does_not_fit_is_named(where, key, value):
    metrics = json.loads(json.dumps(smallest()))
    node = metrics
    for part in where:
        node = node[part]
    node[key] = value
    with pytest.raises(RunError) as caught:
        check(metrics)
    assert any(".".join([*where, key]) in line for line in caught.value.problems)


def test_a_missing_key_is_named():
    metrics = smallest()
    del metrics["models"]["x"]["cost"]
    with pytest.raises(RunError, match=r"models\.x\.cost: Field required"):
        check(metrics)


def test_the_recipe_s_precisions_are_those_that_can_be_swept():
    sweep = pytest.importorskip("distill.evaluation.usage")
    (element,) = get_args(Evaluate.model_fields["precisions"].annotation)
    listed, by_blocks = set(get_args(element)), set(get_args(BlockPrecision))
    assert listed == set(sweep.PRECISIONS) | by_blocks and not by_blocks & set(sweep.PRECISIONS)
    cpu = torch.device("cpu")
    assert all(resolve_precision(name, cpu).name == name for name in by_blocks)
