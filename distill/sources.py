"""Where the rows of an optimizer step come from: a source hands the loop one lot per step.

    source = StoredRows(rows, recipe.train.batch_size, recipe.seed)
    lot = source.lot(step, rank, world)        # rows, this process's share of them, tokens of the whole step

A source is all that changes between training on text that a teacher wrote and text that the student just wrote
(`distill.rollout`): the loop never asks which. Stored rows have no state; a source that has (a buffer of
sampled text) gives it to be saved and takes it back on resume.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distill.data import BatchPlan, TokenRows


@dataclass(frozen=True)
class Lot:
    """One optimizer step's rows as one process sees them."""

    rows: TokenRows
    share: np.ndarray  # indices into `rows` of this process, shortest first
    tokens: int  # completion tokens of the step over all processes: what losses are divided by
    read: int  # tokens of the step over all processes, prompts too


class Source(Protocol):
    stats: dict[str, float]  # what to log beside the loss; {} for nothing

    def lot(self, step: int, rank: int, world: int) -> Lot:
        """The rows of 0-based optimizer step `step`; the same on every call with the same arguments."""

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs besides the step, as JSON; None if nothing."""

    def restore(self, state: dict[str, Any] | None) -> None: ...


class StoredRows:
    """A dataset on disk: which rows make a step is a pure function of (seed, step)."""

    def __init__(self, rows: TokenRows, batch_size: int, seed: int):
        self.stats = {}
        self.rows, self.plan = rows, BatchPlan(rows.lengths, batch_size, seed)

    def lot(self, step: int, rank: int = 0, world: int = 1) -> Lot:
        chosen = self.plan.step_rows(step)
        tokens, read = self.rows.completion_lengths[chosen].sum(), self.rows.lengths[chosen].sum()
        return Lot(self.rows, self.plan.share(step, rank, world), int(tokens), int(read))

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass
