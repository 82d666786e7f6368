"""A model folder on its way to GGUF: whether llama.cpp's converter finds what it reads, and the command that runs it.

    distill export MODEL --gguf                                      checks the folder, prints the command
    distill export MODEL --gguf --llama-cpp DIR [--out FILE.gguf]     and runs the converter of that checkout

The converter is llama.cpp's own script, `convert_hf_to_gguf.py`. The package `gguf` reads and writes the format but
does not hold it, and what the index offers as a converter is a copy that puts its own files over that package's. So
it is not a dependency: whoever has llama.cpp has it. What it reads of a folder: `architectures` in config.json, all
tensors by the names that transformers gives them, in safetensors, unquantised; a tokenizer; and the template and
generation config beside them. A SentencePiece vocabulary it reads from `tokenizer.model`: of tokenizer.json alone it
makes a byte-level one (Gemma), and the file would answer nonsense. Byte-level tokenizers it knows by a list of its own.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import models
from transformers import AutoModelForCausalLM

from distill.errors import RunError, UserError
from distill.models.chat import has_own_template
from distill.models.load import check_weights, load_config, load_tokenizer
from distill.storage import find_file

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
            "would write another one; copy that file from the model it was made from"
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
