"""What a lesson shows in a notebook: answers whose tokens can be clicked, and curves that a slider moves.

Knobs to turn: a slider is moved and the curve moves with it, in a notebook as well as in a page without Python.

    slider("temperature", scores=[4.1, 3.0, 0.2], names=["7", "8", "9"])     # the last line of a cell shows it
    page("en")                                                              # all of them, as one HTML page

| kind          | what is moved                          | what is seen                                              |
|---------------|----------------------------------------|-----------------------------------------------------------|
| `temperature` | T                                      | probabilities of a few tokens, entropy, repeated samples  |
| `direction`   | beta, from forward to reverse KL       | the bell that is nearest to a teacher with two humps      |
| `tail`        | k of the stored tokens, peakedness     | the error of KL with the tail thrown away, or in a bucket |
| `rank`        | rank, width of the matrix              | what LoRA trains beside the whole matrix                  |
| `blocks`      | numbers that share a scale, an outlier | rounding errors of FP8 along a row                        |
| `balance`     | u, the step of the expert bias         | MaxVio over the steps                                     |
| `experts`     | the expert that is dropped             | right answers with their interval, as a lesson measured   |
| `walk`        | a place along what a lesson measured   | the curves, and their values at that place                |

The script (distill/report/templates/explore.js) computes the curves in the browser from formulas and from the numbers
given here; nothing is fetched. A viewer that runs no scripts, as GitHub's, shows one line of text instead.

Answers of several models in a notebook, every token to be clicked: what `distill play` shows, without its server.

    playground = players("recipes/workshop/demo")             # base, student and teacher of a finished run
    asked = answer(playground, "What is 4683 + 9457?")
    show(asked, playground)                                   # the last line of a cell shows it
    answer(playground, "...", drop={1: [3]})                   # the teacher without expert 3 of layer 1

The answers come from distill/play/engine.py, the same that serves the page; here they are put into one piece of HTML
with their numbers, a few kB an answer. A viewer that runs no scripts, as GitHub's, shows the answers as text.
"""

import html
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import UserError
from distill.lessons.lesson import BOTH, NOW, shown_in_chinese
from distill.play.engine import Player, Playground
from distill.play.html import SIGNS, changes, labels_of
from distill.play.records import Asked, Change, Chosen, Finished, PlayedAnswer, Token, find_setup
from distill.report.pages import TEMPLATES, called, say, speaking, visible

KINDS = ("temperature", "direction", "tail", "rank", "blocks", "balance", "experts", "walk")
NOTES = {
    "en": "Run this cell to move the sliders.",
    "zh": "运行这个单元格即可拖动滑块。",
}
TITLES = {
    "temperature": ("Temperature", "温度"),
    "direction": ("Direction of KL", "KL 的方向"),
    "tail": ("The tail of top-k", "top-k 的尾部"),
    "rank": ("Rank of LoRA", "LoRA 的秩"),
    "blocks": ("Blocks of FP8", "FP8 的分块"),
    "balance": ("Balance by a bias", "用偏置均衡"),
}
# Scores of a language model after "The capital of the": invented, for the page without a model.
EXAMPLE = {
    "scores": [5.0, 4.2, 3.6, 2.9, 2.0, 1.2],
    "names": ["country", "world", "state", "United", "old", "moon"],
}


class Shown(str):
    """HTML that a notebook shows when it is the last line of a cell."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return "(to be seen in a notebook)"


def slider(kind: str, language: str | None = None, **data: Any) -> Shown:
    """One knob with its curve. `data`: what the kind shows, as in the table above. UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"slider({kind!r}): one of {', '.join(KINDS)}")
    if kind in ("temperature", "experts") and not {"scores", "names"} <= set(data):
        raise UserError(f"slider({kind!r}) needs scores= and names=, one of each a bar")
    if kind == "walk" and not {"at", "knob", "unit", "lines"} <= set(data):
        raise UserError("slider('walk') needs at=, knob=, unit= and lines=; names are {'en': ..., 'zh': ...}")
    return Shown(
        f"<style>{style()}</style>{_box(kind, language or NOW['language'], data)}<script>{script()}</script>"
    )


def script() -> str:
    return (TEMPLATES / "explore.js").read_text(encoding="utf-8")


def style() -> str:
    return (TEMPLATES / "explore.css").read_text(encoding="utf-8")


def _box(kind: str, language: str, data: dict[str, Any]) -> str:
    told = json.dumps({"kind": kind, "lang": language, "data": data}, ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    note = html.escape(NOTES[language])
    return f"<div class='explore'><script type='application/json'>{told}</script><noscript>{note}</noscript></div>"


def page(language: str) -> str:
    """Every knob that needs no model, as one page that works without Python, server or network."""
    chinese = language == "zh"
    title = "工作坊里可以拖动的图" if chinese else "The workshop's sliders"
    told = (
        "拖动滑块，图和下面的句子随之变化。"
        if chinese
        else "Move a slider: picture and sentence change with it."
    )
    parts = [
        f"<section><h2>{html.escape(names[chinese])}</h2>"
        f"{_box(kind, language, EXAMPLE if kind == 'temperature' else {})}</section>"
        for kind, names in TITLES.items()
    ]
    return (
        f"<!doctype html>\n<html lang='{'zh-CN' if chinese else 'en'}'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{title}</title>"
        "<style>:root { color-scheme: light } body { margin: 0 auto; max-width: 1480px; padding: 1rem; "
        'color: #1c2530; background: #fff; font-family: system-ui, "Noto Sans CJK SC", sans-serif } '
        "h2 { margin: .5rem 0 .3rem } main { display: grid; gap: 1rem 2.5rem; "
        "grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)) }"
        f"{style()}</style><h1>{title}</h1><p>{told}</p><main>{''.join(parts)}</main>"
        f"<script>{script()}</script></html>\n"
    )


# ==== Answers of several models in a notebook, every token to be clicked ====

OPTIONS = 4  # shown of each distribution


def players(run: str, without: Sequence[str] = ()) -> Playground:
    """The checkpoints of a finished run, loaded; `without`: names that are left out."""
    import torch

    setup = find_setup([run])
    for name in without:
        setup.checkpoints.pop(name, None)
    return Playground(setup, torch.device("cpu"))


def answer(
    playground: Playground, question: str, drop: Mapping[int | str, Sequence[int]] | None = None
) -> Asked:
    """Every model's answer, greedy. `drop`: experts that the teacher may not choose, by layer."""
    changes_of = {playground.teacher.name: Change(drop=dict(drop))} if drop and playground.teacher else {}
    asked = playground.begin(question, changes=changes_of)
    for event in playground.answer(asked):
        if isinstance(event, Finished) and event.answer.error:
            print(f"{event.answer.model}: {event.answer.error}")
    return asked


def show(asked: Asked, playground: Playground, language: str | None = None) -> Shown:
    """The answers side by side, every token a button."""
    if os.environ.get(BOTH) and language is None:
        from IPython.display import HTML

        shown_in_chinese(HTML(show(asked, playground, "zh")))
    with speaking(language or NOW["language"]):
        words = {
            "token": say("token"),
            "own": say("The model itself weighs"),
            "teacher": say("The teacher would have said"),
            "experts": say("Experts that chose this token"),
            "theirs": say("Experts of the teacher at this place"),
            "share": say("Bold: a chosen expert. Small: its share of the weight, in %%."),
            "hint": say(
                "Click a token. Dashed: the teacher would have said something else. Strong colour: unlikely."
            ),
        }
        models = [_model(one, playground.players[one.model], playground) for one in asked.answers.values()]
        routed = playground.routed
        experts = routed[0].routers[0].num_experts if routed else 0
        plain = "<br>".join(
            f"{html.escape(one['name'])} {one['sign']} {html.escape(''.join(t['t'] for t in one['tokens']))}"
            for one in models
        )
        question = say("Right answer:")
    right = asked.reference.answer if asked.reference else ""
    told = json.dumps({"words": words, "experts": experts, "models": models}, ensure_ascii=False)
    script, style = ((TEMPLATES / f"shown.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    return Shown(
        f"<style>{style}</style><div class='shown'>"
        f"<p><b>{html.escape(asked.question)}</b> "
        f"{html.escape(question)} <b>{html.escape(right)}</b></p><p class='plain'>{plain}</p>"
        f"<script type='application/json'>{told.replace('<', chr(92) + 'u003c')}</script></div>"
        f"<script>{script}</script>"
    )


def _model(one: PlayedAnswer, player: Player, playground: Playground) -> dict:
    sign, verdict = SIGNS[one.verdict]
    return {
        "name": called(one.model),
        "sign": sign,
        "verdict": one.verdict,
        "word": say(verdict),
        "final": one.final or "–",
        "change": changes(one.change, player) if one.change else "",
        "tokens": [_token(t, one, player, playground) for t in one.tokens],
    }


def _token(token: Token, one: PlayedAnswer, player: Player, playground: Playground) -> dict:
    dense, change = not token.experts, one.change
    if dense:
        player, change = playground.teacher or player, Change()
    chosen = token.teacher_experts if dense else token.experts
    return {
        "t": visible(token.text),
        "p": round(token.probability, 4),
        "parts": token.parts,
        "own": [[visible(o.text), round(o.probability, 4)] for o in token.own[:OPTIONS]],
        "teacher": [[visible(o.text), round(o.probability, 4)] for o in (token.teacher or [])[:OPTIONS]],
        "dense": dense,
        "experts": _layers(chosen, player, change),
    }


def _layers(chosen: Chosen, player: Player, change: Change) -> list:
    """[layer, [[expert, share of the weight]], dropped experts] of every routed layer."""
    labels, rows = labels_of(player), []
    for place, (layer, found) in enumerate(chosen.items()):
        total = sum(abs(weight) for _, weight in found) or 1
        router = next((r for r in player.routers if r.name == layer), None)
        gone = [
            e
            for where, lost in change.drop.items()
            for e in lost
            if router and where in (layer, _number(layer))
        ]
        rows.append([labels.get(layer, str(place)), [[e, round(abs(w) / total, 3)] for e, w in found], gone])
    return rows


def _number(layer: str) -> int:
    """The number in a router's name, as 1 of model.layers.1.mlp; -1 without one."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), -1)
