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
from distill.report import pages
from distill.report.drawing import layer_labels
from distill.report.pages import VISIBLE, called, mark, say, visible
from distill.tasks.problems import FAMILIES

CELLS = 32  # experts of a layer that are all drawn; of larger layers only the chosen ones
SIGNS = {
    "correct": ("✓", mark("correct")),
    "wrong": ("✗", mark("wrong")),
    "no_answer": ("∅", mark("no answer")),
    "truncated": ("…", mark("cut off")),
    "error": ("!", mark("failed")),
    NOT_VERIFIED: ("?", mark("not verified")),
    None: ("·", mark("answering")),
}
_TEMPLATE_SIGNS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def escape(text: object) -> str:
    """Harmless inside HTML and inside Gradio's templates."""
    return html.escape(str(text)).translate(_TEMPLATE_SIGNS)


def chance(probability: float) -> str:
    if probability >= 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"


# ------------------------------------------------------------------------------------------ the answers


def welcome() -> str:
    words = say(
        "Click an example, pick a problem or type one, then press Ask. All models answer side by side."
    )
    more = say("Then click a token: you see what else could have stood there.")
    return f"<p class='hint'>{escape(words)} {escape(more)}</p>"


def outside(question: str, example: str | None) -> str:
    """Instead of answers: the question is none of the kinds that these models were trained on."""
    kinds = say(", ").join(called(family) for family in FAMILIES)
    lines = [
        say(
            "These models know %(n)s families of problems and nothing else: %(kinds)s.",
            n=_counted(len(FAMILIES)), kinds=kinds,
        ),
        say("This question is none of them, or it is worded in a way they never read. Their answer would be noise."),
    ]  # fmt: skip
    if example:
        lines.append(say("Try one like this: %(example)s", example=example))
    lines.append(say("Press Ask again to see what they write all the same."))
    said = "".join(f"<p>{escape(line)}</p>" for line in lines)
    asked = say("You asked: %(question)s", question=_short(question, 120))
    title = escape(say("Outside what these models know"))
    return (
        f"<section class='outside' role='status'><h3>{title}</h3><p class='note'>{escape(asked)}</p>"
        f"{said}</section>"
    )


def _counted(n: int) -> str:
    return say("seven") if n == 7 else str(n)


def cards(asked: Asked, playground: Playground, picked: tuple[str, int] | None = None) -> str:
    """The question's reference and a card a model. `picked`: model and place of the token that is looked at."""
    shown = "".join(_card(answer, playground, picked) for answer in asked.answers.values())
    legend = (
        f"<p class='legend'><span class='token' style='--d:.05'>{escape(say('likely'))}</span> "
        f"<span class='token' style='--d:.5'>{escape(say('less likely'))}</span> "
        f"<span class='token' style='--d:.95'>{escape(say('unlikely'))}</span> "
        + escape(say("to the model itself"))
    )
    if playground.teacher:
        other = escape(say("the teacher would have said something else"))
        dashed = f"<span class='token parts' style='--d:.3'>{escape(say('dashed'))}</span>"
        legend += f"{say('; ')}{dashed}{say(': ')}{other}"
    hint = escape(say("Click a token: you see what else could have stood there."))
    legend += f"{escape(say('.'))}{say(' ')}{hint}"
    return f"{_reference(asked, playground)}<div class='players'>{shown}</div>{legend}</p>"


def _reference(asked: Asked, playground: Playground) -> str:
    found = asked.reference
    if found is None and playground.narrow:
        why = say("These models were never trained on a question like this. What they write is noise.")
        return f"<p class='right-answer'><b>{escape(say('Not verified'))}</b>{say(': ')}{escape(why)}</p>"
    if found is None:
        why = say("this is none of the known problems, and no rule knows its answer.")
        return f"<p class='right-answer'><b>{escape(say('Not verified'))}</b>{say(': ')}{escape(why)}</p>"
    how = say("known by a rule") if found.source == "rule" else say("the problem's own answer")
    kind = called(found.family) if found.family != "all" else ""
    size = called(found.level) if found.level else say("of a size they were not trained on")
    split = (
        say("from the training problems: the student may have seen it")
        if found.split == "train"
        else say("held out: no training set has it")
    )
    answer = found.answer or say("whatever matches %(rule)s", rule=found.verifier)
    about = say("; ").join((how, say(", ").join(filter(None, (kind, size))), split))
    told = f"{escape(say('Right answer:'))}{say(' ')}<b>{escape(answer)}</b>"
    return f"<p class='right-answer'>{told}{escape(say(' (%(about)s)', about=about))}</p>"


def _card(answer: PlayedAnswer, playground: Playground, picked: tuple[str, int] | None) -> str:
    sign, word = SIGNS[answer.verdict]
    look, word = word.replace(" ", "-"), say(word)
    player = playground.players[answer.model]
    looked_at = picked[1] if picked and picked[0] == answer.model else None
    tokens = "".join(_token(t, i, answer.model, i == looked_at) for i, t in enumerate(answer.tokens))
    final = answer.error or answer.final or ("" if answer.verdict is None else say("no final answer"))
    facts = []
    if answer.tokens:
        facts = [
            say("%(n)s tokens", n=len(answer.tokens)),
            say("%(seconds)s s", seconds=f"{answer.seconds:.1f}"),
        ]
    if answer.finish_reason == "length" and answer.verdict == NOT_VERIFIED:  # a checked one says so above
        facts.append(escape(say("cut off")))
    changed = f"<p class='changed'>{escape(changes(answer.change, player))}</p>" if answer.change else ""
    return (
        f"<article class='player' aria-label='{escape(say('answer of %(model)s', model=called(answer.model)))}'>"
        f"<header><h3>{escape(called(answer.model))}</h3>"
        f"<span class='verdict {look}'><i aria-hidden='true'>{sign}</i> {escape(word)}</span></header>"
        f"<p class='size'>{escape(size(player))}</p>{changed}"
        f"<p class='final'>{escape(final)}</p>"
        f"<div class='tokens' role='group' aria-label='{escape(say('tokens'))}'>{tokens}</div>"
        f"<p class='facts'>{' · '.join(facts)}</p></article>"
    )


def size(player: Player) -> str:
    """Parameters, active ones and experts of a model in a few words."""
    words = say("%(size)s parameters", size=pages.size(player.about))
    if not player.routers:
        return say("dense, %(size)s", size=words)
    router, active = player.routers[0], pages.millions(player.about["parameters_active"])
    return say(
        "%(size)s, %(active)s active, %(k)s of %(n)s experts a token",
        size=words, active=active, k=router.top_k, n=router.num_experts,
    )  # fmt: skip


def changes(change: Change, player: Player) -> str:
    """Other routing in words: "1 expert per token, without layer 1 expert 3"."""
    words = []
    if change.top_k is not None:
        one = change.top_k == 1
        words.append(say("1 expert per token") if one else say("%(k)s experts per token", k=change.top_k))
    labels = labels_of(player)
    dropped = [
        say("%(layer)s expert %(e)s", layer=labels.get(layer, layer), e=e)
        for layer, found in change.drop.items()
        for e in found
    ]
    if dropped:
        words.append(say("without %(experts)s", experts=say(", ").join(dropped)))
    return say(", ").join(words)


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
    where = say("%(model)s, token %(n)s of %(of)s:", model=called(model), n=place + 1, of=len(answer.tokens))
    how_sure = say("said with probability %(p)s", p=chance(token.probability))
    parts = [
        f"<h3>{escape(where)} <code>{escape(visible(token.text))}</code> <small>{escape(how_sure)}</small></h3>",
        "<div class='sides'>",
        _column(say("%(model)s itself weighs", model=called(model)), _options(token.own, token.id)),
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
        f"<span class='p'>{chance(option.probability)}{escape(say(' ← said')) if option.id == said else ''}</span></li>"
        for option in options
    )
    return f"<ol class='options'>{rows}</ol>"


def _teacher_column(answer: PlayedAnswer, token: Token, playground: Playground) -> str:
    title = say("The teacher would have said")
    if playground.teacher is None:
        return _column(title, "", escape(say("Nobody is the teacher here: start with --teacher PATH.")))
    if playground.players[answer.model] is playground.teacher and not answer.change:
        return _column(title, "", escape(say("This is the teacher, as it is.")))
    if token.teacher is None:
        waiting = answer.verdict is None or not any(t.teacher for t in answer.tokens)
        why = (
            say("The teacher reads an answer when all have finished.")
            if waiting
            else say("The teacher splits this text into other tokens: none of them ends here.")
        )
        return _column(title, "", escape(why))
    shared = token.teacher_probability is not None
    notes = [escape(say("At this very place, after the same text."))]
    if shared:
        said = f"<code>{escape(visible(token.text))}</code>"
        notes.append(
            say("It gives %(token)s %(p)s.", token=said, p=escape(chance(token.teacher_probability)))
        )
    if answer.change:
        notes.append(escape(say("It was asked unchanged, with its own routing.")))
    return _column(title, _options(token.teacher, token.id if shared else None), say(" ").join(notes))


def _experts_column(answer: PlayedAnswer, token: Token, playground: Playground) -> str:
    """Of the model that answered; for a dense one, of the teacher reading the same text."""
    player, experts, change = playground.players[answer.model], token.experts, answer.change
    title = say("Experts of %(model)s, layer by layer", model=called(answer.model))
    if not experts:
        player, experts, change = playground.teacher, token.teacher_experts, Change()
        if not experts:
            none = say("%(model)s is dense: it has none.", model=called(answer.model))
            return _column(say("Experts"), "", escape(none))
        title = say("Experts of the teacher at this place")
    dropped = {layer: set(found) for layer, found in change.drop.items()}
    rows = _expert_rows(player, experts, dropped)
    note = say(
        "A number is the expert, the small one its share of the weight in percent. These experts chose this "
        "token; they read the one before it. Click one to drop it and ask again."
    )
    return _column(title, f"<table class='experts'>{rows}</table>", escape(note))


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
        return f"<span class='expert gone' title='{escape(say('dropped expert'))}'><s>{expert}</s></span>"
    if weight is None:
        return f"<span class='expert'>{expert}</span>"
    return (
        f"<button class='expert chosen' style='--w:{abs(weight) / total:.2f}' data-model='{escape(model)}' "
        f"data-layer='{escape(layer)}' data-expert='{expert}' "
        f"title='{escape(say('drop expert %(e)s of %(layer)s and ask again', e=expert, layer=label))}'>{expert}"
        f"<small>{100 * abs(weight) / total:.0f}</small></button>"
    )


# ------------------------------------------------------------------------------------------ earlier rounds


def settings(asked: Asked, playground: Playground) -> str:
    """How a round was asked, in words."""
    words = [say("greedy")]
    if asked.temperature:
        words = [say("temperature %(t)s", t=f"{asked.temperature:g}"), say("seed %(n)s", n=asked.seed)]
    for answer in asked.answers.values():
        if answer.change:
            how = changes(answer.change, playground.players[answer.model])
            words.append(say("%(model)s: %(change)s", model=called(answer.model), change=how))
    return say("; ").join(words)


def history(rounds: list[Asked], playground: Playground) -> str:
    """A table of rounds, newest first: what was asked how, and what each model made of it."""
    if not rounds:
        return ""
    names = list(playground.players)
    head = "".join(f"<th scope='col'>{escape(called(name))}</th>" for name in names)
    rows = []
    for asked in reversed(rounds):
        cells = "".join(
            f"<td><i>{SIGNS[answer.verdict][0]}</i> "
            f"{escape(_short(answer.final or say(SIGNS[answer.verdict][1])))}</td>"
            for answer in (asked.answers[name] for name in names)
        )
        how = f"<small>{escape(settings(asked, playground))}</small>"
        rows.append(f"<tr><th scope='row'>{escape(_short(asked.question, 80))} {how}</th>{cells}</tr>")
    return (
        f"<section class='history'><h3>{escape(say('Asked so far'))}</h3><div class='wide'><table>"
        f"<thead><tr><th scope='col'>{escape(say('question'))}</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div></section>"
    )


def _short(text: str, length: int = 28) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
