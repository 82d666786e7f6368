"""Answers of several models in a notebook, every token to be clicked: what `distill play` shows, without its server.

    playground = players("recipes/workshop/demo")             # base, student and teacher of a finished run
    asked = answer(playground, "What is 4683 + 9457?")
    show(asked, playground)                                   # the last line of a cell shows it
    answer(playground, "...", drop={1: [3]})                   # the teacher without expert 3 of layer 1

The answers come from distill/play/engine.py, the same that serves the page; here they are put into one piece of HTML
with their numbers, a few kB an answer. A viewer that runs no scripts, as GitHub's, shows the answers as text.
"""

import html
import json
from collections.abc import Mapping, Sequence

from distill.lessons.explore import Shown
from distill.lessons.lesson import NOW
from distill.play.engine import Player, Playground
from distill.play.html import SIGNS, changes, labels_of
from distill.play.records import Asked, Change, Chosen, Finished, PlayedAnswer, Token, find_setup
from distill.report.pages import TEMPLATES, visible
from distill.report.words import called, say, speaking

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
