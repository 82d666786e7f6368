"""A claim is registered before it is measured, and git is asked: changed texts, late ones, seeds seen before."""

import json
import subprocess

import pytest
import register
import yaml
from conftest import ROOT

from distill.bench.claims import History, first_stood, seeds_seen, texts, unregistered
from distill.bench.grid import load_bench
from distill.storage import PROJECT_ROOT

FILE = "recipes/claims.yaml"
BENCH = {
    "title": "T",
    "run_dir": "x",
    "recipe": "recipes/demo.yaml",
    "budgets": {"small": {"seeds": 3}},
    "first_seed": 10,
    "set": {"train.steps": 5},
    "arms": {
        "a": {"set": {"train.batch_size": 4}},
        "b": {"like": "a", "start": "c"},
        "c": {},
        "idle": {"about": "in no claim"},
    },
    "claims": [
        {"id": "one", "sentence": "s", "hypothesis": "h", "metric": "accuracy.hard", "effect": {"a": 1, "b": -1},
         "expect": "greater"},
        {"id": "two", "sentence": "s", "hypothesis": "h", "metric": "accuracy.easy", "effect": {"c": 1},
         "expect": "less"},
    ],
}  # fmt: skip


class Project:
    """A git checkout of its own with a bench file."""

    def __init__(self, root):
        self.root, self.data = root, json.loads(json.dumps(BENCH))
        (root / "recipes" / "results").mkdir(parents=True)
        self.git("init", "-q")
        self.history = History(root)

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(self.root), *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def save(self) -> None:
        (self.root / FILE).write_text(yaml.safe_dump(self.data, sort_keys=False))

    def commit(self) -> str:
        self.save()
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "m")
        return self.git("rev-parse", "HEAD")

    def claim(self, number: int = 0) -> dict:
        return self.data["claims"][number]

    def problems(self, code=None, seeds=(10, 11, 12)) -> dict[str, str]:
        return unregistered(FILE, self.history, dict.fromkeys(("one", "two"), seeds), code)


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    made.history = History(made.root)
    return made


@pytest.fixture
def registered(project):
    first = project.commit()
    for claim in project.data["claims"]:
        claim["registered"] = first
    project.commit()
    project.history = History(project.root)
    return project


def test_a_registered_claim_is_accepted(registered):
    assert registered.history.available and registered.problems() == {}
    later = registered.commit()
    assert registered.problems(code={"one": [later], "two": [later]}) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["claims"][0].update(hypothesis="h!"),
        lambda data: data["claims"][0].update(metric="accuracy.mean"),
        lambda data: data["claims"][0].update(margin=0.1),
        lambda data: data["claims"][0].update(trivial=0.1),
        lambda data: data["claims"][0].update(expect="less"),
        lambda data: data["claims"][0].update(effect={"a": 1, "c": -1}),
        lambda data: data["claims"][0].update(first_seed=30),
        lambda data: data["claims"][0].update(headline=True),
        lambda data: data["arms"]["a"]["set"].update({"train.batch_size": 8}),
        lambda data: data["arms"]["c"].update(set={"train.steps": 9}),
        lambda data: data["set"].update({"train.steps": 6}),
        lambda data: data["budgets"]["small"].update(seeds=4),
        lambda data: data.update(first_seed=20),
    ],
)
def test_whatever_decides_is_part_of_the_text(registered, change):
    """Arms that a claim names, what they are like, start from or are taught by; margins, seeds, families."""
    change(registered.data)
    registered.save()
    assert "its text did not stand in" in registered.problems()["one"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["claims"][0].update(sentence="other", axis="words", why="a reason"),
        lambda data: data["arms"]["a"].update(about="words"),
        lambda data: data["arms"].update(idle={"set": {"train.steps": 1}}),
        lambda data: data["claims"].reverse(),
    ],
)
def test_words_beside_it_and_arms_of_others_are_not(registered, change):
    change(registered.data)
    registered.save()
    assert registered.problems() == {}


def test_a_claim_registered_after_the_code_that_measured_it_is_refused(registered):
    code = registered.commit()
    registered.claim()["hypothesis"] = "what was found"
    new = registered.commit()
    registered.claim()["registered"] = new
    registered.commit()
    found = registered.problems(code={"one": [code, new], "two": [code]})
    assert (
        set(found) == {"one"}
        and "after the code that measured it" in found["one"]
        and code[:7] in found["one"]
    )
    assert registered.problems(code={"one": [new], "two": [code]}) == {}
    assert "one" in registered.problems(code={"one": ["an unknown commit"], "two": [code]})


def test_a_commit_of_another_branch_registers_nothing(registered):
    main = registered.git("rev-parse", "HEAD")
    registered.claim()["hypothesis"] = "elsewhere"
    other = registered.commit()
    registered.git("reset", "-q", "--hard", main)
    registered.claim()["registered"] = other
    registered.commit()
    assert "after the code that measured it" in registered.problems()["one"]


def test_a_claim_without_a_commit_beside_claims_with_one_is_refused(registered):
    del registered.claim()["registered"]
    registered.commit()
    assert "names no commit" in registered.problems()["one"]
    del registered.claim(1)["registered"]
    registered.commit()
    assert registered.problems() == {}, "a file of a user registers nothing"


def test_a_claim_written_after_a_look_needs_fresh_seeds(registered):
    shown = {"effect": {"per_seed": {"10": 0.1, "11": 0.2}}}
    results = registered.root / "recipes" / "results" / "claims-small.json"
    results.write_text(json.dumps({"bench": FILE, "claims": [shown]}))
    registered.claim()["hypothesis"] = "seen and believed"
    looked = registered.commit()
    registered.claim()["registered"] = looked
    registered.commit()
    assert seeds_seen(registered.history, looked, FILE) == {"recipes/results/claims-small.json": {10, 11}}
    found = registered.problems()
    assert set(found) == {"one"}, "the other was there before the results"
    assert "uses its seeds 10 to 11; give it fresh ones (first_seed)" in found["one"]
    assert registered.problems(seeds=(12, 13, 14)) == {}


def test_where_there_is_no_history_nothing_is_checked(registered, tmp_path_factory):
    registered.claim()["hypothesis"] = "anything"
    registered.save()
    shallow = tmp_path_factory.mktemp("clone") / "shallow"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{registered.root}", str(shallow)], check=True
    )
    assert not History(shallow).available and not History(tmp_path_factory.mktemp("wheel")).available
    assert unregistered(FILE, History(shallow), {"one": [10], "two": [10]}) == {}


def test_the_commit_is_the_one_in_which_the_text_first_stood(project):
    first = project.commit()
    project.claim(1)["margin"] = 0.2
    second = project.commit()
    project.claim(1)["margin"] = 0.0
    third = project.commit()  # as at first, but it has not stood since then
    project.history = History(project.root)
    assert first_stood(project.history, FILE) == {"one": first, "two": third} and second not in (first, third)


def test_the_script_writes_what_is_accepted(project, monkeypatch, capsys):
    project.commit()
    monkeypatch.setattr(register, "PROJECT_ROOT", project.root)
    monkeypatch.setattr("sys.argv", ["register.py"])
    assert register.main() == 0 and "2 of 2" in capsys.readouterr().out
    text = (project.root / FILE).read_text()
    assert yaml.safe_load(text)["claims"][0]["registered"] == project.git("rev-parse", "HEAD")[:12]
    project.data = yaml.safe_load(text)
    project.git("commit", "-qam", "registered")
    project.history = History(project.root)
    assert project.problems() == {}
    assert register.main() == 0 and (project.root / FILE).read_text() == text, "again, nothing changes"
    project.claim()["hypothesis"] = "new"
    project.save()
    assert register.main() == 1 and "not registered: one" in capsys.readouterr().err


def test_the_claims_of_the_project_are_registered():
    """Every one, in a commit of this history in which its text stood as it is now, on seeds that nobody had seen."""
    history = History(PROJECT_ROOT)
    if not history.available:
        pytest.skip("no whole history here: a shallow clone, or no checkout")
    bench, _ = load_bench(str(ROOT / FILE))
    seeds = {claim.id: bench.claim_seeds(claim, list(bench.budgets)[-1]) for claim in bench.claims}
    assert all(claim.registered for claim in bench.claims)
    assert unregistered(FILE, history, seeds) == {}
    assert texts((ROOT / FILE).read_text()).keys() == seeds.keys()


@pytest.mark.parametrize("budget", ["small", "full"])
def test_committed_results_name_code_that_came_after_their_claims(budget):
    history = History(PROJECT_ROOT)
    results = json.loads((ROOT / "recipes" / "results" / f"claims-{budget}.json").read_text())
    if not history.available:
        pytest.skip("no whole history here: a shallow clone, or no checkout")
    for claim in results["claims"]:
        assert all(history.reaches(claim["registered"], code) for code in results["commits"]), claim["id"]
