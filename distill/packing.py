"""May rows be packed end to end into one sequence for this model? Asked of the model, not of a list.

Packing wastes no work on padding, but attention, convolutions and recurrent states must not cross from one row
into the next. transformers masks by position where the attention mask is absent; what has no such mask (linear
attention, state-space layers, some own attention code) would leak silently. So both ways are tried on random
rows before training, and a model that tells them apart is refused.

    check_packing(student.model, vocabulary=len(tokenizer))
"""

import numpy as np
import torch
from torch import nn

from distill.data import TokenRows
from distill.errors import UserError
from distill.kept import KeptLogits


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
            batches = [*packs, rows.collate(np.array([2]), 0)]
            inputs = (
                {"attention_mask": None, "keep": b.keep, **b.inputs()}
                for b in (b.to(device) for b in batches)
            )
            first, second, alone = (kept(**named)[-len(tail) :] for named in inputs)
    finally:
        model.train(training)
    spread = alone.float().std().clamp(min=1e-9)
    neighbour, position = (float((a.float() - first.float()).abs().max() / spread) for a in (second, alone))
    if not (neighbour <= 16 * torch.finfo(alone.dtype).eps and position <= 0.05):
        raise UserError(
            "train.packing: this model sees from one packed row into the next (logits move by "
            f"{max(neighbour, position):.2g} of their spread); set train.packing=false"
        )
