"""lm-evaluation-harness itself, on two local tasks of five documents; skipped where the extra is not installed."""

import json
import math

import pytest
from launching import forked, processes_of

lm_eval = pytest.importorskip("lm_eval")

from distill.config.evaluation import Evaluate  # noqa: E402
from distill.errors import RunError, UserError  # noqa: E402
from distill.evaluation import harness  # noqa: E402
from distill.evaluation.harness import check_harness, run_harness  # noqa: E402
from distill.evaluation.likelihood import likelihoods  # noqa: E402
from distill.models.load import load_model, load_tokenizer  # noqa: E402
from distill.storage import read_json  # noqa: E402

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
target_delimiter: ""
test_split: test
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 3.0}}
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{i} + 1?", "choices": [" yes", " no", " 3"], "label": i % 3, "answer": str(i + 1)}
        for i in range(5)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "docs.jsonl"))
    return str(folder)


PLAIN = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{text}"
doc_to_choice: "{choice}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
metadata: {{version: 1.0}}
"""
LETTERED = "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nAnswer:"


def test_likelihood_of_the_plain_form_is_the_harness_s_number(hub, tmp_path, monkeypatch):
    """Forty questions with options of unequal length; mmlu's text by letter, arc's by the words."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["yes", "no, never", "ä", "perhaps", "of course it is", "3", "naïve", "we do not know"]
    rows = [
        {"question": f"Is {i} so?", "choices": [words[(i * k + k) % 8] for k in (1, 3, 5)], "label": i % 3}
        for i in range(40)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    forms = {
        "letter": (LETTERED, "{{['A', 'B', 'C']}}"),
        "text": ("Question: {{question}}\\nAnswer:", "{{choices}}"),
    }
    for name, (text, choice) in forms.items():
        task = PLAIN.format(name=name, data=tmp_path / "docs.jsonl", text=text, choice=choice)
        (tmp_path / f"{name}.yaml").write_text(task)
    model, tokenizer = load_model(hub["plain"], "fp32"), load_tokenizer(hub["plain"])
    section = Evaluate(harness=["tiny_letter", "tiny_text"], harness_include=str(tmp_path))
    theirs = run_harness(model, tokenizer, section)["tasks"]
    problems = [
        {"prompt_id": str(i), "messages": [{"role": "user", "content": row["question"]}], "level": "all"}
        | {
            "answer": "ABC"[row["label"]],
            "verifier": "choice",
            "choices": row["choices"],
            "question": row["question"],
        }
        for i, row in enumerate(rows)
    ]
    ours = {f["options"]: f for f in likelihoods(model, tokenizer, problems)["all"] if f["form"] == "plain"}
    for name in forms:
        metrics = theirs[f"tiny_{name}"]["metrics"]
        assert ours[name]["sum"]["accuracy"] == pytest.approx(metrics["acc,none"], abs=1e-12)
        assert ours[name]["per_character"]["accuracy"] == pytest.approx(metrics["acc_norm,none"], abs=1e-12)
        assert ours[name]["per_byte"]["accuracy"] == pytest.approx(metrics["acc_bytes,none"], abs=1e-12)
    assert len({f"{ours['text'][kind]['accuracy']:.3f}" for kind in ("sum", "per_character")}) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_real_tasks_with_errors_and_versions(hub, tasks, family, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    section = Evaluate(harness=["tiny_choice", "tiny_generate"], harness_include=tasks)
    check_harness(section)
    model, tokenizer = load_model(hub[family], "fp32"), load_tokenizer(hub[family])
    found = run_harness(model, tokenizer, section)
    assert found["lm_eval"] == lm_eval.__version__ and set(found["tasks"]) == {"tiny_choice", "tiny_generate"}
    choice, generate = found["tasks"]["tiny_choice"], found["tasks"]["tiny_generate"]
    accuracy = choice["metrics"]["acc,none"]
    assert choice["n"] == generate["n"] == 5 and accuracy * 5 == pytest.approx(round(accuracy * 5))
    assert choice["stderr"]["acc,none"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 4))
    assert (choice["version"], generate["version"], choice["shots"]) == ("3.0", "1.0", 0)
    assert len(choice["hash"]) == 64 and choice["hash"] != generate["hash"]
    assert "exact_match,none" in generate["metrics"]
    assert ("moe" in found) == (family == "qwen3_moe")
    if family == "qwen3_moe":
        # Every option is read but for its last token, every written token but for the last: no padding.
        fed = 0
        for i in range(5):
            prompt = len(tokenizer(f"{i} + 1? Answer:")["input_ids"])
            fed += sum(prompt + len(tokenizer(o)["input_ids"]) - 1 for o in (" yes", " no", " 3"))
        counted = {layer["tokens"] for layer in found["moe"]["layers"].values()}
        written = (
            counted.pop() - fed - sum(len(tokenizer(f"{i} + 1? Answer:")["input_ids"]) for i in range(5))
        )
        assert not counted and 0 <= written <= 5 * 3  # the last token of four is never read


def test_the_command_puts_it_into_metrics(run_cli, hub, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ("--tasks", "easy", "--problems", "2", "--max-new-tokens", "2", "--out", tmp_path / "out")
    asked = ("--harness", "tiny_choice", "--harness-include", tasks, "--harness-limit", "2")
    code, _, err = run_cli("evaluate", hub["llama"], *arguments, *asked)
    assert code == 0, err
    assert "loglikelihood" not in err, "its bars are not for a file"
    found = read_json(tmp_path / "out" / "metrics.json")["models"]["llama"]["harness"]
    assert found["tasks"]["tiny_choice"]["n"] == found["limit"] == 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_processes_share_the_requests(hub, tmp_path, family, monkeypatch):
    """Sixty documents of three options are pieces for two processes; numbers, errors, hash and routing are of one."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "question": f"{i} + 1" * (1 + i % 7),
            "choices": [" yes", " no", " 3"],
            "label": i % 3,
            "answer": "2",
        }
        for i in range(60)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=tmp_path / "docs.jsonl"))
    asked = ["--harness", "tiny_choice,tiny_generate", "--harness-include", str(tmp_path), "--no-speed"]
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        forked(["evaluate", hub[family], *asked, "--out", str(out)], processes)
        assert processes_of(out) == processes
        (result,) = (model["harness"] for model in read_json(out / "metrics.json")["models"].values())
        found.append({key: value for key, value in result.items() if key != "seconds"})
    assert found[0] == found[1] and found[0]["tasks"]["tiny_choice"]["n"] == 60
    assert ("moe" in found[0]) == (family == "qwen3_moe")


def test_what_is_wrong_is_said_before_anything_runs(tasks, monkeypatch):
    # Without the harness's own 14,000 task files, which take long to index.
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        harness, "_manager", lambda section: TaskManager(include_path=tasks, include_defaults=False)
    )
    with pytest.raises(UserError, match="tiny_chioce: the harness has no such task"):
        check_harness(Evaluate(harness=["tiny_chioce"], harness_include=tasks))
    with pytest.raises(UserError, match="no such folder"):
        check_harness(Evaluate(harness=["tiny_choice"], harness_include="/nowhere"))


def test_a_task_that_fails_is_a_run_error(hub, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        GENERATE.format(data="/nowhere.jsonl").replace("tiny_generate", "tiny_bad")
    )
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    with pytest.raises(RunError, match="failed on tiny_bad"):
        run_harness(model, tokenizer, Evaluate(harness=["tiny_bad"], harness_include=str(tmp_path)))
