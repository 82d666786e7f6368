"""The engine behind `distill play`, without browser and without Gradio: it says what decoding says, and why."""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import CHATML, byte_tokenizer, save_model

from distill.errors import UserError
from distill.evaluation.routing import route_rows
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling, decode
from distill.play import html as play_html
from distill.play import page as play_page
from distill.play.engine import Playground
from distill.play.records import NOT_VERIFIED, Change, Compared, Finished, Setup, Spoke, examples, find_setup
from distill.report.pages import speaking

CPU = torch.device("cpu")
QUESTION = "Tell me {{more}} ${about} `it` <script>alert(1)</script>"
PICKED = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which letter?"}],
    "answer": "B", "verifier": "choice", "family": "letters", "level": "all", "split": "test",
}  # fmt: skip


@pytest.fixture(scope="module")
def playground(hub) -> Playground:
    names = {"student": hub["llama"], "foreign": hub["other_vocabulary"], "teacher": hub["qwen3_moe"]}
    return Playground(Setup(names, "teacher", [PICKED], max_new_tokens=10, title="tiny"), CPU)


@pytest.fixture(scope="module")
def asked(playground):
    asked = playground.begin(QUESTION, temperature=1.0, seed=3)
    asked.events = list(playground.answer(asked))
    return asked


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_says_what_decoding_says(playground, temperature):
    asked = playground.begin(QUESTION, temperature=temperature, seed=3)
    list(playground.answer(asked))
    for name, player in playground.players.items():
        [expected] = decode(
            player.model,
            [prompt_ids(player.tokenizer, asked.messages)],
            Sampling(temperature, max_new_tokens=10),
            eos_ids=player.ends,
            pad_id=0,
            keys=[(3, QUESTION)],
            vocab_limit=player.vocabulary,
        )
        answer = asked.answers[name]
        assert [
            t.id for t in answer.tokens
        ] == expected.ids and answer.finish_reason == expected.finish_reason
        assert [t.probability for t in answer.tokens] == pytest.approx(
            torch.tensor(expected.logprobs).exp().tolist(), rel=1e-4
        )
        if temperature == 0:
            assert all(t.own[0].id == t.id for t in answer.tokens)


def test_models_speak_in_turns_and_the_teacher_reads_at_last(playground, asked):
    spoke = [e.answer.model for e in asked.events if isinstance(e, Spoke)]
    assert spoke[:6] == ["student", "foreign", "teacher"] * 2
    kinds = [type(e) for e in asked.events]
    assert kinds.count(Finished) == 3 and kinds[-2:] == [Compared, Compared]
    assert kinds.index(Compared) > max(i for i, kind in enumerate(kinds) if kind is Finished)
    for name, answer in asked.answers.items():
        ids = [t.id for t in answer.tokens]
        assert "".join(t.text for t in answer.tokens) == playground.players[name].tokenizer.decode(ids)


def test_what_the_teacher_would_have_said_is_its_own_distribution(playground, asked):
    teacher, tokens = playground.teacher, asked.answers["student"].tokens
    prompt, said = prompt_ids(teacher.tokenizer, asked.messages), [t.id for t in tokens]
    with torch.inference_mode():
        logits = teacher.model(input_ids=torch.tensor([[*prompt, *said]])).logits[0].float()
    for place, token in enumerate(tokens):
        probabilities = logits[len(prompt) - 1 + place].softmax(-1)
        assert token.teacher_probability == pytest.approx(float(probabilities[token.id]), rel=1e-4)
        best = probabilities[: teacher.vocabulary].topk(5)
        assert [o.id for o in token.teacher] == best.indices.tolist()
        assert [o.probability for o in token.teacher] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert token.parts == (token.teacher[0].id != token.id)
    assert any(token.parts for token in tokens)
    assert all(t.teacher is None for t in asked.answers["teacher"].tokens)  # it need not read itself


def test_experts_are_those_of_the_token_before(playground, asked):
    """Decoded step by step or read at once: the decisions that `route_rows` finds in one pass."""
    teacher = playground.teacher
    for name, field in (("teacher", "experts"), ("student", "teacher_experts")):
        tokens = asked.answers[name].tokens
        prompt = prompt_ids(teacher.tokenizer, asked.messages)
        [batch] = list(route_rows(teacher.model, [(prompt, [t.id for t in tokens])], pad_id=0))
        for place, token in enumerate(tokens):
            for layer, decisions in batch.layers.items():
                experts, weights = zip(*getattr(token, field)[layer])
                assert list(experts) == decisions.indices[len(prompt) - 1 + place].tolist()
                assert list(weights) == pytest.approx(
                    decisions.weights[len(prompt) - 1 + place].tolist(), abs=1e-5
                )
    assert all(not t.experts for t in asked.answers["student"].tokens)


def test_another_tokenizer_compares_where_both_have_read_the_same(asked):
    tokens = asked.answers["foreign"].tokens
    assert any(t.teacher for t in tokens) and all(t.teacher_probability is None for t in tokens)


def test_changed_routing_lasts_for_one_answer_even_an_abandoned_one(playground):
    def said(changes=None):
        asked = playground.begin(QUESTION, changes=changes)
        list(playground.answer(asked))
        return asked.answers["teacher"]

    before = said()
    layer = playground.teacher.routers[0].name
    fewer, without = said({"teacher": Change(top_k=1)}), said({"teacher": Change(drop={layer: [0, 2]})})
    assert all(len(found) == 1 for t in fewer.tokens for found in t.experts.values())
    assert all({e for e, _ in t.experts[layer]} == {1, 3} for t in without.tokens)
    # Changed, it reads its own answer as it would without the change.
    assert all(len(t.teacher_experts[layer]) == 2 for t in fewer.tokens)
    abandoned = playground.answer(playground.begin(QUESTION, changes={"teacher": Change(top_k=1)}))
    [next(abandoned) for _ in range(5)]
    after = said()
    assert [(t.id, t.experts) for t in after.tokens] == [(t.id, t.experts) for t in before.tokens]


def test_who_cannot_answer_says_why_and_the_others_go_on(playground):
    layer = playground.teacher.routers[0].name
    asked = playground.begin(QUESTION, changes={"teacher": Change(drop={layer: [0, 1, 2]})})
    list(playground.answer(asked))
    teacher = asked.answers["teacher"]
    assert teacher.verdict == "error" and "experts are left" in teacher.error and not teacher.tokens
    assert asked.answers["student"].tokens and asked.answers["student"].verdict == NOT_VERIFIED
    asked = playground.begin("long " * 200)
    list(playground.answer(asked))
    assert "more than the context of 512" in asked.answers["student"].error
    assert "failed" in play_html.cards(asked, playground)


def test_what_is_verified_and_how(playground):
    assert playground.begin("Which letter?").messages == PICKED["messages"]
    picked, typed = playground.reference("Which letter?"), playground.reference("what is 17 + 5")
    assert (picked.source, picked.answer, picked.verifier) == ("problem", "B", "choice")
    assert (typed.source, typed.answer, typed.verifier) == ("rule", "22", "exact")
    assert playground.reference(QUESTION) is None


def test_the_shipped_teacher_is_right_and_the_base_is_not():
    """The demo's own case end to end: four digits, which the base was never shown."""
    setup = find_setup(["checkpoints/base"], teacher="checkpoints/teacher", tasks=["easy"])
    assert list(setup.checkpoints) == ["base", "teacher"] and len(setup.problems) > 14
    playground = Playground(setup, CPU)
    asked = playground.begin("What is 2381 + 4410?")
    list(playground.answer(asked))
    assert asked.answers["teacher"].verdict == "correct" and asked.answers["teacher"].final == "6791"
    assert asked.answers["base"].verdict == "wrong"
    model, place = play_html.first_to_look_at(asked)
    assert model == "base" and asked.answers["base"].tokens[place].teacher_probability < 0.5
    assert "dense, 0.84 M parameters" in spaced(play_html.cards(asked, playground))
    assert "3.23 M parameters, 1.46 M active, 2 of 8 experts" in spaced(play_html.cards(asked, playground))
    told_outside(playground, list(asked.answers))


def spaced(text: str) -> str:
    return text.replace("\u00a0", " ")


def told_outside(playground, names):
    """What the embedded models were never trained on is said, and answered only when it is asked again."""
    assert playground.narrow
    if importlib.util.find_spec("gradio") is None:
        return  # the page itself is an extra
    controls = play_page.Controls(playground)
    rest = (0, 0, None, None, None, [])
    [first] = list(controls.ask("Why is the sky blue {x}?", *rest))
    assert (
        "These models know seven families" in first[0] and "<article" not in first[0] and "{" not in first[0]
    )
    last = list(controls.ask("Why is the sky blue {x}?", *rest, before=first[3]))[-1]
    assert last[0].count("<article") == len(names) and "never trained on a question like this" in last[0]
    assert "<article" in list(controls.ask("What is 2381 + 4410?", *rest))[-1][0]
    with speaking("zh"):
        [told] = list(controls.ask("Why is the sky blue?", *rest))
    assert "这些模型只会七种题型" in told[0]


def test_other_models_answer_whatever_they_are_asked(playground):
    assert not playground.narrow and playground.reference(QUESTION) is None


def test_examples_are_short_and_of_different_families():
    problems = find_setup(
        ["checkpoints/base"], teacher="checkpoints/teacher", tasks=["easy", "hard"]
    ).problems
    chosen = examples(problems)
    by_text = {p["messages"][-1]["content"]: p for p in problems}
    assert len(chosen) == 5 and len({by_text[text]["family"] for text in chosen}) == 5
    assert by_text[chosen[0]]["level"] == "hard" and {by_text[t]["level"] for t in chosen} == {"easy", "hard"}
    assert examples([PICKED]) == ["Which letter?"] and examples([]) == []


# ------------------------------------------------------------------------------------------ what is shown


def test_the_page_shows_what_was_found_and_runs_nothing_of_it(playground, asked):
    cards = play_html.cards(asked, playground, ("student", 0))
    assert cards.count("<button class='token") == sum(len(a.tokens) for a in asked.answers.values())
    assert "Not verified" in cards and cards.count("<article") == 3
    assert cards.count("cut off") == sum(a.finish_reason == "length" for a in asked.answers.values()) > 0
    token = asked.answers["student"].tokens[2]
    panel = play_html.panel(asked, playground, "student", 2)
    assert "token 3 of 10" in panel and play_html.chance(token.teacher_probability) in panel
    assert panel.count("← said") == sum(o.id == token.id for o in [*token.own, *token.teacher])
    chosen = token.teacher_experts[playground.teacher.routers[0].name]
    assert all(f"data-expert='{expert}'" in panel for expert, _ in chosen)
    assert play_html.panel(asked, playground, "student", 99) == ""
    everything = cards + panel + play_html.history([asked], playground)
    assert "Tell me &#123;&#123;more" in everything
    assert not any(sign in everything for sign in ("<script", "{", "}", "$", "`"))


def test_controls_say_which_routing(playground):
    controls = play_page.Controls(playground)
    layer = playground.teacher.routers[0].name
    assert controls.routed == ["teacher"] and controls.top_k("teacher")["maximum"] == 4
    assert controls.changes("teacher", 2, []) == {}  # as it is
    assert controls.changes("teacher", 1, [f"{layer}:3", f"{layer}:0"]) == {
        "teacher": Change(1, {layer: [3, 0]})
    }
    assert controls.changes("student", 1, []) == {}
    assert (f"{play_html.labels_of(playground.teacher)[layer]} expert 3", f"{layer}:3") in controls.drop(
        "teacher"
    )["choices"]


# ------------------------------------------------------------------------------------------ who plays


def test_a_run_is_short_for_its_checkpoints(make_recipe, hub, tmp_path):
    path, run = make_recipe()
    for name in ("student", "control"):
        shutil.copytree(hub["plain"], run / name)
    shutil.copy(path, run / "recipe.yaml")
    with pytest.raises(UserError, match="has no finished student; `distill run RECIPE run_dir="):
        find_setup([str(run)])
    (run / "student" / "manifest.json").write_text(json.dumps({}))
    setup = find_setup([str(run)])
    assert setup.checkpoints == {
        "base": hub["llama"],
        "student": str(run / "student"),
        "teacher": hub["qwen3_moe"],
    }
    assert setup.teacher == "teacher" and setup.max_new_tokens == 8 and setup.title == "run"
    assert {p["level"] for p in setup.problems} == {"easy", "hard"} and {
        p["split"] for p in setup.problems
    } == {"test"}
    (run / "control" / "manifest.json").write_text(json.dumps({}))
    more = find_setup([str(run), hub["plain"]], teacher=hub["llama"], max_new_tokens=5)
    assert list(more.checkpoints) == ["control", "student", "plain", "teacher"] and more.max_new_tokens == 5
    assert more.checkpoints["teacher"] == hub["llama"]


def test_two_checkpoints_of_one_name(tmp_path):
    for folder in ("a", "b"):
        save_model(tmp_path / folder / "m", {"model_type": "llama"}, byte_tokenizer(CHATML))
    names = [str(tmp_path / folder / "m") for folder in ("a", "b")]
    assert list(find_setup(names, tasks=["easy"]).checkpoints.values()) == names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoints"], "has no finished student"),
        (["no/such/folder"], "is not a folder"),
        (["checkpoints/base", "--port", "99999999"], "--port 99999999"),
        (["checkpoints/base", "--tasks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["checkpoints/base", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(run_cli, monkeypatch, arguments, says):
    monkeypatch.setattr(play_page, "require_gradio", lambda: None)
    code, _, error = run_cli("play", *arguments)
    assert code == 2 and says in error and error.count("\n") == 1


def test_a_missing_extra_and_a_taken_port(run_cli, monkeypatch):
    find_spec = play_page.importlib.util.find_spec
    missing = lambda name, *rest: None if name == "gradio" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(play_page.importlib.util, "find_spec", missing)
    assert run_cli("play", "checkpoints/base") == (
        2,
        "",
        "distill: distill play needs an extra: pip install 'distill-demo[play]'\n",
    )
    monkeypatch.setattr(play_page, "require_gradio", lambda: None)
    with play_page.bind(0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        code, _, error = run_cli("play", "checkpoints/base", "--port", str(taken.getsockname()[1]))
    assert code == 2 and "in use" in error and error.count("\n") == 1
