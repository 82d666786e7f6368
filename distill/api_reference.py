"""docs/api.md: what the package offers to Python, written from the docstrings.

    python -m distill.api_reference            # rewrites docs/api.md; a test compares the two

`PUBLIC` names what a program or a notebook may rely on, in pipeline order. Source is read with `ast` and never
imported, so the page needs no torch and is the same everywhere. Docstrings here are prose with shapes
and units, so they are shown as they stand: there is no markup that a documentation library would have to parse.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from distill.config import PROJECT_ROOT
from distill.errors import UserError
from distill.shards import write_atomic

PAGE = PROJECT_ROOT / "docs" / "api.md"
# What is promised, by module. A name that a module no longer has is an error of the generator, and of its test.
PUBLIC: dict[str, dict[str, str]] = {
    "Recipes and runs": {
        "config": "load_recipe load_prompts load_evaluate",
        "pipeline": "run",
        "shards": "read_rows read_table read_json",
        "errors": "DistillError UserError RunError",
    },
    "Prompts and teacher outputs": {
        "tasks": "Problem sample_problem sample_problems split_of",
        "verify": "judge extract_answer exact numeric choice matches math_equal",
        "prompts": "make_prompts training_prompts held_out",
        "presets": "Preset render",
        "terms": "decide require",
        "teachers": "open_teacher LocalTeacher",
        "decode": "Sampling Completion decode",
        "generate": "generate",
        "filter": "make_dataset explain",
        "dataset_card": "export push",
    },
    "Teacher signals": {
        "signals": "Dense TopK Sampled SignalFormat StoredSignals",
        "scoring": "score_rows draw",
    },
    "Objectives": {
        "losses": "cross_entropy forward_kl reverse_kl generalized_jsd skew_forward_kl skew_reverse_kl adaptive_kl "
        "total_variation alpha_beta_divergence ranking_hinge ranking_logistic uld",
        "sparse_losses": "sparse_forward_kl sampled_cross_entropy",
        "hidden_losses": "hidden_cosine hidden_mse Projection layer_pairs",
        "router_losses": "sequence_balance batch_balance router_distillation",
        "objectives": "Objective Option problems resolve",
        "fused": "fused_loss",
    },
    "Training": {
        "data": "Batch TokenRows BatchPlan micro_batches",
        "models": "load_model load_tokenizer load_config tokenizer_fingerprint same_vocabulary prompt_ids",
        "students": "build_student save_student",
        "adapters": "plan_lora add_lora assert_trained",
        "precision": "Precision resolve_precision",
        "fp8": "emulate_fp8 restore fp8_emulated",
        "arms": "train_arms train_arm",
        "merge": "merge_adapter difference",
    },
    "Mixture of experts": {
        "routing": "record_routing Recording LayerRecord Decisions",
        "routing_metrics": "load_fraction max_violation max_violation_per_batch max_violation_noise_floor load_entropy "
        "effective_experts coefficient_of_variation dead_experts token_drop router_entropy confidence coactivation "
        "strongest_pairs overlap specialisation whole_model",
        "specialisation": "GroupShares",
        "saturation": "saturation saturation_between",
        "interventions": "use_top_k drop_experts route",
        "sweeps": "intervention_sweep",
    },
    "Measuring": {
        "evaluate": "evaluate_recipe evaluate_checkpoints",
        "stats": "wilson_interval binomial_stderr score paired_interval paired_comparison mcnemar_p holm pass_at_k "
        "majority_at_k",
        "compare": "compare forgetting",
        "probes": "Probe load_probes outcome",
        "inherit": "measure_probes summarise_flaws compare_flaws inherited_share audit",
        "flaws": "embedded_probes write_data",
        "fidelity": "fidelity",
        "calibration": "Reliability answer_calibration",
        "text_nll": "text_nll",
        "describe": "describe describe_config describe_model",
        "ledger": "run_ledger",
        "cost_v3": "deepseek_v3_bill",
        "cost_r1": "deepseek_r1_bill",
        "break_even": "Costs cheapest segments solve",
    },
    "Pages and provenance": {
        "provenance": "provenance",
        "report": "build_report summary_table",
        "dossier": "build_dossier",
    },
}
_OPENING = """# API reference

What the modules below offer to Python, written by `python -m distill.api_reference` from their docstrings: edit those,
not this page. Shapes: B batch, T tokens, N kept tokens, V vocabulary, K stored tokens, k experts per token, E experts,
L layers, d width. Errors a user can mend are `UserError`, a run that cannot go on is `RunError` (`distill/errors.py`);
both hold one line per problem in `problems`. Everything not named here may change without notice.

```python
from distill.losses import forward_kl
from distill.routing import record_routing

loss = forward_kl(student_logits, teacher_logits, temperature=2.0)     # [N, V], [N, V] -> [N]
with record_routing(model) as recording:                               # any MoE causal LM of transformers
    model(**batch)
print(recording.summary())
```
"""


@dataclass(frozen=True)
class Documented:
    """A function or class: its `signature` as written, its docstring, and of a class the public methods."""

    name: str
    signature: str
    docstring: str
    methods: tuple["Documented", ...] = ()


def documented(module: str, names: str) -> Iterator[Documented]:
    """The named functions and classes of a module. Raises UserError for one it does not have, or has undocumented."""
    source = _source(module)
    nodes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for name in names.split():
        if name not in nodes:
            raise UserError(f"distill/{module}.py has no {name}: change PUBLIC in distill/api_reference.py")
        found = _read(nodes[name], source.splitlines())
        if not found.docstring:
            raise UserError(f"distill/{module}.py: {name} is public and needs a docstring")
        yield found


def page() -> str:
    """The whole of docs/api.md."""
    lines = [_OPENING, "## Contents\n"]
    for group, modules in PUBLIC.items():
        links = ", ".join(f"[{name}](#distill{name})" for name in modules)
        lines.append(f"- {group}: {links}")
    for group, modules in PUBLIC.items():
        lines.append(f"\n# {group}")
        for module, names in modules.items():
            lines += [f"\n## distill.{module}\n", _block(ast.get_docstring(ast.parse(_source(module))) or "")]
            for found in documented(module, names):
                lines += ["", f"### {module}.{found.name}\n", _block(_entry(found))]
    return "\n".join(lines) + "\n"


def _source(module: str) -> str:
    return (PROJECT_ROOT / "distill" / f"{module}.py").read_text(encoding="utf-8")


def _read(node: ast.FunctionDef | ast.ClassDef, source: list[str]) -> Documented:
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        decorators = {ast.unparse(d) for d in node.decorator_list}
        if decorators & {"property", "cached_property"}:
            return Documented(node.name, f"{node.name}{_returns(node)}", docstring)
        return Documented(node.name, f"{node.name}({_arguments(node.args)}){_returns(node)}", docstring)
    public = [
        n
        for n in node.body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n)
    ]
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    head = f"class {node.name}" + (f"({bases})" if bases else "")
    if init is not None:
        head += f"\n{node.name}({_arguments(init.args)})"
    else:
        # From the source, since their comments hold shapes and units.
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
        head += "".join("\n" + "\n".join(source[n.lineno - 1 : n.end_lineno]) for n in fields)
    return Documented(node.name, head, docstring, tuple(_read(n, source) for n in public))


def _arguments(arguments: ast.arguments) -> str:
    """As written, without self and cls."""
    text = ast.unparse(arguments)
    for first in ("self", "cls"):
        if text == first:
            return ""
        text = text.removeprefix(f"{first}, ")
    return text


def _returns(node: ast.FunctionDef) -> str:
    return f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""


def _entry(found: Documented) -> str:
    parts = [f"{found.signature}\n\n{_indent(found.docstring)}"]
    parts += [_indent(f".{m.signature}\n{_indent(m.docstring)}") for m in found.methods]
    return "\n\n".join(parts)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def main() -> int:
    try:
        write_atomic(PAGE, page())
    except UserError as error:
        print(f"distill: {error}", file=sys.stderr)
        return error.exit_code
    names = [name for modules in PUBLIC.values() for words in modules.values() for name in words.split()]
    print(f"{PAGE.relative_to(PROJECT_ROOT)}: {len(names)} functions and classes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
