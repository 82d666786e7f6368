"""What a recipe will cost before it starts: derived values for `--dry-run`, from configs alone.

    distill train RECIPE --dry-run

Apart from the commands, since it imports torch: a mistake in their arguments is told in a fraction of a second.
"""

from typing import Any

from distill.config.recipe import Recipe
from distill.data.budget import forecast
from distill.data.signals import SignalFormat
from distill.data.terms import decide
from distill.models.describe import describe_config
from distill.models.load import load_config
from distill.models.student import student_config
from distill.storage import read_json


def derived(recipe: Recipe) -> dict[str, Any]:
    """Rows, steps, parameters, bytes and FLOPs that follow from the recipe; no weights are loaded.

    Memory is what must be held for training: weights, and for trained parameters a float32 gradient and two
    Adam moments. Activations come on top and grow with micro_batch_size x length.
    """
    train = recipe.train
    student = describe_config(student_config(recipe.student))
    total = student["parameters_total"]
    trained = total if recipe.student.adapter == "full" else None
    values: dict[str, Any] = {
        "optimizer_steps": train.steps,
        "rows_per_step": train.batch_size,
        "micro_batches_per_step": -(-train.batch_size // train.micro_batch_size),
        "rows_trained": train.steps * train.batch_size,
        "student_parameters": total,
        "student_flops_per_token_forward": student["flops_per_token"],
        "student_weight_bytes_fp32": 4 * total,
    }
    if trained:
        moments = 2 if train.optimizer == "adamw" else 0
        values["training_bytes_without_activations"] = 4 * trained * (2 + moments)
    if recipe.prompts.source == "tasks":
        values["prompts"] = sum(recipe.prompts.levels.values())
    if recipe.teacher:
        teacher = None
        if not recipe.teacher.endpoint:
            teacher = describe_config(load_config(recipe.teacher.model))
            values["teacher_parameters"] = teacher["parameters_total"]
            values["teacher_parameters_active"] = teacher["parameters_active"]
        decision = decide(recipe.teacher, recipe.student)
        values["teacher_terms"] = decision["reason"] + ("" if decision["allowed"] else "; stops the run")
        values |= forecast(recipe)
        if teacher and "answer_tokens_at_most" in values:
            flops = teacher["flops_per_token"] * values["answer_tokens_at_most"]
            values["generation_flops_at_most"] = flops
            values |= _signal_bytes(recipe, values["answer_tokens_at_most"])
    manifest = recipe.path / "dataset" / "manifest.json"
    if manifest.is_file():
        counts = read_json(manifest)["counts"]
        values["dataset_rows"] = counts["rows"]
        values["epochs"] = round(values["rows_trained"] / counts["rows"], 2)
        values["trained_tokens_per_step"] = round(counts["tokens"] / counts["rows"] * train.batch_size)
    return values


def _signal_bytes(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Bytes of the teacher signals that so many tokens take on disk, at most."""
    if recipe.generate.signal.kind == "none":
        return {}
    text = load_config(recipe.teacher.model).get_text_config()
    form = SignalFormat.from_recipe(recipe.generate.signal, text.vocab_size, {}, text.hidden_size)
    return {"signal_bytes_at_most": round(tokens * form.bytes_per_token())}
