"""`distill bench RECIPE`: arms x seeds over a recipe, every run an ordinary resumable run folder, and verdicts.

    distill bench recipes/claims.yaml --budget small             (2 CPU cores: recipes/results/claims-small.json says
    distill bench recipes/claims.yaml --budget full --jobs 8      how long it took)
    distill bench recipes/claims.yaml --dry-run                  the runs, what they share, and how long they take
    distill bench recipes/claims.yaml --tune                     learning rates, chosen on seeds of their own
    distill bench recipes/claims.yaml --budget full --part 2/3   every third seed, from the second on

Runs go to worker processes, `--jobs` at a time (as many as cores by default, one thread each; with a GPU one). A
failed run does not stop the others, and the same command does what is left. It leaves in the bench's `run_dir`
`results.json` (distill/bench/results.py describes it), `results.parquet` (arm, seed, metric, value),
`items.parquet` (every answer) and `bench.html`; and, from the first finished task on, `records.parquet`, all that
results are made of. Several machines share a grid so: each does a `--part`, the others' files are copied into one
`run_dir` as records-2.parquet, records-3.parquet, and there the command without `--part` does what is left and judges.

One task of a grid runs in a worker process: ordinary stages in ordinary run folders, nothing printed.

    start_worker(threads=1)      # once per process
    run_task(task, redo=False)   # -> seconds spent; finished stages are skipped as everywhere

A run folder's `prompts`, `generations` and `dataset` are links to the shared ones, so that every command that
reads a run folder reads this one.
"""

import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from distill import console
from distill.bench.grid import Bench, Prepared, load_bench, pick_budget
from distill.bench.items import Records
from distill.bench.metrics import MODEL, TEACHER
from distill.bench.plan import BUDGET, Task, apply_rates, describe, plan, tuning_bench, tuning_results
from distill.bench.results import (
    Clock,
    check_registration,
    collect_results,
    commit,
    read_values,
    write_results,
)
from distill.errors import DistillError, RunError, UserError
from distill.files import replacing, sync_all, writing
from distill.storage import MANIFEST, entries, find_file, record_entries, write_sealed


def run_bench(
    path: str,
    budget: str | None = None,
    jobs: int = 0,
    redo: bool = False,
    say: Callable[[str], None] = console.say,
    language: str = "en",
    part: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Run what is left of a budget's grid; returns the results. UserError before, RunError if runs failed.

    language: of the page. part: (2, 3) runs every third seed alone, from the second on. All are judged together: while
    other parts' runs are missing, what is returned has `part`, `finished`, `tasks` and `records` instead of results.
    """
    recipe, file = load_bench(path)
    budget = pick_budget(recipe, budget)
    if apply_rates(recipe) is None and recipe.tuning:
        console.warn(
            "warning: learning rates are those of the file; `--tune` chooses them among several first"
        )
    tasks = plan(recipe, budget, file)
    check_registration(recipe, file)
    jobs = jobs or _jobs()
    root = Path(recipe.run_dir)
    clock, records = _finish(recipe, budget, tasks, jobs, redo, say, part)
    known = sum(records.knows(task) for task in tasks.values())
    if known < len(tasks):
        return {
            "part": f"{part[0]}/{part[1]}",
            "finished": known,
            "tasks": len(tasks),
            "records": str(records.path),
        }
    results, table = collect_results(recipe, budget, file, tasks, clock.data, records, jobs)
    write_results(results, table, root, language)
    return results


def run_tuning(
    path: str, jobs: int = 0, redo: bool = False, say: Callable[[str], None] = console.say
) -> dict[str, Any]:
    """Train every arm of `tuning` with each of its learning rates; writes `tuning.results` and returns it."""
    whole, file = load_bench(path)
    recipe = tuning_bench(whole)
    tasks = plan(recipe, BUDGET, file)
    jobs = jobs or _jobs()
    clock, records = _finish(recipe, BUDGET, tasks, jobs, redo, say)
    device = next(records[task].device for task in tasks.values() if task.kind == "run")
    about = {"commit": commit(), "device": device, "seconds": clock.data["wall"].get(BUDGET, 0.0)}
    found = tuning_results(whole, file, read_values(recipe, BUDGET, tasks, records)[0], about)
    write_sealed(find_file(whole.tuning.results), found)
    return found


def _finish(
    recipe: Bench,
    budget: str,
    tasks: dict[str, Task],
    jobs: int,
    redo: bool,
    say: Callable[[str], None],
    part: tuple[int, int] = (1, 1),
) -> tuple[Clock, Records]:
    """Do what is left of the tasks. UserError before anything has begun, RunError where some failed."""
    prepare(recipe.prepare)  # first: recipes name these files
    root = Path(recipe.run_dir)
    records = Records(root)
    clock = Clock(root, budget, records)
    left = _left(recipe, tasks, records, redo, part)
    _check({n: t for n, t in left.items() if redo or not (t.folder / "eval" / MANIFEST).is_file()})
    root.mkdir(parents=True, exist_ok=True)
    elsewhere = {name: task for name, task in tasks.items() if name not in left and records.knows(task)}
    for task in elsewhere.values():
        clock.take_over(task)
    told = f", {len(elsewhere)} of them known from records" if elsewhere else ""
    shown = f" (part {part[0]} of {part[1]}: {len(left)})" if part[1] > 1 else ""
    say(f"{recipe.title}: {len(tasks)} tasks in budget '{budget}'{told}{shown}, {jobs} at a time")
    try:
        failed = run_tasks(left, jobs, redo, clock, say)
    finally:  # also of what was stopped
        records.write()
    if failed:
        lines = [f"{name}: {line}" for name, lines in failed.items() for line in lines]
        more = len(left) - len(clock.known(left)) - len(failed)
        raise RunError(
            f"{len(failed)} of {len(tasks)} tasks failed{f' and {more} wait for them' if more > 0 else ''}; what is "
            "finished is kept, and the same command does the rest:",
            *lines,
        )
    return clock, records


def _left(
    recipe: Bench, tasks: dict[str, Task], records: Records, redo: bool, part: tuple[int, int]
) -> dict[str, Task]:
    """The tasks of a part that no record stands for, or whose folder is here; and all that they need, in order."""
    mine, of = part
    wanted = [
        name
        for name, task in tasks.items()
        if (task.kind == "run" or of == 1)
        and (task.seed - recipe.first_seed) % of == mine - 1
        and (redo or task.folder.exists() or not records.knows(task))
    ]
    found = set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            wanted += tasks[name].needs
    return {name: task for name, task in tasks.items() if name in found}


def _jobs() -> int:
    import torch

    from distill.devices import cores

    if torch.cuda.is_available():
        return 1  # a second process would fight for the same memory
    return cores()


def _check(tasks: dict[str, Task]) -> None:
    """What `distill doctor` says of arms that are to run and whose models are there already.

    One recipe stands for all seeds of an arm, and for arms that differ in nothing that is looked at. Raises
    UserError with every FAIL; a WARN is printed once, with the arms that it is of.
    """
    from distill.devices import pick_device
    from distill.doctor.checks import examine, examine_checkpoints
    from distill.doctor.pair import FAIL, WARN

    asked: set[str] = set()
    said: dict[tuple[str, str], list[str]] = {}  # (state, line): arms
    for task in tasks.values():
        made_here = [need for need in task.needs if not need.startswith("rows-")]
        recipe = task.recipe
        key = task.checkpoint or recipe.model_dump_json(exclude={"run_dir": True, "seed": True})
        if task.kind != "run" or made_here or key in asked:
            continue
        asked.add(key)
        if task.checkpoint:
            device = pick_device(recipe.device, recipe.threads)
            found = examine_checkpoints({task.arm: task.checkpoint}, recipe.evaluate, device)
        else:
            found = examine(recipe, "run", weights=True)
        for finding in found:
            if finding.state in (FAIL, WARN):
                said.setdefault((finding.state, finding.line), []).append(task.arm)
    told = [(state, f"arm {_named(arms)}: {line}") for (state, line), arms in said.items()]
    if problems := [line for state, line in told if state == FAIL]:
        raise UserError(*problems)
    for _, line in told:
        console.warn(f"warning: {line}")


def _named(arms: list[str], most: int = 3) -> str:
    arms = list(dict.fromkeys(arms))
    more = f" and {len(arms) - most} more" if len(arms) > most else ""
    return ", ".join(arms[:most]) + more


# ------------------------------------------------------------------------------------------- the schedule


SILENT = 60.0  # seconds without a finished task after which the bench says what it is at


def run_tasks(
    tasks: dict[str, Task], jobs: int, redo: bool, clock: Clock, say: Callable[[str], None]
) -> dict[str, list[str]]:
    """Do all tasks, those that others wait for first; {name: problems} of those that failed."""
    from distill.devices import asked_threads, cores

    threads = max(1, (asked_threads() or cores()) // jobs)
    waiting, running, done, failed = dict(tasks), {}, set(), {}
    dependants = _dependants(tasks)
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(threads,)
    ) as pool:
        try:
            while waiting or running:
                ready = [t for t in waiting.values() if done.issuperset(t.needs)]
                ready.sort(key=lambda t: (-dependants[t.name], t.seed, list(tasks).index(t.name)))
                for task in ready[: 2 * jobs - len(running)]:
                    clock.begin(task)
                    running[pool.submit(run_task, task, redo)] = waiting.pop(task.name)
                if not running:
                    break  # what is left waits for tasks that failed
                finished, _ = wait(running, timeout=SILENT, return_when=FIRST_COMPLETED)
                if not finished:
                    begun = [task.name for future, task in running.items() if future.running()]
                    say(f"[{len(done) + len(failed)}/{len(tasks)}] still at {', '.join(begun[:jobs])}")
                for future in finished:
                    task = running.pop(future)
                    _take(task, future, done, failed, clock, redo)
                    left = [*waiting.values(), *running.values()]
                    say(_line(task, len(done), len(tasks), failed, clock, left, jobs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _take(task: Task, future: Future, done: set, failed: dict, clock: Clock, redo: bool) -> None:
    try:
        clock.add(task, future.result(), redo)
        clock.records.add(task, clock.data["tasks"][task.name])
        done.add(task.name)
    except DistillError as error:
        failed[task.name] = error.problems
    except BrokenProcessPool:
        failed[task.name] = [
            "its process ended (memory?); use a smaller --jobs, and see log.txt in its folder"
        ]
    except Exception as error:  # a bug of ours must not lose the other runs
        failed[task.name] = [f"{type(error).__name__}: {error}"]


def _dependants(tasks: dict[str, Task]) -> dict[str, int]:
    """How many tasks wait, directly or not, for each."""
    users: dict[str, set[str]] = {name: set() for name in tasks}

    def note(name: str, user: str) -> None:
        for need in tasks[name].needs:
            if user not in users[need]:
                users[need].add(user)
                note(need, user)

    for name in tasks:
        note(name, name)
    return {name: len(found) for name, found in users.items()}


def _line(task: Task, done: int, total: int, failed: dict, clock: Clock, left: list[Task], jobs: int) -> str:
    """One finished task for a person: what it found, how long it took, and how long the rest may take."""
    counted = f"[{done + len(failed)}/{total}]"
    if task.name in failed:
        return f"{counted} {task.name}: FAILED, {failed[task.name][0]}"
    found = clock.records[task].values
    shown = f", hard {100 * found['accuracy.hard']:.1f} %" if "accuracy.hard" in found else ""
    remaining = clock.estimate(left)
    wait_for = f"; about {remaining / jobs / 60:.0f} min left" if remaining else ""
    return f"{counted} {task.name}: {clock.seconds(task.name):.0f} s{shown}{wait_for}"


# ------------------------------------------------------------------------------------------------ dry run


def describe_plan(path: str, budget: str | None = None, tuning: bool = False) -> dict[str, Any]:
    """What a budget would run, for --dry-run: arms, seeds, tasks, steps and rows, from recipes alone.

    `tuning`: the grid of learning rates instead, which has no claims.
    """
    recipe, file = load_bench(path)
    if tuning:
        recipe, budget = tuning_bench(recipe), BUDGET
    else:
        budget = pick_budget(recipe, budget)
        apply_rates(recipe)
    tasks = plan(recipe, budget, file)
    runs = [t for t in tasks.values() if t.kind == "run"]
    trained = [t for t in runs if not t.checkpoint]
    found = {
        "budget": budget,
        "seeds": recipe.budgets[budget].seeds,
        "arms": {arm: sum(t.arm == arm for t in runs) for arm in dict.fromkeys(t.arm for t in runs)},
        "runs": len(runs),
        "shared_generations": sum(t.kind == "answers" for t in tasks.values()),
        "shared_datasets": sum(t.kind == "rows" for t in tasks.values()),
        "optimizer_steps": sum(t.recipe.train.steps for t in trained),
        "rows_trained": sum(t.recipe.train.steps * t.recipe.train.batch_size for t in trained),
        "forecast": describe(recipe, file, tasks),
        "finished": sum((t.folder / "eval" / MANIFEST).is_file() for t in runs),
    }
    claims = [c for c in recipe.claims if recipe.within(budget, c)]
    if not tuning:
        found["registered"] = sum(c.registered is not None for c in claims)
        found["claims"] = [c.id for c in claims]
    return found


_LINKED = ("prompts", "generations", "dataset")


def start_worker(threads: int) -> None:
    """What a process does before its first task: its share of the cores, silence, and what takes long to import."""
    os.environ["DISTILL_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.set_verbosity(-1)
    console.hush_foreign_bars()
    console.quiet_libraries()
    from distill.evaluation.measure import keep_teacher

    keep_teacher()
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A worker whose bench was killed would go on for hours, and hold the folder that the next bench wants."""
    parent.join()
    os._exit(1)


def prepare(section: Prepared | None) -> None:
    """The files that runs read. Written again they are the same, so finished runs stay valid."""
    if section is not None:
        from distill.tasks.flaws import write_data

        write_data(Path(section.flaws))


def run_task(task: Task, redo: bool = False) -> float:
    """Do one task, or what is left of it. Raises UserError and RunError of its stages."""
    begun = time.perf_counter()
    with writing(task.folder):
        task.folder.mkdir(parents=True, exist_ok=True)
        log = open(task.folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed below
    with log, contextlib.redirect_stdout(log):
        {"base": _base, "answers": _answers, "rows": _rows, "run": _run}[task.kind](task, redo)
    return time.perf_counter() - begun


def _base(task: Task, redo: bool) -> None:
    from distill.training.arms import make_base

    make_base(task.recipe, redo)


def _answers(task: Task, redo: bool) -> None:
    from distill.data.generate import generate
    from distill.data.prompts import make_prompts

    make_prompts(task.recipe, redo)
    if task.recipe.teacher and not task.recipe.prompts.documents:
        generate(task.recipe, redo)


def _rows(task: Task, redo: bool) -> None:
    from distill.data.filter import make_dataset

    _link(task.folder, task.rows, _LINKED[:2])
    make_dataset(task.recipe, redo)


def _run(task: Task, redo: bool) -> None:
    from distill.evaluation.evaluate import evaluate_named, evaluate_recipe
    from distill.training.arms import train_arms

    model = str(task.folder / "student")
    if task.checkpoint:
        model, teacher = task.checkpoint, task.recipe.teacher
        beside = {TEACHER: teacher.model} if TEACHER in task.recipe.evaluate.models else {}
        evaluate_named(task.recipe, {MODEL: model, **beside}, redo)
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
        from distill.training.merge import merge_adapter

        merge_adapter(str(student), start)
        return
    kept = [p for p in student.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja")]
    with replacing(start, sum(p.stat().st_size for p in kept)) as partial:
        partial.mkdir()
        for path in kept:
            if path.name != MANIFEST:
                shutil.copy(path, partial / path.name)
        weights = entries(partial, partial.glob("*.safetensors"))
        hashes = {"stage": "start", "files": weights, "records": record_entries(partial)}
        write_sealed(partial / MANIFEST, hashes)
        sync_all(partial)


def _probe(task: Task, model: str, redo: bool) -> None:
    """`probes.json`: how often the run's model shows each planted flaw."""
    out = task.folder / "probes.json"
    if out.is_file() and not redo:
        return
    from distill.devices import pick_device
    from distill.evaluation.inherit import measure_probes
    from distill.models.load import load_model, load_tokenizer
    from distill.tasks.flaws import embedded_probes, load_probes

    device = pick_device(task.recipe.device, task.recipe.threads)
    probes = embedded_probes() if task.probes == "embedded" else load_probes(task.probes)
    loaded = load_model(model, device=device), load_tokenizer(model)
    limit = task.recipe.evaluate.max_new_tokens
    rows, flaws = measure_probes(*loaded, probes, max_new_tokens=limit, seed=task.recipe.seed)
    items = [[p.flaw, p.probe_id, row["outcome"] == "flaw"] for p, row in zip(probes, rows)]
    write_sealed(out, {"model": model, "probes": task.probes, "flaws": flaws, "items": items})
