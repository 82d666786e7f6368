"""The README's numbers are those of the committed result file, its commands exist, generated pages are current."""

import json
import re

import claim_pages
import pictures
import pytest
import readme
import tree
import website
from claim_pages import claim_results
from conftest import ROOT
from readme import PAGES, replaced, results_section, sections

import recipes as recipe_page
from distill.bench.grid import Bench, load_bench
from distill.commands import scaffold as recipe_reference
from distill.commands.cli import build_parser
from distill.config.recipe import Recipe


@pytest.mark.parametrize("language", PAGES)
def test_results_are_those_of_the_result_file(language):
    text = PAGES[language].read_text()
    shown = re.search(r"<!-- results: .*?-->\n(.*?)<!-- end of results -->", text, re.S).group(1)
    results = json.loads((ROOT / "recipes" / "results" / "demo.json").read_text())
    again = "run `python docs/generate/readme.py` after a new result file"
    assert shown == results_section(results, language), again
    low, high = results["models"]["student"]["tasks"]["hard"]["ci95"]
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in shown


@pytest.mark.parametrize("language", PAGES)
def test_claims_are_those_of_the_result_files(language):
    """And those files name their commit and hardware; from the second version on they are of the recipes of today."""
    found = claim_results()
    assert set(found) == {"small", "full"}
    assert replaced(PAGES[language].read_text(), "claims", sections(language)["claims"]) == (
        PAGES[language].read_text()
    ), "run `python docs/generate/readme.py` after a new result file"
    assert readme.CLAIMS_PAGE.read_text() == claim_pages.claims_page(found)
    assert found["small"]["seeds"] >= 3
    small, full = ({c["id"] for c in found[b]["claims"]} for b in ("small", "full"))
    assert small < full
    for results in found.values():
        assert results["commit"]["id"] and results["device"] and results["seconds"]["wall"] > 0
        assert not claim_pages.stale(results), (
            "run the grid again, then `python docs/generate/readme.py checkpoints/claims`"
        )
        doses = {dose["dose"]: dose["verdict"] for dose in results["controls"]["doses"]}
        assert doses[1.0] == "SUPPORTED"


def test_a_base_recipe_may_change_in_what_the_grid_sets_itself(monkeypatch):
    results = claim_results()["small"]
    file = "recipes/demo.yaml"
    assert file in results["recipes"] and claim_pages.stale(results) == []
    other = {**results, "recipes": {file: "another"}}
    text = claim_pages.History(ROOT).text(results["commit"]["id"], file)
    if text is None:
        pytest.skip("no checkout")
    assert claim_pages.stale(other) == [], "samples alone are others, and the grid sets them"
    monkeypatch.setattr(claim_pages.History, "text", lambda *_: text.replace("seed: 0", "seed: 1"))
    assert claim_pages.stale(other) == [file]
    bench = results["bench"]
    assert claim_pages.stale({**results, "recipes": {bench: "another"}}) == [bench]


def _language_results() -> dict:
    def arm(values: dict[str, list[float]]) -> dict:
        return {"metrics": {
            name: {"mean": sum(v) / len(v), "sd": None, "values": {str(100 + i): x for i, x in enumerate(v)}}
            for name, v in values.items()
        }}  # fmt: skip

    texts = [f"text.{text}.{key}" for text in claim_pages.TEXTS for key in ("nll", "kl", "agreement")]
    once = {name: [0.5] for name in texts} | {"parameters.total": [134.5e6]}
    seeds = {name: [4.0, 4.2, 4.1] for name in texts} | {
        "parameters.total": [63.7e6] * 3,
        "train.seconds": [500.0] * 3,
    }
    arms = {"teacher": arm(once), "pruned": arm(once), "text": arm(seeds), "mixture": arm(seeds)}
    return {"arms": arms, "device": "cpu (X)", "commit": {"id": "abc", "clean": True}}


@pytest.mark.parametrize("language", PAGES)
def test_the_table_of_language_models(language):
    shown = claim_pages.language_section(_language_results(), language)
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and len({row.count("|") for row in rows}) == 1
    # by hand: mean 4.1, sd 0.1, Student's 97.5 % point of two degrees 4.3027: 4.1 -+ 4.3027 * 0.1 / sqrt(3)
    assert rows[-1].count("4.10 [3.85, 4.35]") == 4 and rows[-1].count("410.0 [385.2, 434.8]") == 2
    assert "| 0.50 | 0.50 | 50.0 |" in rows[3] and "134.5 M" in rows[3]


@pytest.mark.parametrize("language", PAGES)
def test_the_second_story_is_that_of_the_result_files(language):
    found, text = claim_results("language"), PAGES[language].read_text()
    bench = claim_pages.LANGUAGE_BENCH
    assert claim_pages.OTHER_PAGES[bench].read_text() == claim_pages.bench_page(found, bench)
    if "small" in found:
        shown = sections(language)["language"]
        assert shown in text and replaced(text, "language", shown) == text
        assert not claim_pages.stale(found["small"]) and found["small"]["seeds"] >= 5
        (wrong,) = [c for c in found["small"]["claims"] if c["id"] == "not-the-text"]
        assert wrong["verdict"] == "NOT SUPPORTED" and f" {wrong['effect']['mean']:.2f} nat" in text, (
            "in the prose"
        )


def test_the_table_of_claims_is_of_the_largest_budget():
    """Its words are those of the results."""
    results = claim_results()["full"]
    shown = re.search(r"<!-- claims: (.*?) -->\n(.*?)<!-- end of claims -->", PAGES["en"].read_text(), re.S)
    assert shown[1] == "recipes/results/claims-full.json" and results["commit"]["id"] in shown[2]
    rows = [line for line in shown[2].splitlines() if line.startswith("| ") and "| hypothesis" not in line]
    claims = {claim["hypothesis"]: claim for claim in results["claims"]}
    assert len(rows) == len(claim_pages.SHOWN) and all(row.split(" | ")[1] in claims for row in rows)


def test_the_sentence_under_the_demo_is_that_of_the_claims():
    """By hand from the values of the seeds: worked steps without a teacher against the teacher's text."""
    arms = claim_results()["full"]["arms"]
    taught, worked = (arms[arm]["metrics"]["accuracy.hard"]["values"] for arm in ("sequence", "worked-100"))
    taught, worked = ([of[seed] for seed in worked] for of in (taught, worked))
    n = len(worked)
    mean, spread = sum(worked) / n, (sum((x - sum(worked) / n) ** 2 for x in worked) / (n - 1)) ** 0.5
    text = f"100 steps each: {100 * mean:.1f} ± {100 * spread:.1f} against {100 * sum(taught) / n:.1f}"
    assert text in PAGES["en"].read_text() and f"; {n} seeds, hard level" in PAGES["en"].read_text()


def test_a_verdict_that_its_interval_does_not_show_explains_itself():
    """INCONCLUSIVE beside an interval without zero is a riddle; the row says which correction took the verdict away."""
    found = claim_results()["full"]
    rows = {claim["id"]: claim_pages._row(claim, "en", found) for claim in found["claims"]}
    for claim in found["claims"]:
        told = "its own interval says" in rows[claim["id"]]
        assert told == (claim["verdict"] == "INCONCLUSIVE" and claim["alone"] != "INCONCLUSIVE"), claim["id"]
    assert "its own interval says SUPPORTED" in rows["inherits-refusal"]


def test_the_table_of_claims_is_chinese_in_chinese():
    """What was measured, and what will stand there when today's claims are."""
    today = load_bench(str(ROOT / claim_pages.BENCH))[0].claims
    for claim in [*claim_results()["full"]["claims"], *(claim.model_dump() for claim in today)]:
        if claim["id"] in claim_pages.SHOWN:
            for key in ("sentence", "hypothesis"):
                assert re.search("[\u4e00-\u9fff]", claim_pages.in_language(claim[key], "zh")), claim[key]


@pytest.mark.parametrize("language", PAGES)
def test_the_combination_is_that_of_the_result_files(language):
    bench, found = claim_pages.COMBINATION_BENCH, claim_results("combination")
    assert claim_pages.OTHER_PAGES[bench].read_text() == claim_pages.bench_page(found, bench)
    for claim in load_bench(str(ROOT / bench))[0].claims:
        for key in ("sentence", "hypothesis"):
            said = claim_pages.in_language(getattr(claim, key), language)
            assert (language == "zh") == bool(re.search("[\u4e00-\u9fff]", said)), said
    if found:
        largest, shown = list(found.values())[-1], sections(language)["combination"]
        assert shown in PAGES[language].read_text()
        assert not claim_pages.stale(largest) and largest["seeds"] >= 5
        assert all(claim_pages.shown_effect(claim)[:6] in shown for claim in largest["claims"])


def test_the_checklist_has_every_claim_of_today():
    bench, _ = load_bench(str(ROOT / "recipes" / "claims.yaml"))
    page = readme.CLAIMS_PAGE.read_text()
    checklist = page[page.index("## The referee's checklist") :].partition("## The first registration")[0]
    for claim in bench.claims:
        (row,) = [
            line for line in checklist.splitlines() if re.match(rf"\| {re.escape(claim.id)}( \(|\s\|)", line)
        ]
        assert claim.hypothesis.replace("|", "\\|") in row and "95 % interval wholly" in row
        assert claim.registered and claim.registered in row
    for row in bench.evidence:
        assert row.sentence in page


def test_the_speed_table_is_that_of_the_result_file():
    page = readme.SPEED_PAGE.read_text()
    for name, file in readme.SPEED_RESULTS.items():
        found = json.loads(file.read_text())
        assert page == replaced(page, name, readme.speed_section(found)), (
            "run `python docs/generate/readme.py`"
        )
        assert f"<!-- {name}: recipes/results/{file.name} -->" in page
    (group,) = [
        g for g in found["groups"]
        if g["setting"] == "large vocabulary" and g["objective"] == "forward_kl" and g["measured"] == "step"
        and g["precision"] == "fp32" and g["allocator"] == "glibc"
    ]  # fmt: skip
    mine = group["methods"]["distill"]
    ratio = group["methods"]["TRL DistillationTrainer"][group["clock"]] / mine[group["clock"]]
    assert mine["times_faster_than"]["TRL DistillationTrainer"] == pytest.approx(ratio, rel=1e-2)
    assert f"| {ratio:.2f} |" in page and f"{mine['memory_peak'] / 1e9:.2f}" in page


def test_both_readmes_have_the_same_parts():
    """Translated headings aside: as many sections and blocks, the same commands, links to the same pages."""
    english, chinese = (PAGES[language].read_text() for language in ("en", "zh"))
    assert [h.count("#") for h in re.findall(r"^#+ ", english, re.M)] == [
        h.count("#") for h in re.findall(r"^#+ ", chinese, re.M)
    ], "README.md and README.zh-CN.md differ in their sections"
    links = [set(re.findall(r"\]\((docs/\w+\.md|CONTRIBUTING\.md)", text)) for text in (english, chinese)]
    assert links[0] == links[1], "a page is linked in one language only"


def test_the_demo_proves_what_the_page_says():
    """The claims of the page, from the committed numbers: by how much, and that intervals do not overlap."""
    models = json.loads((ROOT / "recipes" / "results" / "demo.json").read_text())["models"]
    hard = {name: model["tasks"]["hard"] for name, model in models.items()}
    assert hard["student"]["accuracy"] >= 0.65
    for arm in ("base", "control"):
        assert hard["student"]["accuracy"] - hard[arm]["accuracy"] >= 0.40
        assert hard["student"]["ci95"][0] > hard[arm]["ci95"][1]
    easy = {name: model["tasks"]["easy"]["accuracy"] for name, model in models.items()}
    assert easy["student"] >= easy["base"] - 0.05
    assert models["teacher"]["tasks"]["hard"]["accuracy"] >= 0.95


@pytest.mark.parametrize("language", PAGES)
def test_commands_in_the_readme_exist(language):
    """Every command of the program stands under "Commands" ("命令"), and nothing else does."""
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    named = set(re.findall(r"^distill (\w+)", PAGES[language].read_text(), re.M)) | {
        "filter",
        "train",
        "report",
    }
    assert named <= set(commands)
    assert set(commands) <= named, f"add a line to {PAGES[language].name}: {set(commands) - named}"


def test_recipe_reference_is_current_and_explains_every_key():
    assert recipe_page.PAGE.read_text() == recipe_page.page(), (
        "a recipe's keys changed: run `python docs/generate/recipes.py`"
    )
    walked = [found for root in (Recipe, Bench) for found in recipe_reference.entries(root)]
    found = [entry for _, _, own in walked for entry in own]
    silent = [entry.key for entry in found if len(entry.description) < 5]
    assert not silent, f"give these a Field(description=...) with the unit: {silent}"
    sections = [path for path, section, _ in walked if not section.__doc__]
    assert not sections, f"say what these sections are for in a docstring: {sections}"
    keys = {entry.key for entry in found}
    assert {"train.steps", "teacher.endpoint.base_url", "evaluate.interventions.top_k"} <= keys
    assert {"arms.NAME.like", "claims.0.hypothesis"} <= keys and len(keys) > 170


@pytest.mark.parametrize("page", tree.PAGES, ids=lambda p: p.name)
def test_the_tree_is_that_of_the_docstrings(page):
    text = page.read_text()
    assert tree.with_tree(text) == text, (
        "a module or its first sentence changed: run `python docs/generate/tree.py`"
    )
    assert {f"distill/{f}/" if f else "distill/" for f in tree.FOLDERS} <= set(text.split())


@pytest.mark.parametrize("language", PAGES)
def test_the_tour_is_short_enough_to_be_read(language):
    """Every file that it names exists, and together they are an hour."""
    table = re.search(r"\n\| `recipes/minimal_kd.py` .*?\n\n", PAGES[language].read_text(), re.S)[0]
    files, folder = [], ""
    for name in re.findall(r"`([\w./]+\.(?:py|yaml))`", table):
        folder = name.rpartition("/")[0] or folder
        files.append(ROOT / folder / name.rpartition("/")[2])
    assert len(files) == 11
    assert sum(len(file.read_text().splitlines()) for file in files) < 3100


def test_the_site_offers_every_name_and_no_dead_link(tmp_path):
    offered = [
        name
        for folder in tree.FOLDERS
        if (page := website.api_page(folder))
        for name in re.findall(r"^::: (\S+)", page, re.M)
    ]
    assert len(offered) > 180 and "distill.moe.metrics.max_violation" in offered
    text = website.site_page("docs/moe.md", "[a](data.md#x) [b](../distill/cli.py) [c](https://d.e)")
    assert text == "[a](data.md#x) b [c](https://d.e)"
    assert website.site_page("docs/moe.md", "```sh slow\nx\n```") == "```sh\nx\n```"
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    website.build(tmp_path / "site")
    start = (tmp_path / "site" / "index.html").read_text()
    shown = re.findall(r'(?:src|srcset)="(docs/pictures/[^"]+)"', start)
    assert len(shown) >= 4 and all((tmp_path / "site" / picture).is_file() for picture in shown)
    assert 'id="the-article-claim-by-claim"' in start and 'href="README.zh-CN.html"' in start
    assert "drop_experts" in (tmp_path / "site" / "api" / "moe.html").read_text()


@pytest.mark.parametrize("language", pictures.LANGUAGES)
@pytest.mark.parametrize("colours", pictures.COLOURS)
def test_the_pictures_are_those_of_their_script(colours, language):
    file = pictures.FOLDER / f"pipeline-{colours}{language}.svg"
    assert file.read_text() == pictures.picture(colours, language), "run `python docs/generate/pictures.py`"
    page = PAGES["zh" if language else "en"].read_text()
    assert f"docs/pictures/{file.name}" in page
