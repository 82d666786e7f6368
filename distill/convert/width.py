"""Less of every layer: neurons of the MLPs, heads of keys and values with their queries, channels of the hidden states.

    student, chosen = narrower(model, Width(intermediate=192, kv_heads=1), calibration)

What stays is what is largest on the recipe's prompts (Minitron, arXiv 2407.14679, section 2.2): a neuron by the mean of
|act(gate) * up|, the input of the last matrix; a head by the mean norm of its output, over the query heads of its group
together; a channel by its mean size behind the norms of all layers. Neurons and heads are chosen in each layer for
itself, channels once, since all layers add to the same hidden state. Kept weights are copied as they are.

Known to work where a layer is q_proj, k_proj, v_proj, o_proj and gate_proj, up_proj, down_proj with norms by channel or
by head (llama, qwen, gemma, ...). A mixture, latent attention and what else has other weights are refused.
"""

import copy
import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.config.student_from import Width
from distill.convert.calibrate import Calibration, InputSizes
from distill.errors import UserError
from distill.models.hooks import Hooks
from distill.models.layers import decoder_layers
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
            name: _cut(name, old[name], like, places, heads, within)
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


def _cut(
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
