"""What a run says of itself while it trains: metrics.jsonl, progress, held-out loss.

One JSON line per optimizer step: step, loss, lr, grad_norm, tokens (trained in this step), seconds (since the
start, over resumes), gflops (model FLOPs per second of this step), each objective's own mean; where there is
one, the held-out loss, what was sampled, the experts' MaxVio, and mfu, the share of the device's peak (PaLM, arXiv
2204.02311, appendix B). The file is the record; trackers (TensorBoard, Weights & Biases, Trackio, through
Accelerate) get the same numbers.

Held-out loss while training: the cross-entropy of rows of the dataset that are never trained on.

    train: {validation: {rows: 256, every: 50, patience: 3, keep_best: true}}

It is cross-entropy in nats per completion token and nothing else, whatever the objectives, so that arms with different
objectives compare: a penalty that one arm carries (an auxiliary loss, a divergence) is no part of it. It is summed over
processes and divided once. With `patience`, training ends after so many looks without a better value; with `keep_best`,
the weights that are saved at the end are those of the best look. Its place in metrics.jsonl is `validation`; the
objectives' own weighted sum on the same rows stands beside it as `validation_objective`.
"""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from distill import console
from distill.config.training import Train, Validation
from distill.data.batches import TokenRows, even_pieces, micro_batches
from distill.devices import peak_flops
from distill.errors import UserError
from distill.files import write_atomic, writing
from distill.models.layers import rows_apart
from distill.training.checkpoint import BEST, load_trained, save_trained, saved_step
from distill.training.sources import Lot
from distill.training.step import StudentStep, whole_step


class StepLog:
    """Continues at step `first` with so many tokens trained and read.

    `flops_per_token`: of one token read, forward and backward, teacher included.
    """

    def __init__(
        self, folder: Path, first: int, tokens: int, read: int, accelerator: Accelerator, train: Train,
        flops_per_token: float = 0.0, recorded: str | None = None,
    ):  # fmt: skip
        self.steps, self.tokens, self.read = first, tokens, read
        self.train, self.accelerator, self.flops_per_token = train, accelerator, flops_per_token
        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self.peak = peak * accelerator.num_processes if peak else None
        self.start = self.before = time.perf_counter()
        self.bar = self.file = None
        if train.trackers:
            accelerator.init_trackers("distill")
        if accelerator.is_main_process:
            self.path = folder / "metrics.jsonl"
            self.earlier, self._digest = cut_back(self.path, first, recorded)
            with writing(folder):
                self.file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def progress(self, first: int, steps: int, title: str) -> Any:
        self.bar = console.bar(
            range(first, steps), initial=first, total=steps, desc=title, unit="step",
            main=self.accelerator.is_main_process,
        )  # fmt: skip
        return self.bar

    def write(self, step: int, means, rate: float, norm: float, lot: Lot, **more: Any) -> None:
        """One optimizer step; `more` is written where it is neither None nor empty."""
        self.steps, self.tokens, self.read = step + 1, self.tokens + lot.tokens, self.read + lot.read
        now = time.perf_counter()
        taken, self.before = max(now - self.before, 1e-9), now
        values = {o.name: float(m) for o, m in zip(self.train.objectives, means)}
        loss = sum(o.weight * float(m) for o, m in zip(self.train.objectives, means))
        more = {name: value for name, value in more.items() if value not in (None, {})}
        if self.train.trackers:
            flat = {k: v for k, v in more.items() if isinstance(v, (int, float))}
            logged = {"loss": loss, "lr": rate, "grad_norm": norm, **values, **flat}
            self.accelerator.log(logged, step=step + 1)
        if self.file is None:
            return
        speed = self.flops_per_token * lot.read / taken
        if self.peak:
            more["mfu"] = round(speed / self.peak, 4)
        line = {
            "step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": lot.tokens,
            "seconds": round(self.earlier + now - self.start, 3), "gflops": round(speed / 1e9, 2),
            "objectives": values, **more,
        }  # fmt: skip
        data = (json.dumps(line) + "\n").encode()
        with writing(self.path.parent, len(data)):
            self.file.write(data)
            self.file.flush()
        self._digest.update(data)
        shown = f"loss {loss:.3f}, {lot.tokens / taken:,.0f} tok/s" + (
            f", MFU {more['mfu']:.1%}" if self.peak else ""
        )
        self.bar.set_postfix_str(shown, refresh=False)

    def sync(self) -> str | None:
        """Before a state is saved: the record must not end before the state that a resume begins with.

        Returns the hash of the file, for that state; None in the processes that write none.
        """
        if self.file is None:
            return None
        with writing(self.path.parent):
            os.fsync(self.file.fileno())
        return self._digest.hexdigest()

    def close(self) -> None:
        if self.file:
            self.sync()
            self.file.close()
        if self.train.trackers:
            self.accelerator.end_training()


def cut_back(path: Path, first: int, recorded: str | None = None) -> tuple[float, Any]:
    """Leave the lines of the first `first` steps in metrics.jsonl; (seconds of the last one, the hash of them all).

    Lines past a resumed state belong to steps that run again, and one that a kill cut short is none. The file is
    touched only where there is such a line, and then replaced as a whole: at no moment are there fewer lines.
    recorded: the hash that the state has of these lines; others are told of.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    kept: list[str] = []
    last, seconds = 0, 0.0
    for line in text.splitlines():
        try:
            found = json.loads(line)
            step, spent = int(found["step"]), float(found["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
        if last < step <= first:
            kept.append(line + "\n")
            last, seconds = step, spent
    if len(kept) < first:
        console.warn(
            f"warning: {path} lacks {first - len(kept)} of the {first} steps that are done; curves have a gap"
        )
    digest = hashlib.blake2b("".join(kept).encode(), digest_size=16)
    if len(kept) == first and recorded not in (None, digest.hexdigest()):
        console.warn(
            f"warning: {path} is not as training wrote it (its hash is another); its numbers may be wrong"
        )
    if "".join(kept) != text:
        write_atomic(path, "".join(kept))
    return seconds, digest


# ==== Held-out loss while training ====


def split_rows(rows: TokenRows, section: Validation, seed: int) -> tuple[TokenRows, TokenRows | None]:
    """(rows to train on, rows held out): a seeded choice. Raises UserError where nothing would be left to train on."""
    if not section.rows:
        return rows, None
    if section.rows >= len(rows):
        raise UserError(
            f"train.validation.rows={section.rows} leaves none of the dataset's {len(rows)} rows to train on; lower it"
        )
    order = np.random.default_rng([seed, 101]).permutation(len(rows))
    return rows.subset(np.sort(order[section.rows :])), rows.subset(np.sort(order[: section.rows]))


class Validator:
    """Looks at the held-out rows now and then; remembers the best value and its weights."""

    def __init__(
        self, train: Train, rows: TokenRows | None, pad_id: int, accelerator: Accelerator, folder: Path
    ):
        self.section, self.train, self.rows, self.pad_id = train.validation, train, rows, pad_id
        self.accelerator, self.folder = accelerator, folder
        self.best, self.best_step, self.worse = math.inf, 0, 0
        self.objective: float | None = None

    def due(self, step: int) -> bool:
        return self.rows is not None and (
            (step + 1) % self.section.every == 0 or step + 1 == self.train.steps
        )

    @property
    def finished(self) -> bool:
        """Whether patience has run out."""
        return bool(self.section.patience) and self.worse >= self.section.patience

    def look(self, step: int, model: nn.Module, module: StudentStep, teacher) -> float:
        """Mean cross-entropy per token in nats after `step`; every process calls it. `module` is the unwrapped model.

        `objective` is then the weighted sum of the objectives per token.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        order = np.argsort(self.rows.lengths, kind="stable")
        training = [m for m in module.modules() if m.training]
        module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        try:
            with torch.no_grad():
                size, tokens = self.train.micro_batch_size, self.train.micro_batch_tokens
                # Of all processes: as many passes as the one that needs most.
                cut = [
                    list(micro_batches(order[r::world], self.rows.lengths, size, tokens))
                    for r in range(world)
                ]
                pieces = even_pieces(cut[rank], max(map(len, cut)))

                def batches():
                    for indices, weight in pieces:
                        yield (
                            module.ready(self.rows.collate(indices, self.pad_id), self.accelerator.device),
                            weight,
                        )

                kept = int(self.rows.completion_lengths.sum())
                with whole_step(module, model, batches, self.accelerator.reduce, kept):
                    for batch, weight in batches():
                        with rows_apart(batch.rows):
                            said = teacher(batch) if teacher else {}
                            objective, _, plain = model(batch, said, held_out=True)
                        total += weight * torch.stack([plain.double(), objective.double()])
        finally:
            for m in training:
                m.training = True
        everyone = self.accelerator.reduce(total).cpu()
        value, self.objective = (everyone / int(self.rows.completion_lengths.sum())).tolist()
        if value < self.best:
            self.best, self.best_step, self.worse = value, step + 1, 0
            if self.section.keep_best:
                save_trained(self.folder / BEST, module, step + 1, write=self.accelerator.is_main_process)
        else:
            self.worse += 1
        return value

    def close(self, module: nn.Module) -> dict[str, Any]:
        """Put the best weights back, if they are to be kept; returns what the manifest says."""
        if self.rows is None:
            return {}
        self.accelerator.wait_for_everyone()
        if self.section.keep_best and (self.folder / BEST).is_file():
            load_trained(self.folder / BEST, module)
        return {"validation": {"rows": len(self.rows), "best": self.best, "best_step": self.best_step}}

    def state(self) -> dict[str, Any]:
        known = math.isfinite(self.best)
        return {"best": self.best if known else None, "best_step": self.best_step, "worse": self.worse}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step, self.worse = state["best_step"], state["worse"]
        kept = saved_step(self.folder / BEST)
        if kept is not None and kept > self.best_step:
            # A look after this state wrote better weights over those of `best_step`. It comes again.
            self.best = math.inf
