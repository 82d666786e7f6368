"""A frozen base in 4 or 8 bits through bitsandbytes: what is asked of the machine, and what stays in 16 bits.

    student: {model: org/name, adapter: lora, quantize: 4bit}          QLoRA (Dettmers et al. 2023, arXiv 2305.14314)
    load_model(name, "bf16", device, quantize="4bit")                  any model, for inference too

4bit is NF4 with double quantisation (section 3 of the paper), 8bit is LLM.int8() (arXiv 2208.07339). 4-bit matmuls
run in the dtype the model is loaded in, 8-bit ones in fp16 whatever is asked. Only nn.Linear weights shrink:
embedding, output head, norms and, in every MoE of transformers, the fused routed experts do not, so a MoE of mostly
experts gains little. Routers stay whole even where they are an nn.Linear: a rounded router chooses other experts.

peft.prepare_model_for_kbit_training is not used. It casts every 16-bit tensor left to fp32, fused experts included
(twice the memory of what dominates a MoE), and switches on re-entrant gradient checkpointing. What it is for happens
elsewhere: PEFT freezes the base, adapters are fp32, and norms compute in fp32 inside their own forward.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from distill.errors import UserError
from distill.models.routers import find_routers


def check_quantize(quantize: str, device: torch.device) -> None:
    """That this machine can hold and run such weights. Raises UserError with the reason."""
    if quantize == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantize={quantize} needs bitsandbytes: pip install 'distill-demo[quantize]'")
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(f"quantize={quantize}: bitsandbytes does not run on {device.type}, only on {known}")


def quantization_config(quantize: str, config: PreTrainedConfig, compute: torch.dtype) -> Any:
    """A BitsAndBytesConfig for a model of this config; what is kept whole is found on a skeleton of it.

    compute: what 4-bit matmuls run in.
    """
    from transformers import BitsAndBytesConfig

    whole = _kept_whole(config)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=whole,  # for 4 bits too, whatever its name says
    )


def keep_differentiable(model: nn.Module, training: bool) -> None:
    """Stops bitsandbytes from rearranging 4-bit weights for good on CPUs with bf16 units (0.50, AVX512-BF16).

    There a layer that is called once in eval mode, as validation and sampling do, is repacked for a kernel without
    a backward pass: from then on no gradient passes through it, in train mode either, and nothing says so. Widths
    that are no multiple of 32 fail in the repacking. So not for a model that trains, nor for such widths.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (training or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False


def _kept_whole(config: PreTrainedConfig) -> list[str]:
    """Full names of the linear layers that are not rounded: the output head and everything in a router."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {id(module): name for name, module in skeleton.named_modules()}
    head = skeleton.get_output_embeddings()
    inside = [r.router if r.router is not None else r.block.router_gate for r in find_routers(skeleton)]
    linear = [m for router in inside for m in router.modules() if isinstance(m, nn.Linear)]
    return sorted(names[id(module)] for module in [head, *linear] if module is not None)


def logical_size(parameter: nn.Parameter) -> int:
    """Numbers a parameter stands for: four-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
