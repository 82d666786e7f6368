"""Record what the routers of a mixture-of-experts model decide, on any MoE causal LM of transformers.

    with record_routing(model, pad_token_id=tokenizer.pad_token_id) as recording:
        model(**batch)                          # or model.generate(...), or a whole evaluation
    recording.layers["model.layers.1.mlp"].indices      # [T, k], real (non-padding) tokens only
    recording.summary()                                 # load, MaxVio, entropies, ... per layer, plain JSON

Why not `output_router_logits`: logits are not decisions. The selection-only expert bias of DeepSeek-V3,
group limits and hash tables all come after them, so top-k of the logits is wrong for half of the families.
Decisions are read where they are used (`distill.models.routers`), logits where they are made. What is summed while
tokens pass is in `distill.moe.totals` and `distill.moe.totals`; whose token is whose, in
`distill.evaluation.routing`. What the hooks cost: `python recipes/benchmarks/routing_overhead.py`.

Over several processes each records its own tokens; `recording.reduce(sum_over_processes)` before `summary()`.
A model that goes through the same layers several times (inkling2_loop) has a record for each time: "NAME pass 2".

Shapes: B batch, T tokens, E experts (all that the router chooses among), k experts per token.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from distill.errors import RunError, UserError
from distill.models.hooks import Hooks
from distill.models.routers import Router, bare_model, find_routers, listen
from distill.moe.metrics import whole_model
from distill.moe.totals import SCORES, LoadTotals, ScoreTotals, is_sparsemixer

__all__ = ["Decisions", "LayerRecord", "Recording", "Router", "find_routers", "record_routing"]

_FLUSH = 4096  # tokens held per layer before they are digested: hooks stay cheap, "counts" memory bounded


class Decisions(NamedTuple):
    """Of T tokens at one layer: weights [T, k] as applied to the expert outputs (fp32), indices [T, k] (int64)."""

    weights: torch.Tensor
    indices: torch.Tensor


class LayerRecord:
    """The decisions of one router. Reading a property digests what the hooks have left so far.

    `indices` [T, k], `weights` [T, k] (as applied to the expert outputs) and `scores` [T, E] (after the score
    function, before any bias, mask, renormalisation or scale) exist with keep="decisions" only; `counts` [E]
    and `tokens` always. Everything is on the CPU, scores and weights in fp32.
    """

    def __init__(self, router: Router, keep: str):
        self.router, self.keep, self.calls = router, keep, 0
        self._load = LoadTotals(router.num_experts, router.top_k)
        self._scores = ScoreTotals(router)
        self._pending: list[tuple] = []
        self._held = 0
        self._kept: list[tuple] = []

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
        *columns, masks = zip(*self._pending)
        logits, weights, indices = (torch.cat(column) for column in columns)
        sizes = [len(call) for call in columns[0]]
        self._pending, self._held = [], 0
        if any(mask is not None for mask in masks):
            home = logits.device
            real = [
                torch.ones(n, dtype=torch.bool, device=home) if mask is None else mask.to(home)
                for n, mask in zip(sizes, masks)
            ]
            sizes = torch.stack([mask.sum() for mask in real]).tolist()
            places = torch.cat(real).nonzero()[:, 0]  # once a digest: every such look makes the host wait
            logits, weights, indices = (c.index_select(0, places) for c in (logits, weights, indices))
        if logits.device.type == "mps":  # no float64 there
            logits, weights, indices = logits.cpu(), weights.cpu(), indices.cpu()
        self._load.add(indices, sizes)
        self._scores.add(logits, weights, indices)
        if self.keep == "decisions":
            self._kept.append((logits.float().cpu(), weights.float().cpu(), indices.long().cpu()))

    def take(self) -> Decisions:
        """What was kept since the last call of this, and forget it; totals go on. keep="decisions" only."""
        taken = Decisions(self.weights, self.indices)
        self._kept = []
        return taken

    @property
    def tokens(self) -> int:
        self.flush()
        return self._load.tokens

    @property
    def counts(self) -> torch.Tensor:
        self.flush()
        return self._load.counts

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
        """Name in SCORES of the router's score function. Raises RunError where it cannot be told."""
        self.flush()
        return self._scores.verdict()

    def load_summary(self) -> dict[str, Any]:
        """The part of `summary` that holds whatever the score function is. RunError without tokens."""
        if not self.tokens:
            raise RunError(
                f"{self.router.name}: no token was recorded; run a forward pass inside record_routing, and "
                "compile a model after entering it, not before"
            )
        return {
            "tokens": self.tokens,
            "experts": self.router.num_experts,
            "experts_per_token": self.router.top_k,
            "null_experts": self.router.null_experts,
            **self._load.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """Metrics of `distill.moe.metrics` as plain numbers; raises RunError without tokens or scores."""
        return {**self.load_summary(), "score_function": self.score_function, **self._scores.means()}

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor], rank: int, world: int) -> None:
        """Make the totals those of all processes; single decisions stay this process's own."""
        self.flush()
        self._load.reduce(total, rank, world)
        self._scores.reduce(total, rank, world)


class Recording:
    """`layers[name]` is the LayerRecord of each router; complete once the context has been left."""

    def __init__(self, routers: list[Router], keep: str):
        self.layers = {router.name: LayerRecord(router, keep) for router in routers}
        self._order, self._keep, self._reduced = [router.name for router in routers], keep, False

    def record_of(self, router: Router, visit: int) -> LayerRecord:
        """The record of a router that decides for the `visit`-th time, from 1, in one forward pass."""
        if visit == 1:
            return self.layers[router.name]
        name = f"{router.name} pass {visit}"
        if name not in self.layers:
            self.layers[name] = LayerRecord(replace(router, name=name), self._keep)
            places = {name: place for place, name in enumerate(self._order)}
            found = sorted(self.layers.items(), key=lambda item: places[item[0].split(" pass ")[0]])
            self.layers.clear()
            self.layers.update(found)  # in model order, the passes of one layer together
        return self.layers[name]

    def reduce(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sum counts, pairs and score sums over the processes of torch.distributed, ratios come after.

        total: CPU tensor -> its sum over all processes, of the same shape and dtype (int64 and float64); called
        equally often everywhere. `accelerator.reduce` under gloo; for nccl
        `lambda t: accelerator.reduce(t.to(accelerator.device)).cpu()`. A forward pass of one process stays a
        batch of its own. Once per recording, after the last forward pass: UserError for a second call.
        """
        if self._reduced:
            raise UserError("these counts are already those of all processes: reduce a recording once")
        self._reduced = True
        group = torch.distributed
        alive = group.is_available() and group.is_initialized()
        rank, world = (group.get_rank(), group.get_world_size()) if alive else (0, 1)
        for record in self.layers.values():
            record.reduce(total, rank, world)

    def summary(self) -> dict[str, Any]:
        """{"layers": {name: metrics}, "model": aggregates of `whole_model`}, plain JSON."""
        layers = {name: record.summary() for name, record in self.layers.items()}
        return {"layers": layers, "model": whole_model(layers)}


# ---------------------------------------------------------------------- the recorder


class _Pass:
    """The forward pass in progress and which of its tokens are real.

    Calls outside of one are not recorded: gradient checkpointing runs every block again during backward.
    """

    def __init__(self, backbone: nn.Module, pad_token_id: int | None):
        self.backbone, self.pad_token_id = backbone, pad_token_id
        self.names = list(inspect.signature(backbone.forward).parameters)
        self.running, self.count, self.valid = False, 0, None

    def begin(self, _module, args, kwargs) -> None:
        named = dict(zip(self.names, args)) | kwargs
        self.valid = real_tokens(
            named.get("input_ids"), named.get("inputs_embeds"), named.get("attention_mask"), self.pad_token_id
        )
        self.running, self.count = True, self.count + 1

    def end(self, *_) -> None:
        self.running, self.valid = False, None


def real_tokens(ids, embeds, mask, pad_token_id: int | None) -> torch.Tensor | None:
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
    if any(is_sparsemixer(router) and router.block.training for router in routers):
        raise UserError("this model samples its experts in train mode: call model.eval() before recording")
    state, recording = _Pass(routed_backbone(model, routers), pad_token_id), Recording(routers, keep)

    def emit_to(router: Router):
        seen = [0, 0]  # the forward pass, and the calls of this router in it

        def emit(*decisions) -> None:
            seen[:] = state.count, 1 + (seen[1] if seen[0] == state.count else 0)
            recording.record_of(router, seen[1]).add(*decisions, state.valid)

        return emit

    if is_compiled(model):  # hooks put on what is already compiled are ignored without a word
        torch._dynamo.reset()
    with Hooks() as hooks:
        hooks.before(state.backbone, state.begin, named=True)
        hooks.after(state.backbone, state.end, always=True)
        for router in routers:
            listen(router, hooks, lambda: state.running, emit_to(router))
        yield recording
    silent = [name for name, record in recording.layers.items() if not record.calls]
    if state.count and silent:
        raise RunError(f"{state.count} forward passes ran but no routing was seen at {', '.join(silent)}")
    for record in recording.layers.values():
        record.flush()


def routed_backbone(model: nn.Module, routers: list[Router]) -> nn.Module:
    """What every forward pass goes through, head or no head: the child of the LM that holds the blocks."""
    base = bare_model(model)
    child = base.get_submodule(routers[0].name.split(".")[0])
    return base if isinstance(child, nn.ModuleList) else child


def is_compiled(model: nn.Module) -> bool:
    """Any of it under torch.compile, `module.compile()`, a compiled `forward`, or compiled decoding of `generate`."""
    return any(
        hasattr(m, "_orig_mod")
        or hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")
        or getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m, "_compiled_call")
        for m in model.modules()
    )
