"""The model that is trained: loaded or from scratch, full, LoRA (distill/models/lora.py) or QLoRA.

student = build_student(recipe.student, recipe.train.precision, torch.device("cpu"), seed=0)
student.model, student.tokenizer, student.trainable
print(format_trainable(student.model))          # what trains, and what stays frozen
"""

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

from distill.config.training import StudentSection
from distill.errors import UserError
from distill.files import sync_all, write_atomic, writing
from distill.models.folders import check_config, refusing
from distill.models.load import check_quantize, load_config, load_model, load_tokenizer, resolve_model
from distill.models.lora import add_lora, plan_lora
from distill.models.precision import EMULATED


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
    from distill.tasks.tokenizer import build_tokenizer

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
