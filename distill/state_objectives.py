"""Objectives on what happens before the logits: hidden states, routers. They join the sum in `StudentStep`.

    states = state_objectives(recipe, student.model, teacher)      # an nn.ModuleList in the recipe's order
    step = StudentStep(student.model, recipe.train.objectives, states)

Each listens to the student's own forward pass, takes what it heard after it, and gives a loss per kept token
[N] as objectives on logits do. Hidden-state objectives may own learned projections, which train with the
student and are not part of it: they are saved with the training state and left behind at the end.

Shapes: B rows, T time, N kept tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distill import router_losses
from distill.data import Batch
from distill.errors import UserError
from distill.hidden_losses import HiddenTap, hidden_cosine, hidden_mse, layer_pairs, over_pairs, projections
from distill.router_losses import RouterTap, over_layers, per_kept_token, router_distillation
from distill.taps import decoder_layers
from distill.train_sections import Objective


class _State(nn.Module):
    """An objective with its weight; forward(batch, signals) -> [N] after the student's forward pass."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.weight, self.options = objective.weight, objective.options


class HiddenStates(_State):
    """hidden_cosine and hidden_mse: the mean over pairs of layers, with a projection where widths differ."""

    def __init__(self, objective: Objective, student: nn.Module, teacher, seed: int):
        super().__init__(objective)
        (model,) = teacher.models
        layers = [len(decoder_layers(m)[1]) for m in (student, model)]
        widths = [m.config.get_text_config().hidden_size for m in (student, model)]
        self.pairs = layer_pairs(*layers, self.options["layers"])
        self.maps = projections(self.pairs, *widths, seed)
        if self.maps is not None:
            self.maps.to(next(student.parameters()).device)
        self.__dict__["tap"] = HiddenTap(student, [s for s, _ in self.pairs])
        teacher.listen_hidden([t for _, t in self.pairs])
        normalise = self.options.get("normalise")
        self.loss = hidden_cosine if normalise is None else lambda s, t: hidden_mse(s, t, normalise=normalise)

    def forward(self, batch: Batch, signals: dict[str, Any]) -> Tensor:
        return over_pairs(self.loss, self.tap.take(batch.keep), signals["hidden"], self.pairs, self.maps)


class Balance(_State):
    """sequence_balance and batch_balance of the student's own routers, per layer, then summed over layers."""

    def __init__(self, objective: Objective, student: nn.Module, _teacher, _seed: int):
        super().__init__(objective)
        self.loss = getattr(router_losses, objective.name)
        self.__dict__["tap"] = RouterTap(student)

    def forward(self, batch: Batch, _signals: dict[str, Any]) -> Tensor:
        mask = batch.real_tokens()
        return per_kept_token(over_layers(self.loss, self.tap.take(mask), mask), batch.keep)


class Routers(_State):
    """router_distillation: the teacher's distribution over experts, layer by layer, expert by expert."""

    def __init__(self, objective: Objective, student: nn.Module, teacher, _seed: int):
        super().__init__(objective)
        self.__dict__["tap"] = RouterTap(student)
        teacher.listen_routers()

    def forward(self, batch: Batch, signals: dict[str, Any]) -> Tensor:
        mine, theirs = self.tap.take(batch.real_tokens()), signals["routers"]
        found = []
        for s, t in layer_pairs(len(mine), len(theirs), self.options["layers"]):
            student, teacher = mine[s], theirs[t]
            if student.logits.shape[-1] != teacher.logits.shape[-1]:
                raise UserError(
                    f"router_distillation: {student.name} chooses among {student.logits.shape[-1]} experts and the "
                    f"teacher's {teacher.name} among {teacher.logits.shape[-1]}; it needs a student whose experts "
                    "descend from the teacher's"
                )
            found.append(
                router_distillation(
                    student.logits[batch.keep], teacher.logits[batch.keep], temperature=self.options["temperature"],
                    student_score=student.score, teacher_score=teacher.score,
                )
            )  # fmt: skip
        return torch.stack(found).mean(0)


_KINDS = {"hidden": HiddenStates, "own_routers": Balance, "routers": Routers}


def state_objectives(objectives: list[Objective], student: nn.Module, teacher, seed: int) -> nn.ModuleList:
    """One module per objective that is not on logits, in order; listening to `student` and `teacher` at once.

    Raises UserError where a model has no routers, or several teachers would have to be heard.
    """
    wanted = [o for o in objectives if o.signal in _KINDS]
    asks = [o.name for o in wanted if o.signal != "own_routers"]
    if asks and not hasattr(teacher, "listen_hidden"):
        raise UserError(
            f"objective {asks[0]} compares one student with one teacher: leave out train.teachers, or the objective"
        )
    return nn.ModuleList(_KINDS[o.signal](o, student, teacher, seed) for o in wanted)
