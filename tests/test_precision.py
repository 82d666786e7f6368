"""Precision is what it says: bf16 really multiplies in bf16, and what a device lacks is refused."""

import numpy as np
import pytest
import torch

from distill.config import load_recipe
from distill.data import TokenRows
from distill.errors import UserError
from distill.kept import KeptLogits
from distill.precision import resolve_precision
from distill.students import build_student
from distill.train import make_accelerator

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, fix", [("fp16", "bf16 or fp32"), ("fp8", "train.precision=bf16")])
def test_cpu_refuses_what_it_would_fake(name, fix):
    with pytest.raises(UserError, match=f"precision {name}.*{fix}"):
        resolve_precision(name, CPU)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matmuls_run_in_the_stated_type_and_weights_stay_float32(make_recipe, tmp_path, name, dtype):
    path, _ = make_recipe()
    recipe = load_recipe(path, [f"train.precision={name}", "student.adapter=full"])
    student = build_student(recipe.student, name, CPU, seed=0)
    accelerator = make_accelerator(recipe, resolve_precision(name, CPU), tmp_path)
    model = accelerator.prepare(KeptLogits(student.model))
    seen = []
    student.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out.dtype)
    )
    batch = TokenRows([[5, 6]], [[7, 1]]).collate(np.arange(1), 0)
    logits = model(batch.input_ids, batch.attention_mask, batch.keep)
    accelerator.backward(logits.sum())
    assert seen == [dtype]
    assert logits.dtype == torch.float32, "losses see float32"
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in student.model.parameters() if p.grad is not None} == {torch.float32}
