"""What a model does on the recipe's own prompts: the numbers by which parts of it are kept or left out.

    calibration = calibration_of(recipe, model, tokenizer)    # rows of token ids: prompts, the model's own answers
    angles(model, calibration, n=20)                             # how far each run of 20 layers turns the hidden state
    expert_use(model, calibration)                               # per router: tokens, router weights, REAP's saliency

A calibration set decides what survives, so it is of the kind that the student is trained and measured on. Rows are read
one at a time: there is no padding to tell from text.

Shapes: T tokens of one row, E experts, k experts per token, d hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config.recipe import Recipe
from distill.console import slow
from distill.data.prompts import document_rows, training_prompts
from distill.errors import UserError
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling, decode
from distill.models.hooks import Hooks
from distill.models.layers import decoder_layers
from distill.models.load import eos_ids
from distill.models.routers import Router, find_routers


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids, and the seed of what is drawn."""

    rows: list[list[int]]
    seed: int = 0

    def read(self, model: nn.Module) -> None:
        """Every row through the model, without gradient; hooks hear it."""
        if not self.rows:
            raise UserError(
                "there is no prompt to choose by; give prompts.levels, or a prompts.source with rows"
            )
        modes = [module for module in model.modules() if module.training]
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            for row in self.rows:
                model(input_ids=torch.tensor([row], device=device), use_cache=False)
        for module in modes:
            module.training = True


def calibration_of(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """`student.from.calibration` of the recipe's prompts; no rows where no choice reads any. Raises UserError."""
    section, seed = recipe.student.made_from, recipe.seed
    if not section.reads:
        return Calibration([], seed)
    asked = section.calibration
    with slow("reading what the model does on the prompts"):
        found = training_prompts(recipe.prompts, seed)
        if recipe.prompts.documents:
            windows = list(
                document_rows({p["prompt_id"]: p for p in found}, tokenizer, recipe.prompts.window)
            )
            return Calibration(
                [w["prompt_ids"] + w["completion_ids"] for w in _drawn(windows, asked.rows, seed)], seed
            )
        rows = [prompt_ids(tokenizer, p["messages"]) for p in _drawn(found, asked.rows, seed)]
        if asked.answers:
            ends, pad = eos_ids(model, tokenizer), tokenizer.pad_token_id
            sampling = Sampling(max_new_tokens=asked.max_new_tokens)
            answers = decode(model, rows, sampling, eos_ids=ends, pad_id=pad, vocab_limit=len(tokenizer))
            rows = [row + answer.ids for row, answer in zip(rows, answers)]
    return Calibration(rows, seed)


def _drawn(rows: list, count: int, seed: int) -> list:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in sorted(order[:count])]


def angles(model: PreTrainedModel, calibration: Calibration, n: int) -> list[float]:
    """Angle over pi between the input of layer l and that of layer l + n, for every l; mean over the rows' last tokens.

    arXiv 2403.17887, equation 2: the last token has seen all of its row.
    """
    _, layers = decoder_layers(model)
    states: list[list[Tensor]] = []

    def begin(_module, args, kwargs) -> None:
        states.append([_first(args, kwargs)[0, -1].float()])

    def end(_module, _args, output) -> None:
        states[-1].append((output[0] if isinstance(output, tuple) else output)[0, -1].float())

    with Hooks() as hooks:
        hooks.before(layers[0], begin, named=True)
        for layer in layers:
            hooks.after(layer, end)
        calibration.read(model)
    stacked = torch.stack([torch.stack(row) for row in states])  # [rows, layers + 1, d]
    cosine = torch.cosine_similarity(stacked[:, :-n], stacked[:, n:], dim=-1).clamp(-1, 1)
    return (cosine.arccos() / math.pi).mean(0).tolist()


def _first(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))


class InputSizes:
    """Mean size of what goes into (or comes out of) modules: by channel, or by group of `width` channels."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def hook(self, name: str, width: int = 1, of_output: bool = False) -> Callable:
        def heard(_module, args, output=None) -> None:
            states = (output if of_output else args[0]).float()
            sizes = states.reshape(-1, states.shape[-1] // width, width).norm(dim=-1)
            self._sums[name] = self._sums.get(name, 0) + sizes.sum(0)
            self._tokens[name] = self._tokens.get(name, 0) + len(sizes)

        return heard

    def mean(self, name: str) -> Tensor:
        return self._sums[name] / self._tokens[name]


# ---------------------------------------------------------------------- experts


@dataclass
class ExpertUse:
    """What one router's experts did: of T tokens in all.

    chosen [E]: tokens; weight [E]: sum of router weights; saliency [E]: sum of router weight times norm of the output
    (REAP, arXiv 2510.13999, equation 9, before the mean over the tokens that chose it). likeness [E, E]: only where
    asked for, mean cosine of two experts' outputs for the same tokens.
    """

    tokens: int
    chosen: Tensor
    weight: Tensor
    saliency: Tensor
    likeness: Tensor

    @property
    def mean_saliency(self) -> Tensor:
        """REAP's score [E]; 0 for an expert that no token chose."""
        return self.saliency / self.chosen.clamp(min=1)

    @property
    def mean_weight(self) -> Tensor:
        """Router weight [E] of an expert over all tokens, 0 where it was not chosen."""
        return self.weight / max(self.tokens, 1)


def expert_use(
    model: PreTrainedModel, calibration: Calibration, likeness: bool = False
) -> dict[str, ExpertUse]:
    """{router name: ExpertUse}. Raises UserError for a dense model, and for experts not called with weights."""
    routers = find_routers(model)
    if not routers:
        raise UserError(
            "a dense model has no experts: leave out what is asked of them, or give a mixture of experts"
        )
    if odd := [r.name for r in routers if r.source != "experts" or r.null_experts]:
        raise UserError(f"{odd[0]}: the experts of this family cannot be called one by one; keep all of them")
    found, calls = {}, {router.name: [] for router in routers}
    for router in routers:
        e = router.num_experts
        found[router.name] = ExpertUse(0, *(torch.zeros(e) for _ in range(3)), torch.zeros(e, e))
    with Hooks() as hooks:
        for router in routers:
            hooks.before(
                router.experts, lambda _m, a, k, name=router.name: calls[name].append((a, k)), named=True
            )
        for row in calibration.rows:
            Calibration([row]).read(model)
            heard = {name: calls[name].pop() for name in calls}
            with torch.no_grad():
                for router in routers:
                    _add(found[router.name], router, *heard[router.name], likeness)
            for held in calls.values():  # what asking the experts again has brought
                held.clear()
    return found


def _add(use: ExpertUse, router: Router, args: tuple, kwargs: dict, likeness: bool) -> None:
    """One call of the experts, on T tokens: each expert is asked again for the tokens that chose it (or for all)."""
    given = dict(enumerate(args)) | kwargs
    hidden, *others = [key for key, value in given.items() if isinstance(value, torch.Tensor)]
    indices = next(key for key in others if not given[key].is_floating_point())
    weights = next(key for key in others if given[key].is_floating_point())

    def output(expert: int, tokens: Tensor) -> Tensor:
        n = len(tokens)
        asked = given | {
            hidden: given[hidden][tokens],
            indices: given[indices].new_full((n, 1), expert),
            weights: given[weights].new_ones(n, 1),
        }
        return router.experts(*(asked[i] for i in range(len(args))), **{k: asked[k] for k in kwargs}).float()

    chosen, count = given[indices], len(given[hidden])
    use.tokens += count
    for expert in chosen.unique().tolist():
        tokens, slots = torch.where(chosen == expert)
        weight = given[weights][tokens, slots].float()
        use.chosen[expert] += len(tokens)
        use.weight[expert] += float(weight.sum())
        use.saliency[expert] += float((weight * output(expert, tokens).norm(dim=-1)).sum())
    if likeness:
        everyone = torch.arange(count, device=chosen.device)
        unit = torch.nn.functional.normalize(
            torch.stack([output(e, everyone) for e in range(router.num_experts)]), dim=-1
        )  # [E, T, d]
        use.likeness += torch.einsum("itd,jtd->ij", unit, unit).cpu() / count
