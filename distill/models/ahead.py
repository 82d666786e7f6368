"""Tokens ahead: the multi-token prediction module of DeepSeek-V3, depth 1, and decoding with drafts, its or a model's.

    ahead = TokenAhead(model)                                  # trained by the objective `multi_token`
    states = ahead(shifted(hidden, mask), embeddings, ...)     # [B, T, d], for the model's own output head
    rows, drafts = decode_ahead(model, ahead, prompts, Sampling(max_new_tokens=80), eos_ids={2}, pad_id=0)
    rows, drafts = decode_ahead(teacher, base, prompts, ..., guesses=3)      # a smaller model of its tokens guesses

The module (arXiv 2412.19437, section 2.2) joins the model's last state of a token with the embedding of the next one,
sends both through one more decoder layer, and so predicts the token after that; embedding and output head are the
model's own. Here column j of the module reads token j beside the state of token j - 1, so that batch, mask and targets
are the model's own, and the first column of a row, which has no state before it, is given zeros. It lies beside the
weights in `mtp.safetensors`, which `from_pretrained` does not read.

Decoding ("MTP in Inference" there; the scheme of arXiv 2211.17192): the model reads its newest token and the drafts of
those after it in one pass, so what it would say behind a draft is known if the draft is what it says itself. Drafts are
chosen by the same random numbers as the model's own tokens of their places (distill/models/decode.py), and one is taken
only if it *is* that token: not only is the distribution kept, every answer is the one that `decode` gives, token by
token, but for the rounding of several columns instead of one. The price: at a temperature above 0 rejection sampling
takes a draft of distribution q against p with probability sum min(p, q), the most there is; equal numbers take it less
often.

Shapes: B rows, T columns, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from distill.errors import UserError
from distill.files import replacing
from distill.models.decode import Completion, GrowingLayer, Sampling, choose, row_seed, uniforms
from distill.models.hooks import Hooks, output_head
from distill.models.layers import decoder_layers
from distill.models.load import cache_name
from distill.models.packed import packed_linears
from distill.models.routers import bare_model
from distill.storage import resolve_model

FILE = "mtp.safetensors"


class TokenAhead(nn.Module):
    """The module of one causal LM, in float32 on its device. UserError where its last layer cannot be made anew."""

    def __init__(self, model: nn.Module, seed: int = 0):
        super().__init__()
        backbone, layers = decoder_layers(model)
        config = _one_layer(bare_model(model).config.get_text_config(decoder=True))
        width, device = config.hidden_size, next(layers.parameters()).device
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.body = type(backbone)(config).float()
                self.eh_proj = nn.Linear(2 * width, width, bias=False)
                nn.init.normal_(self.eh_proj.weight, std=getattr(config, "initializer_range", 0.02))
        except Exception as error:  # whatever a family raises for one layer alone
            raise UserError(
                f"multi_token: a {config.model_type} model of one layer cannot be built "
                f"({str(error).splitlines()[0]}); use another student"
            ) from error
        self.body.set_input_embeddings(nn.Identity())  # it is given embeddings
        self.enorm, self.hnorm = (copy.deepcopy(self.body.norm) for _ in range(2))
        self.to(device)

    def forward(self, before: Tensor, embeddings: Tensor, **inputs) -> Tensor:
        """States [B, T, d] for the head. before: the model's states one column later (`shifted`). inputs: mask,
        positions and cache as any model takes them."""
        joined = torch.cat([self.enorm(embeddings), self.hnorm(before)], dim=-1)
        return self.body(inputs_embeds=self.eh_proj(joined), **inputs).last_hidden_state

    def save(self, folder: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.state_dict().items()}
        with replacing(folder / FILE, sum(t.nbytes for t in tensors.values())) as temporary:
            save_file(tensors, temporary, {"format": "pt"})


def load_ahead(name: str, model: nn.Module) -> TokenAhead | None:
    """The module beside the weights of checkpoint `name`, for `model`, in its dtype; None without one. UserError."""
    path = Path(resolve_model(name)) / FILE
    if not path.is_file():
        return None
    ahead = TokenAhead(model)
    try:
        ahead.load_state_dict(load_file(path))
    except Exception as error:
        raise UserError(
            f"{path} is no module of this model ({str(error).splitlines()[0]}); remove it"
        ) from error
    return ahead.to(model.dtype).eval().requires_grad_(False)


def shifted(states: Tensor, real: Tensor, starts: Tensor | None = None) -> Tensor:
    """[B, T, d]: at every column the state of the one before it in its row, zeros where there is none.

    real [B, T]: 1 for tokens, 0 for padding. starts [B, T]: True where a row begins (packed rows).
    """
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
    known = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1).bool()
    known = known if starts is None else known & ~starts
    return before * known[..., None].to(before.dtype)


def _one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model that is the last layer alone."""
    config, total = copy.deepcopy(config), config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and name.endswith("layer_types"):
            setattr(config, name, list(value[-1:]))
        elif name in ("mlp_only_layers", "full_attn_idxs") and isinstance(value, list | tuple):
            setattr(config, name, [0] if total - 1 in value else [])
        elif name == "first_k_dense_replace" and isinstance(value, int):
            setattr(config, name, int(value >= total))
    config.num_hidden_layers = 1
    return config


# ---------------------------------------------------------------------------------------------- decoding


@dataclass
class Drafts:
    """What became of the drafts: `passes` of the model after the prompts."""

    passes: int = 0
    drafted: int = 0  # drafts that could have been taken: the row had come to their place and went on
    taken: int = 0

    @property
    def acceptance(self) -> float:
        return self.taken / max(1, self.drafted)

    def text(self) -> str:
        return f"{self.taken:,} of {self.drafted:,} guesses were taken ({self.acceptance:.0%})"


@torch.inference_mode()
def decode_ahead(
    model: nn.Module,
    drafter: nn.Module,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    keys: list[tuple[Hashable, ...]] | None = None,
    vocab_limit: int | None = None,
    guesses: int = 1,
    batch_size: int | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
    drafts: Drafts | None = None,
) -> tuple[list[Completion], Drafts]:
    """What `decode` gives for these prompts, with up to 1 + `guesses` tokens a row for every pass of the model.

    drafter: a `TokenAhead`, which guesses one token, or a causal LM of the same tokens. batch_size: rows at a time;
    None: all. drafts: counted on. A column of a draft that was not taken by its row is masked for it, and leaves both
    caches if no row took it. Best for few rows: on a full machine the further columns cost what they bring.
    Raises UserError for caches that cannot be masked by column.
    """
    ahead = isinstance(drafter, TokenAhead)
    if not all(prompts) or (sampling.temperature > 0 and keys is None):
        raise UserError("decode_ahead needs prompts with tokens, and keys to sample")
    if not (masks_columns(_text(model)) and (ahead or masks_columns(_text(drafter)))):
        raise UserError("decode_ahead needs full attention in every layer, of the model and of its draft")
    training = [module for both in (model, drafter) for module in both.modules() if module.training]
    model.eval(), drafter.eval()
    found: list[Completion | None] = [None] * len(prompts)
    drafts = Drafts() if drafts is None else drafts
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    try:
        with packed_linears(model), nullcontext() if ahead else packed_linears(drafter):
            for rows in _groups(order, batch_size or len(prompts)):
                with Hooks() as hooks:
                    reader = _Reader(model, hooks)
                    guess = _ByModule(drafter, reader) if ahead else _ByModel(drafter, guesses, hooks)
                    seeds = [row_seed(keys[row]) if keys is not None else 0 for row in rows]
                    draw = _Draw(torch.tensor(seeds, device=reader.device), sampling, vocab_limit)
                    asked = [prompts[row] for row in rows]
                    written = _Writer(reader, guess, draw, eos_ids, drafts).write(asked, pad_id)
                for row, completion in zip(rows, written):
                    found[row] = completion
                    if on_finish is not None:
                        on_finish(row, completion)
    finally:
        for module in training:
            module.training = True
    return found, drafts


def masks_columns(config: PreTrainedConfig) -> bool:
    """Whether what a row did not take can be masked in the cache of such a model: full attention in every layer.

    Windows count columns, and recurrent states cannot be taken back.
    """
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _groups(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _text(model: nn.Module) -> PreTrainedConfig:
    return bare_model(model).config.get_text_config(decoder=True)


@dataclass(frozen=True)
class _Draw:
    """How all who speak choose: by the same random number for the same place of a row."""

    seeds: Tensor  # [B]
    sampling: Sampling
    vocab_limit: int | None

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Tokens [B] from logits [B, V] for place `steps` [B] of each answer."""
        u = uniforms(self.seeds, steps) if self.sampling.temperature > 0 else None
        return choose(logits[:, : self.vocab_limit], self.sampling, u)


class _Columns:
    """A cache, and which of its columns are whose."""

    def __init__(self, config: PreTrainedConfig, name: str):
        self.cache, self.name, self.mask = DynamicCache(config=config), name, None
        self.cache.layers = [GrowingLayer() for _ in self.cache.layers]

    def inputs(self, read: Tensor, positions: Tensor) -> dict:
        """For a pass over new columns, of which `read` [B, T] says whose they are."""
        self.mask = read if self.mask is None else torch.cat([self.mask, read], 1)
        given = {"attention_mask": self.mask.long(), "position_ids": positions, self.name: self.cache}
        return given | {"use_cache": True}

    def settle(self, newest: int, read: Tensor | None = None) -> None:
        """Of the `newest` columns the first are kept, with `read` [B, T] for their owners; without it none."""
        kept = self.mask[:, : self.mask.shape[1] - newest]
        self.mask = kept if read is None else torch.cat([kept, read], 1)
        for layer in self.cache.layers:
            layer.cut(self.mask.shape[1])


class _Reader:
    """A causal LM with its columns. `states` [B, T, d] are those of its last pass, before the head."""

    def __init__(self, model: nn.Module, hooks: Hooks):
        self.model, self.columns = model, _Columns(_text(model), cache_name(model))
        self.device = model.get_input_embeddings().weight.device
        hooks.before(output_head(model), self._hear)

    def _hear(self, _head, args):
        self.states = args[0]
        rows = torch.arange(len(self.states), device=self.device)
        return None if self.at is None else (self.states[rows, self.at].unsqueeze(1), *args[1:])

    def __call__(self, ids: Tensor, read: Tensor, positions: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; [B, 1, V] of the column `at` [B] of each row."""
        self.at = at
        return self.model(input_ids=ids, **self.columns.inputs(read, positions)).logits.float()


class _ByModule:
    """Guesses of one token by the module ahead. `before` [B, T, d]: the model's state ahead of every token."""

    most = 1

    def __init__(self, ahead: TokenAhead, reader: _Reader):
        self.ahead, self.columns = ahead, _Columns(ahead.body.config, cache_name(ahead.body))
        self.embed, self.head = reader.model.get_input_embeddings(), output_head(reader.model)
        self.reader = reader

    def __call__(
        self, before, ids, read, positions, steps: Tensor, at: Tensor, draw: _Draw, count: int
    ) -> Tensor:
        """Guesses [B, count] for the places from `steps` [B] on, behind column `at` [B] of these new ones."""
        states = self.ahead(before, self.embed(ids).to(before.dtype), **self.columns.inputs(read, positions))
        self.reader.at = None
        last = states[torch.arange(len(states), device=states.device), at]
        return draw(self.head(last[:, None])[:, 0].float(), steps)[:, None][:, :count]


class _ByModel:
    """Guesses by another causal LM of the same tokens, one after the other."""

    def __init__(self, model: nn.Module, most: int, hooks: Hooks):
        self.reader, self.most, self.own = _Reader(model, hooks), most, 0

    def __call__(
        self, before, ids, read, positions, steps: Tensor, at: Tensor, draw: _Draw, count: int
    ) -> Tensor:
        if self.own:  # what it guessed the last time; what became of it is among `ids`
            self.reader.columns.settle(self.own)
        token = draw(self.reader(ids, read, positions, at)[:, 0], steps)
        found, place = [token], positions.gather(1, at[:, None])
        whose = torch.ones_like(place, dtype=torch.bool)
        for further in range(1, count):
            token = draw(self.reader(token[:, None], whose, place + further)[:, 0], steps + further)
            found.append(token)
        self.own = count - 1
        return torch.stack(found, 1)


class _Writer:
    """The answers to some prompts: drafts are guessed, read in one pass, and taken while they are the model's own."""

    def __init__(self, reader: _Reader, guess, draw: _Draw, eos_ids: set[int], drafts: Drafts):
        self.reader, self.guess, self.draw, self.drafts = reader, guess, draw, drafts
        self.device, self.limit = reader.device, draw.sampling.max_new_tokens
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)

    def write(self, prompts: list[list[int]], pad_id: int) -> list[Completion]:
        rows, width = len(prompts), max(map(len, prompts))
        padded = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        ids, lengths = (torch.tensor(x, device=self.device) for x in (padded, list(map(len, prompts))))
        mask = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.out = [Completion([], "length", []) for _ in prompts]
        made, end = torch.zeros_like(lengths), torch.full_like(lengths, width - 1)
        logits = self.reader(ids, mask, positions, end)[:, 0]
        newest = self.draw(logits, made)
        live = self._keep(newest, logits, torch.ones(rows, dtype=torch.bool, device=self.device))
        made = made + 1
        # Who guesses reads the prompt and the first token; a module, each beside the state before it.
        read = torch.cat([mask, mask[:, -1:]], 1)
        before = shifted(torch.cat([self.reader.states, self.reader.states[:, -1:]], 1), read)
        new = (
            before,
            torch.cat([ids, newest[:, None]], 1),
            read,
            torch.cat([positions, lengths[:, None]], 1),
        )
        at = end + 1
        while live.any():
            # The last token of an answer needs no guess behind it.
            left = self.limit - min(len(o.ids) for o, on in zip(self.out, live.tolist()) if on)
            count = min(self.guess.most, left - 1)
            drafts = self.guess(*new, made, at, self.draw, count) if count else newest[:, None][:, :0]
            place = (lengths + made - 1)[:, None] + torch.arange(count + 1, device=self.device)
            place = torch.minimum(place, lengths[:, None] + self.limit)  # of rows that ended, or soon do
            fed = torch.cat([newest[:, None], drafts], 1)
            logits = self.reader(fed, torch.ones_like(fed, dtype=torch.bool), place)
            said, read, newest, live = self._verify(logits, drafts, made, newest, live)
            self.reader.columns.settle(count + 1, read)
            most = read.shape[1]
            new = (self.reader.states[:, :most], said[:, :most], read, place[:, :most] + 1)
            at = read.sum(1) - 1
            made = made + at + 1
        return self.out

    def _verify(self, logits: Tensor, drafts: Tensor, made: Tensor, newest: Tensor, live: Tensor) -> tuple:
        """What the model says at each column, [B, T]; which of the first columns are whose, as far as any row came; the
        newest token [B]; which rows go on [B]. A row comes to a column by drafts that are the model's own tokens.
        """
        self.drafts.passes += 1
        said, read, here = [], [], live
        for column in range(logits.shape[1]):
            token = self.draw(logits[:, column], made + column)
            goes_on = self._keep(token, logits[:, column], here)
            said.append(token)
            read.append(here)
            newest = torch.where(here, token, newest)
            live = torch.where(here, goes_on, live)
            if column == drafts.shape[1]:
                break
            here = goes_on & (token == drafts[:, column])
            self.drafts.drafted += int(goes_on.sum())
            self.drafts.taken += int(here.sum())
        read = torch.stack(read, 1)
        read[:, 0] = True  # an ended row reads on beside the others; nobody hears it
        return torch.stack(said, 1), read[:, : int(read.sum(1).max())], newest, live

    def _keep(self, tokens: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Write these tokens to `rows` [B]; which of them go on."""
        on = rows.clone()
        logs = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)
        ends = torch.isin(tokens, self.eos)
        for row in rows.nonzero().flatten().tolist():
            found = self.out[row]
            if not bool(logs[row].isfinite()):
                found.finish_reason, found.error, on[row] = "error", "non-finite logits", False
                continue
            found.ids.append(int(tokens[row]))
            found.logprobs.append(float(logs[row]))
            found.finish_reason = "stop" if bool(ends[row]) else "length"
            on[row] = not bool(ends[row]) and len(found.ids) < self.limit
        return on
