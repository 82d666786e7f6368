"""What a model folder holds, looked at before any library sees it: a stranger's folder is refused, and not run into.

    check_folder(folder)         # files, JSON, sizes in configs, weights that are whole and safetensors; UserError
    check_template(text, label)  # a chat template ends, within 2 s, 512 MB and a million characters
    with refusing("cannot load ..."): AutoTokenizer.from_pretrained(...)     # whatever a library raises: one line

Pickle can execute code, so it is refused by name where a library would fall back on it: `adapter_model.bin` without
`adapter_model.safetensors`, and weights that are there as pickle alone. Sizes are bounded because a skeleton is built
from them: 10^9 layers are a line of JSON, and hours of work.
"""

import json
import math
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.errors import UserError
from distill.storage import verify_folder
from distill.workers import template_worker
from distill.workers.template_worker import MEMORY, MOST_CHARACTERS, SECONDS

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Files that transformers or PEFT read; each holds one JSON object.
_OBJECTS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json", "processor_config.json",
)  # fmt: skip
_LONG = (
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
)  # a vocabulary, whose reader looks at every entry
_TEXTS = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_MOST_JSON = 2**28  # bytes
# Sizes in a config, and what nothing real exceeds. A list has one for each layer.
_SIZES = {
    "hidden_size": 10**6, "intermediate_size": 10**7, "moe_intermediate_size": 10**7, "vocab_size": 10**8,
    "num_hidden_layers": 2000, "n_layer": 2000, "num_layers": 2000, "n_embd": 10**6, "n_head": 10**5,
    "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "head_dim": 10**5, "num_experts": 10**5,
    "num_local_experts": 10**5, "n_routed_experts": 10**5, "num_experts_per_tok": 10**5,
    "max_position_embeddings": 10**10,
}  # fmt: skip
# Numbers that every token's arithmetic goes through, and what they are between; outside they make NaN of all of it.
_FACTORS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"), (0.0, 1.0)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (1e-3, 1e15)),
}  # fmt: skip
# Sizes that may be 0: a config makes as many labels, layers or experts of them as they say, when it is read.
_MOST = {
    **dict.fromkeys(("d_model", "n_inner", "ffn_dim", "d_ff", "d_inner"), 10**7),
    **dict.fromkeys(("n_layers", "num_nextn_predict_layers", "decoder_layers", "encoder_layers"), 2000),
    **dict.fromkeys(("n_shared_experts", "q_lora_rank", "kv_lora_rank", "v_head_dim", "state_size"), 10**6),
    "num_labels": 10**5,
}  # fmt: skip
_DROPOUTS = (
    "attention_dropout", "hidden_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "router_jitter_noise",
)  # fmt: skip
_FACTORS |= dict.fromkeys(_DROPOUTS, (0.0, 1.0))
# What runs a part of the model: names of transformers' own ways. With a slash it is a repository of compiled code.
_KERNELS = ("attn_implementation", "experts_implementation")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WHOLE_NUMBERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")  # dtypes of safetensors
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TIMES = 32  # packed weights (4 bits and less) have fewer elements than parameters, but not so many fewer
_CONVERSATIONS = (
    [{"role": "user", "content": "2+2"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}],
    [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3"},
    ],
)
_AGAIN = "copy the folder again, or write it with `save_pretrained`"


# ---- whatever a library raises -----------------------------------------------------------------------


@contextmanager
def refusing(what: str, fix: str = _AGAIN) -> Iterator[None]:
    """Every error inside becomes a UserError of one line, `what: reason; fix`; one that is one already passes.

    Libraries raise what they like for what strangers wrote; those in Rust panic with a BaseException.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {first_line(error)}; {fix}") from error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:  # its advice is the one thing that is not done here
        return (
            "it needs code from the checkpoint, which is never run: use a model that transformers implements"
        )
    line = "".join(c if c.isprintable() else "?" for c in text.splitlines()[0]).replace(";", ",")
    return line if len(line) <= 300 else f"{line[:297]}..."


# ---- a folder ----------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Everything above but the chat template. Raises UserError. A folder without weights passes: see check_weights."""
    if not folder.is_dir():
        return  # a hub name: what is downloaded is looked at by the library
    _check_ordinary(folder)
    verify_folder(folder)
    found = {name: read_object(folder / name) for name in _OBJECTS if (folder / name).exists()}
    if "config.json" in found:
        check_config(found["config.json"], f"{folder / 'config.json'}")
    for name in ("config.json", "generation_config.json"):
        _check_tokens(found.get(name, {}), folder / name)
    if "adapter_config.json" in found:
        _check_adapter(folder, found["adapter_config.json"])
    elif any(folder.glob("*.safetensors")):
        check_weights(folder)
        _check_proportion(folder, found.get("config.json", {}))
        _check_kinds(folder, found.get("config.json", {}))


def _check_ordinary(folder: Path) -> None:
    for path in folder.iterdir():
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(f"{path} is no ordinary file, and reading it may never end; remove it")
        if (
            (path.suffix == ".jinja" or path.name in _TEXTS)
            and path.exists()
            and path.stat().st_size > _MOST_JSON
        ):
            raise UserError(f"{path} has more than {_MOST_JSON:,} bytes, and is read whole; {_AGAIN}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"it has more than {_MOST_JSON:,} bytes")
        strict = {} if path.name in _LONG else {"object_pairs_hook": _once, "parse_constant": _number}
        value = json.loads(path.read_text(encoding="utf-8"), **strict)
    except RecursionError:
        raise UserError(f"{path} is no JSON that can be read (nested too deeply); {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON that can be read ({first_line(error)}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} and not an object {{...}}; {_AGAIN}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that is written twice readers keep one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice[:60]!r} is written twice")
    return found


def _number(name: str) -> float:
    """Infinity is a limit in real configs (Mamba 2); NaN is none."""
    if name == "NaN":
        raise ValueError("it holds NaN, which is no setting")
    return float(name)


def check_config(config: dict[str, Any], where: str) -> None:
    """Sizes of a model config (also of the configs inside it) are whole, positive and possible. Raises UserError."""
    for key, value in config.items():
        if key in _SIZES and value is not None:
            for size in value if isinstance(value, list) else [value]:
                if type(size) is not int or not 0 < size <= _SIZES[key]:
                    raise UserError(
                        f"{where}: {key} is {str(value)[:60]}, not a whole number from 1 to {_SIZES[key]:,}; correct it"
                    )
        if key in _MOST and (
            isinstance(value, str | float) or (isinstance(value, int) and not 0 <= value <= _MOST[key])
        ):
            raise UserError(
                f"{where}: {key} is {str(value)[:60]}, not a whole number from 0 to {_MOST[key]:,}; correct it"
            )
        if (
            key in _FACTORS
            and type(value) in (int, float)
            and not _FACTORS[key][0] <= value <= _FACTORS[key][1]
        ):
            low, high = _FACTORS[key]
            raise UserError(
                f"{where}: {key} is {str(value)[:60]}, not a number from {low:g} to {high:g}; correct it"
            )
        if key.strip("_").removesuffix("_internal") in _KERNELS and "/" in str(value):
            raise UserError(
                f"{where}: {key} is {str(value)[:60]}, code from a hub, which is never run; take this key out"
            )
        if isinstance(value, dict) and (key.endswith("_config") or key.startswith("rope_")):
            check_config(value, where)
    experts = [config[key] for key in _EXPERTS if isinstance(config.get(key), int)]
    chosen = config.get("num_experts_per_tok")
    if experts and isinstance(chosen, int) and chosen > max(experts):
        raise UserError(f"{where}: num_experts_per_tok is {chosen}, of {max(experts)} experts; correct it")
    family = config.get("model_type")
    if family is not None and not isinstance(family, str):
        raise UserError(f"{where}: model_type is {str(family)[:60]}, not a name; correct it")


def _check_tokens(config: dict[str, Any], path: Path) -> None:
    for key in _TOKENS:
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        if any(i is not None and (type(i) is not int or not -1 <= i < 2**31) for i in ids):
            raise UserError(
                f"{path}: {key} is {str(value)[:60]}, not a token id or a list of them; correct it"
            )


# ---- weights -----------------------------------------------------------------------------------------


def check_weights(folder: Path) -> None:
    """Every safetensors file is whole, and no weights exist only as pickle. Raises UserError."""
    if not folder.is_dir():
        return  # a hub name: checked by the download
    _check_ordinary(folder)
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / ADAPTER_WEIGHTS).is_file() and "adapter_model.bin" in pickled:
        files = []  # PEFT would take the pickle, whatever else is there
    if not files:
        if pickled:
            name = "adapter_model.bin" if "adapter_model.bin" in pickled else pickled[0]
            raise UserError(
                f"{folder} has pickle weights only ({name}), which can execute code and are never "
                "loaded; convert it with `save_pretrained`, which writes safetensors"
            )
        raise UserError(f"{folder} has no *.safetensors weights; is it a saved model?")
    if adapter and not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} is an adapter without {ADAPTER_WEIGHTS}; {_AGAIN}")
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index, {p.name for p in files})
    for file in files:
        try:
            with safe_open(file, "numpy"):  # its header is looked at; "pt" would import torch
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is damaged or cut short ({first_line(error)}); copy it again") from None


def _check_index(index: Path, there: set[str]) -> None:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map of names of files; {_AGAIN}")
    wanted = set(weight_map.values())
    if outside := sorted(name for name in wanted if Path(name).name != name):
        raise UserError(f"{index} names a file outside its folder ({outside[0][:60]}); {_AGAIN}")
    if missing := sorted(wanted - there):
        raise UserError(f"{index.parent}: weight file {missing[0][:60]} is missing; copy the folder again")


def shapes(file: Path) -> dict[str, list[int]]:
    """{name: shape} of a safetensors file that `safe_open` accepts: its header alone is read."""
    return {name: entry["shape"] for name, entry in _header(file).items()}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _check_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Whole numbers in place of weights are packed ones, and a config says so; else they are damage."""
    if config.get("quantization_config"):
        return
    for file in folder.glob("*.safetensors"):
        for name, entry in _header(file).items():
            if name.endswith(".weight") and entry["dtype"] in _WHOLE_NUMBERS:
                raise UserError(
                    f"{file}: {name[:100]} is of {entry['dtype']}, whole numbers, and config.json has no "
                    f"quantization_config that says how to read them; {_AGAIN}"
                )


def _check_proportion(folder: Path, config: dict[str, Any]) -> None:
    """A config that asks for far more than the weights hold would fill memory before anybody compares the two."""
    found = [shape for file in folder.glob("*.safetensors") for shape in shapes(file).values()]
    stored = sum(math.prod(shape) for shape in found)
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    sizes = {
        key: max(value) if isinstance(value, list) and value else value if isinstance(value, int) else 0
        for key, value in ((key, inner.get(key)) for key in _SIZES)
    }
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    least = width * sizes["vocab_size"] + layers * width * (width + sizes["intermediate_size"]) // 4
    if least > _TIMES * stored or layers > max(len(found), 200):
        raise UserError(
            f"{folder}: config.json asks for {layers:,} layers and at least {least:,} parameters, and the weights "
            f"hold {len(found):,} tensors of {stored:,}; they do not belong together, {_AGAIN}"
        )


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """The fields of adapter_config.json that PEFT trusts, and weights of that rank. Raises UserError."""
    where = folder / "adapter_config.json"
    check_weights(folder)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise UserError(
            f"adapter {folder}: its base model does not load (base_model_name_or_path is {str(base)[:60]!r}); put it "
            "there, or edit base_model_name_or_path in adapter_config.json"
        )
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f"{where}: peft_type is {str(config.get('peft_type'))[:60]}, not a name; {_AGAIN}")
    if config["peft_type"] != "LORA":
        return
    rank, alpha = config.get("r"), config.get("lora_alpha")
    longest = max((max(shape, default=0) for shape in shapes(folder / ADAPTER_WEIGHTS).values()), default=0)
    if type(rank) is not int or not 0 < rank <= longest:
        raise UserError(
            f"{where}: the rank r is {str(rank)[:60]}, and no tensor of the adapter has it; {_AGAIN}"
        )
    if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise UserError(f"{where}: lora_alpha is {str(alpha)[:60]}, not a number above 0; {_AGAIN}")
    targets = config.get("target_modules")
    named = [targets] if isinstance(targets, str) else targets
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise UserError(f"{where}: target_modules is {str(targets)[:60]}, not a list of names; {_AGAIN}")


# ---- chat templates ----------------------------------------------------------------------------------


def check_template(template: Any, label: str, tokens: dict[str, str | None]) -> None:
    """Raises UserError where a chat template is no text, or does not end within the limits of template_worker.py.

    tokens: `bos_token` and `eos_token`, which templates write. Each text is tried once per process.
    """
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"the chat template of {label} is no text; give the tokenizer a chat_template.jinja")
    for text in texts:
        if problem := _tried(text, tuple(tokens.items())):
            raise UserError(
                f"the chat template of {label} {problem}; give the tokenizer another chat_template.jinja"
            )


@lru_cache(maxsize=64)
def _tried(template: str, tokens: tuple[tuple[str, str | None], ...]) -> str | None:
    return _stopped({"template": template, "conversations": _CONVERSATIONS, "tokens": dict(tokens)})


def conversation_problem(template: str, tokens: dict[str, str | None], messages: list[dict]) -> str | None:
    """Why a template does not end within its limits for these messages, as "writes more than ..."; None if it does."""
    return _stopped({"template": template, "conversations": [messages], "tokens": tokens})


# Seconds by the clock. The worker itself ends after SECONDS of work; on a busy machine those take minutes.
_WAIT = 600


def _stopped(asked: dict[str, Any]) -> str | None:
    command = [sys.executable, "-P", template_worker.__file__]
    try:
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=_WAIT)
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS} s"
    said = done.stdout.strip()
    if said == "long":
        return f"writes more than {MOST_CHARACTERS:,} characters for a question of three"
    return None if said else f"does not end within {SECONDS} s and {MEMORY // 2**20} MB"
