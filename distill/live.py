"""The live teacher: its next-token logits at the kept tokens of a training batch.

teacher = LiveTeacher(model); teacher(batch, vocabulary).logits     # [N, V], no gradient
"""

import torch
from torch import nn

from distill.data import Batch
from distill.errors import UserError
from distill.kept import KeptLogits
from distill.models import load_model, load_tokenizer, same_vocabulary
from distill.signals import Dense


def match_vocabulary(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Teacher logits [N, V'] cut, or padded with -inf, to the student's V.

    For two tokenizers that are equal by content: rows beyond them are padding of the embedding (151,936
    against 152,064 in the Qwen family) and stand for no token.
    """
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        return nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits[:, :vocabulary]


class LiveTeacher:
    """A frozen causal LM asked for its next-token logits on the student's own batch."""

    def __init__(self, model: nn.Module):
        self.kept = KeptLogits(model.eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(self, batch: Batch, vocabulary: int) -> Dense:
        """Teacher logits [N, V] at the batch's kept tokens, without gradient."""
        logits = self.kept(batch.input_ids, batch.attention_mask, batch.keep)
        return Dense(match_vocabulary(logits, vocabulary))


def load_live_teacher(name: str, dtype: str, device: torch.device, student_tokenizer) -> LiveTeacher:
    """Load a teacher for a divergence on logits.

    Raises UserError where the vocabularies differ by content: then only text can be distilled.
    """
    if not same_vocabulary(load_tokenizer(name), student_tokenizer):
        raise UserError(
            f"teacher '{name}' and the student have different vocabularies, so their logits cannot be compared; "
            "use train.objectives=[{name: cross_entropy}] (distil its text), or a student with its tokenizer"
        )
    return LiveTeacher(load_model(name, dtype, device))
