"""Others read the training set without our code: the card, TRL's formats, what an upload would take."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import PYTHON, RECIPE, ROOT

from distill.commands.cli import main
from distill.data import export as dataset_card
from distill.data.export import size_category
from distill.data.provenance import decide
from distill.errors import RunError, UserError
from distill.models.load import load_tokenizer
from distill.storage import read_json, read_rows, write_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory, hub):
    """A finished dataset with dropped rows and a control set: (recipe, run folder)."""
    root = tmp_path_factory.mktemp("card")
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(run_dir=root / "run", teacher=hub["qwen3_moe"], student=hub["llama"]))
    for command in ("generate", "filter"):
        # At most one answer a question: something is dropped in any case.
        assert main([command, str(recipe), "filter.max_per_prompt=1", "generate.max_new_tokens=60"]) == 0
    return root / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def elsewhere(code: str, *arguments) -> dict:
    """Run code in another process, another folder and without this package; what it prints as JSON."""
    code = f"import json, sys\n{code}\nassert 'distill' not in sys.modules\n"
    done = subprocess.run(
        [PYTHON, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_card_says_teacher_terms_sampling_and_what_was_dropped(run):
    card = (run / "dataset" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["size_categories"] == ["n<1K"] and "distillation" in front["tags"]
    assert "license" not in front, "none is invented"
    counts = read_json(run / "dataset" / "manifest.json")["counts"]
    assert counts["dropped"] > 0 and f"| answers | {counts['kept'] + counts['dropped']:,} |" in card
    for rule, number in counts["dropped_by_rule"].items():
        assert f"| dropped: {rule} | {number:,} |" in card
    assert "2 per question" in card and "temperature 1, at most 60 tokens; seed 0" in card
    assert "MIT License" in card and "not legal advice" in card and "qwen3-moe" in card
    columns = set(next(read_rows(run / "dataset")))
    described = {line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| ")}
    assert columns - {"signal_ids", "signal_values"} <= described


def test_load_dataset_reads_the_kept_rows_alone(run, tmp_path):
    folder = run / "dataset"
    found = elsewhere(
        "from datasets import load_dataset\n"
        "rows = load_dataset(sys.argv[1], cache_dir=sys.argv[2])\n"
        "files = load_dataset('parquet', data_files=sys.argv[1] + '/part-*.parquet', cache_dir=sys.argv[2])\n"
        "print(json.dumps([{k: v.num_rows for k, v in rows.items()}, files['train'].num_rows,"
        " list(rows['train']['text']), rows['train'][0]['messages'],"
        " list(rows['train'][0]['completion_ids'])]))",
        folder,
        tmp_path / "cache",
    )
    kept = list(read_rows(folder))
    extra = len(list(read_rows(folder / "dropped"))) + len(list(read_rows(folder / "control")))
    assert extra > 0 and found[0] == {"train": len(kept)} and found[1] == len(kept)
    assert found[2] == [row["text"] for row in kept]
    assert found[3] == kept[0]["messages"] and found[4] == kept[0]["completion_ids"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["prompt_completion", "messages"])
def test_export_in_chat_messages(run, run_cli, tmp_path, form, suffix):
    out = tmp_path / "deep" / f"train{suffix}"
    code, said, err = run_cli("export", run, "--format", form, "--out", out)
    kept = list(read_rows(run / "dataset"))
    assert code == 0 and f"{len(kept)} rows" in said, err
    reader = "json" if suffix == ".jsonl" else "parquet"
    found = elsewhere(
        "from datasets import load_dataset\n"
        f"rows = load_dataset('{reader}', data_files=sys.argv[1], cache_dir=sys.argv[2])['train']\n"
        "print(json.dumps([list(rows.features), rows.to_list()]))",
        out,
        tmp_path / "cache",
    )
    prompts = {p["prompt_id"]: p for p in read_rows(run / "prompts")}
    for row, made in zip(kept, found[1], strict=True):
        prompt = prompts[row["prompt_id"]]["messages"]
        answer = [{"role": "assistant", "content": row["text"]}]
        if form == "messages":
            assert made == {"messages": [*prompt, *answer]}
        else:
            assert made == {"prompt": prompt, "completion": answer}


def test_plain_text_is_what_the_student_trains_on(run, run_cli, tmp_path, hub):
    (run / "recipe.yaml").write_text(
        RECIPE.format(run_dir=run, teacher=hub["qwen3_moe"], student=hub["llama"])
    )
    tokenizer = load_tokenizer(hub["llama"])
    made = {}
    for form in ("prompt_completion", "messages"):
        out = tmp_path / f"{form}.jsonl"
        code, _, err = run_cli("export", run, "--format", form, "--plain", "--out", out)
        assert code == 0, err
        made[form] = [json.loads(line) for line in out.read_text().splitlines()]
    for row, pair in zip(read_rows(run / "dataset"), made["prompt_completion"], strict=True):
        assert tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"] == row["prompt_ids"]
        assert pair["completion"] == row["text"] + tokenizer.eos_token
    joined = [{"text": pair["prompt"] + pair["completion"]} for pair in made["prompt_completion"]]
    assert made["messages"] == joined


def test_refusals_leave_nothing(run, run_cli, tmp_path):
    out = tmp_path / "x.jsonl"
    for arguments, said in (
        ([run], "nothing to do"),
        ([run, "--out", tmp_path / "x.csv"], "ends in .jsonl or .parquet"),
        ([tmp_path, "--out", out], "is not finished"),
    ):
        code, _, err = run_cli("export", *arguments)
        assert code == 2 and said in err
    out.write_text("mine")
    code, _, err = run_cli("export", run, "--out", out)
    assert code == 2 and "exists" in err and out.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x.jsonl"]


@pytest.mark.parametrize(
    "rows, name",
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**7, "n>10M")],
)
def test_size_categories(rows, name):
    assert size_category(rows) == name


def test_sources_without_a_teacher_and_without_recorded_terms(tmp_path):
    from distill.config.recipe import load_recipe

    counts = {"rows": 3, "kept": 3, "dropped": 0, "dropped_by_rule": {}, "prompts_covered": 3}
    dataset_card.write_card(load_recipe(str(ROOT / "recipes" / "base.yaml")), tmp_path, counts, None)
    assert "No third-party data or model outputs" in (tmp_path / "README.md").read_text()
    recipe = load_recipe(str(ROOT / "recipes" / "demo.yaml"), ["generate.temperature=0", "generate.top_k=5"])
    dataset_card.write_card(recipe, tmp_path, counts, None)
    card = (tmp_path / "README.md").read_text()
    assert "terms were not recorded" in card and "greedy, top_k 5" in card
    dataset_card.write_card(recipe, tmp_path, counts, decide(recipe.teacher, recipe.student))
    assert "allowed by MIT License" in (tmp_path / "README.md").read_text()


# ---- the hub, with a stand-in for it ------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch):
    """Records what would be sent. `state["public"]`: the dataset exists and is public."""
    import huggingface_hub

    state: dict = {"public": False, "fails": None}

    class Api:
        def create_repo(self, name, *, repo_type, private, exist_ok):
            if state["fails"]:
                raise state["fails"]
            state["created"] = (name, repo_type, private, exist_ok)
            return f"https://huggingface.co/datasets/{name}"

        def repo_info(self, name, *, repo_type):
            return type("Info", (), {"private": not state["public"]})

        def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns):
            files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
            sent = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
            state["sent"] = (repo_id, repo_type, sorted(sent))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def test_push_is_private_and_takes_the_kept_rows_alone(run, run_cli, fake_hub):
    code, out, err = run_cli("export", run, "--push-to-hub", "me/set")
    assert code == 0 and "datasets/me/set" in out, err
    assert fake_hub["created"] == ("me/set", "dataset", True, True)
    assert fake_hub["sent"] == ("me/set", "dataset", ["README.md", "manifest.json", "part-00000.parquet"])
    assert run_cli("export", run, "--push-to-hub", "me/set", "--public")[0] == 0
    assert fake_hub["created"][2] is False


def test_push_refuses_what_it_should_not_send(run, fake_hub):
    fake_hub["public"] = True
    with pytest.raises(UserError, match="public already"):
        dataset_card.push(run, "me/set")
    assert "sent" not in fake_hub
    fake_hub["fails"] = OSError("no route to the hub")
    with pytest.raises(RunError, match=r"no route to the hub.*hf auth login"):
        dataset_card.push(run, "me/set")
    path = run / "dataset" / "manifest.json"
    manifest = read_json(path)
    manifest["terms"] = None
    write_json(path, manifest)
    with pytest.raises(UserError, match="terms were not recorded"):
        dataset_card.push(run, "me/set")
