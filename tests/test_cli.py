"""The command line's manners: quick help, exit codes, JSON that parses."""

import json
import subprocess

import pytest
from conftest import PYTHON, ROOT

from distill.cli import build_parser, main


def test_help_never_imports_torch():
    code = (
        "import sys\nfrom distill.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "evaluate" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["train"], ["nope"], ["train", "r.yaml", "--nope"], ["cost", "a", "b"]]
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
        "provenance", "export", "merge",
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
