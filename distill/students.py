"""The model that is trained: loaded or from scratch, full or with LoRA, and what really trains asserted.

PEFT 0.21 rewrites `gate_proj`-like targets of 14 MoE families to the routed experts without a word
(DeepSeek-V3 among them), so the names of the trainable tensors are compared with those asked for.

    student = build_student(recipe.student, recipe.train.precision, torch.device("cpu"), seed=0)
    student.model, student.tokenizer, student.trainable
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models import load_model, load_tokenizer
from distill.train_sections import Lora, Student


@dataclass
class BuiltStudent:
    model: nn.Module  # a PreTrainedModel, or a PeftModel around one
    tokenizer: PreTrainedTokenizerBase

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def base(self) -> PreTrainedModel:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def student_tokenizer(section: Student) -> PreTrainedTokenizerBase:
    """The tokenizer of the student, without loading its weights."""
    if section.model is not None:
        return load_tokenizer(section.model)
    if section.tokenizer != "embedded":
        return load_tokenizer(section.tokenizer)
    from distill.tokenizer import build_tokenizer

    return build_tokenizer()


def build_student(section: Student, precision: str, device: torch.device, seed: int) -> BuiltStudent:
    """The student ready to train on `device`, deterministic in `seed`.

    Trained weights are float32 masters. Weights that LoRA leaves frozen keep their stored dtype when the
    matmuls run in 16 bits anyway: half the memory and no loss of what was stored.
    Raises UserError for anything that cannot be loaded or built, and where PEFT would train something else.
    """
    tokenizer = student_tokenizer(section)
    torch.manual_seed(seed)
    if section.config is not None:
        model = _from_config(section.config, tokenizer).to(device)
    else:
        frozen_16_bit = section.adapter == "lora" and precision in ("bf16", "fp16", "fp8")
        model = load_model(section.model, "auto" if frozen_16_bit else "fp32", device, training=True)
        if hasattr(model, "get_base_model"):
            raise UserError(
                f"student '{section.model}' is an adapter; merge it first, or train from its base"
            )
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(
                f"student '{section.model}': its tokenizer has more tokens than its embedding has rows"
            )
    model.config.use_cache = False
    if section.adapter == "lora":
        torch.manual_seed(seed)  # loading may draw numbers; the adapter's start must not depend on it
        model = add_lora(model, section.lora)
    return BuiltStudent(model.train(), tokenizer)


def _from_config(values: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    fixed = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    try:
        config = AutoConfig.for_model(**{**values, **fixed})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (
        Exception
    ) as error:  # whatever a wrong value breaks inside the architecture is the recipe's mistake
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"student.config does not make a {values['model_type']} model: {reason}") from error


def lora_targets(model: PreTrainedModel, which: str) -> list[str]:
    """Full names of the nn.Linear modules LoRA is asked to adapt: all but the output head, or attention's."""
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if which == "attention":
        names = [n for n in names if "attn" in n or "attention" in n]
    if not names:
        raise UserError(f"student.lora.targets={which}: this model has no such linear layers")
    return names


def add_lora(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """Wrap with PEFT LoRA and assert that exactly the asked-for modules train."""
    from peft import LoraConfig, get_peft_model

    wanted = lora_targets(model, lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=_shortest_patterns(model, wanted),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"PEFT refuses this LoRA: {str(error).splitlines()[0]}; try student.lora.targets=attention"
        ) from None
    prefix = "base_model.model."
    trained = {n.removeprefix(prefix) for n, p in wrapped.named_parameters() if p.requires_grad}
    asked = {f"{name}.lora_{side}.default.weight" for name in wanted for side in "AB"}
    if trained != asked:
        extra, lost = sorted(trained - asked), sorted(asked - trained)
        raise UserError(
            f"PEFT would not train what was asked: {len(lost)} tensors missing (first: {(lost or ['-'])[0]}), "
            f"{len(extra)} others trained instead (first: {(extra or ['-'])[0]}); "
            "for this MoE family use student.lora.targets=attention or student.adapter=full"
        )
    return wrapped


def _shortest_patterns(model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """Last name components ("q_proj", ...) where they select exactly `wanted`; else the full names.

    A short list keeps adapter_config.json readable and applies to the same architecture of another depth.
    """
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    selected = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves]
    return leaves if sorted(selected) == sorted(wanted) else wanted


def save_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """An ordinary Hugging Face folder: weights or adapter (safetensors), config, tokenizer, model card."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = True
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
