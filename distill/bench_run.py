"""One task of a grid in a process of its own making: ordinary stages in ordinary run folders, nothing printed.

    start_worker(threads=1)      # once per process
    run_task(task, redo=False)   # -> seconds spent; finished stages are skipped as everywhere

A run folder's `prompts`, `generations` and `dataset` are links to the shared ones, so that every command that
reads a run folder reads this one.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from distill import console
from distill.bench_grid import Task
from distill.bench_metrics import MODEL
from distill.bench_sections import Prepared
from distill.shards import MANIFEST, write_json

_LINKED = ("prompts", "generations", "dataset")


def start_worker(threads: int) -> None:
    """What a process does before its first task: its share of the cores, and silence."""
    os.environ["DISTILL_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.set_verbosity(-1)
    console.hush_foreign_bars()


def prepare(section: Prepared | None) -> None:
    """The files that runs read. Written again they are the same, so finished runs stay valid."""
    if section is not None:
        from distill.flaws import write_data

        write_data(Path(section.flaws))


def run_task(task: Task, redo: bool = False) -> float:
    """Do one task, or what is left of it. Raises UserError and RunError of its stages."""
    begun = time.perf_counter()
    task.folder.mkdir(parents=True, exist_ok=True)
    with open(task.folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        {"answers": _answers, "rows": _rows, "run": _run}[task.kind](task, redo)
    return time.perf_counter() - begun


def _answers(task: Task, redo: bool) -> None:
    from distill.generate import generate
    from distill.prompts import make_prompts

    make_prompts(task.recipe, redo)
    if task.recipe.teacher:
        generate(task.recipe, redo)


def _rows(task: Task, redo: bool) -> None:
    from distill.filter import make_dataset

    _link(task.folder, task.rows, _LINKED[:2])
    make_dataset(task.recipe, redo)


def _run(task: Task, redo: bool) -> None:
    from distill.arms import train_arms
    from distill.evaluate import evaluate_named, evaluate_recipe
    from distill.pipeline import resolved

    (task.folder / "recipe.yaml").write_text(resolved(task.recipe), encoding="utf-8")
    model = str(task.folder / "student")
    if task.checkpoint:
        model = task.checkpoint
        evaluate_named(task.recipe, {MODEL: model}, redo)
    else:
        _link(task.folder, task.rows, _LINKED)
        train_arms(task.recipe, redo)
        evaluate_recipe(task.recipe, redo)
    if task.merged:
        _start_for_others(task.folder)
    if task.probes:
        _probe(task, model, redo)


def _link(folder: Path, source: Path, names: tuple[str, ...]) -> None:
    for name in names:
        link, target = folder / name, source / name
        if target.exists() and not link.exists():
            link.unlink(missing_ok=True)  # a link to what has been moved away
            link.symlink_to(os.path.relpath(target, folder))


def _start_for_others(folder: Path) -> None:
    """`start/`: the student as a whole model, which other runs train on from."""
    student, start = folder / "student", folder / "start"
    if start.exists():
        return
    if (student / "adapter_config.json").is_file():
        from distill.merge import merge_adapter

        merge_adapter(str(student), start)
        return
    kept = [p for p in student.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja")]
    partial = folder / ".start.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in kept:
        if path.name != MANIFEST:
            shutil.copy(path, partial / path.name)
    partial.rename(start)


def _probe(task: Task, model: str, redo: bool) -> None:
    """`probes.json`: how often the run's model shows each planted flaw."""
    out = task.folder / "probes.json"
    if out.is_file() and not redo:
        return
    from distill.devices import pick_device
    from distill.flaws import embedded_probes
    from distill.inherit import measure_probes
    from distill.models import load_model, load_tokenizer
    from distill.probes import load_probes

    device = pick_device(task.recipe.device, task.recipe.threads)
    probes = embedded_probes() if task.probes == "embedded" else load_probes(task.probes)
    loaded = load_model(model, device=device), load_tokenizer(model)
    limit = task.recipe.evaluate.max_new_tokens
    _rows, flaws = measure_probes(*loaded, probes, max_new_tokens=limit, seed=task.recipe.seed)
    write_json(out, {"model": model, "probes": task.probes, "flaws": flaws})
