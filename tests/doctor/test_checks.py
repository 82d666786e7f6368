"""`distill doctor`: every trap seeded into a pair is told with its fix, from configs and tokenizers alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, QWEN3_MOE, byte_tokenizer, save_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from distill import console
from distill.config.recipe import load_recipe
from distill.doctor import memory as footprint
from distill.doctor import pair
from distill.doctor.checks import check_recipe, examine
from distill.doctor.pair import FAIL, NOTE, OK, WARN, format_findings
from distill.doctor.tokens import turn_end
from distill.errors import UserError
from distill.models import precision
from distill.models import student as adapters

DEEPSEEK = {
    "model_type": "deepseek_v3", "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
PLAIN = """
run_dir: {run_dir}
device: cpu
threads: 1
prompts: {{levels: {{easy: 4, hard: 4}}}}
teacher: {{model: {teacher}}}
generate: {{max_new_tokens: 32, batch_size: 8}}
student: {{model: {student}, lora: {{rank: 2}}}}
train: {{objectives: [{{name: cross_entropy}}, {{name: forward_kl}}], steps: 4, warmup_steps: 1, batch_size: 4,
        micro_batch_size: 2, precision: fp32}}
evaluate: {{levels: {{easy: 4}}, max_new_tokens: 32, batch_size: 8}}
"""


@pytest.fixture
def bare(tmp_path):
    """Config, tokenizer and card of a model without weights: bare("name", template, key=value, ...) -> folder."""

    def write(name: str, template: str | None = CHATML, extra=(), ends: object = None, **config) -> Path:
        folder = tmp_path / name
        tokenizer = byte_tokenizer(template, tuple(extra))
        sizes = {
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512,
            "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        }  # fmt: skip
        AutoConfig.for_model(**{**sizes, **config}).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if ends is not None:
            GenerationConfig(eos_token_id=ends).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        return folder

    return write


@pytest.fixture
def recipe(tmp_path, bare):
    """recipe(teacher, student, *overrides) -> Recipe; folders that were not written yet are."""

    def load(teacher: Path | None = None, student: Path | None = None, *overrides: str):
        teacher, student = teacher or bare("teacher"), student or bare("student")
        path = tmp_path / "r.yaml"
        path.write_text(PLAIN.format(run_dir=tmp_path / "run", teacher=teacher, student=student))
        return load_recipe(str(path), list(overrides))

    return load


def of(findings, check: str, state: str):
    """The findings of a check in a state, of which there is one at least."""
    found = [f for f in findings if f.check == check and f.state == state]
    assert found, format_findings(findings)
    return found


def test_a_sound_pair_without_weights(recipe):
    findings = examine(recipe())
    assert {f.state for f in findings} == {OK, WARN}, format_findings(findings)
    assert {f.check for f in findings if f.state == WARN} == {"models"}  # no weights yet
    assert {"vocabulary", "chat template", "end of turn", "context", "precision", "trained", "experts", "memory",
            "terms", "objectives"} <= {f.check for f in findings}  # fmt: skip
    with pytest.raises(UserError, match=r"no .*weights"):
        check_recipe(recipe(), "run")


# ---- the seeded traps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, student, words",
    [
        (152064, 151936, "the teacher's other 128 are cut off"),
        (151936, 152064, "the student's other 128 count as impossible"),
    ],
)
def test_padding_of_the_embedding(bare, recipe, teacher, student, words):
    pair = bare("teacher", vocab_size=teacher), bare("student", vocab_size=student)
    findings = examine(recipe(*pair))
    assert "the same 258 tokens" in of(findings, "vocabulary", OK)[0].text
    (told,) = of(findings, "padding", NOTE)
    assert "152,064" in told.text and "151,936" in told.text and "harmless for text" in told.text
    assert "forward_kl compares the 151,936 rows both have" in told.text and words in told.text
    assert not any(f.state == FAIL for f in findings)
    text_only = examine(recipe(*pair, "train.objectives=[{name: cross_entropy}]"))
    assert "compares" not in of(text_only, "padding", NOTE)[0].text


def test_vocabularies_of_one_size_and_different_content(bare, recipe):
    pair = bare("teacher", extra=["<|a|>"]), bare("student", extra=["<|b|>"])
    (told,) = of(examine(recipe(*pair)), "vocabulary", FAIL)
    assert "both have 259 tokens" in told.text and "'<|a|>'" in told.text and "'<|b|>'" in told.text
    assert "cross_entropy" in told.fix and "uld" in told.fix
    of(examine(recipe(*pair, "train.objectives=[{name: cross_entropy}]")), "vocabulary", NOTE)
    small = bare("small", vocab_size=100)
    assert "258 tokens and its embedding 100 rows" in of(examine(recipe(small)), "vocabulary", FAIL)[0].text


def test_a_draft_must_speak_the_teachers_tokens(bare, recipe):
    """Same ids, full attention, few rows, and its weights count; whoever does not generate needs none of it."""
    small = bare("small", num_hidden_layers=1)
    sound = recipe(None, None, f"teacher.draft={small}", "generate.batch_size=2")
    findings = examine(sound)
    assert not any(f.state == FAIL for f in findings), format_findings(findings)
    said = of(findings, "draft", OK)[0].text
    flops = [pair.model_side("it", str(m)).facts["flops_per_token"] for m in (small, sound.teacher.model)]
    assert f"it pays above {1 + 3 * flops[0] / flops[1]:.1f} tokens a pass" in said
    weights = [
        footprint.phases(pair.Pair(asked))[0].parts["weights"]
        for asked in (sound, recipe(None, None, "generate.batch_size=2"))
    ]
    assert weights[0] - weights[1] == pair.model_side("draft", str(small)).facts["weight_bytes"]
    many = examine(recipe(None, None, f"teacher.draft={small}"))
    assert "8 answers are written together" in of(many, "draft", WARN)[0].text
    short = bare("short", max_position_embeddings=64)
    assert (
        "takes 64 tokens" in of(examine(recipe(None, None, f"teacher.draft={short}")), "draft", WARN)[-1].text
    )
    other = bare("other", extra=["<|b|>"])
    (told,) = of(examine(recipe(None, None, f"teacher.draft={other}")), "draft", FAIL)
    assert "259 and 258" in told.text or "258 and 259" in told.text
    assert "teacher's tokenizer" in told.fix
    windows = bare("windows", model_type="gemma3_text", sliding_window=16, head_dim=8,
                   layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    (told,) = of(examine(recipe(None, None, f"teacher.draft={windows}")), "draft", FAIL)
    assert "without full attention" in told.text
    with pytest.raises(UserError, match="missing-draft"):
        check_recipe(recipe(None, None, "teacher.draft=missing-draft"), "generate")
    trained = examine(recipe(None, None, f"teacher.draft={other}"), "train")
    assert not [f for f in trained if f.check == "draft"]
    with pytest.raises(UserError, match="`draft` is for this project's own decoder"):
        recipe(None, None, f"teacher.draft={small}", "teacher.engine=vllm")


def test_another_end_of_turn(bare, recipe, tmp_path):
    """The base model's tokenizer ends with <|endoftext|>, the teacher and the template with <|im_end|>."""
    teacher, student = bare("teacher", extra=["<|endoftext|>"]), bare("student", extra=["<|endoftext|>"])
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    found = of(examine(recipe(teacher, student)), "end of turn", WARN)
    told = " ".join(f.line for f in found)
    assert "'<|endoftext|>'" in told and "'<|im_end|>'" in told and "counts ending as a mistake" in told
    assert "eos_token='<|im_end|>' in the student's tokenizer_config.json" in told
    alone = "train.objectives=[{name: reverse_kl}]"
    (told,) = of(
        examine(recipe(teacher, student, alone, "train.on_policy.fraction=1.0")), "end of turn", FAIL
    )
    assert "grow without end" in told.text

    # The teacher's own turn ends with what does not end its answers.
    GenerationConfig(eos_token_id=2).save_pretrained(student)
    runs_on = of(examine(recipe(student, teacher)), "end of turn", WARN)[0]
    assert "max_new_tokens" in runs_on.text and "generate.stop_strings=['<|im_end|>']" in runs_on.fix
    # What the student learns to write does not stop plain `generate` of the saved student.
    (told,) = of(examine(recipe(None, bare("other", ends=7))), "end of turn", WARN)
    assert "generation_config.json" in told.fix and "[1, 7]" in told.fix


def test_only_a_special_token_ends_a_turn(bare, recipe):
    """A line break that is an added token, as Gemma has, and a word that is one: neither is a mark of the template."""
    folder = bare("gemma", extra=["<|endoftext|>"])
    table = json.loads((folder / "tokenizer.json").read_text())
    free = 1 + max(token["id"] for token in table["added_tokens"])
    free = max(free, len(table["model"]["vocab"]))
    newline = {"id": free, "content": "\n", "single_word": False, "lstrip": False, "rstrip": False}
    word = {**newline, "content": "<b>"}
    for added, special in ((newline, True), (newline, False), (word, False)):
        table["added_tokens"] = [t for t in table["added_tokens"] if t["id"] < free]
        table["added_tokens"].append({**added, "normalized": False, "special": special})
        (folder / "tokenizer.json").write_text(json.dumps(table))
        side = pair.model_side("student", str(folder))
        template = (
            "{% for m in messages %}{{ m['content'] + '"
            + added["content"].replace("\n", "\\n")
            + "' }}{% endfor %}"
        )
        side.tokenizer.chat_template = template
        assert side.tokenizer("x" + added["content"])["input_ids"][-1] == free
        assert turn_end(side) is None, added
    side.tokenizer.chat_template = template.replace("<b>", "<b><|im_end|>")
    assert side.token(turn_end(side)) == "'<|im_end|>'"


def test_missing_chat_template(bare, recipe):
    findings = of(examine(recipe(bare("t", template=None), bare("s", template=None))), "chat template", WARN)
    assert len(findings) == 2 and all("chat_template" in f.fix for f in findings)
    other = CHATML.replace("\n", " ")
    (told,) = of(examine(recipe(bare("t2", template=other), None)), "chat template", WARN)
    assert "different" in told.text and "forward_kl" in told.text
    text = "train.objectives=[{name: cross_entropy}]"
    of(examine(recipe(bare("t3", template=other), None, text)), "chat template", NOTE)


def test_lora_that_would_silently_train_other_experts(bare, recipe, monkeypatch):
    student = bare("deepseek", **DEEPSEEK)
    shared = "student.lora.targets=[shared_experts.down_proj]"
    findings = examine(recipe(None, student, shared))
    assert "LoRA on 2 shared experts tensors" in of(findings, "trained", OK)[0].text
    (told,) = of(findings, "trained", NOTE)
    assert "shared_experts.down_proj" in told.text and "silently" in told.text
    (frozen,) = of(findings, "experts", NOTE)
    assert "stay frozen" in frozen.text and "student.lora.experts=true" in frozen.fix
    trained = of(examine(recipe(None, student, "student.lora.experts=true")), "experts", OK)
    assert "routers stay as they are" in trained[-1].text

    # PEFT left to itself, as if its rewriting were not known here: the assertion on names catches it.
    monkeypatch.setattr(adapters, "_rewritten", lambda _model, _modules: set())
    (caught,) = of(examine(recipe(None, student, shared)), "trained", FAIL)
    assert "would not train what was asked" in caught.text and "experts" in caught.text
    assert "student.lora.targets=attention" in caught.fix


def test_precision_the_device_lacks(bare, recipe, monkeypatch):
    half = examine(recipe(None, None, "train.precision=fp16"))
    assert "train.precision=bf16 or fp32" in of(half, "precision", FAIL)[0].fix
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    findings = examine(recipe(bare("t", dtype="bfloat16"), None, "train.precision=bf16"))
    train, teacher = of(findings, "precision", WARN)
    assert "slower than fp32" in train.text and "train.precision=auto" in train.fix
    assert "teacher computes in bf16" in teacher.text and "teacher.dtype=fp32" in teacher.fix


def test_bf16_on_a_gpu_without_it(bare, recipe, monkeypatch):
    """A T4: bf16 training is refused, a bf16 teacher warned about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "Tesla T4")
    monkeypatch.setattr(pair, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(footprint, "device_memory", lambda _device: 16 * 10**9)
    monkeypatch.setattr(footprint, "free_memory", lambda _device: None)
    findings = examine(recipe(bare("t", dtype="bfloat16"), None, "train.precision=bf16"))
    told = of(findings, "precision", FAIL)[0]
    assert "Tesla T4 has no bfloat16 units" in told.text and "train.precision=fp16" in told.fix
    findings = examine(recipe(bare("t", dtype="bfloat16"), None, "train.precision=auto"))
    assert "teacher.dtype=fp16" in of(findings, "precision", WARN)[0].fix
    assert "fp16" in of(findings, "precision", OK)[0].text


def test_a_context_too_short(bare, recipe, tmp_path):
    short = bare("short", max_position_embeddings=40)
    (told,) = of(examine(recipe(short, None)), "context", FAIL)[:1]
    assert "exceed the 40 of teacher" in told.text and "every answer would be an error" in told.text
    rows = [{"prompt": "a" * n, "answer": "a"} for n in (3, 400)]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = [f"prompts.source={source}", f"evaluate.source={source}", "generate.max_new_tokens=100"]
    found = of(examine(recipe(None, None, *files)), "context", WARN)
    assert "1 training prompts" in found[0].text and "of teacher" in found[0].text
    room = int(found[0].fix.rpartition("=")[2])
    assert 0 < room < 100 and room <= 512 - 400
    fits = examine(recipe(None, None, *files[:2], f"generate.max_new_tokens={room}"))
    assert not [f for f in fits if f.check == "context" and f.state != OK]
    # The hub is not asked: nothing is downloaded to look at prompts.
    of(examine(recipe(None, None, "prompts.source=hub:a/b", "evaluate.source=hub:a/b")), "context", OK)


def test_too_little_memory(bare, recipe, monkeypatch):
    big = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "bfloat16"}  # Llama 2 7B: 6.74e9 # fmt: skip
    pair = bare("teacher", **big), bare("student")
    monkeypatch.setattr(footprint, "free_memory", lambda _device: None)
    monkeypatch.setattr(footprint, "device_memory", lambda _device: 8 * 10**9)
    findings = examine(recipe(*pair))
    generate, train = of(findings, "memory", FAIL)[:2]
    assert "generate holds 14 GB" in generate.text and "teacher.endpoint" in generate.fix
    assert "teacher weights 13 GB" in train.text and "teacher.quantize=4bit" in train.fix
    four = examine(recipe(*pair, "teacher.quantize=4bit"))
    assert not [f for f in of(four, "memory", FAIL) if f.text.startswith("train")]

    monkeypatch.setattr(footprint, "device_memory", lambda _device: 24 * 10**9)
    many = ["generate.batch_size=1024", "generate.max_new_tokens=400"]
    (told,) = of(examine(recipe(*pair, *many)), "memory", WARN)
    assert "cache of keys and values" in told.text
    fits = told.fix.split()[0]  # generate.batch_size=N
    assert not [f for f in examine(recipe(*pair, *many, fits)) if f.check == "memory" and f.state != OK]
    full = examine(recipe(bare("t2"), bare("s2", **big), "student.adapter=full"))
    (told,) = of(full, "memory", FAIL)
    assert "student.adapter=lora" in told.fix and "train holds 108 GB" in told.text  # 16 bytes a parameter
    monkeypatch.setattr(footprint, "free_memory", lambda _device: 10**9)
    of(examine(recipe(*pair)), "memory", WARN)


def test_experts_that_are_not_there(bare, recipe):
    dense = examine(recipe(None, None, "train.expert_bias_step=0.001"))
    assert "this one is dense" in of(dense, "experts", FAIL)[0].text
    moe = bare("moe", **QWEN3_MOE)
    told = of(examine(recipe(moe)), "experts", OK)
    assert "2 layers of 4 routed experts, 2 per token" in told[0].text
    route = "train.objectives=[{name: cross_entropy}, {name: router_distillation}]"
    assert "dense" in of(examine(recipe(None, moe, route)), "experts", FAIL)[0].text
    asked = examine(recipe(None, None, "train.teachers.experts_per_token=4"))
    assert "a dense model has no routing to change" in of(asked, "experts", FAIL)[0].text
    many = examine(recipe(moe, None, "train.teachers={experts_per_token: 5}"))
    assert "there are 4 experts" in of(many, "experts", FAIL)[0].text
    of(examine(recipe(moe, None, "train.teachers={routings: 2}")), "experts", OK)
    four = examine(recipe(None, None, "train.precision=mxfp4-emulated-experts"))
    assert "no layer that mxfp4 emulation knows" in of(four, "precision", FAIL)[0].text
    larger = bare("larger", **{**QWEN3_MOE, "num_experts": 8})
    assert "compares experts by number" in of(examine(recipe(larger, moe, route)), "experts", FAIL)[0].text


def test_balancing_that_reaches_no_router_is_named(bare, recipe):
    moe = bare("moe", **QWEN3_MOE)
    balance = "train.objectives=[{name: cross_entropy}, {name: batch_balance, weight: 0.1}]"
    (told,) = of(examine(recipe(None, moe, balance)), "experts", WARN)
    assert "batch_balance balances nothing" in told.text and "student.lora.router=true" in told.fix
    for reaches in ("student.lora.router=true", "student.adapter=full"):
        assert not [f for f in examine(recipe(None, moe, balance, reaches)) if "balances nothing" in f.text]
    biased = bare("biased", **DEEPSEEK)
    step = "train.expert_bias_step=0.001"
    told = of(examine(recipe(None, biased, step)), "experts", FAIL)[0]
    assert "no adapter carries" in told.text and "student.adapter=full" in told.fix
    assert not [f for f in examine(recipe(None, biased, step, "student.adapter=full")) if f.state == FAIL]


# ---- the command, and the commands that ask it ---------------------------------------------------------


def test_the_command(bare, recipe, run_cli, tmp_path, monkeypatch):
    recipe()
    path = str(tmp_path / "r.yaml")
    code, out, _ = run_cli("doctor", path)
    assert code == 0 and "OK    vocabulary" in out and out.splitlines()[-1].endswith(" 0 FAIL")
    code, out, _ = run_cli("doctor", path, "--json", "train.precision=fp16")
    report = json.loads(out)
    assert code == 2 and report["ok"] is False
    (told,) = [f for f in report["findings"] if f["state"] == FAIL]
    assert told["check"] == "precision" and told["fix"].startswith("set train.precision")
    assert not (tmp_path / "run").exists()


def test_a_command_prints_warnings_once_and_stops_at_failures(hub, make_recipe, run_cli, tmp_path):
    folder = tmp_path / "no-template"
    shutil.copytree(hub["llama"], folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path, run_dir = make_recipe(str(folder), "llama")
    code, _, err = run_cli("generate", path, "-q")
    assert code == 0 and err.count("warning: teacher") == 1 and "chat_template" in err
    assert (run_dir / "generations" / "manifest.json").is_file()
    code, _, err = run_cli("train", path, "train.precision=fp16")
    assert code == 2 and "train.precision=bf16 or fp32" in err
    assert "note:" not in err and not console.verbose()


# ---- what the padding note promises --------------------------------------------------------------------


def test_a_padded_teacher_distils_as_if_its_rows_were_cut(tmp_path, make_recipe, run_cli):
    """Rows of the embedding beyond the student's: generation never meets them, and the losses are those without."""
    tokenizer = byte_tokenizer(CHATML)
    wide = save_model(tmp_path / "wide", {"model_type": "llama", "vocab_size": 272}, tokenizer, seed=5)
    model = AutoModelForCausalLM.from_pretrained(wide)
    model.resize_token_embeddings(264)
    shutil.copytree(wide, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "cut")
    student = save_model(tmp_path / "student", {"model_type": "llama", "vocab_size": 264}, tokenizer, seed=6)
    overrides = [
        "train.objectives=[{name: cross_entropy}, {name: forward_kl}, {name: reverse_kl}]",
        "train.steps=2", "prompts.levels={easy: 6}", "control.enabled=false", "filter.finish_reasons=[stop, length]",
    ]  # fmt: skip
    losses = []
    for name in ("wide", "cut"):
        path, run_dir = make_recipe(str(tmp_path / name), student, name)
        for command in ("generate", "filter", "train"):
            code, _, err = run_cli(command, path, *overrides)
            assert code == 0, err
        lines = map(json.loads, (run_dir / "student" / "metrics.jsonl").read_text().splitlines())
        losses.append([line["objectives"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert all(value > 0 for line in losses[0] for value in line.values())


def test_of_a_model_that_is_not_there_only_that_is_told(recipe, bare, tmp_path):
    """Its terms are not asked for: nobody could read its card, and a hub would be asked in vain."""
    found = examine(recipe(tmp_path / "teachr", bare("student")))
    (failed,) = [f for f in found if f.state == "FAIL"]
    assert failed.check == "models" and "is not a folder" in failed.text


def test_a_token_that_is_a_line_break_stays_on_its_line():
    class Tokenizer:
        def convert_ids_to_tokens(self, _index):
            return "\n"

    side = pair.Side("teacher", "x", lambda: None, Tokenizer)
    assert side.token(0) == r"'\n'"
