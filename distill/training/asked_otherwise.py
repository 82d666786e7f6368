"""Live teachers that are asked otherwise: told what the student is not, or with experts that they would not choose.

    ToldTeacher(teacher, tokenizer)        # the answer behind another prompt: `train.teachers.context`
    SampledRoutings(teacher, draws=4)      # the mean over draws of its experts: `train.teachers.routings`

*Told*: a teacher that reads a system prompt, or the worked answer beside the question, says what it would say if it
knew; a student that never reads it learns to say so unprompted (context distillation, Snell et al., arXiv 2209.15189;
with the student's own start as the teacher it distils itself). *Drawn*: knowledge augmentation of arXiv 2502.12947.

Shapes: N kept tokens, V vocabulary.
"""

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.config.training import Context
from distill.data.batches import Batch, TokenRows
from distill.models.chat import prompt_ids
from distill.models.layers import rows_apart
from distill.moe.interventions import sample_experts
from distill.training.live_teachers import FrozenTeacher, LiveTeacher, NotHeard


class ToldTeacher(NotHeard):
    """A live teacher of the student's tokenizer that reads another prompt ahead of the same answer.

    Batches bring what it reads as `messages` (see `told`). Its signal is of the same N tokens in the same order.
    """

    def __init__(self, teacher: LiveTeacher, tokenizer):
        self.teacher, self.tokenizer = teacher, tokenizer

    @property
    def models(self) -> list[nn.Module]:
        return self.teacher.models

    def flops_per_token(self, context: int) -> float:
        return self.teacher.flops_per_token(context)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        written = np.split(batch.written, np.cumsum(batch.row_tokens)[:-1])
        rows = TokenRows(
            [prompt_ids(self.tokenizer, m) for m in batch.messages], [w.tolist() for w in written]
        )
        rows.tags = batch.tags
        asked = rows.collate(np.arange(len(rows)), self.tokenizer.pad_token_id)
        with rows_apart(asked.rows):  # padded, however the student's lie
            return {"dense": self.teacher(asked.to(batch.keep.device))["dense"]}


def told(messages: list[dict], answer: str, context: Context) -> list[dict]:
    """A row's messages as the teacher reads them. `answer`: the row's stored one."""
    found = [{"role": m["role"], "content": m["content"]} for m in messages]
    if context.question is not None:
        last = found[-1]["content"]
        # In one pass: a question that spells {answer} out is a question.
        text = re.sub(
            r"\{(question|answer)\}", lambda m: last if m[1] == "question" else answer, context.question
        )
        found[-1] = {**found[-1], "content": text}
    if context.system:
        found = [{"role": "system", "content": context.system}, *(m for m in found if m["role"] != "system")]
    return found


class SampledRoutings(NotHeard):
    """A mixture whose distribution is the mean of those of several draws of its experts (arXiv 2502.12947)."""

    def __init__(self, teacher: FrozenTeacher, draws: int):
        self.teacher, self.draws = teacher, draws

    @property
    def models(self) -> list[nn.Module]:
        return self.teacher.models

    def flops_per_token(self, context: int) -> float:
        return self.draws * self.teacher.flops_per_token(context)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        signals = []
        for draw in range(self.draws):
            with sample_experts(self.teacher.model, seed=draw):
                signals.append(self.teacher(batch)["dense"])
        return {"dense": Averaged(signals)}


class Averaged:
    """The mean of several dense signals' distributions, as logits: log of the mean probability."""

    def __init__(self, signals: list):
        self.signals = signals
        self.finite = all(getattr(signal, "finite", False) for signal in signals)
        self.vocabulary = getattr(signals[0], "vocabulary", None)

    def chunk(self, part: slice, like: Tensor) -> tuple[Tensor, ...]:
        """One chunk's memory is the next one's: each is taken into the sum before another is asked."""
        total = None
        for signal in self.signals:
            (said,) = signal.chunk(part, like)
            logs = said.float().log_softmax(-1)
            total = logs if total is None else torch.logaddexp(total, logs)
        return (total - math.log(len(self.signals)),)
