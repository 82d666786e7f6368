"""GGUF, in and out: what a file's header says, its model and tokenizer, and a folder on its way to llama.cpp.

GGUF files: what the header says, and the model and tokenizer in it as ordinary transformers objects.

    header = read_header("model.gguf"); header.metadata["general.architecture"]     # seconds less than the whole
    config = gguf_config("model.gguf")                                             # for `distill describe`
    tokenizer, model = gguf_tokenizer(path), gguf_model(path)                      # dequantised, in fp32

transformers reads the weights (`from_pretrained(..., gguf_file=)`, which needs the package `gguf`). Three things stand
around it here. The header is read without its lists of tokens, since a vocabulary of 262,144 takes half a minute. A
file that is cut short is told before anything is loaded. And where transformers leaves out how text is cut before it
becomes tokens, it is put back: SmolLM2 takes digits one by one, and "  5" is two spaces and a digit.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the rules of cutting: `llama-vocab.cpp` of llama.cpp.

A model folder on its way to GGUF: whether llama.cpp's converter finds what it reads, and the command that runs it.

    distill export MODEL --gguf                                      checks the folder, prints the command
    distill export MODEL --gguf --llama-cpp DIR [--out FILE.gguf]     and runs the converter of that checkout

The converter is llama.cpp's own script, `convert_hf_to_gguf.py`. The package `gguf` reads and writes the format but
does not hold it, and what the index offers as a converter is a copy that puts its own files over that package's. So
it is not a dependency: whoever has llama.cpp has it. What it reads of a folder: `architectures` in config.json, all
tensors by the names that transformers gives them, in safetensors, unquantised; a tokenizer; and the template and
generation config beside them. A SentencePiece vocabulary it reads from `tokenizer.model`: of tokenizer.json alone it
makes a byte-level one (Gemma), and the file would answer nonsense. Byte-level tokenizers it knows by a list of its own.
"""

import importlib.util
import json
import math
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill import console
from distill.errors import RunError, UserError
from distill.files import writing
from distill.models.chat import has_own_template
from distill.models.load import check_weights, load_config, load_tokenizer
from distill.storage import find_file

MAGIC = b"GGUF"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # of the tensors, where the file does not say

# Names of `tokenizer.ggml.pre`: digits are cut one by one, then the rule of GPT-2; and the rule of GPT-2 alone.
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "trillion", "granite-docling"}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself. A list in `metadata` is its length alone."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]  # name -> (sizes, type, offset)
    kept: bytes  # the entries that are no list, as they stand in the file
    kept_count: int
    table: bytes  # of the tensors, as it stands in the file
    version: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def vocab_size(self) -> int | None:
        """As stated, or the number of tokens."""
        stated = self.metadata.get(f"{self.architecture}.vocab_size")
        return stated or self.metadata.get("tokenizer.ggml.tokens")

    @property
    def ends(self) -> list[int]:
        """Every token that ends an answer: of the text, of a turn, of a message."""
        names = ("eos", "eot", "eom")
        found = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return list(dict.fromkeys(token for token in found if token is not None))


def is_gguf(name: str) -> bool:
    """Whether this names a GGUF file that is there."""
    return name.lower().endswith(".gguf") and Path(name).is_file()


def require_gguf() -> None:
    """Raises UserError where the package that reads quantised blocks is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "GGUF files need the package gguf: pip install 'distill-demo[smollm2]', or pip install gguf"
        )


# ---- the header ----------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises UserError for a file that is none, or is cut short."""
    require_gguf()
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a GGUF file") from None
    with file:
        if file.read(4) != MAGIC:
            raise UserError(
                f"{path} is no GGUF file (it does not begin with the letters GGUF); give one that is"
            )
        try:
            header, start = _parse(path, file)
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError):
            raise UserError(
                f"{path} is cut short or damaged: its header does not end; copy it again"
            ) from None
    if "general.architecture" not in header.metadata:
        raise UserError(f"{path} does not say its architecture (general.architecture); make the file anew")
    missing = _end(header, start) - path.stat().st_size
    if missing > 0:
        raise UserError(f"{path} is cut short: {missing:,} bytes of its weights are missing; copy it again")
    return header


def _parse(path: Path, file) -> tuple[Header, int]:
    """(header, where the tensors begin)."""
    version, tensor_count, entries = _unpack(file, "IQQ")
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF version {version}, and 2 and 3 are read; convert it again")
    metadata, kept, count = {}, bytearray(), 0
    for _ in range(entries):
        begin = file.tell()
        key = _string(file)
        (kind,) = _unpack(file, "I")
        metadata[key] = _value(file, kind)
        if kind != _ARRAY or not key.startswith("tokenizer."):
            kept += _between(file, begin)
            count += 1
    begin, tensors = file.tell(), {}
    for _ in range(tensor_count):
        name = _string(file)
        (dimensions,) = _unpack(file, "I")
        sizes = _unpack(file, f"{dimensions}Q")
        kind, offset = _unpack(file, "IQ")
        tensors[name] = (sizes, kind, offset)
    table, end = _between(file, begin), file.tell()
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-end // alignment) * alignment
    return Header(path, metadata, tensors, bytes(kept), count, table, version), start


def _between(file, begin: int) -> bytes:
    """What was read since `begin`."""
    end = file.tell()
    file.seek(begin)
    return file.read(end - begin)


def _unpack(file, form: str) -> tuple:
    form = f"<{form}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file) -> str:
    (length,) = _unpack(file, "Q")
    text = file.read(length)
    if len(text) < length:
        raise struct.error("cut short")
    return text.decode("utf-8")


def _value(file, kind: int) -> Any:
    """One value; of a list of texts its length, of other lists the values."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _FORMATS[kind])[0]
    element, count = _unpack(file, "IQ")
    if element == _STRING:
        for _ in range(count):
            (length,) = _unpack(file, "Q")
            file.seek(length, 1)
        return count
    return list(_unpack(file, f"{count}{_FORMATS[element]}"))


def _end(header: Header, start: int) -> int:
    """Where the last tensor ends."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    end = start
    for name, (sizes, kind, offset) in header.tensors.items():
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise UserError(
                f"{header.path}: tensor {name} is of a type ({kind}) that the installed package gguf does not know; "
                "pip install -U gguf"
            ) from None
        end = max(end, start + offset + math.prod(sizes) // block * size)
    return end


# ---- as transformers has it ----------------------------------------------------------------------------


def gguf_config(path: Path) -> PreTrainedConfig:
    """The model's config from the header alone. Raises UserError for a family that transformers does not read.

    transformers reads the lists of tokens to make a config. It is given a file without them instead: the same header,
    and room for weights that takes no space on the disk.
    """
    header = read_header(path)
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "header.gguf"
        head = struct.pack("<4sIQQ", MAGIC, header.version, len(header.tensors), header.kept_count)
        data = head + header.kept + header.table
        with writing(Path(folder), len(data)), open(stub, "wb") as file:
            file.write(data)
            file.truncate(len(data) + path.stat().st_size)
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=stub.name)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise UserError(_refusal(header, error)) from None
    if header.vocab_size:
        config.vocab_size = header.vocab_size
    ends = header.ends
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or config.eos_token_id
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token := header.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(config, name, token)
    config._name_or_path = ""
    config.__dict__.pop("_model_name_or_path", None)  # the file's own title, which is no name of a model
    return config


def gguf_model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights, dequantised to fp32. Raises UserError. transformers marks this model as quantised."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, config=config, dtype=torch.float32, trust_remote_code=False
        )
    except (ValueError, KeyError, NotImplementedError, OSError, ImportError, RuntimeError) as error:
        raise UserError(_refusal(read_header(path), error)) from None


def gguf_tokenizer(path: Path, header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers makes it, cutting text as the file says. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False
        )
    except Exception as error:  # converters of a dozen families, each with errors of its own
        raise UserError(_refusal(header, error)) from None
    rule, backend = header.metadata.get("tokenizer.ggml.pre"), tokenizer.backend_tokenizer
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        if rule in _DIGITS_FIRST:
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole])
        elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and rule not in _AS_GPT2:
            console.warn(
                f"warning: {path.name} cuts text by a rule of its own ('{rule}') that is not known here; GPT-2's is "
                "used, so some text may become other tokens: compare with the model's original tokenizer"
            )
    tokenizer.model_max_length = header.metadata.get(
        f"{header.architecture}.context_length", tokenizer.model_max_length
    )
    return tokenizer


def _refusal(header: Header, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{header.path}: transformers does not load this '{header.architecture}' GGUF ({reason}); use one of a family "
        "that it reads, or the model's own folder"
    )


# ==== A model folder on its way to GGUF ====

SCRIPT = "convert_hf_to_gguf.py"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")
_READ_FROM_JSON = (
    "Llama",
    "Mistral",
    "Mixtral",
)  # families of which it reads SentencePiece in tokenizer.json too
_OUTTYPES = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
}  # dtype of the weights -> --outtype that loses nothing


@dataclass(frozen=True)
class Layout:
    """A folder that the converter can read."""

    folder: Path
    architecture: str
    tensors: int
    outtype: str
    template: bool

    def command(self, script: str, out: Path) -> list[str]:
        return ["python", script, str(self.folder), "--outfile", str(out), "--outtype", self.outtype]


def check_layout(model: str) -> Layout:
    """Look through a model folder, or a run's student. Raises UserError with everything that is in the way."""
    folder = find_file(model)
    folder = folder / "student" if (folder / "student" / "config.json").is_file() else folder
    if (folder / "adapter_config.json").is_file() or (folder / "student" / "adapter_config.json").is_file():
        adapter = folder if (folder / "adapter_config.json").is_file() else folder / "student"
        raise UserError(
            f"{adapter} is an adapter, and GGUF holds whole models: distill merge {adapter} --out {adapter}-merged"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a saved model")
    check_weights(folder)
    config, problems = load_config(str(folder)), []
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if not named:
        problems.append(f"{folder}/config.json names no `architectures`; save the model with save_pretrained")
    if getattr(config, "quantization_config", None):
        problems.append(f"{folder} is quantised; export the model as it was before")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); save it there with save_pretrained"
        )
    tensors = _tensors(folder)
    problems += _unlike_its_config(folder, config, {name: shape for name, (shape, _) in tensors.items()})
    dtypes = {dtype for _, dtype in tensors.values()}
    if odd := dtypes - _OUTTYPES.keys():
        problems.append(f"{folder} holds weights in {', '.join(sorted(odd))}; save it in float32 or bfloat16")
    if problems:
        raise UserError(*problems)
    tokenizer = load_tokenizer(str(folder))
    kind = tokenizer.backend_tokenizer.model if hasattr(tokenizer, "backend_tokenizer") else None
    pieces = isinstance(kind, models.Unigram) or getattr(kind, "byte_fallback", False)
    if pieces and not (folder / "tokenizer.model").is_file() and not named[0].startswith(_READ_FROM_JSON):
        raise UserError(
            f"{folder}: the converter reads a tokenizer of this kind from tokenizer.model, which is not there, and "
            "would write another one; copy that file from the original model (a GGUF file does not hold it)"
        )
    outtype = next(out for dtype, out in _OUTTYPES.items() if dtype in dtypes)
    return Layout(folder, named[0], len(tensors), outtype, has_own_template(tokenizer))


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of all weight files; no weight is read."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def _unlike_its_config(folder: Path, config, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Weights that the architecture lacks, or has in another shape; tied ones may be left out.

    Names are compared where the folder holds what transformers has in memory. Families that are saved by other names
    (fused experts, taken apart on saving) are known by their names alone to the converter, and not looked at here.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if not shapes.keys() <= wanted.keys():
        return []
    tied = set(skeleton.all_tied_weights_keys) if hasattr(skeleton, "all_tied_weights_keys") else set()
    missing = sorted(wanted.keys() - shapes.keys() - tied)
    wrong = sorted(name for name in shapes if shapes[name] != wanted[name])
    problems = [f"{folder} lacks the weight {missing[0]}; copy the folder again"] if missing else []
    if wrong:
        problems.append(
            f"{folder}: {wrong[0]} is {list(shapes[wrong[0]])}, and its config says {list(wanted[wrong[0]])}"
        )
    return problems


def export_gguf(model: str, out: Path | None, llama_cpp: Path | None) -> str:
    """Check, and convert where llama.cpp is at hand. Returns what to print. Raises UserError, RunError."""
    layout = check_layout(model)
    out = out or layout.folder.with_suffix(".gguf")
    about = (
        f"{layout.folder}: {layout.architecture}, {layout.tensors} tensors, tokenizer, "
        f"{'chat template' if layout.template else 'no chat template'}: what llama.cpp's converter reads; whether its "
        "list has this tokenizer only the converter can tell"
    )
    if llama_cpp is None:
        command = shlex.join(layout.command(f"llama.cpp/{SCRIPT}", out))
        return (
            f"{about}\nno converter is part of a package that is kept up; with llama.cpp "
            f"(https://github.com/ggml-org/llama.cpp) run:\n  {command}\nor give its folder: --llama-cpp DIR"
        )
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise UserError(f"--llama-cpp {llama_cpp}: there is no {SCRIPT} in it; give a checkout of llama.cpp")
    if out.exists():
        raise UserError(f"{out} exists; give another --out, nothing is written over")
    done = subprocess.run(
        [sys.executable, *layout.command(str(script), out)[1:]], capture_output=True, text=True
    )
    if done.returncode or not out.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        if missing := re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", last):
            raise RunError(
                f"llama.cpp's converter needs the package {missing[1]!r}, which is not installed here: pip install "
                f"{missing[1]}, then run again"
            )
        raise RunError(f"llama.cpp's converter refused {layout.folder}: {last}")
    about = about.partition("; whether")[0]
    return f"{about}\n{out}: {out.stat().st_size / 1e6:,.0f} MB ({layout.outtype})"
