"""Every stage through the command line, with models of other families and tokenizers of their own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.storage import read_json, read_rows


@pytest.mark.parametrize(
    "teacher, student",
    [("qwen3_moe", "llama"), pytest.param("plain", "qwen3_moe", marks=pytest.mark.slow), ("llama", "plain")],
)
def test_the_whole_story_with_any_pair(make_recipe, run_cli, teacher, student):
    """MoE teacher, MoE student, and models without a chat template, every stage by its own command."""
    path, run_dir = make_recipe(teacher, student)
    # LoRA on every linear layer of a MoE is refused by name where PEFT would train other tensors.
    overrides = ["student.lora.targets=attention"] if student == "qwen3_moe" else []
    for command in ("generate", "filter", "train", "evaluate", "report"):
        code, out, err = run_cli(command, path, *overrides)
        assert code == 0, err
    for stage in ("prompts", "generations", "dataset", "student", "control", "eval"):
        manifest = read_json(run_dir / stage / "manifest.json")
        assert manifest["stage"] == stage and manifest["counts"]["rows"] > 0
        assert manifest["versions"]["transformers"] and manifest["seconds"] >= 0
    prompts = list(read_rows(run_dir / "prompts"))
    generations = list(read_rows(run_dir / "generations"))
    assert len(prompts) == 24 and len(generations) == 48
    assert {(g["prompt_id"], g["sample_idx"]) for g in generations} == {
        (p["prompt_id"], s) for p in prompts for s in (0, 1)
    }
    kept, dropped = (list(read_rows(run_dir / "dataset" / d)) for d in ("", "dropped"))
    assert len(kept) + len(dropped) == 48
    metrics = read_json(run_dir / "eval" / "metrics.json")
    assert list(metrics["models"]) == ["base", "control", "student", "teacher"]
    for name, model in metrics["models"].items():
        assert model["tasks"]["easy"]["n"] == model["tasks"]["hard"]["n"] == 7
        routed = "qwen3_moe" in (teacher if name == "teacher" else student)
        assert ("moe" in model) == routed
        assert ("fidelity" in model) == (name != "teacher")
    assert "report:" in out and (run_dir / "report.html").stat().st_size > 20_000
    # A student is an ordinary folder: plain transformers and peft load it, with no code of ours.
    model = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "student")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3

    code, out, _ = run_cli("run", path, *overrides)
    assert code == 0 and out.count("done before") == 6, "a finished run is skipped, stage by stage"


def test_teacher_and_student_flags_and_dry_run(make_recipe, run_cli, hub, tmp_path):
    path, run_dir = make_recipe()
    code, out, _ = run_cli(
        "train", path, "--dry-run", "--teacher", hub["llama"], "--student", hub["plain"], "train.steps=9"
    )
    assert code == 0
    assert f"model: {hub['llama']}" in out and f"model: {hub['plain']}" in out
    assert "steps: 9" in out and "temperature_squared" not in out
    assert "# optimizer_steps: 9" in out and "# rows_trained: 54" in out and "# student_parameters:" in out
    assert not run_dir.exists(), "a dry run leaves nothing"


def test_changed_inputs_are_said_and_rebuilt_only_on_request(make_recipe, run_cli):
    path, run_dir = make_recipe()
    assert run_cli("generate", path)[0] == 0
    assert run_cli("filter", path)[0] == 0
    before = (run_dir / "generations" / "part-00000.parquet").read_bytes()
    code, _, err = run_cli("generate", path, "generate.temperature=0.5")
    assert code == 2 and "generate.temperature: 1.0 -> 0.5" in err and "--redo" in err
    assert (run_dir / "generations" / "part-00000.parquet").read_bytes() == before
    assert run_cli("generate", path, "generate.temperature=0.5", "--redo")[0] == 0
    code, _, err = run_cli("filter", path, "generate.temperature=0.5")
    assert code == 2 and "generations changed" in err


@pytest.mark.slow
def test_full_fine_tuning_on_bf16_with_kl(make_recipe, run_cli):
    path, run_dir = make_recipe("qwen3_moe", "llama")
    objectives = "train.objectives=[{name: forward_kl, temperature: 2.0, temperature_squared: true}]"
    code, _, err = run_cli("run", path, "student.adapter=full", "train.precision=bf16", objectives)
    assert code == 0, err
    lines = [json.loads(line) for line in (run_dir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(
        line["loss"] > 0 and line["tokens"] > 0 and "forward_kl" in line["objectives"] for line in lines
    )
    config = read_json(run_dir / "student" / "manifest.json")["config"]
    assert config["train"]["objectives"][0]["temperature_squared"] is True


def test_prompts_from_a_file(make_recipe, run_cli, tmp_path):
    path, run_dir = make_recipe()
    for name, n in (("train", 6), ("test", 4)):
        rows = [{"question": f"What is {i} + 1?", "final": str(i + 1)} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = [f"prompts.source={tmp_path / 'train.jsonl'}", "prompts.prompt_column=question"]
    code, _, err = run_cli("run", path, *source)
    assert code == 2 and "evaluate.source" in err
    source.append(f"evaluate.source={tmp_path / 'test.jsonl'}")
    code, _, err = run_cli("run", path, *source)
    assert code == 2 and "no column 'answer'" in err and "question, final" in err
    code, _, err = run_cli("run", path, *source, "prompts.answer_column=final", "prompts.verifier=numeric")
    assert code == 0, err
    assert read_json(run_dir / "eval" / "metrics.json")["models"]["student"]["tasks"]["all"]["n"] == 4


def test_evaluate_without_a_recipe(run_cli, hub, tmp_path):
    out_dir = tmp_path / "dossier"
    code, _, err = run_cli(
        "evaluate", hub["qwen3_moe"], hub["plain"], "--teacher", hub["llama"], "--tasks", "easy",
        "--problems", "14", "--max-new-tokens", "6", "--out", out_dir,
    )  # fmt: skip
    assert code == 0, err
    metrics = read_json(out_dir / "metrics.json")
    assert set(metrics["models"]) == {"qwen3-moe", "plain", "teacher"}
    layers = metrics["models"]["qwen3-moe"]["moe"]["layers"]
    assert len(layers) == 2
    answers = [r for r in read_rows(out_dir / "answers") if r["model"] == "qwen3-moe"]
    tokenizer = AutoTokenizer.from_pretrained(hub["qwen3_moe"])
    fed = 0
    for row in answers:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        fed += len(prompt) + len(row["completion_ids"]) - 1  # the last token is produced, never read
    for layer in layers.values():
        assert layer["tokens"] == fed, "routing counts real tokens only: no padding, no finished rows"
        assert sum(layer["load"]) == pytest.approx(1)


def test_datasets_opens_the_outputs(make_recipe, run_cli):
    from datasets import Dataset

    path, run_dir = make_recipe()
    assert run_cli("generate", path)[0] == 0
    files = [str(p) for p in sorted((run_dir / "generations").glob("part-*.parquet"))]
    rows = Dataset.from_parquet(files, cache_dir=str(run_dir / "cache"))
    assert len(rows) == 48 and rows[0]["text"] is not None and rows.features["completion_ids"]


def test_live_kl_gives_the_teacher_a_say(make_recipe, run_cli, hub):
    """Pure KL against itself is zero: teacher and student the same model, LoRA starting at the identity."""
    path, run_dir = make_recipe("llama", "llama")
    code, _, err = run_cli("run", path, "train.objectives=[{name: forward_kl}]", "train.learning_rate=1e-9")
    assert code == 0, err
    first = json.loads((run_dir / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"]) < 1e-6 and first["grad_norm"] < 1e-3
    assert (
        read_json(run_dir / "eval" / "metrics.json")["models"]["student"]["fidelity"]["top1_agreement"] == 1.0
    )
    assert torch.isfinite(torch.tensor(first["grad_norm"])) and Path(run_dir / "report.html").is_file()
