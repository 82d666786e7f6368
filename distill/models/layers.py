"""The layers of any causal LM: found by structure, compiled, attending to packed rows, their weights packed.

    backbone, layers = decoder_layers(model)     # PEFT, DDP and torch.compile are looked through
    compile_layers(student, teacher)

    attend_by_row(model)                       # once, before training; False where the model attends in another way
    with rows_apart(batch.rows): model(...)    # forward and backward

Packed rows are one long sequence, and a mask that keeps them apart still makes every score of the whole square: 64
rows of 50 tokens are 3,200 x 3,200 instead of 64 x 50 x 50, and a step took three to nine times a padded one.
So everything that works on single tokens (projections, MLPs, experts, norms) runs on the packed sequence, and attention
alone on the same tokens laid out as rows [B, longest], causal, where padding stands behind the real tokens and is never
read. A step of the embedded base then takes 0.7 of the padded one (64 rows, 34 % padding).

It is registered with transformers as an attention implementation; without `rows_apart` it is transformers' `sdpa`, mask
included. Sliding windows and models that do not ask the registry keep their own attention and the long mask.

Shapes: T tokens of the packed sequence, B rows, L the longest row, H heads, D size of a head.

    with packed_linears(model): ...     # inference alone; the model is given back as it was

A product of a few rows reads the whole weight, and oneDNN puts it into its own order first, at every call. Decoding
reads the same weights hundreds of times, so the order is made once: a layer of SmolLM2 takes 0.85 of its time at 32
rows, half at 8 and three quarters in a prompt of 3,000 tokens. In bfloat16 the result is the same to the last bit, in
float32 to rounding. Under autocast the weights are cast once as well. The price is a second copy of the weights, so
nothing is packed where memory is short. The two operators are those that torch.compile packs weights with on a CPU
(torch/_inductor/fx_passes/mkldnn_fusion.py). They are not public: where a version of torch lacks them, or refuses, a
layer works as it did.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.devices import free_memory
from distill.errors import UserError
from distill.models.hooks import replaced_forward
from distill.models.routers import bare_model

NAME = "distill_packed"  # of the attention implementation, as transformers knows it
LEAST_WEIGHTS = 2**14  # of a layer: in a smaller one the call costs more than the product
ROWS = 32  # that the order is made for; it was the same for 1 to 1,024 rows
SHARE = 1 / 3  # of the free memory that packed weights may take
_DTYPES = (torch.float32, torch.bfloat16)


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


# Not a context variable: gradient checkpointing runs layers again on the threads of the backward pass.
_rows: PackedRows | None = None


@contextmanager
def rows_apart(rows: PackedRows | None) -> Iterator[None]:
    """Inside, sequences are these rows end to end (None: ordinary batches). Around the backward pass too."""
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


def attend_by_row(model: nn.Module) -> bool:
    """Let the model's attention take packed rows apart; whether it does."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if getattr(config, "_attn_implementation", None) != "sdpa" or kinds != {"full_attention"} or windows:
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)
    return True


def _mask(*given, **named):
    return None if _rows is not None else sdpa_mask(*given, **named)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **named):
    """As transformers' interface: query [1, H, T, D], ... -> (output [1, T, H, D], None)."""
    if _rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    rows, longest = _rows.shape

    def apart(states: Tensor) -> Tensor:
        heads, size = states.shape[1], states.shape[3]
        found = states[0].index_select(1, _rows.places).view(heads, rows, longest, size)
        return found.transpose(0, 1)  # [B, H, L, D]

    named["is_causal"] = True
    output, _ = sdpa_attention_forward(module, apart(query), apart(key), apart(value), None, **named)
    return output.flatten(0, 1).index_select(0, _rows.back)[None], None


# ---- packed weights -----------------------------------------------------------------------------------


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes without gradient use packed weights; those are made when a layer is first called.

    The weights must not change meanwhile. Layers that something else has changed (quantized, parametrized, with a
    forward of its own) are left alone, and so is a model on another device, or one that torch.compile has seen.
    """
    with ExitStack() as stack:
        for layer in _packable(model):
            stack.enter_context(replaced_forward(layer, _PackedForward(layer)))
        yield


def _packable(model: nn.Module) -> list[nn.Linear]:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    if any(_compiled(module) for module in model.modules()):  # it packs by itself, and traces what it finds
        return []
    found = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in _DTYPES
        and layer.weight.numel() >= LEAST_WEIGHTS
    ]
    free, local = free_memory(torch.device("cpu")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = sum(layer.weight.nbytes for layer in found)
    return found if free is None or needed * local <= SHARE * free else []


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


class _PackedForward:
    """What a linear layer does instead, with its weight packed for each dtype that it multiplies in."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self.packed: dict[torch.dtype, Tensor | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
        if (
            torch.is_grad_enabled()
            or not x.numel()
            or not (cast or dtype == weight.dtype)
            or x.dtype not in _DTYPES
        ):
            return linear(x, weight, bias)
        if dtype not in self.packed:
            self.packed[dtype] = _pack(weight, dtype)
        if (packed := self.packed[dtype]) is None:
            return linear(x, weight, bias)
        bias = bias if bias is None else bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None where this torch or this dtype cannot."""
    if dtype not in _DTYPES:
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)
    except (AttributeError, RuntimeError):
        return None
