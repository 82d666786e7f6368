"""One token further ahead: the multi-token prediction module of DeepSeek-V3, depth 1, and decoding that it speeds up.

    ahead = TokenAhead(model)                                  # trained by the objective `multi_token`
    states = ahead(shifted(hidden, mask), embeddings, ...)     # [B, T, d], for the model's own output head
    rows, drafts = decode_ahead(model, ahead, prompts, Sampling(max_new_tokens=80), eos_ids={2}, pad_id=0)

The module (arXiv 2412.19437, section 2.2) joins the model's last state of a token with the embedding of the next one,
sends both through one more decoder layer, and so predicts the token after that; embedding and output head are the
model's own. Here column j of the module reads token j beside the state of token j - 1, so that batch, mask and targets
are the model's own, and the first column of a row, which has no state before it, is given zeros. It lies beside the
weights in `mtp.safetensors`, which `from_pretrained` does not read.

Decoding ("MTP in Inference" there; the scheme of arXiv 2211.17192): the model reads its newest token and the module's
draft of the one after it in one pass, so what it would say behind the draft is known if the draft is what it says
itself. The draft is chosen by the same random number as the model's own token of that place (distill/models/decode.py),
and is taken only if it *is* that token: not only is the distribution kept, every answer is the one that `decode` gives,
token by token, but for the rounding of two columns instead of one. The price: at a temperature above 0 rejection
sampling takes a draft of distribution q against p with probability sum min(p, q), the most there is; equal numbers take
it less often.

Shapes: B rows, T columns, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from distill.errors import UserError
from distill.files import replacing
from distill.models.decode import Completion, Sampling, choose, row_seed, uniforms
from distill.models.head import output_head
from distill.models.hooks import Hooks
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
    """What became of the module's drafts: `passes` of the model after a prompt, each with one draft a row."""

    passes: int = 0
    drafted: int = 0  # drafts that could have been taken: the row went on behind them
    taken: int = 0

    @property
    def acceptance(self) -> float:
        return self.taken / max(1, self.drafted)


@torch.inference_mode()
def decode_ahead(
    model: nn.Module,
    ahead: TokenAhead,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_ids: set[int],
    pad_id: int,
    keys: list[tuple[Hashable, ...]] | None = None,
    vocab_limit: int | None = None,
) -> tuple[list[Completion], Drafts]:
    """What `decode` gives for these prompts, all at once, with up to two tokens a row for every pass of the model.

    A column of a draft that was not taken stays in both caches and is masked for its row. Best for few rows: on a full
    machine the second column costs what it brings. Raises UserError for caches that cannot be masked by column.
    """
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=_text(model)).layers)
    if not plain or not all(prompts) or (sampling.temperature > 0 and keys is None):
        raise UserError(
            "decode_ahead needs full attention in every layer, prompts with tokens, and keys to sample"
        )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with packed_linears(model), Hooks() as hooks:
            return _Ahead(model, ahead.eval(), sampling, eos_ids, vocab_limit, hooks).write(
                prompts, pad_id, keys
            )
    finally:
        for module in training:
            module.training = True


def _text(model: nn.Module) -> PreTrainedConfig:
    return bare_model(model).config.get_text_config(decoder=True)


class _Ahead:
    def __init__(self, model, ahead: TokenAhead, sampling: Sampling, eos_ids, vocab_limit, hooks: Hooks):
        self.model, self.ahead, self.sampling, self.vocab_limit = model, ahead, sampling, vocab_limit
        self.embed, self.head = model.get_input_embeddings(), output_head(model)
        self.device = self.embed.weight.device
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        hooks.before(self.head, self._hear)
        self.caches = [DynamicCache(config=_text(model)), DynamicCache(config=ahead.body.config)]
        self.names = [cache_name(model), cache_name(ahead.body)]

    def _hear(self, _head, args) -> None:
        self.states = args[0]

    def write(self, prompts: list[list[int]], pad_id: int, keys) -> tuple[list[Completion], Drafts]:
        rows, limit, width = len(prompts), self.sampling.max_new_tokens, max(map(len, prompts))
        seeds = [row_seed(key) for key in keys] if keys is not None else [0] * rows
        self.seeds = torch.tensor(seeds, device=self.device)
        padded = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        ids, lengths = (torch.tensor(x, device=self.device) for x in (padded, list(map(len, prompts))))
        mask = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.out = [Completion([], "length", []) for _ in prompts]
        drafts, made = Drafts(), torch.zeros_like(lengths)
        live = torch.ones(rows, dtype=torch.bool, device=self.device)

        logits = self._model(ids, mask, positions)
        newest = self._choose(logits[:, -1], made)
        live &= self._keep(newest, logits[:, -1], live, limit)
        # The module reads the prompt and the first token, each beside the state before it.
        ids, drafted_mask = torch.cat([ids, newest[:, None]], 1), torch.cat([mask, mask[:, -1:]], 1)
        before = shifted(torch.cat([self.states, self.states[:, -1:]], 1), drafted_mask)
        positions = torch.cat([positions, lengths[:, None]], 1)
        draft = self._draft(before, ids, drafted_mask, positions, made + 1, torch.full_like(made, -1))
        made = made + 1
        while live.any():
            place = (lengths + made - 1)[:, None]
            pair, both = (
                torch.stack([newest, draft], 1),
                torch.ones(rows, 2, dtype=torch.bool, device=self.device),
            )
            logits = self._model(pair, torch.cat([mask, both], 1), torch.cat([place, place + 1], 1))
            first, second = self._choose(logits[:, 0], made), self._choose(logits[:, 1], made + 1)
            goes_on = self._keep(first, logits[:, 0], live, limit)
            taken = goes_on & (first == draft)
            drafts.passes += 1
            drafts.drafted += int(goes_on.sum())
            drafts.taken += int(taken.sum())
            still = self._keep(second, logits[:, 1], taken, limit)
            live = torch.where(taken, still, goes_on)
            read = torch.stack([torch.ones_like(taken), taken], 1)
            mask, drafted_mask = torch.cat([mask, read], 1), torch.cat([drafted_mask, read], 1)
            made = made + 1 + taken
            draft = self._draft(
                self.states, torch.stack([first, second], 1), drafted_mask, torch.cat([place + 1, place + 2], 1),
                made, torch.where(taken, 1, 0),
            )  # fmt: skip
            newest = torch.where(taken, second, first)
        return self.out, drafts

    def _model(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        given = {"attention_mask": mask.long(), "position_ids": positions, self.names[0]: self.caches[0]}
        return self.model(input_ids=ids, use_cache=True, **given).logits.float()

    def _draft(self, before, ids, mask, positions, steps: Tensor, column: Tensor) -> Tensor:
        """The module's token [B] for place `steps` of each row, said at `column` of those it is given here."""
        given = {"attention_mask": mask.long(), "position_ids": positions, self.names[1]: self.caches[1]}
        states = self.ahead(before, self.embed(ids).to(before.dtype), use_cache=True, **given)
        at = states[torch.arange(len(states), device=self.device), column]
        return self._choose(self.head(at[:, None])[:, 0].float(), steps)

    def _choose(self, logits: Tensor, steps: Tensor) -> Tensor:
        u = uniforms(self.seeds, steps) if self.sampling.temperature > 0 else None
        return choose(logits[:, : self.vocab_limit], self.sampling, u)

    def _keep(self, tokens: Tensor, logits: Tensor, rows: Tensor, limit: int) -> Tensor:
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
            on[row] = not bool(ends[row]) and len(found.ids) < limit
        return on
