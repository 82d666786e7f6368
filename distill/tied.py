"""One gradient for a matrix that is input embedding and output head at once.

Autograd makes two of them, [V, d] each, and adds them: the head's, and the embedding's, which is 0 but for the rows of
the tokens read. At V = 151,936 and d = 1,024 the second takes 0.6 GB. Here the head leaves its gradient on the way
back, and the embedding, which comes last, adds its rows to it and hands it on:

    tied = TiedGradient.of(model)                       # None where there is nothing to share
    with tied.reading():
        ... the model's forward pass, whose loss calls tied.leave(gradient) in its backward pass ...

Autograd sees one use of the matrix, so DDP, FSDP2, clipping and accumulation are none the wiser. Two lookups, or none
on the way to the loss, are still right: a lookup that finds nothing makes its own gradient, and one that never comes
back is an error at the end of the backward pass rather than a head that does not learn.

Shapes: V vocabulary, d hidden size.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.asked, self.embedding.forward = False, self._look_up
        try:
            yield
        finally:
            del self.embedding.forward

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
