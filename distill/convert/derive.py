"""A model made from a model, before it is trained: averaged, fewer layers, narrower; the key `student.from`.

Less of every layer: neurons of the MLPs, heads of keys and values with their queries, channels of the hidden states.

    student, chosen = narrower(model, Width(intermediate=192, kv_heads=1), calibration)

What stays is what is largest on the recipe's prompts (Minitron, arXiv 2407.14679, section 2.2): a neuron by the mean of
|act(gate) * up|, the input of the last matrix; a head by the mean norm of its output, over the query heads of its group
together; a channel by its mean size behind the norms of all layers. Neurons and heads are chosen in each layer for
itself, channels once, since all layers add to the same hidden state. Kept weights are copied as they are.

Known to work where a layer is q_proj, k_proj, v_proj, o_proj and gate_proj, up_proj, down_proj with norms by channel or
by head (llama, qwen, gemma, ...). A mixture, latent attention and what else has other weights are refused.

All ways together, in the order in which they are applied:

    made = derived(teacher, section, Calibration(rows, seed=0))
    made.model, made.did                             # an ordinary model, and in words what was done

    keep = kept_layers(10, 30)                       # [0, 3, 6, ..., 29]: evenly, with the first and the last
    student = drop_layers(teacher, keep)             # an ordinary model of the same family

What a layer is does not change with its place: its kind of attention, its window, whether it is dense or a mixture come
along. Configs say these things per layer, as lists (`layer_types`), as numbers of layers (`first_k_dense_replace`) and
as counts from the front (`num_kv_shared_layers`), and what is left after the cut must say the same of the kept ones. So
the new model's layers are held against the old ones, piece by piece; a family whose config cannot say it is refused.

Models that were trained apart from one start can be averaged, weight by weight, ahead of all of this (`averaged`).

How to choose layers: evenly spaced ones with both ends are the usual start where the student is trained afterwards
(Sanh et al., DistilBERT, arXiv 1910.01108, section 3). `by: angle` leaves out the run of layers over which the hidden
state turns least (Gromov et al., arXiv 2403.17887, section 3.2); a list tries another choice.

A new way to make a student is a function (model, its settings, ...) -> model, and a step of `derived`: widths and
layers are here, all about experts (taken out, merged, made, joined) in mixture.py. Each also works on a skeleton
without weights, where nothing can be read and any choice gives the same shapes.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distill.config.section import From, Width
from distill.convert.calibrate import Calibration, InputSizes, angles
from distill.convert.mixture import as_dense, as_mixture, fewer_experts
from distill.errors import UserError
from distill.models.hooks import Hooks
from distill.models.layers import decoder_layers
from distill.models.load import load_model
from distill.models.routers import find_routers

# What the axes of a weight count: (rows, columns). "q" and "kv" are heads times head_dim.
_AXES = {
    "q_proj": ("q", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"), "o_proj": ("hidden", "q"),
    "gate_proj": ("mlp", "hidden"), "up_proj": ("mlp", "hidden"), "down_proj": ("hidden", "mlp"),
    "q_norm": (None,), "k_norm": (None,),
}  # fmt: skip
_SIZES = {"mlp": "neurons", "kv": "heads of keys", "hidden": "channels"}


def narrower(
    model: PreTrainedModel, section: Width, calibration: Calibration | None
) -> tuple[PreTrainedModel, dict]:
    """(the narrower model, what was kept). Without calibration the first of everything. Raises UserError."""
    config = model.config
    text = config.get_text_config(decoder=True)
    kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    groups = text.num_attention_heads // kv
    _check(model, section, text, kv, head)
    after = {
        "mlp": section.intermediate or text.intermediate_size,
        "kv": section.kv_heads or kv,
        "hidden": section.hidden or text.hidden_size,
    }
    before = {"mlp": text.intermediate_size, "kv": kv, "hidden": text.hidden_size}
    places = _chosen(model, section, before, after, groups * head, calibration)
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.intermediate_size, text.num_key_value_heads = after["mlp"], after["kv"]
    text.hidden_size, text.num_attention_heads, text.head_dim = after["hidden"], after["kv"] * groups, head
    with torch.device(model.device):
        student = type(model)(config).to(model.dtype)
    if model.device.type != "meta":
        heads = {layer: kept["kv"] for layer, kept in places.items()}
        within = {"q": groups * head, "kv": head}  # channels of one group of queries, of one head of keys
        old = model.state_dict()
        new = {
            name: _narrowed(name, old[name], like, places, heads, within)
            for name, like in student.state_dict().items()
        }
        student.load_state_dict(new)
        student.generation_config = copy.deepcopy(model.generation_config)
    changed = {_SIZES[key]: (after[key], before[key]) for key in before if after[key] != before[key]}
    kept = {
        str(layer): {_SIZES[k]: v.tolist() for k, v in found.items() if k in ("kv", "hidden")}
        for layer, found in places.items()
    }
    return student.eval(), {"sizes": changed, "by": section.by, "kept": kept}


def _check(model: PreTrainedModel, section: Width, text, kv: int, head: int) -> None:
    kind = model.config.model_type
    if find_routers(model):
        raise UserError(
            f"student.from.width: this {kind} model is a mixture of experts; use `experts` or `dense` instead, or a "
            "dense model"
        )
    _, layers = decoder_layers(model)
    wanted = set(_AXES) - {"q_norm", "k_norm"}
    for layer in layers:
        names = {
            name.rpartition(".")[0].rpartition(".")[2] for name, p in layer.named_parameters() if p.ndim > 1
        }
        if names != wanted:
            odd = sorted(names ^ wanted)[0]
            raise UserError(
                f"student.from.width: which weights of a {kind} model belong together is not known ({odd}); keep its "
                "width, or take another model"
            )
    for key, has in (
        ("intermediate", text.intermediate_size),
        ("kv_heads", kv),
        ("hidden", text.hidden_size),
    ):
        asked = getattr(section, key)
        if asked is not None and asked > has:
            raise UserError(f"student.from.width.{key}={asked}: the model has {has}; give 1 to {has}")
    if layers[0].get_submodule("self_attn.k_proj").weight.shape[0] != kv * head:
        raise UserError(f"student.from.width: the heads of this {kind} model cannot be told; keep its width")


def _chosen(
    model: PreTrainedModel,
    section: Width,
    before: dict,
    after: dict,
    group: int,
    calibration: Calibration | None,
) -> dict[int, dict[str, Tensor]]:
    """{layer: {"mlp", "kv", "hidden": kept places, ascending}}."""
    _, layers = decoder_layers(model)
    count = len(layers)
    if section.by == "activation" and calibration and model.device.type != "meta":
        scores = _scores(model, layers, group, calibration)
    else:
        draw = torch.Generator().manual_seed(calibration.seed if calibration else 0)

        def score(size: int) -> Tensor:
            drawn = section.by == "random" and calibration is not None
            return torch.rand(size, generator=draw) if drawn else -torch.arange(float(size))

        hidden = score(before["hidden"])
        scores = [
            {"mlp": score(before["mlp"]), "kv": score(before["kv"]), "hidden": hidden} for _ in range(count)
        ]
    return {
        layer: {key: scores[layer][key].topk(after[key]).indices.sort().values for key in before}
        for layer in range(count)
    }


def _scores(model, layers, group: int, calibration: Calibration) -> list[dict[str, Tensor]]:
    sizes = InputSizes()
    with Hooks() as hooks:
        for number, layer in enumerate(layers):
            hooks.before(layer.get_submodule("mlp.down_proj"), sizes.hook(f"mlp {number}"))
            hooks.before(layer.get_submodule("self_attn.o_proj"), sizes.hook(f"kv {number}", group))
            for name in ("input_layernorm", "post_attention_layernorm"):
                hooks.after(layer.get_submodule(name), sizes.hook("hidden", of_output=True))
        calibration.read(model)
    return [
        {"mlp": sizes.mean(f"mlp {n}"), "kv": sizes.mean(f"kv {n}"), "hidden": sizes.mean("hidden")}
        for n in range(len(layers))
    ]


def _narrowed(
    name: str, old: Tensor, like: Tensor, places: dict, heads: dict[int, Tensor], within: dict[str, int]
) -> Tensor:
    """The kept rows and columns of one weight, `like` the new one."""
    if old.shape == like.shape and name.endswith(("q_norm.weight", "k_norm.weight")):
        return old
    number = re.search(r"\.(\d+)\.", name)
    layer = int(number[1]) if number else 0
    module = name.rpartition(".")[0].rpartition(".")[2]
    axes = _AXES.get(module, ("hidden",) if old.ndim == 1 else (None, "hidden"))
    for axis, what in enumerate(axes[: old.ndim]):
        if what in within:
            n = within[what]
            index = (heads[layer][:, None] * n + torch.arange(n)).reshape(-1)
        elif what is not None:
            index = places[layer][what]
        else:
            continue
        old = old.index_select(axis, index.to(old.device))
    return old


# ==== A model made from a model, before it is trained; the recipe key is `student.from` ====

_FIRST_ARE = ("first_k_dense_replace",)  # numbers: so many layers from the front are of one kind
_INDICES = ("mlp_only_layers", "full_attn_idxs", "dense_layers", "moe_layers")  # lists of layers by number
_UNKNOWN = (
    "num_kv_shared_layers",
    "loop_num_passes",
)  # layers that lean on others: where they were cannot be said
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Made:
    """`did`: each step in words, for card and console; `chosen`: what was kept, as plain JSON, for the manifest."""

    model: PreTrainedModel
    did: list[str]
    chosen: dict[str, Any]


def derived(model: PreTrainedModel, section: From, calibration: Calibration | None = None) -> Made:
    """The model that `student.from` asks for: averaged, then layers, then widths, then experts. Raises UserError.

    calibration: what choices by activation read; without it (skeletons) the first ones are kept.
    """
    did, chosen = [], {}
    if section.average:
        averaged(model, section.average)
        did.append(f"every weight the mean of {1 + len(section.average)} models")
        chosen["average"] = [section.model, *section.average]
    if section.layers is not None:
        total = _text(model.config).num_hidden_layers
        keep = kept_layers(section.layers, total)
        if section.by == "angle" and calibration and len(keep) < total:
            keep = kept_by_angle(angles(model, calibration, total - len(keep)), total)
        model = drop_layers(model, keep)
        did.append(f"{len(keep)} layers")
        chosen["layers"] = keep
    if section.width:
        model, chosen["width"] = narrower(model, section.width, calibration)
        did.append(
            ", ".join(f"{n} of {total} {what}" for what, (n, total) in chosen["width"]["sizes"].items())
        )
    if section.experts:
        model, chosen["experts"] = fewer_experts(model, section.experts, calibration)
        did.append("{kept} of {of} experts a layer ({how})".format(**chosen["experts"]))
    if section.dense:
        model, chosen["dense"] = as_dense(model, section.dense, calibration)
        did.append("experts {how}d into one MLP of {intermediate}".format(**chosen["dense"]))
    if section.mixture:
        model = as_mixture(model, section.mixture, calibration.seed if calibration else 0)
        shared = " and one shared" if section.mixture.shared else ""
        did.append(
            f"every MLP copied to {section.mixture.experts} experts{shared}, "
            f"{section.mixture.experts_per_token} a token"
        )
    return Made(model, did, chosen)


def derived_config(config: PreTrainedConfig, section: From) -> PreTrainedConfig:
    """The same of the config alone: checked on skeletons, no weights. Raises UserError."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return derived(whole, section).model.config


@torch.no_grad()
def averaged(model: PreTrainedModel, others: Iterable[str]) -> None:
    """Every weight of `model` becomes the mean of its own and those of `others`, in place. Raises UserError.

    Only models that were one before they were trained apart have weights that mean the same (arXiv 2203.05482).
    """
    whole, count = dict(model.state_dict()), 1
    if model.device.type == "meta":
        return
    sums = {name: weight.double() for name, weight in whole.items()}
    for name in others:
        other = load_model(name, "fp32", training=True).state_dict()
        if unlike := [k for k, w in whole.items() if k not in other or other[k].shape != w.shape] or (
            other.keys() - whole.keys()
        ):
            raise UserError(
                f"student.from.average: {name} is another kind of model ({sorted(unlike)[0]}); give models of one shape"
            )
        for key, weight in other.items():
            sums[key] += weight
        count += 1
    for key, weight in whole.items():
        weight.copy_(sums[key] / count)


def kept_by_angle(turns: list[float], total: int) -> list[int]:
    """All layers but the run that turns the hidden state least: `turns[l]` is of the layers l to l + n - 1."""
    n = total - len(turns) + 1
    start = min(range(len(turns)), key=turns.__getitem__)
    return [layer for layer in range(total) if not start <= layer < start + n]


def kept_layers(asked: int | tuple[int, ...], total: int) -> list[int]:
    """Layers by number, from 0: a count is taken evenly, with the first and the last. Raises UserError."""
    if isinstance(asked, int):
        if not 1 <= asked <= total:
            raise UserError(f"student.from.layers={asked}: the model has {total} layers; give 1 to {total}")
        return [round(i * (total - 1) / max(asked - 1, 1)) for i in range(asked)]
    if not asked or sorted(set(asked)) != list(asked) or asked[0] < 0 or asked[-1] >= total:
        raise UserError(
            f"student.from.layers={list(asked)}: give layers in rising order, each once, from 0 to {total - 1}"
        )
    return list(asked)


def drop_layers(model: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """A new model of the same family with the layers `keep` of `model`, in its dtype and on its device.

    Embedding, head and norms are copied; what is tied stays tied. Raises UserError for a family whose config cannot
    describe the kept layers, and for one whose decoder layers cannot be told.
    """
    _, layers = decoder_layers(model)
    config = _cut(model.config, keep)
    kind = type(model)
    with torch.device(model.device):
        student = kind(config).to(model.dtype)
    _, new = decoder_layers(student)
    for place, old in enumerate(keep):
        if difference := _unlike(layers[old], new[place]):
            raise UserError(
                f"layer {old} of this {model.config.model_type} model would become another one ({difference}): its "
                "config cannot describe these layers alone; choose other student.from.layers"
            )
    if model.device.type != "meta":
        names = {id(module): name for name, module in model.named_modules()}
        prefix = f"{names[id(layers)]}."
        moved = {f"{prefix}{old}.": f"{prefix}{place}." for place, old in enumerate(keep)}
        student.load_state_dict(_renamed(model.state_dict(), prefix, moved))
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def _renamed(weights: dict[str, torch.Tensor], prefix: str, moved: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            found[name] = tensor
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if (to := moved.get(f"{prefix}{number}.")) is not None:
            found[to + rest] = tensor
    return found


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _cut(config: PreTrainedConfig, keep: list[int]) -> PreTrainedConfig:
    """The config of the kept layers alone."""
    config = copy.deepcopy(config)
    text = _text(config)
    total = text.num_hidden_layers
    values = {name: value for name, value in vars(text).items() if not name.startswith("_")}
    if found := [name for name in _UNKNOWN if (values.get(name) or 0) > (name == "loop_num_passes")]:
        raise UserError(
            f"layers of this {config.model_type} model lean on each other ({found[0]}={values[found[0]]}): none can be "
            "left out; choose a student of another kind"
        )
    for name, value in values.items():
        if name in _INDICES and isinstance(value, list | tuple):
            setattr(text, name, [keep.index(layer) for layer in value if layer in keep])
        elif isinstance(value, list | tuple) and len(value) == total and not name.endswith(("_id", "_ids")):
            if name != "architectures":
                setattr(text, name, [value[layer] for layer in keep])
        elif name in _FIRST_ARE and isinstance(value, int):
            setattr(text, name, sum(layer < value for layer in keep))
    text.num_hidden_layers = len(keep)
    return config


def _unlike(old: nn.Module, new: nn.Module) -> str | None:
    """The first thing in which two layers differ, weights aside: classes, sizes, windows. None where they agree."""
    before, after = dict(old.named_modules()), dict(new.named_modules())
    if before.keys() != after.keys():
        return f"{min(before.keys() ^ after.keys())} is in one of them alone"
    for name, module in before.items():
        other = after[name]
        if type(module) is not type(other):
            return f"{name or 'it'} is {type(module).__name__}, and would be {type(other).__name__}"
        mine, theirs = _facts(module), _facts(other)
        for key in mine.keys() | theirs.keys():
            if mine.get(key) != theirs.get(key):
                return f"{name}.{key}: {mine.get(key)} and {theirs.get(key)}".lstrip(".")
        shapes = [{n: tuple(p.shape) for n, p in m.named_parameters(recurse=False)} for m in (module, other)]
        if shapes[0] != shapes[1]:
            return f"the weights of {name}"
    return None


def _facts(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of one module but for its place."""
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, _PLAIN) and not key.startswith("_") and "idx" not in key and key != "training"
    }
