"""One forward pass of the student and what its objectives say of it: the module that is trained.

    step = StudentStep(model, recipe.train.objectives)                  # before accelerator.prepare
    total, sums = step(batch, {"dense": teacher signal, ...})           # weighted sum; each objective's own sum

Everything that reads the student's weights happens inside this module's forward, the head and its loss
included, so that DDP, FSDP2 and autocast wrap the whole of it. Losses leave as sums over the N kept tokens of
the micro-batch; the loop divides once, by the tokens of the whole optimizer step.

There are two kinds of objectives: those on logits, fused with the head (`distill.training.losses.fused`), and those
on what happens before the logits (hidden states, routers):

    states = state_objectives(recipe, student.model, teacher)      # an nn.ModuleList in the recipe's order
    step = StudentStep(student.model, recipe.train.objectives, states)

Each listens to the student's own forward pass, takes what it heard after it, and gives a loss per kept token
[N] as objectives on logits do. Hidden-state objectives may own learned projections, which train with the
student and are not part of it: they are saved with the training state and left behind at the end.

A matrix that is input embedding and output head at once gets one gradient (`TiedGradient`). Autograd makes two, [V,
d] each, and adds them: the head's, and the embedding's, which is 0 but for the rows of the tokens read. At V =
151,936 and d = 1,024 the second takes 0.6 GB. Here the head leaves its gradient on the way back, and the embedding,
which comes last, adds its rows to it and hands it on:

    tied = TiedGradient.of(model)                       # None where there is nothing to share
    with tied.reading():
        ... the model's forward pass, whose loss calls tied.leave(gradient) in its backward pass ...

Autograd sees one use of the matrix, so DDP, FSDP2, clipping and accumulation are none the wiser. Two lookups, or none
on the way to the loss, are still right: a lookup that finds nothing makes its own gradient, and one that never comes
back is an error at the end of the backward pass rather than a head that does not learn.

Shapes: B rows, T time, N kept tokens, d hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.training import Objective
from distill.data.batches import Batch
from distill.errors import UserError
from distill.models.ahead import TokenAhead, shifted
from distill.models.hooks import AtHead, KeptLogits, Tap, at_places, replaced_forward
from distill.models.layers import decoder_layers, rows_apart
from distill.models.routers import find_routers
from distill.training.live_teachers import LiveTeacher
from distill.training.losses.fused import (
    CHECKS,
    Drawn,
    Given,
    Projected,
    Scratch,
    Term,
    fused_loss,
    whole_loss,
)
from distill.training.losses.hidden import (
    HiddenTap,
    hidden_cosine,
    hidden_mse,
    layer_pairs,
    over_pairs,
    projections,
)
from distill.training.losses.routers import (
    RoutedLayer,
    RouterTap,
    balance_part,
    chosen_experts,
    over_layers,
    per_kept_token,
    router_distillation,
    sequence_balance,
)

# Measured beside the objectives, never trained on.
_CROSS_ENTROPY = Term("cross_entropy", "targets", weight=0.0)
ON_LOGITS = ("targets", "dense", "drawn", "sparse", "sampled", "aligned")


class StudentStep(nn.Module):
    """forward(batch, signals) -> (weighted sum of all objectives, each objective's own sum [objectives])."""

    def __init__(
        self,
        model: nn.Module,
        objectives: list[Objective],
        states: nn.ModuleList | None = None,
        exact_head: bool = False,
    ):
        """`states`: the objectives that are not on logits, in the recipe's order (they are modules: some learn).

        exact_head: the head multiplies in float32 whatever autocast says. Raises UserError where it is no plain matrix.
        """
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
        self.exact_head = exact_head
        if exact_head and not at.fusable:
            raise UserError(
                "train.head_precision=fp32 is for an output head that is one plain matrix, and this one is not; "
                "leave it out, or use train.precision=fp32"
            )

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the decoder layers, the units of sharding: Accelerate asks the module it is given for them,
        and shards nothing but the whole where it gets no answer."""
        return sorted({type(layer).__name__ for layer in decoder_layers(self.model)[1]})

    @property
    def head_form(self) -> str:
        """For manifests and people: how the loss is computed."""
        if self.exact_head:
            return "fused with the head, which multiplies in float32"
        return "fused with the head" if self.at else "on whole logits (this head is not one plain matrix)"

    def forward(
        self, batch: Batch, signals: dict[str, Any], held_out: bool = False, counting: bool = False
    ) -> tuple[Tensor, ...] | list[tuple[Tensor, Tensor]]:
        """`signals` by form: what a teacher said of this batch (live_teachers.py, distill/data/signals.py).

        held_out: a third result, the sum of the kept tokens' plain cross-entropy in nats, whatever the objectives.
        counting: no loss; what the objectives of the whole step count (`whole_step`).
        """
        if counting:
            return self._count(batch)
        terms = [*self.terms, _CROSS_ENTROPY] if held_out else self.terms
        given = {"targets": Given((batch.targets,))}
        if batch.signal is not None:
            given[batch.signal.form] = Given(batch.signal.tensors, batch.checked)
        given |= {form: signal for form, signal in signals.items() if form in ON_LOGITS}
        if batch.from_teacher is not None:
            given["from_teacher"] = Given((batch.from_teacher,))
        if batch.weights is not None:
            given["weights"] = Given((batch.weights,))
        if batch.drawn is not None and "dense" in given:
            given["drawn"] = Drawn(given["dense"], batch.targets, batch.drawn)
        needed = {term.form for term in terms} | {"from_teacher", "weights"}
        given = {form: signal for form, signal in given.items() if form in needed}
        inputs = batch.inputs()
        if self.at:
            # The loss is computed where the forward calls the head: there FSDP2 has the head's weight whole.
            with self.tied.reading() if self.tied else contextlib.nullcontext():
                kept = batch.places
                total, sums = self.at(
                    lambda hidden: self._loss(at_places(hidden, kept), terms, given), **inputs
                )
        else:
            logits = self.kept(keep=batch.places, **inputs)
            total, sums = whole_loss(logits, terms, given)
        plain = sums[-1:]
        if held_out:
            sums = sums[:-1]
        if self.states:
            total, sums = self._with_states(total, list(sums), batch, signals)
        return (total, sums, plain[0]) if held_out else (total, sums)

    def _count(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        inputs = batch.inputs()
        if self.at:
            self.at(lambda hidden: hidden, **inputs)
        else:
            self.model(use_cache=False, **inputs)
        return [state.count(batch) for state in of_step(self)]

    def ready(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on the device, its stored signals held against the student's vocabulary while they are here.

        Raises UserError for ids of another vocabulary: on a device the host would have to wait for that.
        """
        if self.at and batch.signal is not None and batch.signal.form in CHECKS:
            CHECKS[batch.signal.form]((len(batch.targets), len(self.at.module.weight)), *batch.signal.tensors)
            batch.checked = True
        return batch.to(device)

    def _loss(self, hidden: Tensor, terms: list[Term], given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        leave = self.tied.leave if self.tied and self.tied.asked else None
        if self.exact_head:
            with torch.autocast(hidden.device.type, enabled=False):
                exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
                return fused_loss(exact, self.at.head(), terms, given, self.scratch, leave)
        return fused_loss(hidden, self.at.head(), terms, given, self.scratch, leave)

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


class _State(nn.Module):
    """An objective with its weight; forward(batch, signals) -> [N] after the student's forward pass."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.weight, self.options = objective.weight, objective.options

    def keep(self, folder: Path) -> None:
        """Leave beside the student's weights what outlives training: nothing, unless an objective says so."""


class HiddenStates(_State):
    """hidden_cosine and hidden_mse: the mean over pairs of layers, with a projection where widths differ."""

    def __init__(self, objective: Objective, student: nn.Module, teacher: LiveTeacher, seed: int):
        super().__init__(objective)
        model = teacher.heard_model
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
        return over_pairs(
            self.loss, self.tap.take(batch.keep, batch.places), signals["hidden"], self.pairs, self.maps
        )


class Balance(_State):
    """sequence_balance and batch_balance of the student's own routers, per layer, then summed over layers.

    batch_balance is of the whole optimizer step: `whole_step` counts the step's loads first.
    """

    def __init__(self, objective: Objective, student: nn.Module, _teacher, _seed: int):
        super().__init__(objective)
        self.of_step = objective.name == "batch_balance"
        self.__dict__["tap"] = RouterTap(student)
        self.loads: Loads | None = None

    def forward(self, batch: Batch, _signals: dict[str, Any]) -> Tensor:
        mask = batch.real_tokens()
        layers = self.tap.take(mask)
        if not self.of_step:
            return per_kept_token(over_layers(sequence_balance, layers, mask), batch.keep, batch.places)
        kept = len(batch.places)
        loads = self.loads or Loads(_chosen(layers, mask), mask.sum(), kept)
        parts = [
            balance_part(layer.scores, layer.indices, mask, chosen, loads.tokens)
            for layer, chosen in zip(layers, loads.chosen)
        ]
        # The loop adds up kept tokens and divides by those of the step: each gets a share of this part of the sum.
        return (torch.stack(parts).sum() * (loads.kept / kept)).expand(kept)

    def count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(chosen [L, E], real tokens) of the forward pass just made."""
        mask = batch.real_tokens()
        return _chosen(self.tap.take(mask), mask), mask.sum()


@dataclass(frozen=True)
class Loads:
    """Of a whole optimizer step: how often each expert of each layer was chosen [L, E], real and kept tokens."""

    chosen: Tensor
    tokens: Tensor
    kept: int


def _chosen(layers: Sequence[RoutedLayer], mask: Tensor) -> Tensor:
    return torch.stack([chosen_experts(x.scores.detach(), x.indices, mask) for x in layers])


def of_step(step: "StudentStep") -> list[Balance]:
    """The objectives that are of a whole optimizer step."""
    return [state for state in step.states if getattr(state, "of_step", False)]


@contextlib.contextmanager
def whole_step(
    step: "StudentStep",
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Batch, float]]],
    reduce: Callable[[Tensor], Tensor],
    kept: int,
) -> Iterator[None]:
    """Inside, objectives of the whole step know its loads, from a forward pass without gradient over all of it.

    Costs a third of a step's time, and nothing where no objective asks for it. The random numbers of that pass
    (dropout) are those of the passes to come. `batches()`: this process's batches with their weights, 1 or 0;
    `reduce`: the sum over processes; `kept`: tokens of the step with a loss.
    """
    states = of_step(step)
    if not states:
        yield
        return
    sums: list[Tensor | None] = [None] * len(states)
    device = next(step.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch, weight in batches():
            with rows_apart(batch.rows):
                counts = model(batch, {}, counting=True)
            for i, (chosen, tokens) in enumerate(counts):
                both = torch.cat([chosen.flatten(), tokens.double().reshape(1)]) * weight
                sums[i] = both if sums[i] is None else sums[i] + both
    try:
        for state, found in zip(states, map(reduce, sums)):
            layers = len(find_routers(step.model))
            state.loads = Loads(found[:-1].view(layers, -1), found[-1], kept)
        yield
    finally:
        for state in states:
            state.loads = None


class Routers(_State):
    """router_distillation: the teacher's distribution over experts, layer by layer, expert by expert."""

    def __init__(self, objective: Objective, student: nn.Module, teacher: LiveTeacher, _seed: int):
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
                    at_places(student.logits, batch.places), at_places(teacher.logits, batch.places),
                    temperature=self.options["temperature"],
                    student_score=student.score, teacher_score=teacher.score,
                )
            )  # fmt: skip
        return torch.stack(found).mean(0)


class Ahead(_State):
    """multi_token: a module that predicts the token after the next, trained beside the student (models/ahead.py).

    target tokens: cross-entropy to the text, which a row that the student wrote has none of (arXiv 2412.19437,
    equation 24; there with weight 0.3, later 0.1). target model: KL from the student's own distribution one token
    later, which is what a draft is held to. frozen: nothing but the module learns.
    """

    def __init__(self, objective: Objective, student: nn.Module, _teacher, seed: int):
        super().__init__(objective)
        self.module = TokenAhead(student, seed)
        self.at = AtHead(student)
        if not self.at.fusable:
            raise UserError("multi_token needs an output head that is one plain matrix, and this one is not")
        # Plain attributes: the student is not a part of this objective.
        self.__dict__["student"], self.__dict__["tap"] = student, Tap(decoder_layers(student)[0])
        self.tap.hooks.before(
            self.at.module, lambda _head, args: self.tap.hear("states", args[0], "the output head")
        )

    def forward(self, batch: Batch, _signals: dict[str, Any]) -> Tensor:
        states = self.tap.take_heard()("states", "the student's last state")
        embeddings, head = self.student.get_input_embeddings()(batch.input_ids), self.at.head()
        if self.options["frozen"]:
            states, embeddings = states.detach(), embeddings.detach()
            head = replace(head, weight=head.weight.detach())
        starts = None if batch.position_ids is None else batch.position_ids == 0
        mask = batch.real_tokens()
        before = shifted(states, mask, starts)
        inputs = {**batch.inputs(), "attention_mask": mask, "use_cache": False}
        found = self.module(before, embeddings, **{k: v for k, v in inputs.items() if k != "input_ids"})
        term, given = _CROSS_ENTROPY, {"targets": Given((batch.targets,))}
        if self.options["target"] == "model":
            term = Term("forward_kl", "dense", options={"temperature": 1.0, "temperature_squared": False})
            own = replace(head, weight=head.weight.detach())
            given = {"dense": Projected(at_places(states, batch.places), own)}
        given |= {} if batch.from_teacher is None else {"from_teacher": Given((batch.from_teacher,))}
        return fused_loss(at_places(found, batch.places), head, [replace(term, weight=1.0)], given)[
            0
        ].reshape(1)

    def keep(self, folder: Path) -> None:
        self.module.save(folder)


_KINDS = {"hidden": HiddenStates, "own_routers": Balance, "routers": Routers, "ahead": Ahead}


def state_objectives(
    objectives: list[Objective], student: nn.Module, teacher: LiveTeacher | None, seed: int
) -> nn.ModuleList:
    """One module per objective that is not on logits, in order; listening to `student` and `teacher` at once.

    Raises UserError where a model has no routers, or several teachers would have to be heard.
    """
    wanted = [o for o in objectives if o.signal in _KINDS]
    return nn.ModuleList(_KINDS[o.signal](o, student, teacher, seed) for o in wanted)


class TiedGradient:
    """Where the head's gradient lies until the embedding takes it."""

    def __init__(self, embedding: nn.Embedding):
        self.embedding = embedding
        self.asked = False  # whether this pass has looked a token up, and will come back for it
        self._left: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "TiedGradient | None":
        """For a causal LM with a plain embedding, trained, whose weight is its head's."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(embedding) is not nn.Embedding or embedding.weight is not getattr(head, "weight", None):
            return None
        plain = not (embedding.scale_grad_by_freq or embedding.sparse or embedding.max_norm is not None)
        ours = "forward" not in vars(embedding)  # nobody else has put a forward of their own there
        return cls(embedding) if plain and ours and embedding.weight.requires_grad else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Lookups in here share their gradient."""
        self._left = None  # of a pass that failed on its way back, as for want of memory
        self.asked = False
        with replaced_forward(self.embedding, self._look_up):
            yield

    def _look_up(self, ids: Tensor) -> Tensor:
        self.asked = torch.is_grad_enabled()
        return _LookUp.apply(self.embedding.weight, ids, self)

    def leave(self, gradient: Tensor) -> None:
        """Of the head's weight [V, d], float32 or wider; from now on it belongs to the embedding.

        Called in a backward pass, which raises RuntimeError at its end if no embedding came for it.
        """
        self._left = gradient if self._left is None else self._left.add_(gradient)
        torch.autograd.Variable._execution_engine.queue_callback(self._all_taken)

    def _all_taken(self) -> None:
        if self.take() is not None:
            raise RuntimeError("the head's gradient was not taken on: no embedding is on the way to its loss")

    def take(self) -> Tensor | None:
        """What the head left, once."""
        taken, self._left = self._left, None
        return taken


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.tied = weight.shape, weight.dtype, tied
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, rows: Tensor):
        (ids,) = ctx.saved_tensors
        padding = ctx.tied.embedding.padding_idx
        if padding is not None:
            rows = rows * (ids != padding)[..., None]
        gradient = ctx.tied.take()
        if gradient is None:
            gradient = rows.new_zeros(ctx.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        # Unlike index_add_ in a fixed order on accelerators too.
        gradient.index_put_((ids,), rows.to(gradient.dtype), accumulate=True)
        return gradient.to(ctx.dtype), None, None
