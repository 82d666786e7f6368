"""Universal Logit Distillation: two distributions over different vocabularies, compared by shape.

Which positions of two tokenizers may be compared at all is for `distill.cross_tokenizer`.

Shapes: n rows of a chunk, V and V' vocabularies.
"""

import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError


def uld_rows(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """sum_i |q_(i) - p_(i)|, both sorted from the likeliest down. student [n, V], teacher [n, V'] -> [n].

    q and p are softmax(logits / temperature) over each model's own vocabulary, the shorter padded with zeros;
    -inf logits are probability 0. From 0 to 2. No direction, no T^2, no tail cut. It compares the shapes
    of two distributions, not which tokens they are about: use it beside cross_entropy, as the paper does.
    Source: Universal Logit Distillation (arXiv 2402.12030), optimal transport where all moves cost the same.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise UserError(
            "uld needs logits [n, V] and [n, V'] at the same n positions, not "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    q = (student / temperature).softmax(-1).sort(-1, descending=True).values
    p = (teacher.detach().to(student.dtype) / temperature).softmax(-1).sort(-1, descending=True).values
    longer = max(q.shape[1], p.shape[1])
    return (F.pad(q, (0, longer - q.shape[1])) - F.pad(p, (0, longer - p.shape[1]))).abs().sum(-1)
