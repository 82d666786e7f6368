"""The model that is trained: loaded or from scratch, full, LoRA or QLoRA.

LoRA through PEFT: exactly the weights that were asked for, or a refusal that says why.

Three things go wrong silently elsewhere. PEFT 0.21 rewrites targets that end in `gate_proj`, `up_proj`,
`down_proj` or `gate` to the routed experts, or router, of some 20 MoE families (DeepSeek-V3 among them), so that
shared experts and dense layers do not train. Routed experts are no `nn.Linear`, so that "all linear layers" leaves
most of a MoE frozen. And a weight can carry an adapter that no gradient reaches. Therefore: weights are put in
groups by structure, what PEFT would rewrite goes through `target_parameters`, the names of all that trains are
compared with what was asked, and one backward pass shows that a gradient arrives everywhere.

    plan = plan_lora(model, lora)            # on a model of the meta device too: before any weight is loaded
    model = add_lora(model, lora)            # what trains is listed by distill.models.describe

What `target_parameters` costs: W + BA is formed for the whole weight (all experts) in each forward pass, and DoRA
and dropout are not defined there. The rank is that of each expert; a fused gate_up_proj shares one of that rank.

    student = build_student(recipe.student, recipe.train.precision, torch.device("cpu"), seed=0)
    student.model, student.tokenizer, student.trainable
    print(format_trainable(student.model))          # what trains, and what stays frozen
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.config.training import Lora, StudentSection
from distill.errors import UserError
from distill.files import sync_all, write_atomic, writing
from distill.models.describe import LINEAR, adapted_weights, plain_name, weight_groups
from distill.models.folders import check_config, refusing
from distill.models.load import check_quantize, load_config, load_model, load_tokenizer, resolve_model
from distill.models.precision import EMULATED
from distill.models.routers import bare_model


@dataclass(frozen=True)
class LoraPlan:
    """Full names of the weights to adapt, and the patterns that make PEFT adapt these and no others."""

    weights: tuple[str, ...]  # of the bare model, as "model.layers.0.self_attn.q_proj.weight"
    modules: tuple[str, ...]  # target_modules
    parameters: tuple[str, ...]  # target_parameters


# ---- what is asked for -------------------------------------------------------------------------------


def plan_lora(model: PreTrainedModel, lora: Lora, quantize: str = "none") -> LoraPlan:
    """Which weights `lora` means in this model. Nothing is changed; the weights may be on the meta device.

    "attention" and "all-linear" are nn.Linear layers; neither takes the output head, a router or the routed
    experts, which `router` and `experts` add. Raises UserError for what this model does not have, or what PEFT
    cannot adapt in it.
    """
    groups = weight_groups(model)
    if isinstance(lora.targets, str):
        kinds = ("attention",) if lora.targets == "attention" else LINEAR
        wanted = [name for name, group in groups.items() if group in kinds]
        if not wanted:
            raise UserError(f"student.lora.targets={lora.targets}: this model has no such linear layers")
    else:
        wanted = _named(lora.targets, groups)
    modules = {name.removesuffix(".weight") for name in wanted}
    through_parameters = _rewritten(model, modules) | _own_forward(model, modules)
    _check_parameters(model, lora, quantize, through_parameters)
    for asked, group in ((lora.experts, "routed experts"), (lora.router, "router")):
        if asked:
            through_parameters |= _of_group(model, groups, group)
    plain = modules - {name.removesuffix(".weight") for name in through_parameters}
    every_module = [name for name, _ in model.named_modules()]
    return LoraPlan(
        tuple(sorted({f"{m}.weight" for m in plain} | through_parameters)),
        tuple(_shortest_endings(plain, every_module)),
        tuple(_shortest_endings(through_parameters, list(groups))),
    )


def _named(endings: tuple[str, ...], groups: dict[str, str]) -> list[str]:
    """Weights of the linear layers whose module names end in these dotted endings. Raises UserError, all at once."""
    wanted, problems = {}, []
    for ending in endings:
        found = [n for n in groups if n.endswith(".weight") and f".{n}".endswith(f".{ending}.weight")]
        usable = [n for n in found if groups[n] in LINEAR]
        wanted |= dict.fromkeys(usable)
        if len(usable) == len(found) > 0:
            continue
        what = f"student.lora.targets: '{ending}'"
        if not found:
            linear = {n.split(".")[-2] for n, g in groups.items() if g in LINEAR}
            problems.append(
                f"{what} ends no module's name here; linear layers are {', '.join(sorted(linear))}"
            )
        else:
            group = next(groups[n] for n in found if n not in usable)
            key = {"router": "router: true", "routed experts": "experts: true"}.get(group)
            fix = (
                f"set student.lora.{key}" if key else "name linear layers, with more of their path if need be"
            )
            problems.append(f"{what} names a weight of group '{group}'; {fix}")
    if problems:
        raise UserError(*problems)
    return list(wanted)


def _of_group(model: PreTrainedModel, groups: dict[str, str], group: str) -> set[str]:
    """The matrices of the routed experts or of the routers. Raises UserError where LoRA has none to adapt."""
    key = "experts" if group == "routed experts" else "router"
    found = {name: p for name, p in model.named_parameters() if groups.get(name) == group}
    if not found:
        raise UserError(
            f"student.lora.{key}: this {model.config.model_type} model has no routed experts; leave it out"
        )
    if group == "router":
        return set(found)
    stacked = {name for name, p in found.items() if p.ndim == 3}
    if not stacked:
        shape = f"{next(iter(found))} {list(next(iter(found.values())).shape)}"
        raise UserError(
            f"student.lora.experts: {model.config.model_type} does not keep its experts as one [experts, ., .] "
            f"tensor ({shape}), so PEFT would share one rank among all; use student.adapter=full"
        )
    return stacked


def _rewritten(model: PreTrainedModel, modules: set[str]) -> set[str]:
    """The weights, among those of `modules`, that PEFT would replace by routed experts or the router.

    Asked of PEFT itself, name by name, so that no list of families is kept here.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    changed = set()
    for leaf in {name.rpartition(".")[2] for name in modules}:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # gate_proj without up_proj: rewritten too
            changed.add(leaf)
            continue
        if set(config.target_modules) != {leaf}:
            changed.add(leaf)
    return {f"{name}.weight" for name in modules if name.rpartition(".")[2] in changed}


def _own_forward(model: PreTrainedModel, modules: set[str]) -> set[str]:
    """Weights of linear layers that compute something else than xW (deepseek_v4's grouped one): only W + BA fits."""
    own = [name for name in modules if type(model.get_submodule(name)).forward is not nn.Linear.forward]
    return {
        f"{n}.weight" for n in own if not type(model.get_submodule(n)).__module__.startswith("bitsandbytes")
    }


def _check_parameters(model: PreTrainedModel, lora: Lora, quantize: str, weights: set[str]) -> None:
    clashes = {
        "student.lora.dora": lora.dora,
        "student.lora.dropout above 0": lora.dropout > 0,
        f"student.quantize={quantize}": quantize != "none",
    }
    if weights and any(clashes.values()):
        asked = ", ".join(name for name, on in clashes.items() if on)
        raise UserError(
            f"{asked}: in a {model.config.model_type} model PEFT reaches {sorted(weights)[0]} (and "
            f"{len(weights) - 1} more) only as a bare parameter, where that does not exist; "
            "use student.lora.targets=attention, or go without it"
        )


def _shortest_endings(wanted: set[str], everything: list[str]) -> list[str]:
    """The shortest dotted endings that select all of `wanted` and nothing else of `everything`.

    A short list keeps adapter_config.json readable and fits the same architecture of another depth.
    """
    counted = [Counter(e for name in names for e in _endings(name)) for names in (wanted, everything)]
    chosen = {next(e for e in _endings(name) if counted[0][e] == counted[1][e]) for name in wanted}
    return sorted(chosen)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


# ---- wrapping, and the proof -------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, lora: Lora, quantize: str = "none") -> nn.Module:
    """Wrap with PEFT LoRA, float32 adapter weights; exactly the planned weights train, and can.

    Raises UserError where PEFT refuses, would train something else, or no gradient reaches a weight.
    """
    wrapped = wrap_lora(model, lora, plan_lora(model, lora, quantize))
    assert_reached(wrapped)
    return wrapped


def wrap_lora(model: PreTrainedModel, lora: Lora, plan: LoraPlan) -> nn.Module:
    """The model with PEFT's adapters, on exactly the planned weights; on the meta device too, without weights.

    Raises UserError where PEFT refuses, would train something else, or could not load it again.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=list(plan.modules),
        target_parameters=list(plan.parameters) or None,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"PEFT refuses this LoRA: {str(error).splitlines()[0]}; name other layers in student.lora.targets"
        ) from None
    assert_trained(wrapped, plan.weights)
    assert_reloads(wrapped)
    return wrapped


def assert_trained(model: nn.Module, weights: tuple[str, ...]) -> None:
    """Adapters sit on exactly `weights` (full names), and nothing but adapters trains. Raises UserError."""
    adapted = adapted_weights(model)
    extra, lost = sorted(set(adapted) - set(weights)), sorted(set(weights) - set(adapted))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    carried = {name for names in adapted.values() for name in names}
    extra += sorted(training - carried)
    lost += sorted(carried - training)
    if extra or lost:
        raise UserError(
            f"PEFT would not train what was asked: {len(lost)} tensors missing (first: {(lost or ['-'])[0]}), "
            f"{len(extra)} others trained instead (first: {(extra or ['-'])[0]}); "
            "for this MoE family use student.lora.targets=attention or student.adapter=full"
        )


def assert_reloads(model: nn.Module) -> None:
    """What is saved comes back under its own name with plain PEFT. Raises UserError if not.

    Loading applies the family's renaming of old checkpoints to adapters too, and laguna's catches the names of
    today: its shared experts would come back untrained, with a warning among many.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    saved = get_peft_model_state_dict(model)
    loaded = convert_peft_adapter_state_dict_for_transformers(
        bare_model(model), model.peft_config["default"], dict(saved)
    )
    changed = sorted(n for n in saved if n not in loaded or loaded[n].shape != saved[n].shape)
    if changed:
        family = bare_model(model).config.model_type
        raise UserError(
            f"an adapter on {plain_name(changed[0]).partition('.lora_')[0]} (and {len(changed) - 1} more tensors) of a "
            f"{family} model does not load again: PEFT renames it; name other layers in student.lora.targets"
        )


def assert_reached(model: nn.Module) -> None:
    """A backward pass shows that a gradient arrives at every trained tensor. Raises UserError if not.

    Weights that only choose (the indexer of sparse attention), are read past the adapter, or are skipped by the
    architecture would carry one for nothing. Eight tokens tell; where they do not, up to 512 do (attention may
    compress what is further back). No weight, gradient or random state is left changed.
    """
    base = bare_model(model)
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 512
    training, unreached = base.training, []
    for tokens in (8, min(512, longest)):
        unreached = _unreached(model.eval(), tokens)
        if not unreached:
            break
    model.train(training)
    if not unreached:
        return
    adapted = adapted_weights(model)
    groups = weight_groups(model)
    fix = "leave the router out"
    if any(groups[weight] in LINEAR for weight in unreached):
        dead = {weight.split(".")[-2] for weight in unreached}
        left = {w.split(".")[-2] for w in adapted if groups[w] in LINEAR} - dead
        fix = f"name the others, as student.lora.targets=[{', '.join(sorted(left))}]"
    raise UserError(
        f"{len(unreached)} of the weights asked for get no gradient in a {base.config.model_type} model, which "
        f"skips them, reads them past the adapter or only chooses by them (first: {unreached[0]}); {fix}"
    )


def _unreached(model: nn.Module, tokens: int) -> list[str]:
    """The adapted weights, some of whose adapter gets no gradient from a row of this many tokens."""
    base = bare_model(model)
    ids = torch.arange(3, 3 + tokens, device=base.device)[None] % base.get_input_embeddings().num_embeddings
    try:
        with torch.random.fork_rng(devices=[]):
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        if loss.requires_grad:
            loss.backward()
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"this {base.config.model_type} student does not run as asked ({reason}); name other layers in "
            "student.lora.targets, set student.quantize=none, or use student.adapter=full"
        ) from error
    adapted = adapted_weights(model)
    found = [w for w, names in adapted.items() if any(model.get_parameter(n).grad is None for n in names)]
    model.zero_grad(set_to_none=True)
    return found


# ==== The model that is trained ====


@dataclass
class BuiltStudent:
    model: nn.Module  # a PreTrainedModel, or a PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    states: Sequence = ()  # what trains beside it: objectives that are modules (distill/training/step.py)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def base(self) -> PreTrainedModel:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def student_tokenizer(section: StudentSection) -> PreTrainedTokenizerBase:
    """The tokenizer of the student, without loading its weights."""
    if section.model is not None:
        return load_tokenizer(section.model, section.chat_template_kwargs)
    if section.tokenizer != "embedded":
        return load_tokenizer(section.tokenizer, section.chat_template_kwargs)
    from distill.tasks.problems import build_tokenizer

    return build_tokenizer()


def student_config(section: StudentSection) -> PreTrainedConfig:
    """The student's config, read or made. Raises UserError."""
    if section.model is not None:
        return load_config(section.model)
    tokenizer = student_tokenizer(section)
    check_config(section.config, "student.config")
    with refusing("student.config", "correct it"):  # each config class validates in its own way
        return _fitted(section.config, tokenizer)


def student_skeleton(section: StudentSection) -> PreTrainedModel:
    """The student on the meta device: its structure without weights. Raises UserError."""
    config = student_config(section)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a family raises for sizes that do not fit together
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no causal LM can be built from the student's config: {reason}; correct it"
        ) from error


def build_student(section: StudentSection, precision: str, device: torch.device, seed: int) -> BuiltStudent:
    """The student ready to train on `device`, deterministic in `seed`.

    Trained weights are float32 masters. Weights that LoRA leaves frozen keep their stored dtype when the
    matmuls run in 16 bits anyway: half the memory and no loss of what was stored. Rounded ones (`quantize`)
    compute in the dtype of `precision`.
    Raises UserError for anything that cannot be loaded or built, and where PEFT would train something else.
    """
    tokenizer = student_tokenizer(section)
    check_student(section, precision, device)
    torch.manual_seed(seed)
    if section.config is not None:
        model = _from_config(section.config, tokenizer).to(device)
    else:
        model = _from_weights(section, tokenizer, precision, device)
    model.config.use_cache = False
    if section.adapter == "lora":
        torch.manual_seed(seed)  # loading may draw numbers; the adapter's start must not depend on it
        model = add_lora(model, section.lora, section.quantize)
    return BuiltStudent(model.train(), tokenizer)


def check_student(section: StudentSection, precision: str, device: torch.device) -> None:
    """What can be known of a student before its weights are loaded. Raises UserError.

    The adapter is planned on a skeleton built from the config alone.
    """
    check_start(section, precision, device)
    if section.model is not None and section.adapter == "lora":
        plan_lora(student_skeleton(section), section.lora, section.quantize)


def check_start(section: StudentSection, precision: str, device: torch.device) -> None:
    """The same without the adapter: where it starts, and in how many bits. Raises UserError."""
    if section.model is None:
        return
    if (Path(resolve_model(section.model)) / "adapter_config.json").is_file():
        raise UserError(
            f"student '{section.model}' is an adapter; merge it first (distill merge), or train from its base"
        )
    check_quantize(section.quantize, device)
    if section.quantize != "none" and (precision in EMULATED or precision.startswith("fp8")):
        raise UserError(
            f"student.quantize={section.quantize} has matmuls of its own; use train.precision=bf16, not {precision}"
        )


def _from_weights(
    section: StudentSection, tokenizer, precision: str, device: torch.device
) -> PreTrainedModel:
    if section.quantize != "none":
        dtype = precision
    else:
        dtype = "auto" if section.adapter == "lora" and precision != "fp32" else "fp32"
    model = load_model(section.model, dtype, device, training=True, quantize=section.quantize)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"student '{section.model}': its tokenizer has more tokens than its embedding has rows"
        )
    return model


def _from_config(values: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(_fitted(values, tokenizer), dtype=torch.float32)
    # Whatever a wrong value breaks inside the architecture is the recipe's mistake.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"student.config does not make a {values['model_type']} model: {reason}") from error


def _fitted(values: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """A config from scratch has the size and the special tokens of its tokenizer."""
    fixed = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    return AutoConfig.for_model(**{**values, **fixed})


def save_student(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    state_dict: dict | None = None,
) -> None:
    """An ordinary Hugging Face folder: weights or adapter (safetensors), config, tokenizer, model card.

    `state_dict`: the whole tensors of a model whose own are sharded.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = True
    for adapter in getattr(model, "peft_config", {}).values():
        if isinstance(adapter.target_modules, set):  # saved in the order of hashes, another in every process
            adapter.target_modules = sorted(adapter.target_modules)
    tensors = state_dict or {n: p for n, p in model.named_parameters() if p.requires_grad or model is base}
    with writing(folder, sum(t.nbytes for t in tensors.values())):
        model.save_pretrained(
            folder, safe_serialization=True, **({"state_dict": state_dict} if state_dict else {})
        )
        tokenizer.save_pretrained(folder)
        write_atomic(folder / "README.md", card)
        sync_all(folder)
