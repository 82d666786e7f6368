"""The model card (README.md) that every trained folder carries: what it is, from what, how it was made.

Cards state the teacher and what its terms say of training on its outputs (`distill/terms.py`). They name a
licence only where all of the model is this project's own: weights from scratch on its procedural problems.
"""

from typing import Any

from distill.config import Recipe
from distill.terms import describe

OWN_LICENCE = "mit"


def student_card(recipe: Recipe, arm: str, counts: dict, terms: dict[str, Any] | None = None) -> str:
    """Markdown with the front matter the hub reads. `terms`: the decision recorded with the dataset."""
    base = recipe.student.model or f"random weights ({recipe.student.config['model_type']})"
    losses = " + ".join(f"{o.weight:g} x {o.name}" for o in recipe.train.objectives)
    if recipe.teacher and arm != "control":
        origin = f"Trained on outputs of the teacher `{recipe.teacher.model}`, filtered by a verifier."
        unrecorded = "The teacher's terms were not recorded: check them before sharing this model."
        licence = "\n".join(describe(terms)) if terms else unrecorded
    elif recipe.prompts.solutions:
        origin = "Trained on procedurally generated problems with worked steps (`distill/tasks.py`)."
        licence = "Terms: no third-party data or model outputs were used."
    else:
        origin = "Control arm: trained on questions and final answers, without a teacher."
        licence = "Terms: no model outputs were used."
    adapter = f"LoRA rank {recipe.student.lora.rank}" if recipe.student.adapter == "lora" else "full"
    own = recipe.prompts.solutions and recipe.student.config and recipe.student.tokenizer == "embedded"
    lines = [
        "---",
        *([f"license: {OWN_LICENCE}"] if own else []),
        "library_name: peft" if recipe.student.adapter == "lora" else "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {recipe.path.name}: {arm}",
        "",
        origin,
        "",
        f"- starts from: `{base}`",
        f"- fine-tuning: {adapter}, {counts['parameters_trainable']:,} of "
        f"{counts['parameters_total']:,} parameters trained",
        f"- objective: {losses}",
        f"- steps: {counts['steps']:,} of {recipe.train.batch_size} rows, {counts['tokens']:,} trained tokens",
        f"- precision: {recipe.train.precision}; seed {recipe.seed}",
        "",
        licence,
        "",
    ]
    if recipe.teacher and arm != "control":
        lines += [
            "Flaws of the teacher (wrong rules, refusals, bias) can be inherited; measure before relying on it.",
            "",
        ]
    return "\n".join(lines)
