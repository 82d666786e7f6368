"""Whose decision is whose: one teacher-forced pass over finished answers, every token with its row and place.

    for batch in route_rows(model, [(prompt_ids, completion_ids), ...], pad_id):
        batch.answer, batch.position, batch.token_ids          # [N] each
        batch.layers["model.layers.1.mlp"].indices             # [N, k], heaviest weight first
    batch.recording.summary()                                  # the totals of all batches

Why after decoding and not meanwhile: decoding mixes rows of all ages and drops finished ones, so its recording
knows sums only. One forward pass over prompt and completion routes each token as decoding did (tested), costs a
prefill instead of a generation, and tells which token it was. The one thing it cannot give is the load of single
decoding steps: its batches are whole answers.

The last token of a completion is never an input, so no router sees it: N = sum(prompt + completion - 1).

Shapes: N tokens of one batch, k experts per token.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distill.errors import RunError, UserError
from distill.routers import bare_model
from distill.routing import Decisions, Recording, record_routing

CLASSES = ("prompt", "thinking", "answer")
BATCH_TOKENS = 16_384  # tokens of one pass with padding, at most; a longer row goes alone


@dataclass(frozen=True)
class RoutedBatch:
    """`answer` [N]: place of each token's row in `rows`; `position` [N] in that row; `token_ids` [N].

    `layers[name]`: weights and indices [N, k], heaviest weight first. `recording`: totals so far.
    """

    answer: torch.Tensor
    position: torch.Tensor
    token_ids: torch.Tensor
    layers: dict[str, Decisions]
    recording: Recording


def route_rows(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, batch_size: int = 64
) -> Iterator[RoutedBatch]:
    """Every decision on every fed token of `rows`, a batch at a time; each row is in exactly one batch.

    Rows come in a fixed random order, so that a batch is a mix of all that was asked, as a training batch is:
    sorted ones would make MaxVio_batch a measure of the sorting. Raises UserError for a dense model or a row
    with an empty prompt or completion.
    """
    if not rows or any(not prompt or not completion for prompt, completion in rows):
        raise UserError("routing is read from rows with a prompt and a completion; leave failed answers out")
    fed = [[*prompt, *completion][:-1] for prompt, completion in rows]
    base = bare_model(model)
    only_last = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    )
    device = next(model.parameters()).device
    with record_routing(model) as recording:
        for chosen in _batches(np.array([len(ids) for ids in fed]), batch_size):
            ids, mask = _padded([fed[i] for i in chosen], pad_id)
            with torch.inference_mode():
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **only_last)
            row, position = mask.nonzero(as_tuple=True)
            layers = {name: _heaviest_first(record.take()) for name, record in recording.layers.items()}
            for name, decisions in layers.items():
                if len(decisions.indices) != len(row):
                    raise RunError(
                        f"{name} routed {len(decisions.indices)} of {len(row)} tokens: a layer that sees only "
                        "some tokens cannot be aligned with the text"
                    )
            answer = torch.from_numpy(chosen)[row]
            yield RoutedBatch(answer, position, ids[row, position], layers, recording)


def _batches(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers in a fixed random order, at most `batch_size` at a time and BATCH_TOKENS with padding."""
    group, width = [], 0
    for i in np.random.default_rng(0).permutation(len(lengths)):
        wider = max(width, int(lengths[i]))
        if group and (len(group) == batch_size or wider * (len(group) + 1) > BATCH_TOKENS):
            yield np.array(group)
            group, wider = [], int(lengths[i])
        group.append(i)
        width = wider
    if group:
        yield np.array(group)


def _padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T], right-padded, so that positions count from 0 in every family."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def _heaviest_first(decisions: Decisions) -> Decisions:
    weights, order = decisions.weights.sort(dim=-1, descending=True, stable=True)
    return Decisions(weights, decisions.indices.gather(-1, order))


def token_classes(prompt: int, completion: int, thinking: int) -> np.ndarray:
    """Place in CLASSES of each routed token, [prompt + completion - 1], of a row with so many tokens.

    thinking: completion tokens up to and with the last </think> (`distill.answers.thinking_tokens`), which is
    what the verifier does not read as the answer; all of them if thinking never closed, none without the tag.
    """
    place = np.arange(prompt + completion - 1)
    return np.where(place < prompt, 0, np.where(place < prompt + thinking, 1, 2))
