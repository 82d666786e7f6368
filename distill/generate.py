"""Teacher outputs: several sampled answers to every training prompt, judged, in resumable Parquet parts.

    distill generate RECIPE

Stage folder `generations/`: one row per (prompt, sample) with the token ids the teacher chose, their
log-probabilities, the text, why it stopped and the verifier's verdict. Row i of a run depends on the seed, the
prompt and the sample index, and a part is whole or absent, so a killed run continues with the missing parts and
ends with the same rows. A failed row is a row with an `error`, never a missing one.
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.config import Recipe
from distill.decode import Sampling, decode
from distill.describe import describe_model
from distill.devices import describe_device, pick_device
from distill.errors import UserError
from distill.models import eos_ids, load_model, load_tokenizer, prompt_ids, tokenizer_fingerprint
from distill.shards import GENERATION_SCHEMA, PartWriter, parts, read_rows, row_count
from distill.stages import Stage, input_fingerprint
from distill.verify import judge


def generate(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `generations/`; returns its manifest. Raises UserError for a teacher that cannot be loaded."""
    if recipe.teacher is None:
        raise UserError(
            "this recipe has no `teacher`: it trains on worked solutions, there is nothing to generate"
        )
    device = pick_device(recipe.device, recipe.threads)
    tokenizer = load_tokenizer(recipe.teacher.model)
    config = {
        "teacher": recipe.teacher.model_dump(mode="json"),
        "generate": recipe.generate.model_dump(mode="json"),
        "seed": recipe.seed,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    stage = Stage(
        recipe.path, "generations", config, {"prompts": input_fingerprint(recipe.path / "prompts", "run")}
    )
    if stage.done(redo):
        return stage.manifest
    model = load_model(recipe.teacher.model, recipe.teacher.dtype, device)
    stage.begin(redo)
    prompts = list(read_rows(recipe.path / "prompts"))
    writer = PartWriter(stage.folder, GENERATION_SCHEMA)
    size = recipe.generate.part_size
    chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    total = len(prompts) * recipe.generate.samples
    finished = row_count(p for p in parts(stage.folder))
    with tqdm(total=total, initial=finished, desc="generate", unit="answer", mininterval=0.5) as bar:
        meter = Meter(bar)
        for index, chunk in enumerate(chunks):
            if writer.path(index).is_file():
                continue
            writer.write(index, answer_chunk(recipe, model, tokenizer, chunk, meter))
            stage.checkpoint_clock()
    counts = _counts(stage.folder)
    return stage.finish(
        counts,
        device=describe_device(device),
        tokenizer=tokenizer_fingerprint(tokenizer),
        flops=_flops(model, counts),
    )


class Meter:
    """Feeds a progress bar with finished answers and the rate of new tokens."""

    def __init__(self, bar: tqdm):
        self.bar, self.tokens = bar, 0

    def __call__(self, _row: int, completion) -> None:
        self.tokens += len(completion.ids)
        elapsed = self.bar.format_dict["elapsed"]
        self.bar.set_postfix_str(f"{self.tokens / max(elapsed, 1e-9):,.0f} tok/s", refresh=False)
        self.bar.update()


def answer_chunk(recipe: Recipe, model, tokenizer, chunk: list[dict], meter: Meter) -> list[dict]:
    """All samples of one part's prompts as rows of GENERATION_SCHEMA."""
    section = recipe.generate
    tasks = [(prompt, sample) for prompt in chunk for sample in range(section.samples)]
    ids = {prompt["prompt_id"]: prompt_ids(tokenizer, prompt["messages"]) for prompt in chunk}
    completions = decode(
        model,
        [ids[prompt["prompt_id"]] for prompt, _ in tasks],
        Sampling(section.temperature, section.top_p, section.top_k, section.min_p, section.max_new_tokens),
        eos_ids=eos_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        keys=[(recipe.seed, prompt["prompt_id"], sample) for prompt, sample in tasks],
        batch_size=section.batch_size,
        on_finish=meter,
        vocab_limit=len(tokenizer),
    )
    rows = []
    for (prompt, sample), completion in zip(tasks, completions):
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        rows.append(
            {
                "prompt_id": prompt["prompt_id"],
                "sample_idx": sample,
                "teacher": recipe.teacher.model,
                "prompt_ids": ids[prompt["prompt_id"]],
                "completion_ids": completion.ids,
                "text": text,
                "finish_reason": completion.finish_reason,
                "logprobs": completion.logprobs,
                "verdict": judge(
                    prompt["verifier"], text, prompt["answer"], completion.finish_reason, completion.error
                ),
                "error": completion.error,
                "family": prompt["family"],
                "level": prompt["level"],
            }
        )
    return rows


def _flops(model, counts: dict[str, Any]) -> int:
    """Forward FLOPs of every token read or produced, each attending to half of an average row."""
    tokens = counts["tokens"] + counts["prompt_tokens"]
    context = max(1, tokens // (2 * max(counts["rows"], 1)))
    return int(describe_model(model, context)["flops_per_token"] * tokens)


def _counts(folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"rows": 0, "tokens": 0, "prompt_tokens": 0, "errors": 0, "verdicts": {}}
    for row in read_rows(folder, ["prompt_ids", "completion_ids", "verdict", "error"]):
        counts["rows"] += 1
        counts["tokens"] += len(row["completion_ids"])
        counts["prompt_tokens"] += len(row["prompt_ids"])
        counts["errors"] += row["error"] is not None
        counts["verdicts"][row["verdict"]] = counts["verdicts"].get(row["verdict"], 0) + 1
    return counts
