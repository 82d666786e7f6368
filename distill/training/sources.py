"""Where the rows of an optimizer step come from: a source hands the loop one lot per step.

    source = StoredRows(rows, recipe.train.batch_size, recipe.seed)
    lot = source.lot(step, rank, world)        # rows, this process's share of them, tokens of the whole step

A source is all that changes between training on text that a teacher wrote and text that the student just wrote:
the loop never asks which. Stored rows have no state; a source that has (a buffer of
sampled text) gives it to be saved and takes it back on resume.

On-policy rows (`OnPolicyRows`): the student writes, the teacher scores (GKD, arXiv 2306.13649, algorithm 1).

    train:
      objectives: [{name: reverse_kl}]
      on_policy: {fraction: 1.0, buffer_steps: 8, max_new_tokens: 80}

Every row of every optimizer step is, with probability `fraction` (GKD's lambda), answered by the student as it
now is, instead of by the teacher's stored text. Sampling is batched apart from training: one buffer holds the
answers of `buffer_steps` steps, so that hundreds of rows decode together; they are at most that many updates
old. What is drawn depends on (seed, step, place in the step) alone, not on micro-batches or processes.

Cross-entropy is not taken on what the student wrote, or it would learn to repeat itself: on those rows only
divergences from the teacher count. What of it counts at all is said by weights of its tokens (`first_tokens`,
`skip_truncated`, `skip_special`), and so is the balance between tags. An end token that the student's text never
reaches is the usual way for lengths to explode; it is looked for in the stored text before anything is sampled, and in
every buffer. Plain text (`prompts.documents`) has no question and no end: there the student continues the first
`context` tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn

from distill.config.training import OnPolicy
from distill.data.batches import BatchPlan, TokenRows
from distill.errors import RunError, UserError
from distill.models.decode import Sampling, decode


@dataclass(frozen=True)
class Lot:
    """One optimizer step's rows as one process sees them."""

    rows: TokenRows
    share: np.ndarray  # indices into `rows` of this process, shortest first
    tokens: int  # completion tokens of the step over all processes: what losses are divided by
    read: int  # tokens of the step over all processes, prompts too
    lengths: Sequence[np.ndarray] = ()  # of the rows of every process, as `share` has them; (): one process


class Source(Protocol):
    stats: dict[str, float]  # what to log beside the loss; {} for nothing
    passed: int  # tokens that went through the student before the step, to write its rows; 0 for stored ones
    fixed: bool  # whether no lot depends on what training changes: it may be asked for ahead of its time

    def lot(self, step: int, rank: int, world: int) -> Lot:
        """The rows of 0-based optimizer step `step`; the same on every call with the same arguments."""

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs besides the step, as JSON; None if nothing."""

    def restore(self, state: dict[str, Any] | None) -> None: ...


class StoredRows:
    """A dataset on disk: which rows make a step is a pure function of (seed, step)."""

    fixed = True

    def __init__(self, rows: TokenRows, batch_size: int, seed: int, balance: bool = False):
        self.stats, self.passed, self.balance = {}, 0, balance
        self.rows, self.plan = rows, BatchPlan(rows.lengths, batch_size, seed)
        if balance:
            rows.weights = np.ones(len(rows.completion_tokens), dtype=np.float32)

    def lot(self, step: int, rank: int = 0, world: int = 1) -> Lot:
        chosen = self.plan.step_rows(step)
        if self.balance:
            shares = balanced(tokens_by_tag(self.rows, chosen))
            for row in chosen:
                self.rows.weights[_span(self.rows, row)] = shares[self.rows.tags[row]]
        tokens, read = self.rows.completion_lengths[chosen].sum(), self.rows.lengths[chosen].sum()
        lengths = [self.rows.lengths[chosen[r::world]] for r in range(world)]
        return Lot(self.rows, self.plan.share(step, rank, world), int(tokens), int(read), lengths)

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass


def tokens_by_tag(rows: TokenRows, chosen: np.ndarray, counted: np.ndarray | None = None) -> dict[str, int]:
    """Completion tokens of these rows for every tag; with `counted` [completion tokens], those that are not 0 there."""
    found: dict[str, int] = {}
    for row in chosen:
        span = _span(rows, row)
        tokens = span.stop - span.start if counted is None else np.count_nonzero(counted[span])
        found[rows.tags[row]] = found.get(rows.tags[row], 0) + int(tokens)
    return found


def balanced(tokens: dict[str, int]) -> dict[str, float]:
    """Weight of a token of each tag: every tag that has tokens counts the same, and all count as many as before."""
    present = sum(n > 0 for n in tokens.values())
    return {tag: sum(tokens.values()) / (present * n) if n else 0.0 for tag, n in tokens.items()}


def _control_tokens(tokenizer) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _span(rows: TokenRows, row: int) -> slice:
    return slice(int(rows.completion_starts[row]), int(rows.completion_starts[row + 1]))


_DOMAIN = 77  # of the random stream that decides who writes a row; sampling has keys of its own


class OnPolicyRows:
    """A `distill.training.sources.Source`: stored rows, some of them answered by the student."""

    fixed = False

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        seed: int,
        section: OnPolicy,
        student: nn.Module,
        tokenizer,
        eos_ids: set[int],
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        balance: bool = False,
    ):
        """`gather(value)` collects a small object of every process, in order; identity for one process. `balance`:
        between tags, over all processes.

        Raises UserError where the teacher's stored answers do not end with the student's end token: a student
        trained on them would never learn to stop.
        """
        self.rows, self.plan, self.seed, self.section = (
            rows,
            BatchPlan(rows.lengths, batch_size, seed),
            seed,
            section,
        )
        self.student, self.tokenizer, self.eos_ids, self.gather = student, tokenizer, eos_ids, gather
        self.balance, self.special = balance, _control_tokens(tokenizer) - eos_ids
        last = rows.completion_tokens[rows.completion_starts[1:] - 1]
        if not section.context and not np.isin(last, list(eos_ids)).any():
            shown = sorted({tokenizer.decode([int(i)]) for i in last[:200]})[:3]
            raise UserError(
                f"train.on_policy: no stored answer ends with the student's end token {sorted(eos_ids)}; they end "
                f"with {', '.join(map(repr, shown))}; use a student with the teacher's chat template and end token"
            )
        # (step, place in the step) -> completion and its log-probabilities
        self.buffer: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self.filled = (0, 0)  # the buffer holds what the student writes in steps from .. to - 1
        self.bad_buffers = 0
        self.stats: dict[str, float] = {}
        self.passed = 0  # tokens that went through the student to be sampled, prompts too, over all processes

    # ---- the source ------------------------------------------------------------------------------------

    def lot(self, step: int, rank: int = 0, world: int = 1) -> Lot:
        chosen = self.plan.step_rows(step)
        wanted = self._writes(step)
        mine = np.arange(len(chosen))[rank::world]
        # By the step alone, not by what this process lacks: all sample after the same update, and meet there.
        if not self.filled[0] <= step < self.filled[1]:
            self._fill(step, rank, world)
        prompts, completions, drawn = [], [], []
        for place in mine:
            prompt, completion = self.rows.row(chosen[place])
            own = self.buffer.get((step, int(place))) if wanted[place] else None
            prompts.append(prompt if own is None else self._read_before_writing(chosen[place]))
            completions.append(completion if own is None else own[0])
            drawn.append(np.zeros(len(completion)) if own is None else own[1])
        made = TokenRows(prompts, completions)
        made.drawn = np.concatenate(drawn) if drawn else np.zeros(0)
        made.sampled = wanted[mine]
        made.tags = None if self.rows.tags is None else self.rows.tags[chosen[mine]]
        made.messages = None if self.rows.messages is None else [self.rows.messages[i] for i in chosen[mine]]
        counted = self._weigh(made)
        share = np.argsort(made.lengths, kind="stable")
        counts, lengths = zip(*self.gather((counted, made.lengths[share])))
        return Lot(made, share, max(1, sum(counts)), int(sum(map(np.sum, lengths))), lengths)

    def _weigh(self, made: TokenRows) -> int:
        """Give the tokens of the rows their weights where the recipe asks for any; how many count."""
        if not (self.section.weighs or self.balance):
            return int(made.completion_lengths.sum())
        made.weights = np.ones(len(made.completion_tokens), dtype=np.float32)
        for row in np.flatnonzero(made.sampled):
            span = _span(made, row)
            written, weights = made.completion_tokens[span], made.weights[span]
            if self.section.skip_special:
                weights[np.isin(written, list(self.special))] = 0
            if self.section.first_tokens:
                weights[self.section.first_tokens :] = 0
            if self.section.skip_truncated and int(written[-1]) not in self.eos_ids:
                weights[:] = 0
        counted = int(np.count_nonzero(made.weights))
        if self.balance:
            everyone = self.gather(tokens_by_tag(made, np.arange(len(made)), made.weights))
            total: dict[str, int] = {}
            for tokens in everyone:
                total = {tag: total.get(tag, 0) + tokens.get(tag, 0) for tag in total | tokens}
            shares = balanced(total)
            for row, tag in enumerate(made.tags):
                made.weights[_span(made, row)] *= shares[tag]
        return counted

    def state(self) -> dict[str, Any]:
        """The buffers of all processes: a resumed run trains on the very text that was sampled."""
        everyone = [item for items in self.gather(list(self.buffer.items())) for item in items]
        buffer = [[*key, *written] for key, written in dict(everyone).items()]
        return {
            "buffer": buffer,
            "filled": list(self.filled),
            "bad_buffers": self.bad_buffers,
            "passed": self.passed,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        if state:
            # States from before log-probabilities were kept have none.
            self.buffer = {
                (step, place): (ids, *rest) if rest else (ids, [0.0] * len(ids))
                for step, place, ids, *rest in state["buffer"]
            }
            self.filled, self.bad_buffers = tuple(state["filled"]), state["bad_buffers"]
            self.passed = state.get("passed", 0)

    # ---- sampling --------------------------------------------------------------------------------------

    def _writes(self, step: int) -> np.ndarray:
        """[batch_size] bool: which places of the step the student writes."""
        draws = np.random.default_rng([self.seed, _DOMAIN, step]).random(self.plan.batch_size)
        return draws < self.section.fraction

    def _fill(self, first: int, rank: int, world: int) -> None:
        """Sample what this process needs for the steps of the buffer that `first` belongs to."""
        # Buffers end at multiples of their size, whatever step a resume begins with.
        stop = (first // self.section.buffer_steps + 1) * self.section.buffer_steps
        places = [
            (step, int(place))
            for step in range(first, stop)
            for place in np.flatnonzero(self._writes(step))
            if place % world == rank
        ]
        chosen = {step: self.plan.step_rows(step) for step in range(first, stop)}
        prompts = [self._read_before_writing(chosen[step][place]).tolist() for step, place in places]
        section = self.section
        base = self.student.get_base_model() if hasattr(self.student, "get_base_model") else self.student
        sampling = Sampling(
            temperature=section.temperature, top_p=section.top_p, max_new_tokens=section.max_new_tokens
        )
        found = decode(
            base, prompts, sampling, eos_ids=self.eos_ids, pad_id=self.tokenizer.pad_token_id,
            vocab_limit=len(self.tokenizer), keys=[(self.seed, "rollout", *place) for place in places],
            batch_size=section.batch_size,
        )  # fmt: skip
        failed = [c.error for c in found if c.error]
        if failed:
            raise RunError(
                f"the student's samples at step {first + 1} failed: {failed[0]}; lower train.learning_rate"
            )
        self.buffer = {place: (list(map(int, c.ids)), c.logprobs) for place, c in zip(places, found)}
        self.filled = (first, stop)
        self._look_at(first, found, sum(map(len, prompts)))

    def _read_before_writing(self, row: int) -> np.ndarray:
        """Tokens that the student goes on from: a question with all around it, or how a piece of text begins."""
        prompt, completion = self.rows.row(row)
        if not self.section.context:
            return prompt
        return np.concatenate([prompt, completion[:-1]])[: self.section.context]

    def _look_at(self, step: int, found: list, prompt_tokens: int = 0) -> None:
        """Lengths, and the alarm: answers that do not end, twice in a row."""
        cut = sum(c.finish_reason == "length" for c in found)
        lengths = [len(c.ids) for c in found]
        everyone = self.gather((len(found), cut, sum(lengths), prompt_tokens))
        n, cut, total, asked = (sum(column) for column in zip(*everyone))
        self.passed += total + asked
        if not n:
            return
        self.stats = {"sampled": n, "truncated": round(cut / n, 4), "mean_tokens": round(total / n, 2)}
        if self.section.context:
            return
        self.bad_buffers = self.bad_buffers + 1 if cut / n > self.section.most_truncated else 0
        if self.bad_buffers >= 2:
            usual = float(self.rows.completion_lengths.mean())
            raise RunError(
                f"step {step + 1}: {cut / n:.0%} of the student's answers ran into train.on_policy.max_new_tokens="
                f"{self.section.max_new_tokens} in two buffers running (stored answers have {usual:.0f} tokens on "
                "average): lengths explode. Start from a student trained on the teacher's text first, raise "
                "max_new_tokens, or train.on_policy.most_truncated if that is what you want"
            )
