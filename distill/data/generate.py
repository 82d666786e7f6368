"""Teacher outputs: several sampled answers to every training prompt, judged, in resumable Parquet parts.

    distill generate RECIPE
    accelerate launch --config_file recipes/accelerate/cpu2.yaml -m distill generate RECIPE      parts as one is free

Stage folder `generations/`: one row per (prompt, sample) with the token ids the teacher chose, their
log-probabilities, the text, why it stopped and the verifier's verdict. A part is the unit of everything: it is
computed alone, from the seed and its own prompts, and is whole or absent. So a killed run, two processes or a
resume end with byte-identical parts. A failed row is a row with an `error`, never a missing one.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill import console
from distill.config.data import TeacherSection
from distill.config.recipe import Recipe, resolved
from distill.config.section import Signal
from distill.data.endpoint import TRANSPORT, EndpointTeacher
from distill.data.ledger import LIMITS, Limits
from distill.data.provenance import model_source, require_permission, teacher_source
from distill.data.scoring import (
    check_scores,
    given_answers,
    measured_signal,
    score_answers,
    signal_format,
    signal_head,
)
from distill.data.signals import HEAD
from distill.data.teachers import Answer, LocalTeacher, Question, Teacher, TeachersByTag
from distill.data.vllm import VllmTeacher
from distill.devices import describe_device, main_decides, pick_device, processes
from distill.errors import UserError
from distill.files import remove_leftovers, writing
from distill.models.decode import Sampling
from distill.models.hooks import save_head
from distill.stages import Stage, input_fingerprint
from distill.storage import (
    GENERATION_SCHEMA,
    PartWriter,
    parts,
    read_json,
    read_rows,
    row_count,
)
from distill.tasks.verify import judge


def generate(recipe: Recipe, redo: bool = False) -> dict[str, Any]:
    """Run the stage `generations/`; returns its manifest. Raises UserError for a teacher that cannot be loaded."""
    if recipe.teacher is None:
        raise UserError(
            "this recipe has no `teacher`: it trains on worked solutions, there is nothing to generate"
        )
    terms = require_permission(recipe)
    device = pick_device(recipe.device, recipe.threads)
    endpoint = recipe.teacher.endpoint
    teacher = open_teacher(recipe.teacher, device, recipe.generate.batch_size, recipe.generate.signal)
    others = recipe.train.teachers.models if recipe.generate.by_tag else {}
    if others:
        teacher = teachers_by_tag(recipe, teacher, device)
    form = signal_format(recipe.generate.signal, teacher)
    config = {
        "teacher": recipe.teacher.identity(
            exclude={"terms": True, "endpoint": TRANSPORT, "engine_options": True}
        ),
        "generate": recipe.generate.identity(exclude=LIMITS),
        "seed": recipe.seed,
        "identity": teacher.identity(),
    }
    if form and keeps_cut(recipe):
        config["scored"] = ["stop", "length"]
    folder = recipe.path / "prompts"
    inputs = {"prompts": input_fingerprint(folder, "generate RECIPE")}
    stage = Stage(recipe.path, "generations", config, inputs, resolved(recipe))
    ranks = processes(device)
    if main_decides(ranks, lambda: stage.done(redo)):
        return stage.manifest
    if recipe.teacher.engine == "vllm" and ranks.num_processes > 1:
        raise UserError(
            "teacher.engine=vllm spreads over the GPUs by itself: run `distill generate` in one process (with "
            "teacher.engine_options={tensor_parallel_size: N}), then what comes after it with accelerate launch"
        )
    teacher.open()
    check_scores(form, teacher)
    head = signal_head(form, teacher)
    if ranks.is_main_process:
        stage.begin(redo)  # removes the claims of a run that was killed
        if head and not (stage.folder / HEAD).is_file():
            save_head(stage.folder / HEAD, head)
    ranks.wait_for_everyone()
    prompts = read_json(folder / "manifest.json")["counts"]["rows"]
    total = prompts * recipe.generate.samples
    limits = Limits(recipe, stage.folder, ranks.num_processes)
    writer = PartWriter(stage.folder, GENERATION_SCHEMA)
    with console.bar(total=total, desc="generate", unit="answer", main=ranks.is_main_process) as bar:
        bar.update(row_count(parts(stage.folder)))
        meter = TokenMeter(bar, ranks.num_processes)
        for index, chunk in enumerate(chunks(read_rows(folder), recipe.generate.part_size)):
            if not writer.path(index).is_file():
                if limits.reached():
                    break
                with claimed(writer.path(index)) as mine:
                    if mine:
                        writer.write(index, answer_chunk(recipe, teacher, chunk, meter))
                if mine and ranks.is_main_process:
                    stage.checkpoint_clock()
    if isinstance(teacher, VllmTeacher):
        teacher.close()
    if isinstance(teacher, LocalTeacher) and teacher.drafts.passes:
        console.say(f"generate: {teacher.drafts.text()}")
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        remove_leftovers(stage.folder)  # the claims
    total_parts = -(-prompts // recipe.generate.part_size)
    if len(parts(stage.folder)) < total_parts:
        stage.release()
        raise limits.error(total_parts)
    if not ranks.is_main_process:
        return {}
    counts = count_rows(stage.folder)
    flops = teacher.flops(counts["prompt_tokens"], counts["tokens"], counts["rows"])
    scored_too = form and not recipe.prompts.completion_column  # one more pass over what was decoded
    return stage.finish(
        counts,
        device=endpoint.base_url if endpoint else describe_device(device, ranks.num_processes),
        tokenizer=teacher.identity(),
        **({"opened": teacher.opened} if teacher.opened else {}),
        flops=flops and flops * (2 if scored_too else 1),
        terms=terms,
        signal=measured_signal(form, stage.folder),
        teacher_source=teacher_source(recipe.teacher),
        **(
            {"teacher_sources": {name: model_source(name) for name in set(others.values())}} if others else {}
        ),
    )


def keeps_cut(recipe: Recipe) -> bool:
    """Whether `filter` will keep answers that ran into the limit: they need signals then, as the others do."""
    return "length" in (recipe.filter.finish_reasons or ())


@contextlib.contextmanager
def claimed(part: Path) -> Iterator[bool]:
    """Whether this process is the one that makes `part`: it is the first to create the file that says so.

    Parts are taken when a process is free, so a slow one does not hold the others up. What fails is claimed no longer.
    The claim has the name of a temporary file: what a killed run leaves of it goes before the next one starts.
    """
    claim, mine = part.with_name(f".{part.name}.claim.tmp0"), True
    with writing(part.parent):
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            mine = False
    try:
        yield mine
    except BaseException:
        if mine:
            with contextlib.suppress(OSError):
                claim.unlink()
        raise


def chunks(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Consecutive groups of `size` rows, one in memory at a time."""
    while group := list(itertools.islice(rows, size)):
        yield group


class TokenMeter:
    """Feeds a progress bar with finished answers and the rate of new tokens.

    The other processes are taken to be as fast as this one: their parts have the same size.
    """

    def __init__(self, bar, processes: int = 1):
        self.bar, self.processes, self.tokens = bar, processes, 0

    def __call__(self, answer: Answer) -> None:
        self.tokens += answer.completion_tokens * self.processes
        elapsed = self.bar.format_dict["elapsed"]
        self.bar.set_postfix_str(f"{self.tokens / max(elapsed, 1e-9):,.0f} tok/s", refresh=False)
        self.bar.update(min(self.processes, self.bar.total - self.bar.n))


def answer_chunk(recipe: Recipe, teacher: Teacher, chunk: list[dict], meter: TokenMeter) -> list[dict]:
    """All samples of one part's prompts as rows of GENERATION_SCHEMA."""
    section = recipe.generate
    tasks = [(prompt, sample) for prompt in chunk for sample in range(section.samples)]
    by = recipe.train.teachers.by
    questions = [Question(p["messages"], (recipe.seed, p["prompt_id"], sample), p[by]) for p, sample in tasks]
    sampling = Sampling(
        section.temperature, section.top_p, section.top_k, section.min_p, section.max_new_tokens,
        tuple(section.stop_strings),
    )  # fmt: skip
    if recipe.prompts.completion_column:
        answers = given_answers(teacher, questions, [prompt["completion"] for prompt, _ in tasks], meter)
    else:
        answers = teacher.answer(questions, sampling, meter)
    score_answers(section.signal, teacher, questions, answers, keeps_cut(recipe))
    return [
        {
            "prompt_id": prompt["prompt_id"],
            "sample_idx": sample,
            "teacher": answer.teacher or teacher.name,
            "prompt_ids": answer.prompt_ids,
            "completion_ids": answer.completion_ids,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "logprobs": answer.logprobs,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "signal_ids": answer.signal_ids,
            "signal_values": answer.signal_values,
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
    for row in read_rows(folder, ["prompt_tokens", "completion_tokens", "verdict", "error"]):
        counts["rows"] += 1
        counts["tokens"] += row["completion_tokens"]
        counts["prompt_tokens"] += row["prompt_tokens"]
        counts["errors"] += row["error"] is not None
        counts["verdicts"][row["verdict"]] = counts["verdicts"].get(row["verdict"], 0) + 1
    return counts


def open_teacher(section: TeacherSection, device: torch.device, batch_size: int, signal: Signal) -> Teacher:
    """The teacher a recipe names. Raises UserError where it cannot be reached or loaded."""
    if section.endpoint:
        return EndpointTeacher(section)
    if section.engine == "vllm":
        return VllmTeacher(section, batch_size, signal.k if signal.kind == "top_k" else 0)
    return LocalTeacher(section, device, batch_size)


def teachers_by_tag(recipe: Recipe, default: Teacher, device: torch.device) -> TeachersByTag:
    """`generate.by_tag`: the specialists of `train.teachers.models`, each loaded once, and `default` for other tags."""
    section, loaded = recipe.train.teachers, {recipe.teacher.model: default}
    for name in section.models.values():
        if name not in loaded:
            own = recipe.teacher.model_copy(update={"model": name})
            loaded[name] = open_teacher(own, device, recipe.generate.batch_size, recipe.generate.signal)
    return TeachersByTag(default, {tag: loaded[name] for tag, name in section.models.items()})
