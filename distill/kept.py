"""Logits of the kept tokens only: [N, V] straight from the head, never [B, T, V].

Half of a chat batch is prompt, and with a vocabulary of 150,000 the head is most of the work, so computing
logits that no loss reads wastes both time and memory. A pre-hook on the output head selects the kept hidden
states before the head sees them; the model's own forward still runs around it, so logit scaling or capping
of any family, PEFT, autocast and DDP (which must wrap what is called) all stay as they are.

    kept = KeptLogits(model); logits = kept(input_ids, attention_mask, keep)      # [N, V]
"""

import torch
from torch import nn

from distill.errors import UserError


class KeptLogits(nn.Module):
    """Wraps a causal LM (or a PeftModel): forward(input_ids [B,T], attention_mask [B,T], keep [B,T]) -> [N,V]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise UserError(
                f"{type(model).__name__} has no output head to compute logits with; is it a causal LM?"
            )
        self._keep: torch.Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._select)

    def __enter__(self) -> "KeptLogits":
        return self

    def __exit__(self, *_exc) -> None:
        """Give the model back as it was; a model kept for training need not be."""
        self._hook.remove()

    def _select(self, _head, args):
        if self._keep is None:
            return None
        return (args[0][self._keep], *args[1:])  # [B, T, d] -> [N, d]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        self._keep = keep
        try:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        finally:
            self._keep = None
