"""Loading any causal LM, adapter or tokenizer, with every avoidable surprise turned into one clear line.

Local folders and hub names take the same path: `AutoTokenizer`, `AutoModelForCausalLM`, PEFT for adapter
folders. Weights are safetensors only (pickle can execute code), and no code from a checkpoint runs.

A frozen base in 4 or 8 bits is loaded through bitsandbytes:

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

import inspect
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill import console
from distill.errors import UserError
from distill.models.chat import PLAIN_TEMPLATE, reads_the_clock, set_template, template_date
from distill.models.folders import (
    ADAPTER_WEIGHTS,
    check_folder,
    check_template,
    check_weights,
    first_line,
    read_object,
    refusing,
    shapes,
)
from distill.models.layers import attend_by_row
from distill.models.routers import find_routers
from distill.storage import MANIFEST, changed_files, fingerprint, read_json, resolve_model
from distill.tasks.problems import CHAT_TEMPLATE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}

# The keyword under which a model's forward takes its cache: transformers 5.24 renamed the second to the first.
CACHE_NAMES = ("cache", "past_key_values")


_OWN_TEMPLATES = (PLAIN_TEMPLATE, CHAT_TEMPLATE)  # not a stranger's


def cache_name(model: torch.nn.Module) -> str | None:
    """The keyword of CACHE_NAMES that this model's forward takes; None for a model without such a cache."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(inner.forward).parameters
    return next((name for name in CACHE_NAMES if name in accepted), None)


def load_config(name: str) -> Any:
    """The model's config. Raises UserError where there is none or it needs remote code."""
    source = resolve_model(name)
    check_folder(Path(source))
    with refusing(f"cannot read the config of '{name}'"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load_tokenizer(name: str, template_arguments: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, left-padding, with a pad token and a chat template in any case (distill/models/chat.py).

    template_arguments: `chat_template_kwargs` of a recipe, written into the template for good.
    """
    source = resolve_model(name)
    check_folder(Path(source))
    with refusing(f"cannot load a tokenizer from '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of '{name}' has no end token; set `eos_token` in its tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        brought = tokenizer.chat_template
        set_template(tokenizer, template_arguments)
        tokenizer.padding_side = "left"
        if not tokenizer.encode("2+2"):
            raise UserError(f"the tokenizer of '{name}' reads no token in a text; copy its folder again")
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    if brought and brought not in _OWN_TEMPLATES:
        check_template(tokenizer.chat_template, f"'{name}'", tokens)
    return tokenizer


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    training: bool = False,
    quantize: str = "none",
) -> PreTrainedModel:
    """A causal LM in eval mode; for a PEFT adapter folder, its base with the adapter on top.

    dtype: "auto" (as stored), "fp32", "bf16" or "fp16". `training` keeps the kernels that train fastest.
    quantize: "4bit" or "8bit" for the linear layers, on request only.
    Raises UserError with the reason and the fix for a missing folder, pickle-only or damaged weights,
    weights that do not fill the model, a missing base.
    """
    source = resolve_model(name)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, dtype, device, quantize)
    check_folder(folder)
    check_weights(folder)
    rounded = {} if quantize == "none" else _rounded(name, dtype, torch.device(device), quantize)
    with console.slow(f"loading {name}"), refusing(f"cannot load '{name}' as a causal LM"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **rounded,
        )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        key = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))[0]
        raise UserError(
            f"'{name}' lacks weights its config asks for (first: {key}); it would run on random numbers"
        )
    _check_finite(model, name)
    if rounded:  # already on the device, and they refuse to be moved
        keep_differentiable(model, training)
    else:
        model.to(device)
    return (model if training else fit_for_inference(model)).eval()


def _check_finite(model: torch.nn.Module, name: str, only: str = "") -> None:
    """Raises UserError for a weight that is NaN or infinite: all that it answers would be no number either.

    Its least and its largest number are looked at. `only`: of tensors with this in their names.
    """
    for key, parameter in model.named_parameters():
        if (
            only in key
            and parameter.is_floating_point()
            and parameter.element_size() > 1
            and parameter.numel()
        ):
            low, high = torch.aminmax(parameter.detach())
            if not (low.isfinite() and high.isfinite()):
                raise UserError(
                    f"'{name}' has weights that are no numbers (NaN or infinite, first: {key}); copy the folder "
                    "again, or train it anew with a lower learning rate"
                )


def check_adapter_base(folder: Path) -> str:
    """The base model that an adapter folder names. Raises UserError if it is not there."""
    check_folder(folder)
    try:
        base = read_object(folder / "adapter_config.json")["base_model_name_or_path"]
        resolved = Path(resolve_model(base))
        if (resolved / "adapter_config.json").exists():
            raise UserError("it is an adapter itself")
        return str(base)
    except (UserError, KeyError) as error:
        raise UserError(
            f"adapter {folder}: its base model does not load ({first_line(error)}); "
            "put it there, or edit base_model_name_or_path in adapter_config.json"
        ) from None


def base_changes(folder: Path) -> list[str]:
    """How the base of an adapter differs from the one it was trained on; [] where nothing was recorded.

    An adapter folder made here says in its manifest which files its base had (`base_source`).
    """
    try:
        recorded = read_json(folder / MANIFEST)["base_source"]["files"]
        base = Path(resolve_model(check_adapter_base(folder)))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return []
    return changed_files(base, recorded) if base.is_dir() else []


def check_same_base(folder: Path) -> None:
    """Raises UserError where the base under an adapter's path is another than it was trained on."""
    if changed := base_changes(folder):
        raise UserError(
            f"adapter {folder} was trained on another base ({changed[0]}); put it back, or train the adapter anew"
        )


def check_model(name: str, tokenizer: bool = True) -> None:
    """A model (or adapter and its base) that can be loaded: config, whole weights, tokenizer. Raises UserError.

    tokenizer: False where the caller loads it next, since one of 262,144 tokens takes 5 CPU seconds and 0.2 GB.
    """
    folder = Path(resolve_model(name))
    if folder.is_dir():
        check_weights(folder)
        if (folder / "adapter_config.json").is_file():
            check_adapter_base(folder)
            check_same_base(folder)
        else:
            load_config(name)
    if tokenizer:
        load_tokenizer(name)


def _rounded(name: str, dtype: str, device: torch.device, quantize: str) -> dict[str, Any]:
    check_quantize(quantize, device)
    config = load_config(name)
    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    return {
        "quantization_config": quantization_config(quantize, config, compute),
        "device_map": {"": device},
    }


def _load_adapter(folder: Path, dtype: str, device, quantize: str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    check_weights(folder)
    for change in base_changes(folder)[:1]:
        console.warn(f"warning: adapter {folder} was trained on another base: {change}")
    base = load_model(check_adapter_base(folder), dtype, device, quantize=quantize)
    with refusing(
        f"adapter {folder} does not fit its base", "take the base it was trained on, or copy it again"
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, keys that are missing, is compared below
            model = PeftModel.from_pretrained(base, str(folder))
        wanted, stored = set(get_peft_model_state_dict(model)), set(shapes(folder / ADAPTER_WEIGHTS))
        if wanted != stored:
            missing, surplus = sorted(wanted - stored), sorted(stored - wanted)
            raise ValueError(
                f"{len(missing)} tensors are missing and {len(surplus)} have no place, first {(missing + surplus)[0]}"
            )
    _check_finite(model, str(folder), ".lora_")
    return model.to(device).eval()


def fit_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """On CPU, decode with the plain loop over experts; results agree to rounding. Elsewhere, masks without a look.

    "eager" decodes the embedded teacher at 8.2k tokens/s, the default grouped matmul at 5.4-6.6k. Training
    keeps the default, which is the faster one there (0.47 s a step against 0.58).
    """
    if model.device.type == "cpu":
        model.set_experts_implementation("eager")
    else:
        attend_by_row(model)  # transformers' own masks make the host wait, at every token of an answer
    return model


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the vocabulary's content and of the chat template: sizes alone prove nothing.

    A template that reads the clock is another text on another day: its `date` belongs to it.
    """
    date = {"date": template_date().isoformat()} if reads_the_clock(tokenizer) else {}
    return date | {
        "vocabulary": fingerprint(sorted(tokenizer.get_vocab().items())),
        "chat_template": fingerprint(tokenizer.chat_template),
        "eos": str(tokenizer.eos_token),
    }


def same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """The same token for every id: sizes alone say nothing (151,936 and 152,064 are one tokenizer, padded)."""
    return a.get_vocab() == b.get_vocab()


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends an answer: the tokenizer's, and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


# ---------------------------------------------------------------------------------------- 4 or 8 bits


def check_quantize(quantize: str, device: torch.device) -> None:
    """That this machine can hold and run such weights. Raises UserError with the reason."""
    if quantize == "none":
        return
    if find_spec("bitsandbytes") is None:
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
