"""Held-out loss while training: the cross-entropy of rows of the dataset that are never trained on.

    train: {validation: {rows: 256, every: 50, patience: 3, keep_best: true}}

It is cross-entropy in nats per completion token and nothing else, whatever the objectives, so that arms with different
objectives compare: a penalty that one arm carries (an auxiliary loss, a divergence) is no part of it. It is summed over
processes and divided once. With `patience`, training ends after so many looks without a better value; with `keep_best`,
the weights that are saved at the end are those of the best look. Its place in metrics.jsonl is `validation`; the
objectives' own weighted sum on the same rows stands beside it as `validation_objective`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from distill.config.training import Train, Validation
from distill.data.batches import TokenRows, even_pieces, micro_batches
from distill.errors import UserError
from distill.models.layers import rows_apart
from distill.training.checkpoint import BEST, load_trained, save_trained, saved_step
from distill.training.step import StudentStep, whole_step


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
