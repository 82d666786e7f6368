"""Live teachers: what they say of the kept tokens of a training batch, head applied a chunk at a time.

    teacher = FrozenTeacher(model); signals = teacher(batch)          # {"dense": Projected}: hidden states and head
    loss, sums = step(batch, signals)

`LiveTeacher` is the protocol; all kinds are called alike: one model; several, each scoring the rows of its tag
(`train.teachers`); and the student's own starting weights (self-distillation, Furlanello et al. 2018, arXiv
1805.04770), which under LoRA are the student with its adapter switched off and cost no memory. Nothing is quantised
unless the recipe says so.

The teacher's work need not be done twice. `StoredTeacher` is a head alone: it makes the same logits of the hidden
states that `generate.signal.kind: hidden` stored with the rows. And a live teacher remembers the states of the rows
it has read in so much memory as `train.teachers.remember_gb` gives it; in later epochs it only runs its head.

Shapes: B rows, T time, N kept tokens, d hidden size, V vocabulary.
"""

import contextlib
import copy
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.batches import Batch
from distill.errors import UserError
from distill.models.describe import describe_model
from distill.models.hooks import AtHead, Head, KeptLogits, at_places
from distill.models.layers import rows_apart
from distill.moe.interventions import use_top_k
from distill.training.cross_tokenizer import TeacherView
from distill.training.losses.fused import Projected, Scratch, WholeLogits
from distill.training.losses.hidden import HiddenTap
from distill.training.losses.routers import RouterTap


class LiveTeacher(Protocol):
    """Who scores a training batch while the student trains."""

    @property
    def models(self) -> list[nn.Module]:
        """The models behind it, each once."""
        ...

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What it computes in."""
        ...

    def flops_per_token(self, context: int) -> float:
        """FLOPs of scoring one token that is read, behind `context` others."""
        ...

    @property
    def heard_model(self) -> nn.Module:
        """The one model whose hidden states and routers may be listened to. Raises UserError where there is none."""
        ...

    def listen_hidden(self, layers: list[int]) -> None:
        """From now on signals have "hidden": the outputs of these decoder layers, and of those asked for before."""
        ...

    def listen_routers(self) -> None:
        """From now on signals have "routers": logits and decisions per MoE layer. UserError for a dense teacher."""
        ...

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Signals by form, without gradient: "dense" [N, V] or "aligned", and what was asked to be listened to."""
        ...


class _Counted:
    models: list[nn.Module]

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {model.dtype for model in self.models}

    experts_per_token: int | None = None  # where it is not the models' own

    def flops_per_token(self, context: int) -> float:
        k = self.experts_per_token
        each = [describe_model(model, context, k)["flops_per_token"] for model in self.models]
        return sum(each) / len(each)  # every token is scored by one of them


class NotHeard(_Counted):
    """The part of the protocol that cannot be had where several models score, or the student itself does."""

    @property
    def heard_model(self) -> nn.Module:
        raise UserError(
            "an objective on hidden states or on the teacher's routers compares one student with one teacher of its "
            "tokenizer: leave out train.teachers, or the objective"
        )

    def listen_hidden(self, _layers: list[int]) -> None:
        _ = self.heard_model

    def listen_routers(self) -> None:
        _ = self.heard_model


class StateMemory:
    """Last hidden states [n, d] of rows by their keys, in main memory, exactly as they were; full, it takes no more."""

    def __init__(self, most_bytes: float):
        self._left, self._states = most_bytes, {}

    def get(self, key: bytes) -> Tensor | None:
        return self._states.get(key)

    def put(self, key: bytes, states: Tensor) -> None:
        if key not in self._states and states.nbytes <= self._left:
            self._left -= states.nbytes
            self._states[key] = states.detach().to("cpu", copy=True)


class FrozenTeacher(_Counted):
    """A frozen causal LM asked for its next-token distribution on the student's own batch."""

    def __init__(self, model: nn.Module, remember_bytes: float = 0, experts_per_token: int | None = None):
        self._ask(model.eval().requires_grad_(False))
        self.experts_per_token = experts_per_token
        if experts_per_token:  # for as long as the teacher lives
            self._routed = contextlib.ExitStack()
            self._routed.enter_context(use_top_k(model, experts_per_token))
        self._memory = StateMemory(remember_bytes) if remember_bytes and self._at else None

    def _ask(self, model: nn.Module) -> None:
        self.model = model
        at = AtHead(model)
        self._at = at if at.fusable else None
        self._kept = None if at.fusable else KeptLogits(model)
        self._device = next(model.parameters()).device
        self._travelled: Head | None = None
        self._scratch = Scratch()
        self._memory: StateMemory | None = None
        self._hidden: list[HiddenTap] = []
        self._routers: RouterTap | None = None

    @property
    def models(self) -> list[nn.Module]:
        return [self.model]

    @property
    def heard_model(self) -> nn.Module:
        return self.model

    def listen_hidden(self, layers: list[int]) -> None:
        self._hidden.append(HiddenTap(self.model, layers))

    def listen_routers(self) -> None:
        self._routers = self._routers or RouterTap(self.model)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Signals by form: "dense", the teacher's logits at the batch's kept tokens, without gradient."""
        with torch.no_grad():
            signals = self._dense(batch)
            if self._hidden:
                taken = [
                    tap.take(batch.keep.to(self._device), batch.places.to(self._device))
                    for tap in self._hidden
                ]
                states = {layer: state for found in taken for layer, state in found.items()}
                signals["hidden"] = {layer: state.to(batch.keep.device) for layer, state in states.items()}
            if self._routers:
                layers = self._routers.take(batch.real_tokens().to(self._device))
                home = batch.keep.device
                signals["routers"] = [
                    replace(r, logits=r.logits.to(home), indices=r.indices.to(home)) for r in layers
                ]
        return signals

    def _dense(self, batch: Batch) -> dict[str, Any]:
        home, here = batch.keep.device, batch.to(self._device)  # a teacher may sit elsewhere, as on the CPU
        if self._at is None:
            return {"dense": WholeLogits(self._kept(keep=here.places, **here.inputs()).to(home))}
        # What listens to the body needs all of it to run; a text that the student wrote does not come again.
        listening = self._hidden or self._routers
        read = self._read if listening or not self._memory or here.from_teacher is not None else self._recall
        return {"dense": Projected(read(here).to(home), self._head_on(home), self._scratch)}

    def _read(self, batch: Batch) -> Tensor:
        """States [N, d] that the head would read."""
        return self._at(lambda states: at_places(states, batch.places), **batch.inputs())

    def _recall(self, batch: Batch) -> Tensor:
        """The same, with the body run on rows that are not in memory alone."""
        found = [self._memory.get(key) for key in batch.keys]
        missing = [i for i, states in enumerate(found) if states is None]
        if missing:
            packed = batch.attention_mask is None
            missing = list(range(len(found))) if packed else missing  # packed rows are one sequence
            part = batch if len(missing) == len(found) else batch.select(missing)
            for i, states in zip(missing, self._read(part).split(list(map(int, part.row_tokens)))):
                found[i] = states
                self._memory.put(batch.keys[i], states)
        return torch.cat([states.to(self._device) for states in found])

    def _head_on(self, device: torch.device) -> Head:
        """The head where the student's logits are made: an offloaded teacher sends its states, not its logits."""
        head = self._at.head()
        if head.weight.device == device:
            return head
        if self._travelled is None:
            bias = None if head.bias is None else head.bias.to(device)
            self._travelled = replace(head, weight=head.weight.to(device), bias=bias)
        return self._travelled


class StoredTeacher(NotHeard):
    """A teacher's head alone, over hidden states that were stored with the rows (distill/data/signals.py)."""

    def __init__(self, head: Head):
        self.head, self._scratch = head, Scratch()

    @property
    def models(self) -> list[nn.Module]:
        return []

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {self.head.weight.dtype}

    def flops_per_token(self, _context: int) -> float:
        return 2 * self.head.weight.numel()

    def __call__(self, batch: Batch) -> dict[str, Any]:
        states = batch.signal.states.to(self.head.weight.dtype)
        return {"dense": Projected(states, self.head, self._scratch)}


class OwnStart(NotHeard):
    """Self-distillation: the student's starting weights score. Without an adapter they are a frozen copy."""

    def __init__(self, student: nn.Module):
        self._adapted = student if hasattr(student, "disable_adapter") else None
        self._asked = (
            TrainingTeacher(student) if self._adapted is not None else FrozenTeacher(copy.deepcopy(student))
        )

    @property
    def models(self) -> list[nn.Module]:
        return self._asked.models

    def __call__(self, batch: Batch) -> dict[str, Any]:
        with self._adapted.disable_adapter() if self._adapted is not None else contextlib.nullcontext():
            return self._asked(batch)


class TrainingTeacher(FrozenTeacher):
    """The same for a model that goes on training: asked in eval mode, left in the mode it was in."""

    def __init__(self, model: nn.Module):
        self._ask(model)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            return super().__call__(batch)
        finally:
            for module in training:
                module.training = True


class CrossTeacher(NotHeard):
    """A teacher with a tokenizer of its own: its logits where both models have read the same text (ULD)."""

    def __init__(self, model: nn.Module, teacher_tokenizer, student_tokenizer, ends: set[int]):
        self.teacher, self.view = (
            FrozenTeacher(model),
            TeacherView(student_tokenizer, teacher_tokenizer, ends),
        )

    @property
    def models(self) -> list[nn.Module]:
        return self.teacher.models

    def __call__(self, batch: Batch) -> dict[str, Any]:
        completions = np.split(batch.written, np.cumsum(batch.row_tokens)[:-1])
        rows = [self.view.row(m, c.tolist()) for m, c in zip(batch.messages, completions)]
        theirs = self.view.collate(rows)
        asked = Batch(theirs.input_ids, theirs.attention_mask, theirs.keep, theirs.rows).to(batch.keep.device)
        with rows_apart(asked.rows):  # padded, however the student's lie
            said = self.teacher(asked)["dense"]
        return {"aligned": Aligned(said, theirs.rows, theirs.kept, asked.keep.device)}


class Aligned:
    """Dense signals [M, V'] of some of N tokens, and which: a chunk is (logits [n, V'], 1 where aligned [n])."""

    def __init__(self, signal: Projected | WholeLogits, rows: Tensor, kept: int, device: torch.device):
        """`rows` [M], ascending: which of the `kept` tokens, on the host."""
        self.signal, self.kept = signal, kept
        self._rows = rows.cpu().numpy()
        self._on_device = rows.to(device, non_blocking=True)

    def chunk(self, part: slice, like: Tensor) -> tuple[Tensor, ...]:
        start, stop, _ = part.indices(self.kept)
        low, high = np.searchsorted(
            self._rows, [start, stop]
        )  # consecutive: both orders are those of the text
        there = torch.zeros(stop - start, dtype=torch.bool, device=like.device)
        if low == high:
            return like.new_zeros(stop - start, 1), there
        (said,) = self.signal.chunk(slice(int(low), int(high)), None)
        places = self._on_device[low:high] - start
        logits = said.new_zeros(stop - start, said.shape[1])
        return logits.index_copy_(0, places, said), there.index_fill_(0, places, True)


class RoutedTeachers(NotHeard):
    """Several teachers, each scoring the rows whose tag is its own; the others go to `default`."""

    def __init__(self, by_tag: dict[str, FrozenTeacher], default: FrozenTeacher):
        self.by_tag, self.default = by_tag, default

    @property
    def models(self) -> list[nn.Module]:
        return [t.model for t in dict.fromkeys([self.default, *self.by_tag.values()])]

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Every teacher reads the whole batch only if it owns rows in it; each kept token has one owner."""
        owners = [self.by_tag.get(tag, self.default) for tag in batch.tags]
        present = list(dict.fromkeys(owners))
        owner = torch.from_numpy(np.repeat([present.index(o) for o in owners], batch.row_tokens))  # [N]
        owner = owner.to(batch.keep.device, non_blocking=True)
        return {"dense": Shared([teacher(batch)["dense"] for teacher in present], owner)}


class Shared:
    """Dense signals of several teachers: token n is what `signals[owner[n]]` says of it."""

    def __init__(self, signals: list, owner: Tensor):
        self.signals, self.owner = signals, owner
        self.finite = all(getattr(signal, "finite", False) for signal in signals)
        widths = [getattr(signal, "vocabulary", None) for signal in signals]
        self.vocabulary = None if None in widths else min(widths)

    def chunk(self, part: slice, like: Tensor) -> tuple[Tensor, ...]:
        owner = self.owner[part][:, None]
        logits = None
        for i, signal in enumerate(self.signals):
            (said,) = signal.chunk(part, like)
            logits = (
                said.clone() if logits is None else torch.where(owner == i, said.to(logits.dtype), logits)
            )
        return (logits,)
