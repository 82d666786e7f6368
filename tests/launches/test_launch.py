"""`accelerate launch` with two CPU processes gives the rows and the weights of one process."""

import pytest
import torch
from conftest import CHATML, PYTHON, byte_tokenizer, save_model
from launching import LAUNCH, forked, processes_of, run
from safetensors.torch import load_file
from training_example import MIXED, SGD, fake_dataset

from distill.storage import hash_file, parts

ONE = [PYTHON, "-m", "distill"]


@pytest.mark.slow
def test_two_processes_generate_the_same_bytes(make_recipe):
    """24 prompts in parts of 5, dealt to two processes: every part equals that of one process."""
    found = {}
    for name, command in (("one", ONE), ("two", LAUNCH)):
        path, run_dir = make_recipe(name=name)
        run([*command, "generate", path, "generate.part_size=5"])
        found[name] = {p.name: hash_file(p) for p in parts(run_dir / "generations")}
        assert processes_of(run_dir / "generations") == {"one": 1, "two": 2}[name]
    assert len(found["one"]) == 5 and found["one"] == found["two"]


def test_two_processes_train_to_the_same_weights(make_recipe, hub):
    """SGD, ragged lengths, a batch that does not divide evenly: 7 rows in micro-batches of 3.

    One process has two micro-batches then and the other one. The teacher's layers are spread over both, where every
    forward pass is a meeting: without even pieces this would hang.
    """
    options = [*SGD, MIXED, "student.adapter=full", "train.batch_size=7", "train.micro_batch_size=3"]
    weights = {}
    for name in ("one", "two"):
        path, run_dir = make_recipe(name=name)
        fake_dataset(run_dir)
        if name == "one":
            forked(["train", path, *options])
        else:  # by the launcher: these two processes share nothing
            run([*LAUNCH, "train", path, *options, "teacher.device=sharded"])
        weights[name] = load_file(run_dir / "student" / "model.safetensors")
        assert processes_of(run_dir / "student") == {"one": 1, "two": 2}[name]
        assert len((run_dir / "student" / "metrics.jsonl").read_text().splitlines()) == 4
    start = load_file(f"{hub['llama']}/model.safetensors")
    moved = max(float((weights["one"][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-2, "the steps are large enough that a wrong scale would show"
    for name, tensor in weights["one"].items():
        torch.testing.assert_close(
            weights["two"][name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def mixture(folder) -> str:
    """A tiny DeepSeek-V3: its routers have the selection bias that `train.expert_bias_step` moves."""
    config = {
        "model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    return save_model(folder, config, byte_tokenizer(CHATML), seed=5)


def test_the_expert_bias_moves_under_ddp_as_in_one_process(make_recipe, tmp_path):
    """Three processes, seven rows: the bias is counted over all of them, and it is the model's own that moves."""
    student = mixture(tmp_path / "mixture")
    options = [*SGD, "student.adapter=full", "train.batch_size=7", "train.micro_batch_size=2"]
    options += ["train.expert_bias_step=0.01", "train.expert_bias_freeze=0"]
    weights = {}
    for name, processes in (("one", 1), ("three", 3)):
        path, run_dir = make_recipe(student=student, name=name)
        fake_dataset(run_dir)
        forked(["train", path, *options], processes)
        weights[name] = load_file(run_dir / "student" / "model.safetensors")
        assert processes_of(run_dir / "student") == processes
    biases = [name for name in weights["one"] if name.endswith("e_score_correction_bias")]
    assert biases and all(weights["one"][name].abs().max() > 0.009 for name in biases)
    for name, tensor in weights["one"].items():
        torch.testing.assert_close(
            weights["three"][name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
