"""An adapter folded into its base, and what that cost: an ordinary model folder with its error measured.

    distill merge checkpoints/demo/student --out checkpoints/demo-merged [--dtype auto|fp32|bf16]

W + BA is formed in fp32 whatever the base is stored in, and cast once, last. Then the folder as written is loaded
again and compared with the adapter on its base on the same tokens: in fp32 the two agree to rounding, but in bf16
the sum is rounded, and in a MoE a rounded weight sends tokens to other experts. Both are reported, none is hidden.
A merge that is wrong beyond rounding (an adapter on one of two tied weights) is not written.

The result is what `save_pretrained` of the same architecture writes, so converters (vLLM, llama.cpp) find the
names, shapes and dtypes they know. An adapter trained on a rounded base (`student.quantize`) is merged into the
base as stored. Memory: the model in fp32 and once more in the target dtype.

Shapes: T tokens of all probe rows, V vocabulary, k experts per token.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.data.cards import COMPARISONS, merged_card
from distill.data.provenance import UPSTREAM, model_source, upstream_manifests
from distill.devices import describe_device
from distill.errors import RunError, UserError
from distill.files import replacing, sync_all, write_atomic
from distill.models.ahead import FILE
from distill.models.chat import prompt_ids
from distill.models.load import (
    check_adapter_base,
    check_same_base,
    load_model,
    load_tokenizer,
    same_vocabulary,
)
from distill.models.routers import find_routers
from distill.moe.metrics import overlap
from distill.moe.recording import record_routing
from distill.stages import versions
from distill.storage import (
    MANIFEST,
    find_file,
    fingerprint,
    hash_file,
    read_json,
    record_entries,
    write_sealed,
)

# Read by models whose tokenizer is not the embedded one; any ordinary text serves, this one has digits and names.
PROBE_TEXT = (
    "The train to Lyon leaves at 18:45 from platform 7, and the journey takes two hours and four minutes.",
    "Water boils at 100 degrees at sea level; on a mountain of 3,000 metres it boils at about 90.",
    "To add 4387 and 2956, start with the ones: 7 plus 6 is 13, write 3 and carry 1.",
    "A letter from the archive, dated 12 March 1841, mentions a bridge that was never built.",
    "If every router of a network sends its messages to the same place, that place becomes the bottleneck.",
)
_LONGEST = 256  # tokens of one probe row
_WRONG = 1e-2  # mean logit error over their standard deviation that rounding in fp32 cannot explain


@dataclass
class Reading:
    """What a model says on the probe: logits, one [T, V], and the experts chosen, one [T, k] per routed layer."""

    logits: torch.Tensor
    chosen: dict[str, torch.Tensor]


def merge_adapter(source: str, out: Path, dtype: str = "auto") -> dict[str, Any]:
    """Merge the adapter in folder `source` into its base, as the new model folder `out`; returns its manifest.

    dtype: "fp32", "bf16", or "auto" for each tensor's dtype in the base. The manifest's `merge` has one entry
    per comparison with the adapter on its base in fp32, see `difference`: "fp32" merged, before the cast; "stored" the
    folder as loaded again, computing in its own dtype; "stored_in_fp32" the same weights computing in fp32;
    "unmerged" the adapter on its base in that dtype, which is what the dtype costs without any merge.
    Raises UserError for a folder that is no adapter or an `out` that exists, RunError for a wrong merge.
    """
    begun, folder = time.perf_counter(), find_file(source)
    if not (folder / "adapter_config.json").is_file():
        what = (
            "is a whole model already" if (folder / "config.json").is_file() else "has no adapter_config.json"
        )
        raise UserError(
            f"{source} {what}; give the folder of an adapter, as RUN_DIR/student with adapter: lora"
        )
    if out.exists():
        raise UserError(f"{out} exists; give a new folder, nothing is written over")
    base = check_adapter_base(folder)
    check_same_base(folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else base)
    adapted = load_model(str(folder), "fp32")
    rows = probe_rows(tokenizer, adapted)
    reference = read(adapted, rows)
    merged, before = _merged(adapted, rows, reference)
    final = _cast_like(merged, base, dtype)
    del adapted, merged
    with replacing(out, sum(p.nbytes for p in final.parameters())) as temporary:
        temporary.mkdir()
        final.config.use_cache = True
        final.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if (folder / FILE).is_file():  # it read the adapted states, and reads the merged ones
            shutil.copy(folder / FILE, temporary / FILE)
        errors = {
            "fp32": before,
            "stored": difference(reference, read(load_model(str(temporary), dtype), rows)),
            "stored_in_fp32": difference(reference, read(load_model(str(temporary), "fp32"), rows)),
            "unmerged": difference(reference, read(load_model(str(folder), dtype), rows)),
        }
        manifest = _manifest(folder, base, temporary, dtype, errors, time.perf_counter() - begun)
        manifest["parameters"] = sum(p.numel() for p in final.parameters())
        write_sealed(temporary / UPSTREAM, _upstream(folder))
        manifest["records"] = record_entries(temporary)
        write_sealed(temporary / MANIFEST, manifest)
        given = folder / "README.md"
        card = merged_card(out.name, manifest, given.read_text(encoding="utf-8") if given.is_file() else "")
        write_atomic(temporary / "README.md", card)
        sync_all(temporary)
    return manifest


# ---- merging -----------------------------------------------------------------------------------------


def _merged(adapted: nn.Module, rows: list[list[int]], reference: Reading) -> tuple[PreTrainedModel, dict]:
    """The base with the adapter added in fp32, and how far its logits are from the adapter's beside it."""
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # weights that are not finite
        raise RunError(f"this adapter cannot be merged: {str(error).splitlines()[0]}") from None
    found = difference(reference, read(merged, rows))
    if not found["mean_abs"] <= _WRONG * float(reference.logits.std()):
        raise RunError(
            f"merged in fp32, logits differ by {found['mean_abs']:.3g} on average from the adapter on its base: "
            "this adapter has no exact merge (does it adapt one of two tied weights?); use it as an adapter"
        )
    return merged, found


def _cast_like(merged: PreTrainedModel, base: str, dtype: str) -> PreTrainedModel:
    """The merged weights, each in the dtype that the base's own loading gives it (some stay fp32 in a bf16 model)."""
    final = load_model(base, dtype, training=True)
    final.load_state_dict(merged.state_dict())
    return final


# ---- measuring ---------------------------------------------------------------------------------------


def probe_rows(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[list[int]]:
    """Token ids that both models read: held-out problems with their worked answers, or ordinary text."""
    from distill.tasks.problems import CHAT_TEMPLATE, LEVELS, build_tokenizer, sample_problems

    if tokenizer.chat_template == CHAT_TEMPLATE and same_vocabulary(tokenizer, build_tokenizer()):
        problems = sample_problems("validation", dict.fromkeys(LEVELS, 14), seed=0)
        rows = [
            prompt_ids(tokenizer, [{"role": "user", "content": p.question}])
            + tokenizer.encode(p.solution, add_special_tokens=False)
            for p in problems
        ]
    else:
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in PROBE_TEXT]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    return [row[: min(_LONGEST, context)] for row in rows]


@torch.inference_mode()
def read(model: nn.Module, rows: list[list[int]]) -> Reading:
    """One forward pass per row, without padding."""

    def forward() -> torch.Tensor:
        found = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]
        return torch.cat(found)

    if not find_routers(model):
        return Reading(forward(), {})
    with record_routing(model) as recording:
        logits = forward()
    return Reading(logits, {name: layer.indices for name, layer in recording.layers.items()})


def difference(reference: Reading, other: Reading) -> dict[str, Any]:
    """How far `other` is from `reference` on the same T tokens.

    max_abs, mean_abs: over all T x V logits. top1_agreement: share of tokens with the same most likely next token.
    Of a MoE also router_flip_rate, the share of (token, layer, slot) choices that went to another expert, and
    tokens_rerouted, the share of tokens with such a choice in any layer.
    """
    gap = (reference.logits - other.logits).abs()
    same = (reference.logits.argmax(-1) == other.logits.argmax(-1)).double()
    found = {
        "tokens": len(gap),
        "max_abs": float(gap.max()),
        "mean_abs": float(gap.double().mean()),
        "top1_agreement": float(same.mean()),
    }
    if reference.chosen:
        pairs = ((reference.chosen[n], other.chosen[n]) for n in reference.chosen)
        shared = torch.stack([overlap(*pair) for pair in pairs])  # [L, T]
        found["router_flip_rate"] = float(1 - shared.mean())
        found["tokens_rerouted"] = float((shared < 1).any(0).double().mean())
    return found


# ---- the account -------------------------------------------------------------------------------------


def _manifest(
    folder: Path, base: str, written: Path, dtype: str, errors: dict, seconds: float
) -> dict[str, Any]:
    """In the form of a stage's, so that `distill provenance` follows it to the student and further up."""
    source = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    adapter = model_source(str(folder))
    adapter["files"]["adapter_config.json"] = {
        "bytes": (folder / "adapter_config.json").stat().st_size,
        "hash": hash_file(folder / "adapter_config.json"),
    }
    config = {"student": {"model": base}, "adapter": str(folder), "dtype": dtype}
    inputs = {source["stage"]: source["fingerprint"]} if {"stage", "fingerprint"} <= set(source) else {}
    weights = sorted(written.glob("*.safetensors"))
    files = {p.name: {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in weights}
    return {
        "stage": "merged",
        "config": config,
        "inputs": inputs,
        "adapter_source": adapter,
        "base_source": model_source(base),
        "terms": source.get("terms"),
        "merge": errors,
        "seconds": round(seconds, 3),
        "device": describe_device(torch.device("cpu")),
        "versions": versions(),
        "files": files,
        "fingerprint": fingerprint({"identity": {"config": config, "inputs": inputs}, "files": files}),
    }


def _upstream(folder: Path) -> dict[str, Any]:
    """Manifests above the merged model: the adapter's own, and those it was made from."""
    kept = (
        read_json(folder / UPSTREAM) if (folder / UPSTREAM).is_file() else upstream_manifests(folder.parent)
    )
    own = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return {**kept, **({own["stage"]: own} if "stage" in own else {})}


def format_errors(manifest: dict[str, Any]) -> str:
    """The comparisons as text, for people."""
    merge = manifest["merge"]
    rows = [("against the adapter on its base", "max |logit|", "mean |logit|", "top-1 same", "rerouted")]
    for key, name in COMPARISONS.items():
        found = merge[key]
        moved = f"{found['tokens_rerouted']:.2%}" if "tokens_rerouted" in found else "-"
        cells = (
            f"{found['max_abs']:.2e}",
            f"{found['mean_abs']:.2e}",
            f"{found['top1_agreement']:.2%}",
            moved,
        )
        rows.append((name, *cells))
    lines = [f"{a:<32} {b:>12} {c:>13} {d:>11} {e:>9}" for a, b, c, d, e in rows]
    return "\n".join(
        [*lines, f"over {merge['fp32']['tokens']:,} tokens; rerouted: tokens sent to another expert"]
    )
