"""Record what the routers of a mixture-of-experts model decide, on any MoE causal LM of transformers.

    with record_routing(model, pad_token_id=tokenizer.pad_token_id) as recording:
        model(**batch)                          # or model.generate(...), or a whole evaluation
    recording.layers["model.layers.1.mlp"].indices      # [T, k], real (non-padding) tokens only
    recording.summary()                                 # load, MaxVio, entropies, ... per layer, plain JSON

Why not `output_router_logits`: logits are not decisions. The selection-only expert bias of DeepSeek-V3,
group limits and hash tables all come after them, so top-k of the logits is wrong for half of the families.
Decisions are read where they are used (`distill.routers`), logits where they are made.

The score function (softmax, sigmoid, ...) is not looked up either: it is the one whose scores reproduce the
ratios of the weights that were used. If none does, or more than one, reading scores raises `RunError`.

Shapes: B batch, T tokens, E experts (all that the router chooses among), k experts per token.
"""

import inspect
import math
from contextlib import contextmanager

import torch
from torch import nn

from distill import routing_metrics as metrics
from distill.errors import RunError, UserError
from distill.routers import Router, bare, bare_model, find_routers, listen

__all__ = ["LayerRecord", "Recording", "Router", "find_routers", "record_routing"]

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "probabilities": lambda logits: logits.clamp(min=0),  # gemma4's router returns probabilities, not logits
}
_FLUSH = 4096  # tokens held per layer before they are digested: hooks stay cheap, "counts" memory bounded


class LayerRecord:
    """The decisions of one router. Reading a property digests what the hooks have left so far.

    `indices` [T, k], `weights` [T, k] (as applied to the expert outputs) and `scores` [T, E] (after the score
    function, before any bias, mask, renormalisation or scale) exist with keep="decisions" only; `counts` [E]
    and `tokens` always. Everything is on the CPU, scores and weights in fp32.
    """

    def __init__(self, router: Router, keep: str):
        self.router, self.keep, self.calls = router, keep, 0
        self._tokens, self._counts = 0, torch.zeros(router.num_experts, dtype=torch.int64)
        self._pending: list[tuple] = []
        self._held = 0
        self._kept: list[tuple] = []
        # Per candidate score function: what its verdict needs (n, sum, sum of squares of log(weight / score))
        # and the two sums, of entropy and confidence, that count once it has been found to be the one.
        self._fit = {rule: torch.zeros(5, dtype=torch.float64) for rule in SCORES}
        self._tolerance = 1e-3  # on the spread of log(weight / score)

    def add(self, logits, weights, indices, valid) -> None:
        """One call of the layer: [N, E], [N, k], [N, k] and, unless every token is real, a mask [N]."""
        name, (experts, k) = self.router.name, (self.router.num_experts, self.router.top_k)
        if indices.shape != weights.shape or indices.shape[1] != k or logits.shape != (len(indices), experts):
            raise RunError(
                f"{name}: expected logits [N, {experts}] and {k} choices per token, the forward pass made "
                f"logits {list(logits.shape)}, indices {list(indices.shape)}, weights {list(weights.shape)}"
            )
        if valid is not None and len(valid) != len(indices):
            raise RunError(
                f"{name}: routed {len(indices)} tokens of a batch with {len(valid)}; cannot tell padding"
            )
        self.calls += 1
        # Clones: a CUDA graph may write its next step into the same memory.
        self._pending.append((logits.detach().clone(), weights.detach().clone(), indices.clone(), valid))
        self._held += len(indices)
        if self._held >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Digest the calls held back so far."""
        if not self._pending:
            return
        columns = []
        for *call, valid in self._pending:
            columns.append([c if valid is None else c[valid.to(c.device)] for c in call])
            if max(torch.finfo(c.dtype).eps for c in call[:2]) > 1e-4:
                self._tolerance = 2e-2  # half precision rounds weights to two or three digits
        logits, weights, indices = (torch.cat(column) for column in zip(*columns))
        self._pending, self._held = [], 0
        if logits.device.type == "mps":  # no float64 there
            logits, weights, indices = logits.cpu(), weights.cpu(), indices.cpu()
        logits, weights, indices = logits.float(), weights.float(), indices.long()
        self._tokens += len(indices)
        self._counts += torch.bincount(indices.flatten(), minlength=self.router.num_experts).cpu()
        evidence = _evidence(self.router, list(self._fit), logits.double(), weights.double(), indices)
        self._fit = {rule: sums + evidence[rule].cpu() for rule, sums in self._fit.items()}
        spread = self._spread()
        # Candidates beyond this would cost time to the end and cannot win.
        limit = max(3 * min(spread.values()), self._tolerance)
        self._fit = {rule: sums for rule, sums in self._fit.items() if spread[rule] <= limit}
        if self.keep == "decisions":
            self._kept.append((logits.cpu(), weights.cpu(), indices.cpu()))

    @property
    def tokens(self) -> int:
        self.flush()
        return self._tokens

    @property
    def counts(self) -> torch.Tensor:
        self.flush()
        return self._counts

    @property
    def indices(self) -> torch.Tensor:
        return self._decisions(2)

    @property
    def weights(self) -> torch.Tensor:
        return self._decisions(1)

    @property
    def scores(self) -> torch.Tensor:
        return SCORES[self.score_function](self._decisions(0))

    def _decisions(self, column: int) -> torch.Tensor:
        if self.keep != "decisions":
            raise UserError('single decisions were not kept: use record_routing(model, keep="decisions")')
        self.flush()
        width = (self.router.num_experts, self.router.top_k, self.router.top_k)[column]
        empty = torch.zeros(0, width, dtype=torch.int64 if column == 2 else torch.float32)
        return torch.cat([part[column] for part in self._kept] or [empty])

    @property
    def score_function(self) -> str:
        """Name of the function in SCORES whose scores reproduce the ratios of the weights that were used.

        Raises RunError if none does, or more than one (equal logits; one expert per token with weight 1).
        """
        self.flush()
        spread = self._spread()
        best, *others = sorted(spread, key=spread.get)
        rival = spread[others[0]] if others else math.inf
        if spread[best] > self._tolerance or rival < max(3 * spread[best], 1e-5):
            found = ", ".join(f"{rule} {value:.1e}" for rule, value in spread.items())
            raise RunError(
                f"{self.router.name}: cannot tell the score function of {type(self.router.block).__name__} "
                f"from {self._tokens} tokens (spread of log(weight / score): {found}); the counts hold"
            )
        return best

    def _spread(self) -> dict[str, float]:
        """Standard deviation of log(weight / score) under each candidate; infinite where there is none."""
        spread = {}
        for rule, (n, total, squares, *_) in self._fit.items():
            variance = float(squares / n - (total / n) ** 2) if n else math.nan
            spread[rule] = math.sqrt(max(variance, 0)) if math.isfinite(variance) else math.inf
        return spread

    def summary(self) -> dict:
        """Metrics of `distill.routing_metrics` as plain numbers; raises RunError without tokens or scores."""
        if not self.tokens:
            raise RunError(
                f"{self.router.name}: no token was recorded; run a forward pass inside record_routing, and "
                "compile a model after entering it, not before"
            )
        counts, experts, k = self.counts, self.router.num_experts, self.router.top_k
        rule = self.score_function
        entropy, confidence = (self._fit[rule][3:] / self._tokens).tolist()
        return {
            "tokens": self._tokens,
            "experts": experts,
            "experts_per_token": k,
            "null_experts": self.router.null_experts,
            "score_function": rule,
            "load": metrics.load_fraction(counts).tolist(),
            "max_violation": metrics.max_violation(counts),
            "max_violation_noise_floor": metrics.max_violation_noise_floor(self._tokens, experts, k),
            "load_entropy": metrics.load_entropy(counts),
            "load_entropy_normalised": metrics.load_entropy(counts, normalised=True),
            "effective_experts": metrics.effective_experts(counts),
            "load_cv": metrics.coefficient_of_variation(counts),
            "dead_experts": metrics.dead_experts(counts),
            "router_entropy": entropy,
            "confidence": confidence,
        }


class Recording:
    """`layers[name]` is the LayerRecord of each router; complete once the context has been left."""

    def __init__(self, routers: list[Router], keep: str):
        self.layers = {router.name: LayerRecord(router, keep) for router in routers}

    def summary(self) -> dict:
        """{"layers": {name: metrics}}, plain JSON. Over several ranks, sum `counts` first."""
        return {"layers": {name: record.summary() for name, record in self.layers.items()}}


def _evidence(router: Router, rules: list[str], logits, weights, indices) -> dict[str, torch.Tensor]:
    """Per candidate: n, sum and sum of squares of log(weight / score), sum of entropies, of confidences."""
    weights = _without_family_factor(router, logits, weights, indices)
    # Below 1e-4 of the largest, fp16 has no digits left; zaya gives a skipped token the weight 0.
    used = weights > 1e-4 * weights.amax(-1, keepdim=True)
    if router.top_k > 1:
        used &= (used.sum(-1) > 1)[:, None]
    sums = {}
    for rule in rules:
        scores = SCORES[rule](logits).clamp(min=1e-300)
        ratio = torch.where(used, weights.clamp(min=1e-300).log() - scores.gather(-1, indices).log(), 0.0)
        if router.top_k > 1:  # weights may be renormalised within a token, so only their ratios there count
            ratio -= ratio.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp(min=1)
        ratio = ratio[used]
        entropy, confidence = metrics.router_entropy(scores).sum(), metrics.confidence(scores, indices).sum()
        sums[rule] = torch.stack([used.sum(), ratio.sum(), ratio.square().sum(), entropy, confidence])
    return sums


def _without_family_factor(router: Router, logits, weights, indices) -> torch.Tensor:
    """The weights without what two families multiply in that is not a function of the chosen score alone."""
    inner = None if router.router is None else bare(router.router)
    if hasattr(inner, "per_expert_scale"):  # gemma4
        return weights / inner.per_expert_scale.detach().double()[indices]
    if _is_sparsemixer(router):  # each choice is a softmax over its near rivals among those left
        factor, left = [], logits
        for choice in indices.T:
            top = left.amax(-1, keepdim=True)
            near = (top - logits) / logits.abs().clamp(min=top) <= 2 * inner.router_jitter_noise
            factor.append(left.masked_fill(~near, -math.inf).logsumexp(-1) - logits.logsumexp(-1))
            left = left.scatter(-1, choice[:, None], -math.inf)
        return weights * torch.stack(factor, -1).exp()
    return weights


def _is_sparsemixer(router: Router) -> bool:
    """phimoe (arXiv 2409.12136)."""
    return router.router is not None and hasattr(bare(router.router), "router_jitter_noise")


# ---------------------------------------------------------------------- the recorder


class _Pass:
    """The forward pass in progress and which of its tokens are real.

    Calls outside of one are not recorded: gradient checkpointing runs every block again during backward.
    """

    def __init__(self, backbone: nn.Module, pad_token_id: int | None):
        self.backbone, self.pad_token_id = backbone, pad_token_id
        self.running, self.count, self.valid = False, 0, None

    def begin(self, _module, args, kwargs) -> None:
        named = dict(zip(inspect.signature(self.backbone.forward).parameters, args)) | kwargs
        self.valid = _real_tokens(
            named.get("input_ids"), named.get("inputs_embeds"), named.get("attention_mask"), self.pad_token_id
        )
        self.running, self.count = True, self.count + 1

    def end(self, *_) -> None:
        self.running, self.valid = False, None


def _real_tokens(ids, embeds, mask, pad_token_id: int | None) -> torch.Tensor | None:
    """Mask [B*T] of the tokens of this call that are not padding, None if all are real.

    The mask of a cached step covers the whole past, its last columns are the tokens of this call.
    """
    tokens = ids.shape[1] if ids is not None else embeds.shape[1]
    valid = None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        valid = mask[:, -tokens:].bool()
    elif mask is not None and pad_token_id is None:
        raise RunError(
            "the attention mask does not arrive as [batch, tokens] (static cache?), so padding cannot be "
            "told: pass pad_token_id to record_routing, or -1 if nothing is padded"
        )
    if pad_token_id is not None and ids is not None:
        real = ids != pad_token_id
        valid = real if valid is None else valid.to(real.device) & real
    return None if valid is None else valid.reshape(-1)


@contextmanager
def record_routing(model: nn.Module, *, keep: str = "decisions", pad_token_id: int | None = None):
    """Record every routing decision of the forward passes made inside the context; yields a Recording.

    keep: "decisions" keeps indices, weights and scores of each token; "counts" keeps sums, in bounded memory.
    pad_token_id: also drop tokens with this id. `generate` goes on feeding pads to finished rows with mask 1,
      and only this tells them; where pad and end-of-text are one token, real end-of-text tokens go as well.
    Padding marked by a [B, T] attention mask is dropped in any case. The last new token is never routed.

    The model is not changed, and the hooks go on exit. A compiled model is compiled anew (`fullgraph=True`
    refuses the hooks), so a training loop enters once, around all steps, and reads differences of `counts`.
    Raises UserError for a dense model, or phimoe in train mode (it samples experts); RunError if forward
    passes ran and a router was never heard.
    """
    routers = find_routers(model)
    if not routers:
        raise UserError(
            "a dense model was asked for its routing: it has no experts; evaluate it without moe metrics"
        )
    if keep not in ("decisions", "counts"):
        raise UserError(f'keep is "decisions" or "counts", not {keep!r}')
    if any(_is_sparsemixer(router) and router.block.training for router in routers):
        raise UserError("this model samples its experts in train mode: call model.eval() before recording")
    state, recording = _Pass(_backbone(model, routers), pad_token_id), Recording(routers, keep)

    def emit_to(record: LayerRecord):
        return lambda *decisions: record.add(*decisions, state.valid)

    if _is_compiled(model):  # hooks put on what is already compiled are ignored without a word
        torch._dynamo.reset()
    handles = []
    try:
        begin, end = torch.compiler.disable(state.begin), torch.compiler.disable(state.end)
        handles.append(state.backbone.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(state.backbone.register_forward_hook(end, always_call=True))
        for router in routers:
            handles += listen(router, lambda: state.running, emit_to(recording.layers[router.name]))
        yield recording
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, record in recording.layers.items() if not record.calls]
    if state.count and silent:
        raise RunError(f"{state.count} forward passes ran but no routing was seen at {', '.join(silent)}")
    for record in recording.layers.values():
        record.flush()


def _backbone(model: nn.Module, routers: list[Router]) -> nn.Module:
    """What every forward pass goes through, head or no head: the child of the LM that holds the blocks."""
    base = bare_model(model)
    child = base.get_submodule(routers[0].name.split(".")[0])
    return base if isinstance(child, nn.ModuleList) else child


def _is_compiled(model: nn.Module) -> bool:
    """Any of it under torch.compile, `module.compile()`, or the compiled decoding of `generate`."""
    return any(
        hasattr(m, "_orig_mod")
        or getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m, "_compiled_call")
        for m in model.modules()
    )
