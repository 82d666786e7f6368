"""lm-evaluation-harness on the model that is loaded already: published tasks, and routing while they run.

    pip install 'distill-demo[harness]'
    distill evaluate CHECKPOINT --harness arc_easy,gsm8k [--harness-include DIR] [--harness-limit N]

The real package (lm_eval, https://github.com/EleutherAI/lm-evaluation-harness) does the prompting, scoring and
statistics; its numbers come back as it reports them, with standard errors, task versions and a hash of the
prompts and targets, so that they compare with published ones. Prompts are the tasks' own, without this model's
chat template, as is the harness's default. Tasks come from the hub, or from YAML files in --harness-include,
whose `!function` lines run code of that folder: include only what you trust.

A mixture of experts is asked one request at a time. The harness pads its batches without a mask, and routing
statistics must not count padding.

The processes of a launch share the requests. The harness's own way deals documents: it repeats requests to make numbers
even, which routing would count, and joins results in another order, which the bootstrap of some errors sees.
"""

import hashlib
import importlib.util
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState

from distill import console
from distill.config.evaluation import Evaluate
from distill.devices import dealt, even_size, from_all, main_alone, summed
from distill.errors import DistillError, RunError, UserError
from distill.models.routers import find_routers
from distill.moe.recording import Recording, record_routing

BATCH_SIZE = 32  # requests at a time of a dense model, at most
_MOST, _MOST_ALONE = 16 * BATCH_SIZE, 64  # requests of one piece of work, in batches and one at a time
_HASHES = ("doc_hash", "prompt_hash", "target_hash")


def check_harness(section: Evaluate) -> None:
    """Raises UserError where the package, the folder or a task is not there. Loads no data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs an extra: pip install 'distill-demo[harness]', or leave it out")
    if section.harness_include and not Path(section.harness_include).is_dir():
        raise UserError(f"--harness-include {section.harness_include}: no such folder of task files")
    manager = _manager(section)
    missing = [task for task in section.harness if not manager.match_tasks([task])]
    if missing:
        raise UserError(
            *(
                f"--harness {task}: the harness has no such task; `lm_eval ls tasks` lists them, and "
                "--harness-include DIR adds yours"
                for task in missing
            )
        )


def _manager(section: Evaluate):
    return _index(section.harness_include, tuple(section.harness))


@lru_cache(maxsize=1)
def _index(include: str | None, tasks: tuple[str, ...]):
    """The harness's index of tasks. Its own 10,000 files are read only if the folder lacks a task."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include:
        own = TaskManager(include_path=include, include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=include)


def run_harness(model, tokenizer, section: Evaluate) -> dict[str, Any]:
    """`Harness` of metrics.json. Raises RunError with the harness's own reason where it fails."""
    from lm_eval import evaluator

    routed = bool(find_routers(model))
    batch = 1 if routed else min(section.batch_size, BATCH_SIZE)

    def evaluate() -> dict:
        manager = _manager(section)  # first: it quietens the loggers
        # It asks git for a commit that nobody reads, and git complains aloud outside of a checkout.
        evaluator.get_git_commit_hash = lambda: None
        return evaluator.simple_evaluate(
            model=_sharing(model, tokenizer, batch),
            tasks=section.harness,
            limit=section.harness_limit,
            task_manager=manager,
            random_seed=section.seed,
            numpy_random_seed=section.seed,
            torch_random_seed=section.seed,
            fewshot_random_seed=section.seed,
        )

    start, moe = time.perf_counter(), None
    try:
        if routed:
            with record_routing(model, keep="counts") as recording:
                found = evaluate()
            _of_all(recording)
            moe = recording.summary()
        else:
            found = evaluate()
    except DistillError:
        raise
    except Exception as error:  # a task's own code, its data or the network: dozens of kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"lm-evaluation-harness failed on {', '.join(section.harness)}: {reason}") from None
    result: dict[str, Any] = {
        "lm_eval": version("lm_eval"),
        "limit": section.harness_limit,
        "tasks": {name: _task(name, found) for name in found["results"]} if found else {},
        "seconds": round(time.perf_counter() - start, 3),
    }
    if moe:
        result["moe"] = moe
    return main_alone(lambda: result)  # the others were told nothing (LOCAL_RANK)


def _sharing(model, tokenizer, batch: int):
    """The harness's model around `model`: every process answers its share of the requests and knows all answers.

    Requests are cut the same way whatever the number of processes.
    """
    from lm_eval.models.huggingface import HFLM

    class Sharing(HFLM):
        def _share(self, answer: Callable[..., list], requests: list, quiet: bool) -> list:
            size = even_size(len(requests), _MOST if batch > 1 else _MOST_ALONE)
            pieces = [requests[i : i + size] for i in range(0, len(requests), size)]
            theirs = console.shows_bars() and not quiet and console.first_process()
            ours = not theirs and not quiet and console.first_process()
            with console.bar(total=len(requests), desc="harness", unit="request", main=ours) as shown:

                def work(piece: list) -> list:
                    found = answer(piece, disable_tqdm=not theirs)
                    # The other processes are taken to be as fast as this one.
                    shown.update(min(PartialState().num_processes * len(piece), shown.total - shown.n))
                    return found

                return list(chain.from_iterable(dealt(pieces, work)))

        def loglikelihood(self, requests, disable_tqdm=False):
            return self._share(super().loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

        def generate_until(self, requests, disable_tqdm=False):
            return self._share(super().generate_until, requests, disable_tqdm)

    return Sharing(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _of_all(recording: Recording) -> None:
    """The counts of all processes, in each of them, of layers gone through twice too."""
    for name in sorted({name for names in from_all(list(recording.layers)) for name in names}):
        router, _, visit = name.partition(" pass ")
        recording.record_of(recording.layers[router].router, int(visit or 1))
    recording.reduce(summed)


def _task(name: str, found: dict) -> dict[str, Any]:
    """`HarnessTask` of one task, or of a group of tasks."""
    metrics, errors = {}, {}
    for key, value in found["results"][name].items():
        metric, comma, rule = key.partition(",")
        if not comma:
            continue  # alias, name, sample_len
        number = float(value) if isinstance(value, int | float) and value == value else None
        if metric.endswith("_stderr"):
            errors[f"{metric.removesuffix('_stderr')},{rule}"] = number
        else:
            metrics[key] = number
    counted = found.get("n-samples", {}).get(name, {}).get("effective")
    stated, shots = found.get("versions", {}).get(name), found.get("n-shot", {}).get(name)
    return {
        "n": counted,
        "metrics": metrics,
        "stderr": {key: errors.get(key) for key in metrics},
        "version": None if stated is None else str(stated),
        "hash": _hash(found.get("samples", {}).get(name)),
        "shots": shots if isinstance(shots, int) else None,
    }


def _hash(samples: list[dict] | None) -> str | None:
    """The harness's task hash: SHA-256 of the hashes of every document, prompt and target, in order."""
    if not samples:
        return None
    text = "".join(sample[key] for sample in samples for key in _HASHES)
    return hashlib.sha256(text.encode()).hexdigest()
