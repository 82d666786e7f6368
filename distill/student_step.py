"""One forward pass of the student and what its objectives say of it: the module that is trained.

    step = StudentStep(model, recipe.train.objectives)                  # before accelerator.prepare
    total, sums = step(batch, {"dense": teacher signal, ...})           # weighted sum; each objective's own sum

Everything that reads the student's weights happens inside this module's forward, the head and its loss
included, so that DDP, FSDP2 and autocast wrap the whole of it. Losses leave as sums over the N kept tokens of
the micro-batch; the loop divides once, by the tokens of the whole optimizer step.

Two kinds of objectives: those on logits, fused with the head (`distill.fused`), and those on what happens on
the way there (hidden states, routers), each an object of `distill.state_objectives`.

Shapes: B rows, T time, N kept tokens, d hidden size, V vocabulary.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.fused import Given, Scratch, Term, fused_loss, whole_loss
from distill.kept import AtHead, KeptLogits
from distill.taps import decoder_layers
from distill.tied import TiedGradient
from distill.train_sections import Objective

ON_LOGITS = ("targets", "dense", "sparse", "sampled", "aligned")


class StudentStep(nn.Module):
    """forward(batch, signals) -> (weighted sum of all objectives, each objective's own sum [objectives])."""

    def __init__(self, model: nn.Module, objectives: list[Objective], states: nn.ModuleList | None = None):
        """`states`: the objectives that are not on logits, in the recipe's order (they are modules: some learn)."""
        super().__init__()
        self.model = model
        self.states = states if states is not None else nn.ModuleList()
        self.order = [o.signal in ON_LOGITS for o in objectives]
        self.terms = [
            Term(o.name, o.signal, o.weight, o.options) for o in objectives if o.signal in ON_LOGITS
        ]
        at = AtHead(model)
        # Plain attributes: neither is a module of its own, they call `model`.
        self.__dict__["at"] = at if at.fusable else None
        self.__dict__["scratch"] = Scratch()
        self.__dict__["kept"] = None if at.fusable else KeptLogits(model)
        self.__dict__["tied"] = TiedGradient.of(model) if at.fusable else None

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the decoder layers, the units of sharding: Accelerate asks the module it is given for them,
        and shards nothing but the whole where it gets no answer."""
        return sorted({type(layer).__name__ for layer in decoder_layers(self.model)[1]})

    @property
    def head_form(self) -> str:
        """For manifests and people: how the loss is computed."""
        return "fused with the head" if self.at else "on whole logits (this head is not one plain matrix)"

    def forward(self, batch: Batch, signals: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`signals` by form: what a teacher said of this batch, see `distill.live` and `distill.signals`."""
        given = {"targets": Given((batch.targets,))}
        if batch.signal is not None:
            given[batch.signal.form] = Given(batch.signal.tensors)
        given |= {form: signal for form, signal in signals.items() if form in ON_LOGITS}
        if batch.from_teacher is not None:
            given["from_teacher"] = Given((batch.from_teacher,))
        needed = {term.form for term in self.terms} | {"from_teacher"}
        given = {form: signal for form, signal in given.items() if form in needed}
        inputs = batch.inputs()
        if self.at:
            # The loss is taken inside the head's place in the forward, where FSDP2 has its weight whole.
            with self.tied.reading() if self.tied else contextlib.nullcontext():
                total, sums = self.at(lambda hidden: self._loss(hidden[batch.keep], given), **inputs)
        else:
            logits = self.kept(keep=batch.keep, **inputs)
            total, sums = whole_loss(logits, self.terms, given)
        if not self.states:
            return total, sums
        return self._with_states(total, list(sums), batch, signals)

    def _loss(self, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        leave = self.tied.leave if self.tied and self.tied.asked else None
        return fused_loss(hidden, self.at.head(), self.terms, given, self.scratch, leave)

    def _with_states(self, total: Tensor, sums: list[Tensor], batch: Batch, signals: dict[str, Any]):
        found, states = [], iter(self.states)
        for on_logits in self.order:
            if on_logits:
                found.append(sums.pop(0))
                continue
            state = next(states)
            term = state(batch, signals).sum()
            total = total + state.weight * term
            found.append(term.detach().double())
        return total, torch.stack(found)
