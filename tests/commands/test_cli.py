"""The command line's manners: quick help, exit codes, JSON that parses."""

import io
import json
import os
import subprocess
import time

import pytest
from conftest import PYTHON, ROOT

from distill import console
from distill.commands.cli import build_parser, main
from distill.files import like_it


@pytest.mark.parametrize(
    "arguments", [["train"], ["nope"], ["train", "r.yaml", "--nope"], ["describe", "a", "b"]]
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_every_command_has_help():
    parser = build_parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    assert set(commands) == {
        "demo", "run", "generate", "filter", "train", "evaluate", "report", "bench", "cost", "describe",
        "provenance", "export", "merge", "play", "completion", "inherit",
        "doctor", "init", "import",
    }  # fmt: skip


def test_cost_and_describe_print_json(run_cli, hub):
    code, out, _ = run_cli("cost", "deepseek-v3", "--json")
    bill = json.loads(out)
    assert code == 0 and (bill["gpu_hours"], bill["usd"]) == (2_788_000, 5_576_000)
    code, out, _ = run_cli("describe", hub["qwen3_moe"], "--json")
    found = json.loads(out)
    assert code == 0 and (found["experts"], found["experts_per_token"]) == (4, 2)
    assert found["parameters_active"] < found["parameters_total"]
    assert "experts" in run_cli("describe", hub["qwen3_moe"])[1]
    assert "2,788" in run_cli("cost")[1]


# Calls commands one after the other in a process that refuses to import torch or transformers, and says for each what
# was on standard error when it was refused, or that it never asked: [[what, stderr], ...].
_REFUSING = """
import contextlib, io, json, sys

class Asked(BaseException): pass

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "accelerate"):
            raise Asked(name)

sys.meta_path.insert(0, Refuse())
from distill.commands.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            what = f"exit code {main(words)}"
        except Asked:
            what = "asked"
    found.append([what, err.getvalue()])
print(json.dumps(found))
"""


def _refused(commands: list[list[str]], folder, *options: str) -> list[list[str]]:
    done = subprocess.run(
        [PYTHON, "-c", _REFUSING, json.dumps([[*words, *options] for words in commands])],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_line_stands_before_the_wait_for_torch(tmp_path):
    model, recipe = str(ROOT / "checkpoints/base"), str(ROOT / "recipes/demo.yaml")
    here = f"run_dir={tmp_path}/run"
    commands = [
        *([command, recipe, here] for command in ("run", "generate", "filter", "train", "evaluate", "doctor")),
        ["demo", here], ["train", recipe, here, "--dry-run"],
        ["evaluate", model, "--tasks", "easy"], ["inherit", model], ["merge", model, "--out", "merged"],
        ["import", "some.gguf"], ["export", model, "--gguf"],
        ["init", "mine", "--teacher", model, "--student", model],
    ]  # fmt: skip
    for words, (what, said) in zip(commands, _refused(commands, tmp_path)):
        assert (what, said) == ("asked", "loading torch and transformers ...\n"), words
    assert [said for _, said in _refused(commands, tmp_path, "--quiet")] == [""] * len(commands)


def test_what_computes_nothing_takes_no_torch(tmp_path):
    """Nor scipy and pandas, which `bench` and datasets need: half a second instead of six."""
    recipe, claims = str(ROOT / "recipes/demo.yaml"), str(ROOT / "recipes/claims.yaml")
    old = f"run_dir={tmp_path}/nothing"
    commands = {
        "cost": 0, "cost --break-even": 0, "init mine": 0, "completion zsh": 0, f"bench {claims} --dry-run": 0,
        f"report {recipe} {old}": 2, f"run {recipe} train.step=3": 2, f"train {tmp_path}/no.yaml": 2,
        "evaluate x.yaml": 2, "evaluate x --tasks nothing": 2, "export nothing": 2, "provenance nothing": 2,
        "play nothing": 2, "describe ./nothing": 2,
    }  # fmt: skip
    found = _refused([line.split() for line in commands], tmp_path)
    for (line, code), (what, said) in zip(commands.items(), found):
        assert what == f"exit code {code}", f"{line}: {what}, {said}"


def test_a_page_is_built_without_torch():
    code = (
        "import sys; import distill.report.report, distill.report.dossier, distill.cost.page, distill.bench.page\n"
        "print({'torch', 'transformers', 'scipy', 'pandas', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_help_imports_nothing_heavy():
    """What makes it take a fifth of a second: a timed assertion would fail with the machine's load instead."""
    heavy = (
        "torch",
        "transformers",
        "numpy",
        "pyarrow",
        "pydantic",
        "yaml",
        "datasets",
        "matplotlib",
        "jinja2",
    )
    code = (
        "import sys; from distill.commands.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "COMMAND" in done.stdout


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["trian", "r.yaml"], "did you mean 'train'"),
        (["-q", "evalute"], "did you mean 'evaluate'"),
        (["train", "r.yaml", "--dryrun"], "did you mean '--dry-run'"),
        (["xyzzy"], "valid: demo, run"),
    ],
)
def test_a_mistyped_word_is_told_with_the_nearest(arguments, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_version(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("distill 0.")


def test_quiet_and_verbose_stand_before_or_after_the_command(run_cli):
    wrong = "no-such.yaml"
    for words in (["--verbose", "train", wrong], ["train", wrong, "-v"], ["train", "-v", wrong]):
        code, _, err = run_cli(*words)
        assert code == 2 and "Traceback" in err and "not found" in err and console.verbose()
    for words in (["-q", "train", wrong], ["train", wrong, "--quiet"]):
        code, _, err = run_cli(*words)
        assert code == 2 and "Traceback" not in err and "not found" in err and console.quiet()
    run_cli("train", wrong)
    assert not console.quiet() and not console.verbose()


def test_progress_without_a_terminal_is_a_line_per_interval(monkeypatch, capsys):
    def work(interval: float, level: int = 0) -> str:
        monkeypatch.setattr(console, "INTERVAL", interval)
        console.set_verbosity(level)
        with console.bar(total=60, desc="work", unit="row") as bar:
            for _ in range(60):
                time.sleep(0.01)
                bar.update()
        console.set_verbosity(0)
        return capsys.readouterr().err

    assert work(30) == ""  # done long before a first line is due
    shown = work(0.2)
    lines = shown.splitlines()
    assert 2 <= len(lines) <= 4 and lines[-1].startswith("work: 60/60 row [") and "\r" not in shown
    assert work(0.2, -1) == ""


def test_colour_needs_a_terminal_and_no_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.paint("FAIL", "red", Terminal()) == "\x1b[31mFAIL\x1b[0m"
    assert console.paint("FAIL", "red", io.StringIO()) == "FAIL"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("FAIL", "red", Terminal()) == "FAIL"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell, run_cli):
    code, script, _ = run_cli("completion", shell)
    assert code == 0 and "drop-expert" in script
    for command in ("demo", "evaluate", "provenance", "completion"):
        assert command in script


def test_completion_completes_in_bash(run_cli, tmp_path):
    script = tmp_path / "distill.bash"
    script.write_text(run_cli("completion", "bash")[1])

    def completed(*words: str) -> set[str]:
        typed = " ".join(f"'{w}'" for w in words)
        code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_distill; "
        done = subprocess.run(["bash", "-c", code + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
        return set(done.stdout.split())

    assert completed("distill", "ev") == {"evaluate"}
    assert completed("distill", "evaluate", "x", "--dr") == {"--drop-expert", "--drop-each", "--dry-run"}
    (tmp_path / "mine.yaml").touch()
    assert completed("distill", "train", f"{tmp_path}/mi") == {f"{tmp_path}/mine.yaml"}


def test_a_path_with_an_equals_sign_is_no_override(tmp_path, monkeypatch):
    from distill.commands.command import is_override

    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    assert [is_override(word) for word in ("train.steps=3", "runs/lr=1e-4/student", "./a=b", "lr=1e-4", "lr=2")] == [
        True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, said",
    [
        (["cost", "deepseek-v4"], "no published bill; did you mean 'deepseek-v3'?"),
        (["cost", "nothing"], "no published bill; valid: deepseek-v3, deepseek-r1"),
        (["cost", "TMP/first_rum"], "/first_run'?"),
        (["cost", "--break-even", "TMP/first_rum"], "/first_run'?"),
        (
            ["export", "TMP/first_rum", "--out", "TMP/x.jsonl"],
            "give the run_dir of a recipe, did you mean",
        ),
        (["run", "TMP/first_run"], "is a folder; give a file, as TMP/first_run/NAME.yaml"),
        (["doctor", "TMP/latin.yaml"], "not UTF-8 (byte 0xe9 at 12), so it is no recipe"),
        (["describe", "TMP/latin.yaml"], "is not a folder; give a saved model folder"),
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else "",
)
def test_what_is_not_there_is_told_with_what_is(words, said, tmp_path, run_cli):
    (tmp_path / "first_run").mkdir()
    (tmp_path / "latin.yaml").write_bytes("run_dir: caf\u00e9".encode("latin-1"))
    code, _, err = run_cli(*(word.replace("TMP", str(tmp_path)) for word in words))
    assert code == 2 and said.replace("TMP", str(tmp_path)) in err and "Traceback" not in err, err


def test_a_name_is_never_proposed_for_itself(tmp_path):
    (tmp_path / "model").write_text("")
    assert like_it(tmp_path / "model") == "" and "model" in like_it(tmp_path / "modle")
