"""The decoder layers of any causal LM: found by structure, compiled, and attending to rows one by one.

    backbone, layers = decoder_layers(model)     # PEFT, DDP and torch.compile are looked through
    compile_layers(student, teacher)

    attend_by_row(model)                       # once, before training; False where the model attends in another way
    with rows_apart(batch.rows): model(...)    # forward and backward, packed rows or padded ones

Packed rows are one long sequence, and a mask that keeps them apart still makes every score of the whole square: 64
rows of 50 tokens are 3,200 x 3,200 instead of 64 x 50 x 50, and a step took three to nine times a padded one.
So everything that works on single tokens (projections, MLPs, experts, norms) runs on the packed sequence, and attention
alone on the same tokens laid out as rows [B, longest], causal, where padding stands behind the real tokens and is never
read. A step of the embedded base then takes 0.7 of the padded one (64 rows, 34 % padding).

It is registered with transformers as an attention implementation, over its `sdpa` and over each model's own plain
(`eager`) attention; without `rows_apart` it is just that, mask included. A sliding window becomes a mask [L, L] of one
row, the same for all. Models that do not ask the registry, and layers of other kinds (chunked attention), keep their
own attention and the long mask.

Padded rows need no mask either where attention is causal and padding stands behind: no real token reads it. But
transformers makes one, [B, T, T], after a look at whether it may be left out, for which the host waits for the device;
and with a mask there is no flash attention. Rows of 200 to 500 tokens take a CPU 0.88 of the time without it.

A CPU's flash attention in 16 bits is slow on the way back (64 rows of 85 tokens, 4 heads of 32, one thread: 60 ms a
layer) and less exact than the same in float32 (13 ms). So what needs a gradient attends in float32 there, with whatever
mask the model makes.

Shapes: T tokens of the packed sequence, B rows, L the longest row, H heads, D size of a head.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask, sliding_window_causal_mask_function

from distill.errors import UserError
from distill.models.folders import first_line
from distill.models.hooks import Hooks
from distill.models.routers import bare_model

# Of the attention implementations, as transformers knows them: by what they take the place of.
NAMES = {"sdpa": "distill_packed", "eager": "distill_packed_eager"}
EXACT = "distill_sdpa"  # the model's own masks, float32 where a CPU needs the gradient
_EAGER = "eager_attention_forward"  # what every modeling file calls its own


def decoder_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(backbone, its decoder layers) of any causal LM: what every forward pass goes through, and its blocks.

    Found by structure: from the input embedding upwards, the first module that holds a `ModuleList`; of
    several lists the one with the most parameters. Raises UserError where there is none, or where the layers
    are spread over several lists of one length (xlm).
    """
    base = bare_model(model)
    # It may stand in a module of ours, in KeptLogits say.
    base = next((m for m in base.modules() if hasattr(m, "get_input_embeddings")), base)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    names = {id(module): name for name, module in base.named_modules()}
    place = names.get(id(embedding), "")
    while place:
        place = place.rpartition(".")[0]
        backbone = base.get_submodule(place)
        lists = sorted(_outermost_lists(backbone), key=_parameters, reverse=True)
        if lists and _parameters(lists[0]):
            if len(lists) > 1 and len(lists[0]) == len(lists[1]) > 1 and _parameters(lists[1]):
                break
            return backbone, lists[0]
    raise UserError(
        f"cannot tell which modules of {type(base).__name__} are its decoder layers: no single ModuleList "
        "stands beside or above its input embedding; hidden states of this architecture cannot be matched"
    )


def compile_layers(*models: nn.Module) -> None:
    """torch.compile of every decoder layer, in place and for any length; hooks that stand already are compiled in."""
    for model in models:
        for layer in decoder_layers(model)[1]:
            layer.compile(dynamic=True)


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    found = []
    for child in module.children():
        found += [child] if isinstance(child, nn.ModuleList) else _outermost_lists(child)
    return found


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- packed rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedRows:
    """`places` [B * L]: the token of the sequence at each place of the rows (any token at padding); `back` [T]: where
    each token stands there. `shape`: (B, L)."""

    places: Tensor
    back: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: np.ndarray) -> "PackedRows":
        """Rows of these lengths, one behind the other."""
        rows, longest = len(lengths), int(lengths.max())
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        column = np.arange(longest)
        places = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
        back = np.flatnonzero((column < lengths[:, None]).ravel())
        return cls(torch.from_numpy(places.ravel()), torch.from_numpy(back), (rows, longest))

    def to(self, device, non_blocking: bool = False) -> "PackedRows":
        places, back = (t.to(device, non_blocking=non_blocking) for t in (self.places, self.back))
        return PackedRows(places, back, self.shape)


class RightPadded:
    """A batch [B, T] of rows, each with its padding behind it."""

    def to(self, _device, non_blocking: bool = False) -> "RightPadded":
        return self


RIGHT_PADDED = RightPadded()
Rows = PackedRows | RightPadded
# Not a context variable: gradient checkpointing runs layers again on the threads of the backward pass.
_rows: Rows | None = None


@contextmanager
def rows_apart(rows: Rows | None) -> Iterator[None]:
    """Inside, every batch lies like this (None: like any batch). Around the backward pass too."""
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


def choose_attention(model: nn.Module, kind: str) -> None:
    """One of transformers' attention implementations instead of the model's first choice. Raises UserError."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        if kind.startswith("flash") and next(base.parameters()).device.type == "cpu":
            raise ValueError("it runs on GPUs only")
        base.set_attn_implementation(kind)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"train.attention={kind}: {type(base).__name__} cannot attend so ({first_line(error)}); use "
            "train.attention=auto"
        ) from error


def attend_by_row(model: nn.Module) -> bool:
    """Let the model's attention go without a mask of the whole batch inside `rows_apart`; whether it does.

    Tried on random rows first: what sees padding or loses a mask of its own then keeps its masks, and attends in
    float32 alone where that is faster.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "_attn_implementation", None)
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    both_ways = not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    )
    if kind not in NAMES:
        return False
    if not layers <= {"full_attention", "sliding_attention"} or both_ways:
        _keep_masks(base, config, kind)
        return False
    if kind == "eager" and not any(_own_attention(type(m)) for m in model.modules()):
        return False
    for of, attention, mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
        AttentionInterface.register(NAMES[of], _by_row(attention))
        AttentionMaskInterface.register(NAMES[of], _mask_of_rows(mask, whole=of == "eager"))
    base.set_attn_implementation(NAMES[kind])
    if not _the_same(*_trials(base, config, (None, RIGHT_PADDED))):
        _keep_masks(base, config, kind)
        return False
    Hooks().before(base, _all_real, named=True)
    return True


def _all_real(_module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict] | None:
    """Packed rows say that nothing is padding: where nobody says it, transformers looks for rows in the positions, and
    the host waits for what it finds."""
    if (
        not isinstance(_rows, PackedRows)
        or named.get("attention_mask") is not None
        or "input_ids" not in named
    ):
        return None
    return given, {**named, "attention_mask": torch.ones_like(named["input_ids"])}


def _keep_masks(base: nn.Module, config: PretrainedConfig, kind: str) -> None:
    """The model attends as it did, `kind`; through `_sdpa` if that is its kind and its logits are the same so."""
    base.set_attn_implementation(kind)
    learns = any(p.requires_grad for p in base.parameters())
    if kind != "sdpa" or not learns or next(base.parameters()).device.type != "cpu":
        return
    AttentionInterface.register(EXACT, _sdpa)
    AttentionMaskInterface.register(EXACT, sdpa_mask)
    before = _trials(base, config, (None,))
    base.set_attn_implementation(EXACT)
    if not _the_same(*before, *_trials(base, config, (None,))):
        base.set_attn_implementation(kind)


@torch.no_grad()
def _trials(model: nn.Module, config: PretrainedConfig, ways: tuple) -> list[Tensor]:
    """Logits of a short row with padding behind it and a long one, the batch said to lie in each of these ways."""
    device, training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 17), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    model.eval()
    try:
        found = []
        for rows in ways:
            with rows_apart(rows):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            found.append(torch.cat([logits[0, :9], logits[1]]))
    finally:
        model.train(training)
    return found


def _the_same(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 0.05 * first.std())


def _mask_of_rows(of: Callable, whole: bool) -> Callable:
    """As transformers' interface, but for rows apart a mask [1, 1, L, L] of any of them.

    None where causal says it all and `of` may leave it to the attention, which `whole` forbids.
    """

    def mask(*given, **named):
        if _rows is None:
            # Whether a mask can be spared is told by its values, for which the host would wait for a device.
            look = (
                torch.device(named.get("device", "cpu")).type == "cpu" or named.get("attention_mask") is None
            )
            return of(*given, **named) if look else of(*given, **{**named, "allow_is_causal_skip": False})
        length = _rows.shape[1] if isinstance(_rows, PackedRows) else named["q_length"]
        window = named.get("local_size")
        cut = window is not None and window < length
        if not cut and not whole:
            return None
        named |= {"batch_size": 1, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
        named |= {"mask_function": sliding_window_causal_mask_function(window if cut else length)}
        return of(**{**named, "attention_mask": None, "allow_is_causal_skip": False, "use_vmap": False})

    return mask


def _by_row(attention: Callable) -> Callable:
    """As transformers' interface: query [1, H, T, D], ... -> (output [1, T, H, D], None)."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **named):
        if not isinstance(_rows, PackedRows):
            return attention(module, query, key, value, attention_mask, **named)
        rows, longest = _rows.shape
        here = _rows.to(query.device, non_blocking=True)  # an offloaded teacher's device is another
        if attention_mask is not None and attention_mask.shape[-1] != longest:
            return attention(module, query, key, value, attention_mask, **named)  # the model's own long mask

        def apart(states: Tensor) -> Tensor:
            heads, size = states.shape[1], states.shape[3]
            found = states[0].index_select(1, here.places).view(heads, rows, longest, size)
            return found.transpose(0, 1)  # [B, H, L, D]

        named["is_causal"] = attention_mask is None
        output, _ = attention(module, apart(query), apart(key), apart(value), attention_mask, **named)
        return output.flatten(0, 1).index_select(0, here.back)[None], None

    return attend


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named):
    states = (query, key, value)
    backward = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    if query.device.type != "cpu" or not backward or query.dtype == torch.float64:
        return sdpa_attention_forward(module, *states, mask, **named)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):  # it would cast them back
        output, _ = sdpa_attention_forward(module, *(state.float() for state in states), mask, **named)
    return output.to(dtype), None


def _own_attention(kind: type) -> Callable | None:
    """The plain attention of a module's modeling file; wrappers (FSDP2) derive classes of their own from it."""
    files = (sys.modules.get(c.__module__) for c in kind.__mro__)
    return next((getattr(file, _EAGER) for file in files if hasattr(file, _EAGER)), None)


def _eager(module: nn.Module, *given, **named):
    return _own_attention(type(module))(module, *given, **named)
