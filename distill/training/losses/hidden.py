"""Hidden-state distillation: the student's representation of a token against the teacher's, layer by layer.

    pairs = layer_pairs(len(student_layers), len(teacher_layers), "uniform")
    mine, theirs = HiddenTap(student, [s for s, _ in pairs]), HiddenTap(teacher, [t for _, t in pairs])
    maps = projections(pairs, student_width, teacher_width, seed)      # None where the widths agree
    ...                                                                 # both forward passes
    loss = over_pairs(hidden_cosine, mine.take(keep), theirs.take(keep), pairs, maps)      # [N]

A state is the output of a decoder layer, 0-based; that of the last layer is before the final norm. Losses are
float32 whatever the states are (float64 if they are float64), the teacher receives no gradient, and both
models must read the same tokens. Neither has a temperature, and neither is in nats: weigh them by a measured
ratio.

Shapes: B rows, T time, N kept tokens, d width of the student, d' of the teacher.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import RunError, UserError
from distill.models.hooks import Tap, at_places
from distill.models.layers import decoder_layers

# ---------------------------------------------------------------------------------------------- per token


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher), between 0 and 2, blind to length. Both [N, d] -> [N].

    No direction, no temperature, no T^2. Source: the cosine loss of DistilBERT (arXiv 1910.01108, section 2).
    """
    student, teacher = _comparable(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def hidden_mse(student: Tensor, teacher: Tensor, *, normalise: bool) -> Tensor:
    """Mean over d of (student - teacher)^2, at least 0. Both [N, d] -> [N].

    `normalise` divides each state by its own root mean square first, which takes the scale of the two models
    out: the loss then is exactly twice hidden_cosine. Without it the few very large dimensions that language
    models have are most of the loss. No direction, no temperature, no T^2.
    Source: the hidden-state loss of TinyBERT (arXiv 1909.10351, equation 8), with its learned `Projection`.
    """
    student, teacher = _comparable(student, teacher)
    if normalise:
        student, teacher = _unit_rms(student), _unit_rms(teacher)
    return (student - teacher).square().mean(-1)


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise UserError(
            f"hidden states must be [kept tokens, width] and alike, not {list(student.shape)} (student) and "
            f"{list(teacher.shape)} (teacher): widths that differ need a Projection"
        )
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.to(wide), teacher.detach().to(wide)


def _unit_rms(states: Tensor) -> Tensor:
    return states * states.square().mean(-1, keepdim=True).clamp(min=1e-16).rsqrt()


# ---------------------------------------------------------------------------------------- widths and layers


class Projection(nn.Module):
    """Learned linear map of states [N, d] -> [N, d'], float32 under any autocast; for training only.

    It starts as near an isometry as the widths allow, the same on every machine for one seed: lengths are
    kept where d' > d, and on average over directions where d' < d. It has no bias. Raises UserError for equal
    widths: states that can be compared as they are need no map that could learn the difference away. Source:
    W_h of TinyBERT (arXiv 1909.10351, equation 8); the initialisation is a convention.
    """

    def __init__(self, width: int, teacher_width: int, seed: int):
        super().__init__()
        if width == teacher_width:
            raise UserError(f"both models are {width} wide: compare their states without a Projection")
        generator = torch.Generator().manual_seed(seed)
        long, short = max(width, teacher_width), min(width, teacher_width)
        q, r = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64))
        q = q * r.diagonal().sign()  # QR leaves the signs to the library
        matrix = q if teacher_width > width else q.T * (width / teacher_width) ** 0.5
        self.weight = nn.Parameter(matrix.float().contiguous())

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.weight.dtype), self.weight)


def projections(
    pairs: Sequence[tuple[int, int]], width: int, teacher_width: int, seed: int
) -> nn.ModuleList | None:
    """One Projection for each pair of layers, or None where the widths agree."""
    if width == teacher_width:
        return None
    return nn.ModuleList(Projection(width, teacher_width, seed + i) for i in range(len(pairs)))


def layer_pairs(
    student_layers: int,
    teacher_layers: int,
    which: Literal["uniform", "last"] | Sequence[tuple[int, int]] = "uniform",
) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), 0-based.

    "uniform": every student layer, student layer m of M to the teacher's ceil(m L / M) counted from 1: last
    to last and evenly spaced (TinyBERT's g(m) = 3 m for 4 layers of 12). "last": that pair. Or the pairs
    themselves, negative numbers counting from the end. Raises UserError listing every pair that is not there.
    """
    if which == "uniform":
        return [(m, -(-(m + 1) * teacher_layers // student_layers) - 1) for m in range(student_layers)]
    if which == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    if isinstance(which, str):
        raise UserError(f"layers must be 'uniform', 'last' or pairs [[student, teacher], ...], not {which!r}")
    found, pairs = [], []
    for s, t in which:
        if not (-student_layers <= s < student_layers and -teacher_layers <= t < teacher_layers):
            found.append(
                f"layers: [{s}, {t}] is not there; the student has layers 0 to {student_layers - 1}, "
                f"the teacher 0 to {teacher_layers - 1}"
            )
        pairs.append((s % student_layers, t % teacher_layers))
    if len(set(pairs)) < len(pairs) or not pairs:
        found.append("layers: name at least one pair, and each pair once")
    if found:
        raise UserError(*found)
    return pairs


def over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    pairs: Sequence[tuple[int, int]],
    maps: nn.ModuleList | None = None,
) -> Tensor:
    """Mean over the pairs of loss(student state, teacher state): states by layer [N, d], [N, d'] -> [N]."""
    states = [student[s] if maps is None else maps[i](student[s]) for i, (s, _) in enumerate(pairs)]
    return torch.stack([loss(state, teacher[t]) for state, (_, t) in zip(states, pairs)]).mean(0)


# -------------------------------------------------------------------------------------------- hearing them


class HiddenTap(Tap):
    """The outputs of chosen decoder layers in the last forward pass: `take(keep)` after each pass."""

    def __init__(self, model: nn.Module, layers: Sequence[int]):
        """`layers`: 0-based, repetitions allowed. Raises UserError for a layer that is not there."""
        backbone, found = decoder_layers(model)
        if absent := sorted({i for i in layers if not 0 <= i < len(found)}):
            raise UserError(f"no decoder layers {absent}: the model has 0 to {len(found) - 1}")
        super().__init__(backbone)
        self._wanted = sorted(set(layers))
        for i in self._wanted:
            self.hooks.after(found[i], self._listener(i))

    def _listener(self, layer: int) -> Callable:
        def heard(_module, _args, output):
            if self.gate.running:
                states = output[0] if isinstance(output, tuple) else output
                self.hear(layer, states, f"decoder layer {layer}")

        return heard

    def take(self, keep: Tensor, places: Tensor | None = None) -> dict[int, Tensor]:
        """States of the last pass by layer, [N, d] at keep [B, T] bool, row-major; then lets go of them.

        places: `keep` as numbers [N], where they are known (`Batch.places`).

        Raises RunError where there was no pass since the last call, or states are not [B, T, d].
        """
        heard, taken = self.take_heard(), {}
        for layer in self._wanted:
            states = heard(layer, f"decoder layer {layer}")
            if states.dim() != 3 or states.shape[:2] != keep.shape:
                raise RunError(
                    f"decoder layer {layer} returned {list(states.shape)} for a batch of {list(keep.shape)}; "
                    "hidden states of this architecture cannot be matched token by token"
                )
            taken[layer] = states[keep] if places is None else at_places(states, places)
        return taken
