"""What the page of `distill play` shows, as HTML: pure functions from an `Asked` to text; no server, no browser.

    cards(asked, playground)            # the answers side by side, every token a button
    panel(asked, playground, "student", 12)      # one token: what else could stand there, the teacher, the experts
    history([...])                      # earlier rounds, so that "ask again" has something to compare with

Shade is improbability, a dashed line is where the teacher would have said something else, a verdict is a sign and
a word: nothing is told by hue alone. What models and people wrote is escaped, braces and dollar signs included,
since Gradio puts values into a template. The look is templates/play.css, clicks are templates/play.js.
"""

import html

from distill.play.engine import Player, Playground
from distill.play.records import (
    NOT_VERIFIED,
    Asked,
    Change,
    Chosen,
    PlayedAnswer,
    Token,
    TokenOption,
)
from distill.report.drawing import layer_labels
from distill.report.pages import VISIBLE, visible

CELLS = 32  # experts of a layer that are all drawn; of larger layers only the chosen ones
SIGNS = {
    "correct": ("✓", "correct"),
    "wrong": ("✗", "wrong"),
    "no_answer": ("∅", "no answer"),
    "truncated": ("…", "cut off"),
    "error": ("!", "failed"),
    NOT_VERIFIED: ("?", NOT_VERIFIED),
    None: ("·", "answering"),
}
WELCOME = (
    "<p class='hint'>Type a problem or pick one, then <b>Ask</b>. All models answer side by side; click a token to see "
    "what else could have stood there.</p>"
)
_TEMPLATE_SIGNS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def escape(text: object) -> str:
    """Harmless inside HTML and inside Gradio's templates."""
    return html.escape(str(text)).translate(_TEMPLATE_SIGNS)


def chance(probability: float) -> str:
    if probability >= 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"


# ------------------------------------------------------------------------------------------ the answers


def cards(asked: Asked, playground: Playground, picked: tuple[str, int] | None = None) -> str:
    """The question's reference and a card a model. `picked`: model and place of the token that is looked at."""
    shown = "".join(_card(answer, playground, picked) for answer in asked.answers.values())
    legend = (
        "<p class='legend'><span class='token' style='--d:.05'>likely</span> "
        "<span class='token' style='--d:.5'>so-so</span> <span class='token' style='--d:.95'>unlikely</span> "
        "to the model itself"
    )
    if playground.teacher:
        legend += (
            "; <span class='token parts' style='--d:.3'>dashed</span>: the teacher would have said otherwise"
        )
    return f"{_reference(asked)}<div class='players'>{shown}</div>{legend}</p>"


def _reference(asked: Asked) -> str:
    found = asked.reference
    if found is None:
        return (
            "<p class='right-answer'><b>Not verified</b>: this is none of the known problems, and no rule knows its "
            "answer.</p>"
        )
    how = "by a rule" if found.source == "rule" else "the problem's own reference"
    what = ", ".join(
        filter(None, (found.family if found.family != "all" else "", found.level or "no level's size"))
    )
    split = (
        "of the training split: the student may have seen it"
        if found.split == "train"
        else "held out: no training set has it"
    )
    answer = found.answer or f"whatever matches {found.verifier}"
    return (
        f"<p class='right-answer'>Right answer: <b>{escape(answer)}</b> ({how}; {escape(what)}; {split})</p>"
    )


def _card(answer: PlayedAnswer, playground: Playground, picked: tuple[str, int] | None) -> str:
    sign, word = SIGNS[answer.verdict]
    look = word.replace(" ", "-")
    player = playground.players[answer.model]
    looked_at = picked[1] if picked and picked[0] == answer.model else None
    tokens = "".join(_token(t, i, answer.model, i == looked_at) for i, t in enumerate(answer.tokens))
    final = answer.error or answer.final or ("" if answer.verdict is None else "no final answer")
    facts = [f"{len(answer.tokens)} tokens", f"{answer.seconds:.1f} s"] if answer.tokens else []
    changed = f"<p class='changed'>{escape(changes(answer.change, player))}</p>" if answer.change else ""
    return (
        f"<article class='player' aria-label='answer of {escape(answer.model)}'>"
        f"<header><h3>{escape(answer.model)}</h3>"
        f"<span class='verdict {look}'><i aria-hidden='true'>{sign}</i> {word}</span></header>"
        f"<p class='size'>{escape(size(player))}</p>{changed}"
        f"<p class='final'>{escape(final)}</p>"
        f"<div class='tokens' role='group' aria-label='tokens'>{tokens}</div>"
        f"<p class='facts'>{' · '.join(facts)}</p></article>"
    )


def size(player: Player) -> str:
    """Parameters, active ones and experts of a model in a few words."""
    total, active = player.parameters
    words = f"{total / 1e6:,.2f} M parameters" if total < 1e9 else f"{total / 1e9:,.1f} B parameters"
    if not player.routers:
        return f"dense, {words}"
    router = player.routers[0]
    share = f"{100 * active / total:.0f} % active"
    return f"{words}, {share}, {router.top_k} of {router.num_experts} experts a token"


def changes(change: Change, player: Player) -> str:
    """Other routing in words: "1 expert per token, without layer 1 expert 3"."""
    words = []
    if change.top_k is not None:
        words.append(f"{change.top_k} expert{'s' if change.top_k != 1 else ''} per token")
    labels = labels_of(player)
    dropped = [
        f"{labels.get(layer, layer)} expert {e}" for layer, found in change.drop.items() for e in found
    ]
    if dropped:
        words.append(f"without {', '.join(dropped)}")
    return ", ".join(words)


def labels_of(player: Player) -> dict[str, str]:
    """A short name of every routed layer: "layer 1"."""
    names = [router.name for router in player.routers]
    return dict(zip(names, layer_labels(names)))


def _token(token: Token, place: int, model: str, on: bool) -> str:
    look = " parts" * token.parts + " on" * on
    # Spaces are shown as spaces unless they are all there is; the text stays readable.
    text = visible(token.text) if not token.text.strip() else token.text.translate({**VISIBLE, 32: 32})
    return (
        f"<button class='token{look}' style='--d:{1 - token.probability:.2f}' data-model='{escape(model)}' "
        f"data-place='{place}' tabindex='{-1 if place else 0}' title='{chance(token.probability)}'>"
        f"{escape(text)}</button>"
    )


# ------------------------------------------------------------------------------------------ one token


def first_to_look_at(asked: Asked) -> tuple[str, int] | None:
    """Where the first answer parts from the teacher: of models with other routing, then of the student, then any.

    Else a first token.
    """
    answers = sorted(
        asked.answers.values(), key=lambda answer: (not answer.change, answer.model != "student")
    )
    parted = ((a.model, i) for a in answers for i, token in enumerate(a.tokens) if token.parts)
    return next(parted, next(((a.model, 0) for a in answers if a.tokens), None))


def panel(asked: Asked, playground: Playground, model: str, place: int) -> str:
    """One token of one answer. An empty text for a place that is not there."""
    answer = asked.answers.get(model)
    if answer is None or not 0 <= place < len(answer.tokens):
        return ""
    token = answer.tokens[place]
    parts = [
        f"<h3>{escape(model)}, token {place + 1} of {len(answer.tokens)}: <code>{escape(visible(token.text))}</code> "
        f"<small>said with probability {chance(token.probability)}</small></h3>",
        "<div class='sides'>",
        _column(f"{model} itself weighs", _options(token.own, token.id)),
        _teacher_column(answer, token, playground),
        _experts_column(answer, token, playground),
        "</div>",
    ]
    return "<section class='look'>" + "".join(parts) + "</section>"


def _column(title: str, content: str, note: str = "") -> str:
    note = f"<p class='note'>{note}</p>" if note else ""
    return f"<div class='side'><h4>{escape(title)}</h4>{content}{note}</div>"


def _options(options: list[TokenOption], said: int | None) -> str:
    rows = "".join(
        f"<li class='{'said' if option.id == said else ''}'><code>{escape(visible(option.text))}</code>"
        f"<span class='bar'><i style='width:{100 * option.probability:.1f}%'></i></span>"
        f"<span class='p'>{chance(option.probability)}{' ← said' if option.id == said else ''}</span></li>"
        for option in options
    )
    return f"<ol class='options'>{rows}</ol>"


def _teacher_column(answer: PlayedAnswer, token: Token, playground: Playground) -> str:
    title = "The teacher would have said"
    if playground.teacher is None:
        return _column(title, "<p class='note'>Nobody is the teacher here: start with --teacher PATH.</p>")
    if playground.players[answer.model] is playground.teacher and not answer.change:
        return _column(title, "<p class='note'>This is the teacher, as it is.</p>")
    if token.teacher is None:
        waiting = answer.verdict is None or not any(t.teacher for t in answer.tokens)
        why = (
            "The teacher reads an answer when all have finished."
            if waiting
            else "No place of the teacher's text ends here: its tokens are others."
        )
        return _column(title, f"<p class='note'>{why}</p>")
    shared = token.teacher_probability is not None
    note = "at this very place, after the same text"
    if shared:
        note += f"; it gives <code>{escape(visible(token.text))}</code> {chance(token.teacher_probability)}"
    if answer.change:
        note += "; asked unchanged, with its own routing"
    return _column(
        title, _options(token.teacher, token.id if shared else None), f"{note[0].upper()}{note[1:]}."
    )


def _experts_column(answer: PlayedAnswer, token: Token, playground: Playground) -> str:
    """Of the model that answered; for a dense one, of the teacher reading the same text."""
    player, experts, change = playground.players[answer.model], token.experts, answer.change
    title = f"Experts of {answer.model}, layer by layer"
    if not experts:
        player, experts, change = playground.teacher, token.teacher_experts, Change()
        if not experts:
            return _column("Experts", f"<p class='note'>{escape(answer.model)} is dense: it has none.</p>")
        title = "Experts of the teacher at this place"
    dropped = {layer: set(found) for layer, found in change.drop.items()}
    rows = _expert_rows(player, experts, dropped)
    note = (
        "Share of the weight in percent. They chose this token, reading the one before it. "
        "Click one to drop it and ask again."
    )
    return _column(title, f"<table class='experts'>{rows}</table>", note)


def _expert_rows(player: Player, experts: Chosen, dropped: dict[str, set[int]]) -> str:
    labels, rows = labels_of(player), []
    for router in player.routers:
        weights = dict(experts.get(router.name, ()))
        total = sum(map(abs, weights.values())) or 1
        every = range(router.num_experts) if router.num_experts <= CELLS else sorted(weights)
        cells = "".join(
            _expert(player.name, router.name, labels[router.name], e, weights.get(e), total, dropped)
            for e in every
        )
        rows.append(
            f"<tr><th scope='row'>{escape(labels[router.name])}</th>"
            f"<td><div class='cells'>{cells}</div></td></tr>"
        )
    return "".join(rows)


def _expert(model, layer, label, expert: int, weight: float | None, total: float, dropped) -> str:
    if expert in dropped.get(layer, ()):
        return f"<span class='expert gone' title='dropped'><s>{expert}</s></span>"
    if weight is None:
        return f"<span class='expert'>{expert}</span>"
    return (
        f"<button class='expert chosen' style='--w:{abs(weight) / total:.2f}' data-model='{escape(model)}' "
        f"data-layer='{escape(layer)}' data-expert='{expert}' "
        f"title='drop expert {expert} of {escape(label)} and ask again'>{expert}"
        f"<small>{100 * abs(weight) / total:.0f}</small></button>"
    )


# ------------------------------------------------------------------------------------------ earlier rounds


def settings(asked: Asked, playground: Playground) -> str:
    """How a round was asked, in words."""
    words = (
        ["greedy"] if asked.temperature == 0 else [f"temperature {asked.temperature:g}", f"seed {asked.seed}"]
    )
    for answer in asked.answers.values():
        if answer.change:
            words.append(f"{answer.model}: {changes(answer.change, playground.players[answer.model])}")
    return "; ".join(words)


def history(rounds: list[Asked], playground: Playground) -> str:
    """A table of rounds, newest first: what was asked how, and what each model made of it."""
    if not rounds:
        return ""
    names = list(playground.players)
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    rows = []
    for asked in reversed(rounds):
        cells = "".join(
            f"<td><i>{SIGNS[answer.verdict][0]}</i> {escape(_short(answer.final or SIGNS[answer.verdict][1]))}</td>"
            for answer in (asked.answers[name] for name in names)
        )
        how = f"<small>{escape(settings(asked, playground))}</small>"
        rows.append(f"<tr><th scope='row'>{escape(_short(asked.question, 80))} {how}</th>{cells}</tr>")
    return (
        "<section class='history'><h3>Asked so far</h3><div class='wide'><table>"
        f"<thead><tr><th scope='col'>question</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div></section>"
    )


def _short(text: str, length: int = 28) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
