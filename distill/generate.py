"""Teacher outputs: several sampled answers to every training prompt, judged, in resumable Parquet parts.

    distill generate RECIPE
    accelerate launch --num_processes 2 --cpu -m distill generate RECIPE       the same rows, parts dealt by rank

Stage folder `generations/`: one row per (prompt, sample) with the token ids the teacher chose, their
log-probabilities, the text, why it stopped and the verifier's verdict. A part is the unit of everything: it is
computed alone, from the seed and its own prompts, and is whole or absent. So a killed run, two processes or a
resume end with byte-identical parts. A failed row is a row with an `error`, never a missing one.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.config import Recipe
from distill.decode import Sampling
from distill.devices import describe_device, pick_device
from distill.errors import UserError
from distill.shards import GENERATION_SCHEMA, PartWriter, parts, read_json, read_rows, row_count
from distill.stages import Stage, input_fingerprint
from distill.teachers import Answer, Question, Teacher, open_teacher
from distill.verify import judge


def generate(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `generations/`; returns its manifest. Raises UserError for a teacher that cannot be loaded."""
    if recipe.teacher is None:
        raise UserError("this recipe has no `teacher`: it trains on worked solutions, there is nothing to generate")
    device = pick_device(recipe.device, recipe.threads)
    teacher = open_teacher(recipe.teacher, device, recipe.generate.batch_size)
    config = {
        "teacher": recipe.teacher.model_dump(mode="json"),
        "generate": recipe.generate.model_dump(mode="json"),
        "seed": recipe.seed,
        "identity": teacher.identity(),
    }
    folder = recipe.path / "prompts"
    stage = Stage(recipe.path, "generations", config, {"prompts": input_fingerprint(folder, "generate RECIPE")})
    if stage.done(redo):
        return stage.manifest
    stage.begin(redo)
    total = read_json(folder / "manifest.json")["counts"]["rows"] * recipe.generate.samples
    writer = PartWriter(stage.folder, GENERATION_SCHEMA)
    with tqdm(total=total, desc="generate", unit="answer", mininterval=0.5) as bar:
        bar.update(row_count(parts(stage.folder)))
        meter = Meter(bar)
        for index, chunk in enumerate(chunks(read_rows(folder), recipe.generate.part_size)):
            if not writer.path(index).is_file():
                writer.write(index, answer_chunk(recipe, teacher, chunk, meter))
                stage.checkpoint_clock()
    counts = count_rows(stage.folder)
    return stage.finish(
        counts,
        device=describe_device(device),
        tokenizer=teacher.identity(),
        flops=teacher.flops(counts["prompt_tokens"], counts["tokens"], counts["rows"]),
    )


def chunks(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Consecutive groups of `size` rows, one in memory at a time."""
    while group := list(itertools.islice(rows, size)):
        yield group


class Meter:
    """Feeds a progress bar with finished answers and the rate of new tokens."""

    def __init__(self, bar: tqdm):
        self.bar, self.tokens = bar, 0

    def __call__(self, answer: Answer) -> None:
        self.tokens += answer.completion_tokens
        elapsed = self.bar.format_dict["elapsed"]
        self.bar.set_postfix_str(f"{self.tokens / max(elapsed, 1e-9):,.0f} tok/s", refresh=False)
        self.bar.update()


def answer_chunk(recipe: Recipe, teacher: Teacher, chunk: list[dict], meter: Meter) -> list[dict]:
    """All samples of one part's prompts as rows of GENERATION_SCHEMA."""
    section = recipe.generate
    tasks = [(prompt, sample) for prompt in chunk for sample in range(section.samples)]
    questions = [Question(p["messages"], (recipe.seed, p["prompt_id"], sample)) for p, sample in tasks]
    sampling = Sampling(section.temperature, section.top_p, section.top_k, section.min_p, section.max_new_tokens)
    answers = teacher.answer(questions, sampling, meter)
    return [
        {
            "prompt_id": prompt["prompt_id"],
            "sample_idx": sample,
            "teacher": teacher.name,
            "prompt_ids": answer.prompt_ids,
            "completion_ids": answer.completion_ids,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "logprobs": answer.logprobs,
            "verdict": judge(
                prompt["verifier"], answer.text, prompt["answer"], answer.finish_reason, answer.error
            ),
            "error": answer.error,
            "family": prompt["family"],
            "level": prompt["level"],
        }
        for (prompt, sample), answer in zip(tasks, answers)
    ]


def count_rows(folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"rows": 0, "tokens": 0, "prompt_tokens": 0, "errors": 0, "verdicts": {}}
    for row in read_rows(folder, ["prompt_ids", "completion_ids", "verdict", "error"]):
        counts["rows"] += 1
        counts["tokens"] += len(row["completion_ids"])
        counts["prompt_tokens"] += len(row["prompt_ids"])
        counts["errors"] += row["error"] is not None
        counts["verdicts"][row["verdict"]] = counts["verdicts"].get(row["verdict"], 0) + 1
    return counts
