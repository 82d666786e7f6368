"""From the recipe to its live teacher: which kind, loaded where, and asked in which way.

Live teachers that are asked otherwise: told what the student is not, or with experts that they would not choose.

    ToldTeacher(teacher, tokenizer)        # the answer behind another prompt: `train.teachers.context`
    SampledRoutings(teacher, draws=4)      # the mean over draws of its experts: `train.teachers.routings`

*Told*: a teacher that reads a system prompt, or the worked answer beside the question, says what it would say if it
knew; a student that never reads it learns to say so unprompted (context distillation, Snell et al., arXiv 2209.15189;
with the student's own start as the teacher it distils itself). *Drawn*: knowledge augmentation of arXiv 2502.12947.

Shapes: N kept tokens, V vocabulary.

From the recipe to its live teacher: which kind, loaded where and in what.

    teacher = live_teachers(recipe, student.model, tokenizer, ends, device)       # a LiveTeacher, called by every step
"""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.config.training import Context
from distill.data.batches import Batch, TokenRows
from distill.data.signals import HEAD
from distill.errors import UserError
from distill.models.chat import prompt_ids
from distill.models.hooks import load_head
from distill.models.layers import decoder_layers, rows_apart
from distill.models.load import load_model, load_tokenizer, same_vocabulary
from distill.moe.interventions import sample_experts
from distill.training.live_teachers import (
    CrossTeacher,
    FrozenTeacher,
    LiveTeacher,
    NotHeard,
    OwnStart,
    RoutedTeachers,
    StoredTeacher,
)


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


# ==== From the recipe to its live teacher ====

ALONE = (
    "teacher.device=sharded: there is one process, and nothing to spread the teacher over; start several with "
    "accelerate launch, or set teacher.device=auto (or cpu)"
)


def live_teachers(
    recipe: Recipe,
    student: nn.Module,
    tokenizer,
    ends: set[int],
    device: torch.device,
    half: torch.dtype | None = None,
) -> LiveTeacher:
    """What the recipe's objectives with a live teacher are taken from. `ends`: ids that end the student's turn.

    half: the 16-bit format that the student multiplies in. With teacher.dtype=auto a teacher stored in float32 then
    computes in it on a GPU too, since float32 products there take several times as long; elsewhere it is as stored.
    Raises UserError where a vocabulary differs from the student's by content: then only text can be distilled.
    """
    section = recipe.train.teachers
    if recipe.reads_states:
        head = load_head(recipe.path / "dataset" / HEAD, device)
        computes = teacher_dtype(recipe.teacher.dtype, device, half, head.weight.dtype)
        return StoredTeacher(replace(head, weight=head.weight.to(computes)))
    if section.own_start:
        own = OwnStart(student)
        return ToldTeacher(own, tokenizer) if section.context else own
    if any(o.signal == "aligned" for o in recipe.train.objectives):
        model = _load(recipe, recipe.teacher.model, device, half)
        return CrossTeacher(
            model, load_tokenizer(recipe.teacher.model, recipe.teacher.chat_template_kwargs), tokenizer, ends
        )
    names = {recipe.teacher.model, *section.models.values()}
    problems = [
        f"teacher '{name}' and the student have different vocabularies, so their logits cannot be compared; use "
        "train.objectives=[{name: cross_entropy}] (distil its text), {name: uld} (across tokenizers), or a "
        "student with its tokenizer"
        for name in sorted(names)
        if not same_vocabulary(load_tokenizer(name), tokenizer)
    ]
    if problems:
        raise UserError(*problems)
    # Who remembers a row would skip the meeting in which a sharded teacher's weights are gathered.
    remember = 0.0 if recipe.teacher.device == "sharded" else 1e9 * section.remember_gb / len(names)
    k = section.experts_per_token
    loaded = {name: FrozenTeacher(_load(recipe, name, device, half), remember, k) for name in names}
    if section.routings:
        loaded = {name: SampledRoutings(teacher, section.routings) for name, teacher in loaded.items()}
    default = loaded[recipe.teacher.model]
    by_tag = {tag: loaded[name] for tag, name in section.models.items()}
    found = RoutedTeachers(by_tag, default) if by_tag else default
    return ToldTeacher(found, tokenizer) if section.context else found


def teacher_dtype(
    asked: str, device: torch.device, half: torch.dtype | None, stored: torch.dtype
) -> torch.dtype:
    """What a live teacher computes in: see `live_teachers`."""
    narrower = asked == "auto" and device.type == "cuda" and half is not None and stored == torch.float32
    return half if narrower else stored


def _load(recipe: Recipe, name: str, device: torch.device, half: torch.dtype | None = None) -> nn.Module:
    """A teacher where `teacher.device` wants it. Raises UserError where nothing could be sharded over."""
    where = recipe.teacher.device
    if where == "sharded" and not dist.is_initialized():
        raise UserError(ALONE)
    place = device if where == "auto" else torch.device("cpu")
    model = load_model(name, recipe.teacher.dtype, place, quantize=recipe.teacher.quantize)
    if recipe.teacher.quantize == "none":
        model.to(teacher_dtype(recipe.teacher.dtype, place, half, model.dtype))
    return shard_layers(model, device) if where == "sharded" else model


def shard_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread a frozen model's decoder layers over all processes (FSDP2); each is whole only while it computes.

    Embedding, last norm and output head stay whole everywhere: the head is read outside of the forward pass. Every
    process must then call the model equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(model.requires_grad_(False))[1]:
        # Said explicitly: a layer that nothing sharded stands around would stay whole after its first pass.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return model.to(device)
