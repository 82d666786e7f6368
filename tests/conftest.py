"""Shared fixtures: tiny models of other families on disk, with tokenizers of their own; everything offline.

Torch and transformers are imported where a fixture needs them: a file of tests that needs neither runs in a second, and
the process that hands tests to workers never does.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, so each process computes on one thread, those that tests start too.
os.environ["DISTILL_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Compiling the package is a second of every process, and rewriting all asserts of the tests six of each worker.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import ctypes
import gc
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from drafting import draft_pages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

sys.dont_write_bytecode = False

# Memory that one test gave back serves the next, instead of pages that the kernel clears anew.
for name, number in (("MALLOC_TRIM_THRESHOLD_", -1), ("MALLOC_TOP_PAD_", -2), ("MALLOC_MMAP_THRESHOLD_", -3)):
    os.environ[name] = str(size := 64 << 20 if number == -2 else 1 << 30)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc
        mallopt(number, size)

# Tests end processes and not machines: no file has to survive a loss of power.
os.fsync = lambda _file: None

# A busy machine is no fault of a test: nothing here is timed.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_configure():
    """Looking for garbage among all that torch and transformers make is a fifth of the time of importing them."""
    gc.disable()


def pytest_collection_finish():
    """What stands now is not looked at again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: tests of launches and servers wait, and nobody would use their core meanwhile."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbouring tests go to one worker, so that what a module makes for all its tests is made once; who is done
    takes from the others."""
    if config.option.dist == "load":  # what `-n` alone asks for
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)


# Files of half a minute each: the last test of a run is none of theirs, for which the other workers would wait.
LONG = (
    "launches/test_accelerator.py", "recipes/test_workshop.py", "launches/test_launch.py", "bench/test_run.py",
    "launches/test_failing.py", "faults/test_kills.py", "launches/test_evaluate_ranks.py", "recipes/test_recompute.py",
    "launches/test_wheel.py", "launches/test_sharded.py", "data/test_endpoint.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """In a worker: long files first. The order is the same in every worker, and within a file it stays."""
    if hasattr(config, "workerinput"):
        assert all((ROOT / "tests" / name).is_file() for name in LONG), "a file of LONG has another name now"
        items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def byte_tokenizer(template: str | None, extra: tuple[str, ...] = ()) -> "PreTrainedTokenizerFast":
    """Byte-level BPE without merges: any text, few tokens. `extra` makes two vocabularies differ in content."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", *extra]
    trainer = trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    # No pad token on purpose: many hub tokenizers have none.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def save_model(folder: Path, config: dict, tokenizer: "PreTrainedTokenizerFast", seed: int = 0) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    return str(folder)


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its precision for the whole process; what one test chose must not meet the next."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


# Where pages and speeds are what is tried. Elsewhere they are by-products of a run, and more than half of its time.
DRAWN = {"report", "bench", "cost", "docs", "play"}


@pytest.fixture(scope="module", autouse=True)
def drafts(request):
    """`draft_pages`, unless the folder or the module (`DRAWN = True`) is about pages or speeds."""
    if (
        request.path.parent.name in DRAWN
        or getattr(request.module, "DRAWN", False)
        or "torch" not in sys.modules
    ):
        yield
        return
    with draft_pages():
        yield


@pytest.fixture
def drawn(drafts, monkeypatch):
    """Real figures for one test where others have drafts."""
    from distill.report import drawing

    for name in ("written_svg", "_drawn"):
        now = getattr(drawing, name)
        monkeypatch.setattr(drawing, name, getattr(now, "real", now))


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> dict[str, str]:
    """A tiny 'hub': folders of other families, each with its own tokenizer."""
    root = tmp_path_factory.mktemp("hub")
    return {
        "llama": save_model(root / "llama", {"model_type": "llama"}, byte_tokenizer(CHATML)),
        "qwen3_moe": save_model(root / "qwen3-moe", QWEN3_MOE, byte_tokenizer(CHATML), seed=1),
        "plain": save_model(root / "plain", {"model_type": "llama"}, byte_tokenizer(None), seed=2),
        "other_vocabulary": save_model(
            root / "other", {"model_type": "llama"}, byte_tokenizer(CHATML, ("<|extra|>",)), seed=3
        ),
    }


RECIPE = """
run_dir: {run_dir}
seed: 0
device: cpu
threads: 1
prompts: {{source: tasks, levels: {{easy: 12, medium: 6, hard: 6}}}}
teacher: {{model: {teacher}}}
generate: {{samples: 2, temperature: 1.0, max_new_tokens: 12, batch_size: 16, part_size: 8}}
filter: {{correct_only: false}}
student: {{model: {student}, adapter: lora, lora: {{rank: 2, alpha: 4}}}}
train: {{steps: 4, batch_size: 6, micro_batch_size: 3, learning_rate: 1.0e-3, warmup_steps: 1, precision: fp32,
        checkpoint_every: 1}}
evaluate: {{levels: {{easy: 7, hard: 7}}, max_new_tokens: 8, batch_size: 16}}
"""


@pytest.fixture
def make_recipe(tmp_path, hub):
    """Writes a small recipe: make_recipe(teacher="qwen3_moe", student="llama") -> (path, run_dir)."""

    def write(teacher: str = "qwen3_moe", student: str = "llama", name: str = "run") -> tuple[str, Path]:
        run_dir = tmp_path / name
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            RECIPE.format(
                run_dir=run_dir, teacher=hub.get(teacher, teacher), student=hub.get(student, student)
            )
        )
        return str(path), run_dir

    return write


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory, hub):
    """(folder of run.yaml and run/, a copy of run/ as it was made)."""
    from distill.commands.cli import main

    root = tmp_path_factory.mktemp("finished")
    recipe = RECIPE.format(run_dir=root / "run", teacher=hub["qwen3_moe"], student=hub["llama"])
    (root / "run.yaml").write_text(recipe)
    with draft_pages():
        assert main(["run", str(root / "run.yaml")]) == 0
    return root, shutil.copytree(root / "run", root / "kept")


@pytest.fixture(scope="module")
def finished(kept_run):
    """The folder of a finished run, `run` beside its recipe `run.yaml`: made once, as it was made for each module."""
    root, kept = kept_run
    shutil.rmtree(root / "run", ignore_errors=True)
    shutil.copytree(kept, root / "run", symlinks=True)
    return root


@pytest.fixture
def trained(make_recipe):
    """trained("name", "key=value", ...) -> final tensors of the student (and its run folder)."""
    from training_example import trainer

    return trainer(make_recipe)


@pytest.fixture
def run_cli(capsys):
    """Run the command in this process: run_cli("train", recipe) -> (exit code, stdout, stderr)."""
    from distill.commands.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
