"""Batched decoding: many prompts, one Hugging Face causal LM, no waiting for the slowest row.

Teacher generation, evaluation and on-policy rollouts all sample through `decode`. It needs the plain forward
call only (`input_ids, attention_mask, position_ids, cache, use_cache`), so dense, MoE, MLA,
sliding-window and PEFT models take the same path on CPU and CUDA:

    rows = decode(model, prompts, Sampling(temperature=0.6, top_p=0.95, max_new_tokens=512),
                  eos_ids={2}, pad_id=0, keys=[(seed, i, 0) for i in range(len(prompts))], batch_size=256)

Prompts are sorted by length and decoded left-padded, `batch_size` at a time. Samples of one prompt share its
prefill, and what all prompts of a batch begin with (a system prompt, worked examples) is read once. Finished rows
leave the cache in groups. On an accelerator waiting prompts then take their place (continuous batching: Yu et
al., "Orca", OSDI 2022, section 3); on a CPU the batch shrinks, as old rows would make new ones wide and width is
what costs.

A row's random numbers come from its key and the step alone: batch size, order and neighbours never change
what is drawn. The logits do carry the rounding of the batch they were computed in (1e-5 of their spread in
float32 with or without padding; 0.1 and more in padded bfloat16), so a near-tie can fall the other way. A
tiny MoE is fastest with `model.set_experts_implementation("eager")`, which is the caller's to choose.

Shapes: B rows in the batch, T cached columns (left-padding included), V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from distill.errors import UserError
from distill.models.hooks import Hooks, output_head
from distill.models.load import cache_name
from distill.models.packed import packed_linears

_DROP_AT = 0.25  # finished rows leave once they are this share of the batch
_REFILL = {"cpu": False}  # whether waiting prompts take the places of those rows; elsewhere they do
_WIDE = 4096  # tokens of a vocabulary beyond which those that no filter keeps are left out first, on a CPU
_LEAST = (
    -80.0
)  # of a score below the best: e^-80 is never drawn, and exp takes 30 times as long where it underflows
_SHARED = 128  # prompt tokens that reading a common beginning once must save; below, the call costs more
PACKED = 8  # tokens of an answer from which packing the weights for it pays (distill/models/packed.py)
_BLOCK = 64  # columns by which a cache buffer grows: copies are rare, the spare room is small


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Filters act in the order temperature, top-k, top-p, min-p, as in transformers.

    Tokens that tie with the last one kept are kept. Raises UserError naming every value out of bounds.
    """

    temperature: float = 0.0  # 0 is greedy: the filters change nothing
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # least share of the likeliest token's probability (arXiv 2407.01082, section 3)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # strings need a tokenizer: `decode` takes them as `stopping`

    def __post_init__(self):
        checks = {
            f"temperature={self.temperature} must be 0 (greedy) or more": 0 <= self.temperature < math.inf,
            f"top_p={self.top_p} must be above 0 and at most 1 (1 is off)": 0 < self.top_p <= 1,
            f"top_k={self.top_k} must be 0 (off) or more": self.top_k >= 0,
            f"min_p={self.min_p} must be at least 0 (off) and below 1": 0 <= self.min_p < 1,
            f"max_new_tokens={self.max_new_tokens} must be 1 or more": self.max_new_tokens >= 1,
        }
        if problems := [text for text, holds in checks.items() if not holds]:
            raise UserError(*problems)


@dataclass
class Completion:
    """What one prompt produced. Tokens made before an error are kept."""

    ids: list[int]  # the end-of-sequence token included
    finish_reason: str  # "stop" (an end-of-sequence token), "length" (max_new_tokens) or "error"
    logprobs: list[float]  # natural log, float32, under the model itself: temperature 1, no filter
    error: str | None = None


def decode(
    model,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    keys: list[tuple[Hashable, ...]] | None = None,
    batch_size: int = 64,
    on_finish: Callable[[int, Completion], None] | None = None,
    vocab_limit: int | None = None,
    stopping: Callable[..., torch.Tensor] | None = None,
) -> list[Completion]:
    """Complete every prompt (a list of token ids); the result is in the order of `prompts`.

    keys: a tuple of plain ints and strings per prompt, such as (seed, prompt_id, sample_idx); needed when
        `sampling.temperature` is above 0. Rows with equal keys draw equal random numbers.
    on_finish: called as on_finish(index_of_prompt, completion) when a row leaves the batch, in any order.
    vocab_limit: ids at or above it are never produced (embeddings are often padded beyond the tokenizer).
    stopping: transformers' StopStringCriteria; the token that completes a stop string is the row's last.

    A prompt that is asked several times, and what all prompts of a batch begin with, is read once: routing
    statistics count it so. A row ends with `error` set when its logits are not finite (NaN, +inf, or -inf
    everywhere) or its prompt is empty or does not fit the model's context; the others go on. Every module keeps
    its train or eval mode.
    Raises UserError for missing or miscounted keys, a batch size below 1, a model without a key-value cache.
    """
    problems = []
    if sampling.temperature > 0 and keys is None:
        problems.append("decode: temperature > 0 needs keys, one per prompt: (seed, prompt_id, sample_idx)")
    if keys is not None and len(keys) != len(prompts):
        problems.append(f"decode: {len(keys)} keys for {len(prompts)} prompts; give one key per prompt")
    if batch_size < 1:
        problems.append(f"decode: batch_size={batch_size} must be 1 or more")
    if problems:
        raise UserError(*problems)
    decoder = Decoder(model, prompts, sampling, eos_ids, pad_id, keys, vocab_limit, batch_size, stopping)
    results: list[Completion | None] = [None] * len(prompts)
    training = [module for module in model.modules() if module.training]
    model.eval()
    packed = packed_linears(model) if sampling.max_new_tokens >= PACKED else nullcontext()
    try:
        with packed:
            for row, completion in decoder.completions():
                results[row] = completion
                if on_finish is not None:
                    on_finish(row, completion)
    finally:
        for module in training:
            module.training = True
    return results


def copies_rows(model) -> bool:
    """Whether rows of the model's cache can be padded, dropped, joined and copied: attention and nothing else.

    Recurrent states, sparse-attention indexers and the like keep transformers' layers and run in whole batches of one
    prompt length: slower, and right even where a model's padding is not (DeepSeek-V3.2 in transformers 5.23).
    """
    if cache_name(model) is None:
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def row_seed(key: tuple[Hashable, ...]) -> int:
    """A signed 64-bit seed from a key, the same in every process (blake2b of its repr)."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)


def uniforms(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [B]: output `steps` [B] of SplitMix64 started at `seeds` [B].

    Stateless, so a row owes nothing to the rows beside it (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014). The published constants, as signed integers whose products wrap.
    """
    z = seeds + (steps + 1) * -7046029254386353131
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -4658895280553007687
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -7723592293110705685
    z = z ^ ((z >> 31) & (2**33 - 1))
    return ((z >> 12) & (2**52 - 1)).double() * 2.0**-52


def choose(scores: torch.Tensor, sampling: Sampling, u: torch.Tensor | None) -> torch.Tensor:
    """Token ids [B] from float32 scores [B, V]: argmax, or the filtered distribution's inverse CDF at u [B]."""
    if sampling.temperature == 0:
        return scores.argmax(-1)
    scores = (scores - scores.amax(-1, keepdim=True)).div_(sampling.temperature).clamp_(min=_LEAST)
    below = ids = None
    if scores.is_cpu and scores.shape[1] > _WIDE:
        ids, scores, below = _candidates(scores, sampling)
    cdf = (scores.exp() * (scores >= _cutoff(scores, sampling, below))).cumsum(-1)
    total = cdf[:, -1:]
    # Below the total after rounding to float32, too. With right=True the first index whose CDF exceeds the
    # target has a positive weight, so a filtered token is never drawn.
    target = torch.minimum((u.unsqueeze(1) * total).float(), torch.nextafter(total, torch.zeros_like(total)))
    # Only a row of NaN runs past the end; the caller reports it as an error.
    place = torch.searchsorted(cdf, target, right=True).clamp(max=scores.shape[1] - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _candidates(
    scores: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(ids [B, M], their scores [B, M], mass [B, 1] of the others): the tokens that the filters may keep, by id.

    Rows of `scores` [B, V] have their maximum at 0. Tokens below (1 - top_p) / V have less than 1 - top_p of the
    mass together, so top-p keeps none of them, and only the few hundred others are sorted: 4 ms instead of 60 for
    32 x 49,152. Sums go over the same numbers in the same order, so the same token is drawn. None for ids and mass,
    and all scores, where no filter is on.
    """
    rows, size = scores.shape
    below = None
    if 0 < sampling.top_k < size:
        floor = scores.topk(sampling.top_k).values[:, -1:]
    elif sampling.top_p < 1:
        floor = scores.new_full((rows, 1), math.log((1 - sampling.top_p) / size))
    elif sampling.min_p > 0:
        floor = scores.new_full((rows, 1), math.log(sampling.min_p))
    else:
        return None, scores, None
    kept = scores >= floor
    row, column = np.divmod(np.flatnonzero(kept.numpy()), size)  # torch's nonzero takes three times as long
    counts = np.bincount(row, minlength=rows)
    places = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.zeros((rows, max(1, counts.max())), dtype=np.int64)
    ids[row, places] = column
    found = scores.gather(1, ids := torch.from_numpy(ids))
    found[torch.arange(found.shape[1]) >= torch.from_numpy(counts).unsqueeze(1)] = -math.inf
    if sampling.top_p < 1 and not 0 < sampling.top_k < size:
        below = scores.exp().masked_fill_(kept, 0).sum(-1, keepdim=True)
    return ids, found, below


def _cutoff(scores: torch.Tensor, sampling: Sampling, below: torch.Tensor | None = None) -> torch.Tensor:
    """The score [B, 1] below which a token is filtered out; rows of scores [B, V] have their maximum at 0.

    below: mass [B, 1] of tokens that are not among them.
    """
    size = scores.shape[1]
    k = min(sampling.top_k or size, size)
    cutoff = scores.new_full((len(scores), 1), -math.inf)
    if k < size or sampling.top_p < 1:
        # numpy's vectorised sort took 0.12 ms for 256 x 512 and 9 ms for 16 x 151,936, torch's 4.2 and 160.
        ordered = torch.from_numpy(np.sort(scores.numpy())) if scores.is_cpu else scores.sort(-1).values
        cutoff = ordered[:, size - k, None]
        if sampling.top_p < 1:
            mass = (ordered.exp() * (ordered >= cutoff)).cumsum(-1)
            mass = mass if below is None else mass + below
            outside = (mass <= (1 - sampling.top_p) * mass[:, -1:]).sum(-1, keepdim=True)
            cutoff = ordered.gather(1, outside.clamp(max=size - 1))
    least = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    return cutoff.clamp(min=max(least, _LEAST + 0.001))  # what was clamped to _LEAST may be forbidden: -inf


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, T, dim] of one layer, appended in place to buffers that grow by blocks.

    DynamicLayer concatenates, which copies the whole cache at every step (10 to 18 % of a tiny dense model's
    speed). Sliding-window and chunked layers use this class too: they then keep every column and the mask
    hides what is out of reach, which costs memory but lets rows of different ages share a batch.
    """

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.is_initialized = True
        self.keys, self.values = self.buffers = [keys, values]

    def cut(self, columns: int) -> None:
        """Keep the first `columns` alone."""
        if self.is_initialized:
            self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.buffers[0].shape[2] < end:
            room = end - start + _BLOCK
            self.buffers = [torch.nn.functional.pad(old, (0, 0, 0, room)) for old in (self.keys, self.values)]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        if self.keys.shape[1] == 1:
            # MLA's latents go through a linear layer, which runs at a third of its speed on a strided view.
            return self.keys.contiguous(), self.values.contiguous()
        return self.keys, self.values


def _align(sources: list[torch.Tensor], picks: list[torch.Tensor], width: int) -> torch.Tensor:
    """Rows `picks[i]` of every `sources[i]` [B, heads, T, dim], right-aligned in `width` columns.

    Padding on the left is cut or filled with zeros, which stay finite under a mask.
    """
    _, heads, _, dim = sources[0].shape
    out = sources[0].new_zeros(sum(map(len, picks)), heads, width, dim)
    for source, pick, rows in zip(sources, picks, out.split([len(pick) for pick in picks])):
        columns = min(width, source.shape[2])
        rows[:, :, -columns:] = source[:, :, -columns:].index_select(0, pick)
    return out


@dataclass
class _Batch:
    """The rows being decoded. The cache ends in the prompt + made - 1 tokens that a live row has been fed."""

    rows: list[int]  # index of each row's prompt
    cache: DynamicCache
    seeds: torch.Tensor  # [B]
    prompt: torch.Tensor  # [B] prompt tokens
    made: torch.Tensor  # [B] produced tokens
    done: torch.Tensor  # [B]
    stopped: torch.Tensor  # [B] done by an end token or a stop string
    ids: torch.Tensor  # [B, max_new_tokens + 1]; finished rows write into the spare last column
    logprobs: torch.Tensor  # [B, max_new_tokens + 1]


class Decoder:
    """The operations on a batch: prefill, step, and the exchange of finished rows for waiting ones."""

    def __init__(
        self,
        model,
        prompts,
        sampling,
        eos_ids,
        pad_id,
        keys=None,
        vocab_limit=None,
        batch_size=1,
        stopping=None,
    ):
        self.model, self.prompts, self.sampling, self.keys = model, prompts, sampling, keys
        self.pad_id, self.vocab_limit, self.stopping = pad_id, vocab_limit, stopping
        self.batch_size, self.device = batch_size, model.get_input_embeddings().weight.device
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.accepted = inspect.signature(inner.forward).parameters
        self.cache_name = cache_name(model)
        self.config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=self.config).layers
        recurrent = bool(layers) and not any(hasattr(layer, "get_seq_length") for layer in layers)
        if self.cache_name is None or recurrent:
            raise UserError(
                f"{type(inner).__name__} keeps no keys and values of attention; decode needs that cache"
            )
        self.elastic = copies_rows(model)
        self.refill = _REFILL.get(self.device.type, True)

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """(prompt index, completion) of every prompt, as rows end."""
        limit, context = self.sampling.max_new_tokens, getattr(self.config, "max_position_embeddings", None)
        waiting = []
        for row, prompt in enumerate(self.prompts):
            if not prompt:
                yield row, Completion([], "error", [], "empty prompt: there is no token to continue from")
            elif context is not None and len(prompt) + limit > context:
                error = f"prompt of {len(prompt)} tokens + max_new_tokens {limit} exceeds the model's context"
                yield row, Completion([], "error", [], f"{error} of {context} (max_position_embeddings)")
            else:
                waiting.append(row)
        # Longest first: neighbours pad each other least, and a batch too large for memory fails at once. Equal
        # prompts stand together: they are read once.
        waiting.sort(key=lambda row: (-len(self.prompts[row]), tuple(self.prompts[row])))
        batch = self.admit(waiting, self.batch_size)
        while batch:
            if self.is_due(batch):
                yield from self.finished(batch)
                batch = self.regroup(batch, waiting)
            else:
                self.step(batch)

    def is_due(self, batch: _Batch) -> bool:
        """Whether enough rows have finished to drop them and let others in."""
        done, size = int(batch.done.sum()), len(batch.rows)
        return done == size or (self.elastic and done >= _DROP_AT * size)

    def finished(self, batch: _Batch) -> Iterator[tuple[int, Completion]]:
        slots = batch.done.nonzero().squeeze(1)
        fields = (getattr(batch, name)[slots].tolist() for name in ("ids", "logprobs", "made", "stopped"))
        for slot, ids, logprobs, made, stopped in zip(slots.tolist(), *fields):
            completion = Completion(ids[:made], "stop" if stopped else "length", logprobs[:made])
            if not stopped and made < self.sampling.max_new_tokens:
                completion.finish_reason, completion.error = "error", "non-finite logits"
            yield batch.rows[slot], completion

    @torch.inference_mode()
    def step(self, batch: _Batch) -> None:
        """Feed every row's newest token and choose the next; a finished row is fed its last one again."""
        newest = batch.ids.gather(1, (batch.made - 1).clamp(min=0).unsqueeze(1))
        fed = (batch.prompt + batch.made).unsqueeze(1)
        width = batch.cache.get_seq_length() + 1
        mask = torch.arange(width, device=self.device) >= width - fed
        # What a finished row is fed is padding to whoever reads the mask: routing statistics do.
        mask[:, -1] &= ~batch.done
        self._choose(batch, self.forward(newest, mask, fed - 1, batch.cache))

    def forward(self, ids, mask, positions, cache, keep: int = 1) -> torch.Tensor:
        """Logits [B, V] of the last position that the head sees; with `keep` 0 it is given all of them."""
        optional = {"position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in optional.items() if name in self.accepted}
        given |= {"attention_mask": mask.long(), self.cache_name: cache, "use_cache": True}
        return self.model(input_ids=ids, **given).logits[:, -1]

    def read(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, torch.Tensor]:
        """A cache that ends in these prompts, and the logits [D, V] behind each; their beginning is read once."""
        cache = DynamicCache(config=self.config)
        if self.elastic:
            cache.layers = [GrowingLayer() for _ in cache.layers]
        lengths, width = torch.tensor(list(map(len, prompts)), device=self.device), max(map(len, prompts))
        column = torch.arange(width, device=self.device)
        if not (shared := self._shared(prompts)):
            padded = [(self.pad_id,) * (width - len(prompt)) + prompt for prompt in prompts]
            places = column - (width - lengths).unsqueeze(1)
            ids = torch.tensor(padded, device=self.device)
            return cache, self.forward(ids, places >= 0, places.clamp(min=0), cache)
        head = torch.tensor([prompts[0][:shared]], device=self.device)
        self.forward(head, torch.ones_like(head), column[None, :shared], cache)
        for layer in cache.layers:
            layer.hold(*(states.expand(len(prompts), -1, -1, -1) for states in (layer.keys, layer.values)))
        # What follows stands right behind it and padding at the end: windows count columns, and none is between.
        padded = [prompt[shared:] + (self.pad_id,) * (width - len(prompt)) for prompt in prompts]
        ids, rows = torch.tensor(padded, device=self.device), torch.arange(len(prompts), device=self.device)
        ends = lengths - shared - 1
        with Hooks() as hooks:
            hooks.before(
                output_head(self.model), lambda _head, args: (args[0][rows, ends].unsqueeze(1), *args[1:])
            )
            logits = self.forward(
                ids, column < lengths.unsqueeze(1), column[shared:].expand(len(prompts), -1), cache, keep=0
            )
        places = (column - (width - lengths).unsqueeze(1)).clamp(
            min=0
        )  # padding goes to the left, as elsewhere
        for layer in cache.layers:
            both = (layer.keys, layer.values)
            layer.hold(*(s[rows[:, None], :, places].transpose(1, 2).contiguous() for s in both))
        return cache, logits

    def _shared(self, prompts: list[tuple[int, ...]]) -> int:
        """With how many tokens all of them begin, where that is worth a forward pass of its own; else 0."""
        if not self.elastic or len(prompts) < 2:
            return 0
        first, last = min(prompts), max(prompts)  # what these two begin with, all between them do
        length = min(map(len, prompts)) - 1
        length = next((i for i in range(length) if first[i] != last[i]), length)
        return length if length * (len(prompts) - 1) >= _SHARED else 0

    def _choose(self, batch: _Batch, logits: torch.Tensor) -> None:
        logits, limit = logits.float(), self.sampling.max_new_tokens
        normaliser = logits.logsumexp(-1)
        u = uniforms(batch.seeds, batch.made) if self.sampling.temperature > 0 else None
        token = choose(logits[:, : self.vocab_limit], self.sampling, u).unsqueeze(1)
        batch.done |= ~normaliser.isfinite()
        column = torch.where(batch.done, limit, batch.made).unsqueeze(1)
        batch.ids.scatter_(1, column, token)
        batch.logprobs.scatter_(1, column, logits.gather(1, token) - normaliser.unsqueeze(1))
        batch.made += ~batch.done
        batch.stopped |= ~batch.done & (torch.isin(token.squeeze(1), self.eos) | self._at_stop_string(batch))
        batch.done |= batch.stopped | (batch.made >= limit)

    def _at_stop_string(self, batch: _Batch) -> torch.Tensor | bool:
        """[B]: the newest token completes a stop string. Only the tokens that can be part of one are looked at."""
        if self.stopping is None:
            return False
        window = torch.arange(-self.stopping.maximum_token_len, 0, device=self.device)
        columns = batch.made.unsqueeze(1) + window
        tail = batch.ids.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, self.pad_id)
        return self.stopping(tail, None)

    @torch.inference_mode()
    def regroup(self, batch: _Batch, waiting: list[int]) -> _Batch | None:
        """The live rows, then waiting ones where there is room, in as few columns as hold them."""
        keep = (~batch.done).nonzero().squeeze(1)
        alone = len(keep) == 0
        new = self.admit(waiting, self.batch_size - len(keep)) if alone or self.refill else None
        if alone:
            return new
        parts = [batch, new] if new else [batch]
        picks = [keep] + [torch.arange(len(part.rows), device=self.device) for part in parts[1:]]
        width = max(int((part.prompt + part.made - 1)[pick].max()) for part, pick in zip(parts, picks))
        for layers in zip(*(part.cache.layers for part in parts)):
            both = [[layer.keys for layer in layers], [layer.values for layer in layers]]
            layers[0].hold(*(_align(states, picks, width) for states in both))
        for name in [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]:
            setattr(batch, name, torch.cat([getattr(part, name)[pick] for part, pick in zip(parts, picks)]))
        batch.rows = [part.rows[slot] for part, pick in zip(parts, picks) for slot in pick.tolist()]
        return batch

    @torch.inference_mode()
    def admit(self, waiting: list[int], room: int) -> _Batch | None:
        """A batch of the first `room` waiting rows with their first token chosen; None if none waits."""
        if not waiting:
            return None
        width = len(self.prompts[waiting[0]])
        rows = [row for row in waiting[:room] if self.elastic or len(self.prompts[row]) == width]
        del waiting[: len(rows)]
        asked = [tuple(self.prompts[row]) for row in rows]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(asked))} if self.elastic else {}
        cache, logits = self.read(list(places) or asked)
        if 0 < len(places) < len(rows):
            owner = torch.tensor([places[prompt] for prompt in asked], device=self.device)
            logits = logits.index_select(0, owner)
            for layer in cache.layers:
                layer.hold(layer.keys.index_select(0, owner), layer.values.index_select(0, owner))
        seeds = [row_seed(self.keys[row]) if self.keys is not None else 0 for row in rows]
        lengths = [len(prompt) for prompt in asked]
        prompt, seeds = (torch.tensor(data, device=self.device) for data in (lengths, seeds))
        produced = prompt.new_zeros(len(rows), self.sampling.max_new_tokens + 1)
        done, made = torch.zeros_like(prompt, dtype=torch.bool), torch.zeros_like(prompt)
        batch = _Batch(rows, cache, seeds, prompt, made, done, done.clone(), produced, produced.float())
        self._choose(batch, logits)
        return batch
