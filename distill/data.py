"""Token rows to batches. Shift and mask happen here, once, and nowhere else.

A row is (prompt_ids, completion_ids); only completion tokens are trained on. Which rows make optimizer
step s is a pure function of (seed, s), and how those rows are split over processes and micro-batches
only orders them, so 1 x 64 = 2 x 32 = 8 x 8, and a resumed run continues exactly.

A teacher's stored signals travel with their rows: one per kept token, in the order of `targets`.

Shapes: B rows, T time, N kept tokens (all completion tokens of the batch).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from distill.errors import UserError
from distill.shards import SIGNAL_COLUMNS, parts, read_table
from distill.signals import Sampled, SignalFormat, StoredSignals, TopK


@dataclass
class Batch:
    input_ids: torch.Tensor  # [B, T] right-padded
    attention_mask: torch.Tensor  # [B, T]
    keep: torch.Tensor  # [B, T] bool: the *next* token is a completion token
    targets: torch.Tensor  # [N] that next token, in row-major order of `keep`
    signal: TopK | Sampled | None = None  # [N, K] the teacher's, where it was stored and asked for

    def to(self, device) -> "Batch":
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in vars(self).values()))


class TokenRows:
    """All rows of a dataset folder as flat int32 arrays: 4 bytes a token, no Python object per row."""

    def __init__(self, prompts: list, completions: list, signals: StoredSignals | None = None):
        self.signals = signals
        self.prompt_tokens, self.prompt_starts = _flatten(prompts)
        self.completion_tokens, self.completion_starts = _flatten(completions)
        self.prompt_lengths = np.diff(self.prompt_starts)
        self.completion_lengths = np.diff(self.completion_starts)
        self.lengths = self.prompt_lengths + self.completion_lengths

    @classmethod
    def from_folder(cls, folder: Path, stored: SignalFormat | None = None) -> "TokenRows":
        """All rows; with `stored`, their teacher signals too.

        Raises UserError for a folder without rows, a damaged part, an empty prompt or completion, or a row
        without a signal.
        """
        prompts, completions, signals = [], [], ([], [])
        for path in parts(folder):
            table = read_table(path, ["prompt_ids", "completion_ids", *(SIGNAL_COLUMNS if stored else ())])
            prompts += table["prompt_ids"].to_numpy(zero_copy_only=False).tolist()
            completions += table["completion_ids"].to_numpy(zero_copy_only=False).tolist()
            for column, values in zip(SIGNAL_COLUMNS, signals):
                values += table[column].to_pylist() if stored else []
        if not prompts:
            raise UserError(
                f"{folder} has no rows to train on; loosen `filter`, or look in {folder / 'dropped'} for why"
            )
        if None in signals[0]:
            raise UserError(
                f"{folder} has rows without a stored teacher signal; run generate and filter with --redo"
            )
        rows = cls(prompts, completions, StoredSignals(stored, *signals) if stored else None)
        if rows.prompt_lengths.min() == 0 or rows.completion_lengths.min() == 0:
            raise UserError(
                f"{folder} has a row with an empty prompt or completion; run its stage with --redo"
            )
        return rows

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        p, c = self.prompt_starts, self.completion_starts
        return self.prompt_tokens[p[i] : p[i + 1]], self.completion_tokens[c[i] : c[i + 1]]

    def collate(self, indices: np.ndarray, pad_id: int) -> Batch:
        """Rows as one right-padded batch of inputs and shifted targets.

        The last token is never an input, so T is one less than the longest row.
        """
        width = int(self.lengths[indices].max()) - 1
        ids = np.full((len(indices), width), pad_id, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        keep = np.zeros((len(indices), width), dtype=bool)
        targets = []
        for b, i in enumerate(indices):
            prompt, completion = self.row(i)
            p, length = len(prompt), len(prompt) + len(completion) - 1
            ids[b, :p] = prompt
            ids[b, p:length] = completion[:-1]
            mask[b, :length] = 1
            keep[b, p - 1 : length] = True
            targets.append(completion)
        flat = np.concatenate(targets).astype(np.int64)
        signal = self.signals.take(indices, self.completion_lengths[indices]) if self.signals else None
        return Batch(*(torch.from_numpy(a) for a in (ids, mask, keep, flat)), signal)


def _flatten(rows: list) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(r) for r in rows], out=starts[1:])
    flat = np.concatenate([np.asarray(r, dtype=np.int32) for r in rows]) if rows else np.zeros(0, np.int32)
    return flat, starts


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each optimizer step, process and micro-batch sees; no state, so nothing to checkpoint."""

    lengths: np.ndarray  # [rows]
    batch_size: int
    seed: int

    def step_rows(self, step: int) -> np.ndarray:
        """The rows of optimizer step `step` (0-based), shortest first.

        Epochs are fresh permutations laid end to end; a step may straddle two of them.
        """
        n, start = len(self.lengths), step * self.batch_size
        wanted = range(start, start + self.batch_size)
        rows = np.array([_epoch(self.seed, i // n, n)[i % n] for i in wanted])
        # Sorted rows waste little padding in micro-batches; the sum over the step is the same.
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def micro_batches(
        self, step: int, micro_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[np.ndarray]:
        """This process's share of the step in pieces of at most `micro_size` rows.

        Processes take every world-th row, so that their shares have like lengths.
        """
        mine = self.step_rows(step)[rank::world]
        for start in range(0, len(mine), micro_size):
            yield mine[start : start + micro_size]
