"""Expert balancing without an auxiliary loss: the selection bias of DeepSeek-V3, updated by hand.

transformers keeps the bias (`e_score_correction_bias`) as a buffer and never changes it. DeepSeek-V3
(arXiv 2412.19437, section 2.1.2; Wang et al. 2024, arXiv 2408.15664) moves it after every step by a fixed
u: up for experts below the mean load, down for those above, counted over the whole global batch. The
bias only selects experts; the mixing weights do not see it, so no gradient is disturbed.

    balancer = ExpertBiasBalancer(model)      # hooks count tokens per expert
    balancer.mask = attention_mask            # before each forward: padding is not load
    balancer.update(u=0.001, reduce=accelerator.reduce)
"""

from collections.abc import Callable

import torch
from torch import nn

from distill.errors import UserError
from distill.models.hooks import Hooks
from distill.models.routers import find_routers


class ExpertBiasBalancer:
    """Counts assignments per expert during forwards, then nudges each router's bias once per step."""

    def __init__(self, model: nn.Module):
        """Raises UserError for a model none of whose routers has a selection bias."""
        self.routers = [r for r in find_routers(model) if r.bias is not None and r.experts is not None]
        if not self.routers:
            raise UserError(
                "train.expert_bias_step needs a MoE model whose routers have a selection bias; set it to 0"
            )
        self.mask: torch.Tensor | None = None
        self.counts = [
            torch.zeros(r.num_experts, dtype=torch.int64, device=r.bias.device) for r in self.routers
        ]
        self.hooks = Hooks()
        for layer, router in enumerate(self.routers):
            self.hooks.before(router.experts, self._counter(layer))

    def _counter(self, layer: int) -> Callable:
        def count(module, args):
            if not module.training:  # a look at held-out rows: not this step's tokens, nor its mask
                return
            # Experts are called with (hidden [N, d], indices [N, k], weights [N, k]), N = B * T flattened.
            # Recomputation under gradient checkpointing counts every expert twice: no sign changes.
            indices = args[1].long()
            real = torch.ones_like(indices[:, 0]) if self.mask is None else self.mask.reshape(-1).long()
            # Not `bincount` of the real ones: the host would wait for how many they are.
            self.counts[layer].scatter_add_(0, indices.reshape(-1), real.repeat_interleave(indices.shape[1]))

        return count

    def forget(self) -> None:
        """Drop what was counted since the last update: the step starts over."""
        for counts in self.counts:
            counts.zero_()

    @torch.no_grad()
    def update(self, u: float, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> torch.Tensor:
        """bias += u * sign(mean load - load) per layer, loads summed over processes by `reduce`.

        Returns the step's largest MaxVio, (max load - mean) / mean (arXiv 2408.15664 eq. 4), as a number that is still
        on the device. u = 0 only counts.
        """
        found = []
        for layer, router in enumerate(self.routers):
            load = reduce(self.counts[layer]).double()
            mean = load.mean()
            router.bias.add_((u * torch.sign(mean - load)).to(router.bias.dtype))
            found.append((load.max() - mean) / mean.clamp(min=1e-9))
            self.counts[layer].zero_()
        return torch.stack(found).max()
