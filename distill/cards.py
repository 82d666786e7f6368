"""The model card (README.md) that every trained folder carries: what it is, from what, how it was made.

Cards state the teacher, because whether its outputs may train another model is a question of its terms.
"""

from distill.config import Recipe


def student_card(recipe: Recipe, arm: str, counts: dict) -> str:
    """Markdown with the front matter the hub reads."""
    base = recipe.student.model or f"random weights ({recipe.student.config['model_type']})"
    terms = " + ".join(f"{o.weight:g} x {o.name}" for o in recipe.train.objectives)
    if recipe.teacher and arm != "control":
        origin = f"Trained on outputs of the teacher `{recipe.teacher.model}`, filtered by a verifier."
        licence = "Check that the teacher's licence or terms of use allow its outputs to train this model."
    elif recipe.prompts.solutions:
        origin = "Trained on procedurally generated problems with worked steps (`distill/tasks.py`)."
        licence = "No third-party data or model outputs were used."
    else:
        origin = "Control arm: trained on questions and final answers, without a teacher."
        licence = "No model outputs were used."
    adapter = f"LoRA rank {recipe.student.lora.rank}" if recipe.student.adapter == "lora" else "full"
    lines = [
        "---",
        "library_name: peft" if recipe.student.adapter == "lora" else "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {recipe.path.name}: {arm}",
        "",
        origin,
        "",
        f"- starts from: `{base}`",
        f"- fine-tuning: {adapter}, {counts['parameters_trainable']:,} of {counts['parameters_total']:,} parameters trained",
        f"- objective: {terms}",
        f"- steps: {counts['steps']:,} of {recipe.train.batch_size} rows, {counts['tokens']:,} trained tokens",
        f"- precision: {recipe.train.precision}; seed {recipe.seed}",
        "",
        f"Terms: {licence}",
        "",
    ]
    if recipe.teacher and arm != "control":
        lines += [
            "Flaws of the teacher (wrong rules, refusals, bias) can be inherited; measure before relying on it.",
            "",
        ]
    return "\n".join(lines)
