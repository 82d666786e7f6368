"""Token rows to batches. Shift and mask happen here, once, and nowhere else.

A row is (prompt_ids, completion_ids); only completion tokens are trained on. Which rows make optimizer
step s is a pure function of (seed, s), and how those rows are split over processes and micro-batches
only orders them, so 1 x 64 = 2 x 32 = 8 x 8, and a resumed run continues exactly.

A teacher's stored signals travel with their rows: one per kept token, in the order of `targets`.

Shapes: B rows, T time, N kept tokens (all completion tokens of the batch).

Rows may also be packed end to end into one sequence, where the model keeps them apart. Packing wastes no work on
padding, but attention, convolutions and recurrent states must not cross from one row into the next. transformers
masks by position where the attention mask is absent; what has no such mask (linear attention, state-space layers,
some own attention code) would leak silently. So both ways are tried on random rows before training, and a model
that tells them apart is refused.

    check_packing(student.model, vocabulary=len(tokenizer))
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill.data.signals import Sampled, SignalFormat, States, StoredSignals, TopK
from distill.errors import UserError
from distill.models.hooks import KeptLogits
from distill.models.layers import RIGHT_PADDED, PackedRows, Rows, rows_apart
from distill.storage import SIGNAL_COLUMNS, parts, read_table


@dataclass
class Batch:
    """Rows of one forward pass: B rows of T tokens, N of which are kept for a loss."""

    input_ids: torch.Tensor  # [B, T] right-padded; packed: [1, T], rows end to end
    attention_mask: torch.Tensor | None  # [B, T]; packed: None, nothing is padding
    keep: torch.Tensor  # [B, T] bool: the *next* token is a completion token
    targets: torch.Tensor  # [N] that next token, in row-major order of `keep`
    signal: TopK | Sampled | States | None = None  # [N, ...] the teacher's, where it was stored and asked for
    position_ids: torch.Tensor | None = None  # [1, T] packed only: each row counts from 0
    from_teacher: torch.Tensor | None = None  # [N] 1 where a teacher wrote the row, 0 where the student did
    weights: torch.Tensor | None = None  # [N] what a token's losses are multiplied by; None: 1
    drawn: torch.Tensor | None = None  # [N] log-probability of the target when the student drew it
    messages: list | None = None  # [B] of the rows' questions, for a teacher with another tokenizer
    tags: np.ndarray | None = None  # [B] of the rows, in the order of their kept tokens
    row_tokens: np.ndarray | None = None  # [B] kept tokens of each row
    keys: list[bytes] | None = None  # [B] what the rows say, hashed: to know one again
    written: np.ndarray | None = None  # [N] `targets` once more, which stay on the host
    places: torch.Tensor | None = None  # [N] of the kept tokens in [B * T], ascending: `keep` as numbers
    rows: Rows = RIGHT_PADDED  # how they lie, for attention to take them apart
    checked: bool = False  # whether the stored signal's ids were looked at, on the host

    def __post_init__(self):
        # On the host, where it costs nothing: on a device everyone would wait for how many they are.
        if self.places is None:
            self.places = self.keep.flatten().nonzero()[:, 0]

    def to(self, device) -> "Batch":
        """On the device, without waiting for it: from memory that a GPU may read by itself, where it is one."""
        pinned = torch.device(device).type == "cuda" and self.input_ids.device.type == "cpu"
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and pinned:
                value = value.pin_memory()
            moved[name] = value.to(device, non_blocking=True) if hasattr(value, "to") else value
        return Batch(**moved)

    def select(self, rows: list[int]) -> "Batch":
        """These rows of a padded batch alone, for a model that reads them; what was stored of them stays behind."""
        length, device = self.input_ids.shape[1], self.input_ids.device
        tokens, ends = self.row_tokens[rows], np.cumsum(self.row_tokens)[rows]
        # By numbers that are known here, not by masks: on a device everyone would wait for how many they are.
        kept = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, tokens)])
        moved = np.repeat((np.arange(len(rows)) - rows) * length, tokens)
        chosen, kept, moved = (torch.as_tensor(numbers, device=device) for numbers in (rows, kept, moved))
        ids, mask, keep = (
            t.index_select(0, chosen) for t in (self.input_ids, self.attention_mask, self.keep)
        )
        places = self.places.index_select(0, kept) + moved
        return Batch(ids, mask, keep, self.targets.index_select(0, kept), row_tokens=tokens, places=places)

    def real_tokens(self) -> torch.Tensor:
        """[B, T]: 1 where a token is not padding."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a causal LM's forward."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return {name: value for name, value in named.items() if value is not None}


class TokenRows:
    """All rows of a dataset folder as flat int32 arrays: 4 bytes a token, no Python object per row."""

    def __init__(self, prompts: list, completions: list, signals: StoredSignals | None = None):
        self.signals = signals
        self.tags: np.ndarray | None = None  # [rows] strings, where teachers are chosen by tag
        self.messages: list | None = None  # [rows], where a teacher reads them with a tokenizer of its own
        self.sampled: np.ndarray | None = None  # [rows] bool, where some rows are the student's own
        self.weights: np.ndarray | None = None  # [completion tokens] of their losses; None: 1
        self.drawn: np.ndarray | None = (
            None  # [completion tokens] log-probabilities when the student wrote them
        )
        self.prompt_tokens, self.prompt_starts = _flatten(prompts)
        self.completion_tokens, self.completion_starts = _flatten(completions)
        self.prompt_lengths = np.diff(self.prompt_starts)
        self.completion_lengths = np.diff(self.completion_starts)
        self.lengths = self.prompt_lengths + self.completion_lengths

    @classmethod
    def from_folder(
        cls, folder: Path, stored: SignalFormat | None = None, columns: dict[str, str] | None = None
    ) -> "TokenRows":
        """All rows; with `stored`, their teacher signals too. `columns`: attribute to column, as {"tags": "level"}.

        Raises UserError for a folder without rows, a damaged part, an empty prompt or completion, or a row
        without a signal.
        """
        prompts, completions, signals = [], [], ([], [])
        more = {attribute: [] for attribute in columns or {}}
        extra = [*(SIGNAL_COLUMNS if stored else ()), *(columns or {}).values()]
        for path in parts(folder):
            table = read_table(path, ["prompt_ids", "completion_ids", *extra])
            for attribute, column in (columns or {}).items():
                more[attribute] += table[column].to_pylist()
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
        rows.messages = more.get("messages")
        rows.tags = np.array(more["tags"], dtype=object) if "tags" in more else None
        return rows

    def __len__(self) -> int:
        return len(self.lengths)

    def subset(self, indices: np.ndarray) -> "TokenRows":
        """These rows alone, with all that is known of them."""
        pairs = [self.row(i) for i in indices]
        signals = self.signals
        if signals is not None:
            signals = StoredSignals(
                signals.form, [signals.ids[i] for i in indices], [signals.values[i] for i in indices]
            )
        made = TokenRows([p for p, _ in pairs], [c for _, c in pairs], signals)
        made.messages = None if self.messages is None else [self.messages[i] for i in indices]
        made.tags = None if self.tags is None else self.tags[indices]
        made.sampled = None if self.sampled is None else self.sampled[indices]
        return made

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
        return Batch(*(torch.from_numpy(a) for a in (ids, mask, keep, flat)), signal, **self._about(indices))

    def _about(self, indices: np.ndarray) -> dict:
        """What a batch says of its rows besides their tokens."""
        lengths = self.completion_lengths[indices]
        written = None if self.sampled is None else np.repeat(~self.sampled[indices], lengths)
        spans = [slice(self.completion_starts[i], self.completion_starts[i + 1]) for i in indices]

        def of_tokens(values: np.ndarray | None) -> torch.Tensor | None:
            found = None if values is None else np.concatenate([values[span] for span in spans])
            return None if found is None else torch.from_numpy(found.astype(np.float32))

        return {
            "weights": of_tokens(self.weights),
            "drawn": of_tokens(self.drawn),
            "from_teacher": None if written is None else torch.from_numpy(written.astype(np.float32)),
            "messages": None if self.messages is None else [self.messages[i] for i in indices],
            "tags": None if self.tags is None else self.tags[indices],
            "row_tokens": lengths,
            "keys": [self.key(i) for i in indices],
            "written": np.concatenate([self.row(i)[1] for i in indices]),
        }

    def key(self, i: int) -> bytes:
        prompt, completion = self.row(i)
        return blake2b(
            len(prompt).to_bytes(8) + prompt.tobytes() + completion.tobytes(), digest_size=16
        ).digest()

    def pack(self, indices: np.ndarray) -> Batch:
        """The same rows end to end in one sequence without padding; positions restart at every row.

        Attention must not cross rows: transformers builds such a mask from the positions where the mask is
        absent. `distill.data.batches` makes sure that a model does before anything is trained on packed rows.
        """
        inputs, positions, keeps, targets = [], [], [], []
        for i in indices:
            prompt, completion = self.row(i)
            length = len(prompt) + len(completion) - 1
            inputs += [prompt, completion[:-1]]
            positions.append(np.arange(length))
            keeps.append(np.arange(length) >= len(prompt) - 1)
            targets.append(completion)
        ids, places, keep, flat = map(np.concatenate, (inputs, positions, keeps, targets))
        signal = self.signals.take(indices, self.completion_lengths[indices]) if self.signals else None
        return Batch(
            torch.from_numpy(ids.astype(np.int64))[None], None, torch.from_numpy(keep)[None],
            torch.from_numpy(flat.astype(np.int64)), signal, torch.from_numpy(places)[None],
            rows=PackedRows.of(self.lengths[indices] - 1), **self._about(indices),
        )  # fmt: skip


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

    def share(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """This process's rows of the step, shortest first.

        Processes take every world-th row, so that their shares have like lengths.
        """
        return self.step_rows(step)[rank::world]


def micro_batches(
    indices: np.ndarray,
    lengths: np.ndarray,
    most_rows: int,
    most_tokens: int | None = None,
    padded: bool = True,
) -> Iterator[np.ndarray]:
    """Cut rows, sorted by length, into pieces of at most `most_rows` rows and `most_tokens` tokens.

    Tokens are counted as they are computed: rows times the longest of them where rows are padded. Sorted rows
    of like length share a piece, so little of it is padding. A single row above the limit is a piece.
    """
    start = 0
    while start < len(indices):
        stop = min(start + most_rows, len(indices))
        if most_tokens:
            ahead = lengths[indices[start:stop]]
            taken = np.arange(1, len(ahead) + 1) * np.maximum.accumulate(ahead) if padded else ahead.cumsum()
            stop = start + max(1, int(np.searchsorted(taken, most_tokens, side="right")))
        yield indices[start:stop]
        start = stop


def even_pieces(pieces: list[np.ndarray], most: int) -> list[tuple[np.ndarray, float]]:
    """`most` pieces with their weights: those given count 1, repetitions of the last one (or row 0) nothing.

    Where weights are sharded, every forward pass is a meeting of all processes: one with fewer pieces than
    the others would leave them waiting for ever.
    """
    filler = pieces[-1] if pieces else np.zeros(1, dtype=np.int64)
    return [(piece, 1.0) for piece in pieces] + [(filler, 0.0)] * (most - len(pieces))


@torch.no_grad()
def check_packing(model: nn.Module, vocabulary: int) -> None:
    """Raises UserError where a packed row sees its neighbour, or is not what it is alone.

    The first is sharp: with another neighbour of the same length, the same arithmetic must give the same
    logits, to a few roundings. The second catches positions that do not restart.
    """
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, vocabulary, n).tolist()  # noqa: E731
    row, tail = draw(5), draw(12)
    rows = TokenRows([draw(7), draw(7), row], [draw(9), draw(9), tail])
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with KeptLogits(model) as kept:
            packs = (rows.pack(np.array(pair)) for pair in ((0, 2), (1, 2)))
            found = []
            for batch in (b.to(device) for b in (*packs, rows.collate(np.array([2]), 0))):
                with rows_apart(batch.rows):
                    logits = kept(**{"attention_mask": None, "keep": batch.places, **batch.inputs()})
                found.append(logits[-len(tail) :])
            first, second, alone = found
    finally:
        model.train(training)
    spread = alone.float().std().clamp(min=1e-9)
    neighbour, position = (float((a.float() - first.float()).abs().max() / spread) for a in (second, alone))
    if not (neighbour <= 16 * torch.finfo(alone.dtype).eps and position <= 0.05):
        raise UserError(
            "train.packing: this model sees from one packed row into the next (logits move by "
            f"{max(neighbour, position):.2g} of their spread); set train.packing=false"
        )
