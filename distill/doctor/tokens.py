"""Checks of what two models read and write: vocabulary and padding, end of turn, chat template, context length.

Each is a function of a `Pair` (distill/doctor/pair.py) that returns findings; configs and tokenizers suffice.

What differing widths of logits mean here (Qwen2.5's 0.5B and 7B have embeddings of 151,936 and 152,064 rows for the
same 151,665 tokens): text is not touched, since rows beyond the tokenizer are never sampled. Objectives on logits
compare the rows both have: a wider teacher is cut to the student's width and normalised there, a narrower one gives
the student's surplus rows probability 0 (distill/training/losses/fused.py, `match_vocabulary`).
"""

from distill.data.signals import STORED
from distill.doctor.pair import FAIL, NOTE, OK, WARN, Finding, Lengths, Pair, Side, model_side
from distill.errors import UserError
from distill.models.ahead import masks_columns
from distill.models.chat import opening, reads_the_clock, render, template_date
from distill.models.load import same_vocabulary

MOST_ROWS = 4  # answers at a time with which guesses by another model still pay (LOG.md, "Decoding")


def vocabulary(pair: Pair) -> list[Finding]:
    """Compared by content: sizes alone prove nothing, in either direction."""
    found = [_too_few_rows(side) for side in pair.sides if len(side.tokenizer) > side.rows]
    if pair.teacher is None:
        tokens = f"the student has {len(pair.student.tokenizer):,} tokens"
        return [*found, Finding("vocabulary", OK, f"{tokens}; no teacher here reads or writes ids")]
    train = pair.recipe.train
    on_logits = [] if train.teachers.own_start else pair.on_logits
    for teacher in [pair.teacher, *(model_side("teacher", name) for name in train.teachers.models.values())]:
        found += _compared(
            teacher, pair.student, on_logits, aligned="uld" in [o.name for o in train.objectives]
        )
    return found


def _compared(teacher: Side, student: Side, on_logits: list[str], aligned: bool) -> list[Finding]:
    tokens = len(student.tokenizer)
    if same_vocabulary(teacher.tokenizer, student.tokenizer):
        same = Finding("vocabulary", OK, f"the same {tokens:,} tokens with the same ids")
        padded = teacher.rows != student.rows and tokens <= min(teacher.rows, student.rows)
        return [same, _padding(teacher, student, tokens, on_logits)] if padded else [same]
    difference = _difference(teacher, student)
    if on_logits:
        text = (
            f"objective {on_logits[0]} compares logits, but {teacher.label} and {student.label} have different "
            f"vocabularies: {difference}"
        )
        fix = (
            "use train.objectives='[{name: cross_entropy}]' (distil the text), {name: uld} (across tokenizers), or "
            "a student with the teacher's tokenizer"
        )
        return [Finding("vocabulary", FAIL, text, fix)]
    how = "uld compares across them" if aligned else "the teacher's text is distilled"
    return [Finding("vocabulary", NOTE, f"different vocabularies: {difference}; {how}")]


def _too_few_rows(side: Side) -> Finding:
    return Finding(
        "vocabulary",
        FAIL,
        f"{side.label}: its tokenizer has {len(side.tokenizer):,} tokens and its embedding {side.rows:,} rows",
        "use the tokenizer that was saved with the model",
    )


def _padding(teacher: Side, student: Side, tokens: int, on_logits: list[str]) -> Finding:
    text = (
        f"embeddings have {teacher.rows:,} (teacher) and {student.rows:,} rows (student) for these {tokens:,} "
        "tokens; rows beyond them are padding, harmless for text"
    )
    if on_logits:
        shared = min(teacher.rows, student.rows)
        surplus = (
            f"the teacher's other {teacher.rows - shared:,} are cut off"
            if teacher.rows > shared
            else f"the student's other {student.rows - shared:,} count as impossible"
        )
        text += f"; {on_logits[0]} compares the {shared:,} rows both have, {surplus}"
    return Finding("padding", NOTE, text)


def _difference(teacher: Side, student: Side) -> str:
    a, b = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    moved = [token for token, index in a.items() if token in b and b[token] != index]
    only = [token for token in a if token not in b], [token for token in b if token not in a]
    sizes = f"both have {len(a):,} tokens" if len(a) == len(b) else f"{len(a):,} and {len(b):,} tokens"
    parts = [
        f"{len(moved):,} with another id (first: {moved[0]!r})" if moved else "",
        f"{len(only[0]):,} of the teacher alone (as {only[0][0]!r})" if only[0] else "",
        f"{len(only[1]):,} of the student alone (as {only[1][0]!r})" if only[1] else "",
    ]
    return f"{sizes}, {', '.join(filter(None, parts))}"


def draft(pair: Pair) -> list[Finding]:
    """`teacher.draft` guesses the teacher's tokens: the same ids, room for as much text, and few rows at a time."""
    side, section = pair.draft, pair.recipe.teacher
    if side is None:
        return []
    if not same_vocabulary(side.tokenizer, pair.teacher.tokenizer):
        text = f"{side.label} has another vocabulary than {pair.teacher.label}: {_difference(pair.teacher, side)}"
        return [
            Finding(
                "draft", FAIL, text, "name a model with the teacher's tokenizer, or leave out teacher.draft"
            )
        ]
    windows = [who.label for who in (side, pair.teacher) if not masks_columns(who.config)]
    if windows:
        text = f"{windows[0]} has layers without full attention, in which a guess cannot be taken back"
        return [Finding("draft", FAIL, text, "leave out teacher.draft")]
    most, generate = section.draft_tokens, pair.recipe.generate
    ratio = side.facts["flops_per_token"] / pair.teacher.facts["flops_per_token"]
    text = f"{most} tokens at a time, each at {ratio:.0%} of the teacher's FLOPs: it pays above "
    found = [Finding("draft", OK, f"{text}{1 + most * ratio:.1f} tokens a pass")]
    if generate.batch_size > MOST_ROWS:
        text = f"{generate.batch_size} answers are written together, where guesses cost more than they save"
        found.append(
            Finding("draft", WARN, text, f"set generate.batch_size={MOST_ROWS} or less, or leave it out")
        )
    lengths = pair.lengths(pair.teacher, "training")
    needed = (lengths.longest[0] if lengths else 0) + generate.max_new_tokens + most
    if side.context and needed > side.context:
        text = f"{side.label} takes {side.context:,} tokens, and prompts, answers and guesses have up to {needed:,}"
        found.append(Finding("draft", WARN, f"{text}: parts with such rows are written without it"))
    return found


# ---- chat template and end of turn ---------------------------------------------------------------------


def template(pair: Pair) -> list[Finding]:
    """A missing chat template changes what a model reads; two different ones, what is compared."""
    found = [finding for side in pair.sides for finding in missing_template(side)]
    told = [finding for side in pair.sides for finding in _clock(side)]
    if found or pair.teacher is None:
        return (found or [Finding("chat template", OK, "the student has one")]) + told
    return _templates_of_both(pair) + told + _openings(pair)


def _clock(side: Side) -> list[Finding]:
    if not reads_the_clock(side.tokenizer):
        return []
    text = f"{side.label}: its template reads the clock; this run's prompts say {template_date().isoformat()}"
    return [Finding("chat template", NOTE, text, "set `date` in the recipe for another day")]


def _openings(pair: Pair) -> list[Finding]:
    """Thinking that a template opens, or closes, ahead of the answer."""
    teacher, student = (opening(side.tokenizer) for side in (pair.teacher, pair.student))
    if teacher == student:
        shown = f"both templates begin the answer with {teacher!r}"
        return [Finding("chat template", NOTE, shown)] if teacher else []
    if "</think>" in student and "</think>" not in teacher:
        return [
            Finding(
                "chat template",
                WARN,
                f"the student's template closes the thinking ahead of the answer ({student!r}), and the teacher's does "
                "not: the student would be trained to think behind its end",
                "set student.chat_template_kwargs (for Qwen3 {enable_thinking: true}), or the teacher's to match",
            )
        ]
    text = (
        f"the templates begin the answer differently, the teacher's with {teacher!r} and the student's with "
        f"{student!r}: the difference becomes part of what the student writes"
    )
    return [Finding("chat template", NOTE, text)]


def _templates_of_both(pair: Pair) -> list[Finding]:
    if pair.teacher.tokenizer.chat_template == pair.student.tokenizer.chat_template:
        return [Finding("chat template", OK, "the same for both")]
    live, different = pair.on_logits, "teacher and student have different chat templates"
    if not live or not same_vocabulary(pair.teacher.tokenizer, pair.student.tokenizer):
        return [Finding("chat template", NOTE, f"{different}; each reads its own")]
    return [
        Finding(
            "chat template",
            WARN,
            f"{different}: {live[0]} asks the teacher about prompts in the student's",
            "copy the teacher's `chat_template` into the student's tokenizer_config.json",
        )
    ]


def missing_template(side: Side) -> list[Finding]:
    if side.has_template:
        return []
    text = f"{side.label} has no chat template: prompts read 'User: ...\\nAssistant:', which suits a base model only"
    if side.role == "student":
        text += "; saved with the student"
    fix = "if it was trained on a chat format, put that into `chat_template` of its tokenizer_config.json"
    return [Finding("chat template", WARN, text, fix)]


def end_of_turn(pair: Pair) -> list[Finding]:
    """The tokenizer's end token, the generation config's, and the one the template ends a turn with."""
    found = [finding for side in pair.sides for finding in _own_ends(side, pair)]
    if pair.teacher and same_vocabulary(pair.teacher.tokenizer, pair.student.tokenizer):
        found += _ends_of_both(pair)
    if found:
        return found
    shown = " and ".join(f"the {s.role}'s with {_tokens(s, s.ends)}" for s in pair.sides)
    return [Finding("end of turn", OK, f"answers end as the templates end a turn: {shown}")]


def _tokens(side: Side, ids: set[int]) -> str:
    return " or ".join(sorted(map(side.token, ids)))


def turn_end(side: Side) -> int | None:
    """Id of the first special token that the template writes after an assistant's words; None without one."""
    mark = "Zq7"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = render(side.tokenizer, messages, generation_prompt=False)
    except UserError:  # told about where prompts are counted
        return None
    rest = side.tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    # Added tokens are words too: line breaks, runs of blanks, tags of HTML (Gemma). None of them ends a turn.
    marked = {i for i, token in side.tokenizer.added_tokens_decoder.items() if token.special}
    special = {i for i in {*marked, *side.tokenizer.all_special_ids} if side.tokenizer.decode([i]).strip()}
    return next((i for i in rest if i in special), None)


def _own_ends(side: Side, pair: Pair) -> list[Finding]:
    turn, end = turn_end(side), side.tokenizer.eos_token_id
    writes = pair.recipe.generate.stop_strings
    if turn is not None and turn not in side.ends and side.tokenizer.decode([turn]) not in writes:
        ends = _tokens(side, side.ends)
        text = f"{side.label}: its template ends a turn with {side.token(turn)}, and answers end with {ends} only"
        fix = f"set eos_token={side.token(turn)} in its tokenizer_config.json"
        if side.role == "teacher":
            return [
                Finding(
                    "end of turn",
                    WARN,
                    f"{text}: answers may run on to generate.max_new_tokens",
                    f"{fix}, or generate.stop_strings=[{side.token(turn)}]",
                )
            ]
        return [Finding("end of turn", WARN, f"{text}: it learns to end with {side.token(end)} instead", fix)]
    if side.role == "student" and end not in side.configured_ends:
        return [
            Finding(
                "end of turn",
                WARN,
                f"{side.label} learns to end with {side.token(end)}, and its generation config does not stop there",
                f"eos_token_id: {sorted(side.ends)} in its generation_config.json",
            )
        ]
    return []


def _ends_of_both(pair: Pair) -> list[Finding]:
    """The student is taught its own end token; a live teacher must agree that answers end so."""
    teacher, student = pair.teacher, pair.student
    end = student.tokenizer.eos_token_id
    if end in teacher.ends:
        return []
    theirs = _tokens(teacher, teacher.ends)
    text = f"the student ends with {student.token(end)} and the teacher with {theirs}"
    fix = f"set eos_token={teacher.token(teacher.tokenizer.eos_token_id)} in the student's tokenizer_config.json"
    train = pair.recipe.train
    live = any(o.live for o in train.objectives)
    if train.on_policy.fraction and not train.on_policy.context:  # a piece of text has no end to learn
        text += "; scored by this teacher the student's own answers grow without end"
        return [Finding("end of turn", FAIL, text, fix)]
    if live or any(o.signal in STORED for o in train.objectives):
        text += ", which counts ending as a mistake"
    else:
        text += "; in the stored answers the student's takes its place"
    return [Finding("end of turn", WARN, text, fix)]


# ---- context -------------------------------------------------------------------------------------------


def context(pair: Pair) -> list[Finding]:
    """Prompt and answer against what each model was built for; prompts are counted where they can be read.

    A prompt that does not fit with the new tokens it is allowed becomes an answer with an error
    (distill/models/decode.py).
    """
    needs = _needs(pair)
    found = [f for need in needs if (f := fits(*need))]
    if found or not needs:
        return found
    _, key, new, _, lengths = max(needs, key=lambda n: n[2] + (n[4].longest[0] if n[4] else 0))
    prompt = f"a prompt of {lengths.longest[0]:,}" if lengths else "prompts (on the hub, not counted)"
    limits = " and ".join(f"{s.context:,} ({s.role})" for s in pair.sides if s.context) or "unlimited"
    return [Finding("context", OK, f"at most {prompt} + {new:,} new tokens ({key}), of {limits}")]


_Need = tuple[Side, str, int, str, Lengths | None]


def _needs(pair: Pair) -> list[_Need]:
    """(model, key, new tokens, which prompts, their lengths) for all that the command lets a model write or read."""
    recipe = pair.recipe
    made, answered = recipe.generate.max_new_tokens, recipe.evaluate.max_new_tokens
    needs = []
    given = recipe.prompts.solutions or recipe.prompts.completion_column or recipe.prompts.documents
    if pair.does("generate", "train") and not given:
        sides = pair.sides if pair.does("generate") else [pair.student]
        needs += [(side, "generate.max_new_tokens", made, "training") for side in sides]
    if pair.does("train") and recipe.train.on_policy.fraction:
        new = recipe.train.on_policy.max_new_tokens
        needs.append((pair.student, "train.on_policy.max_new_tokens", new, "training"))
    if pair.does("evaluate"):
        needs += [(side, "evaluate.max_new_tokens", answered, "held-out") for side in pair.sides]
    begun = recipe.train.on_policy.context  # plain text is continued from so many tokens
    read = {"training": Lengths([begun], begun)} if begun else {}
    return [(*need, read.get(need[3]) or pair.lengths(need[0], need[3])) for need in needs]


def fits(side: Side, key: str, new: int, which: str, lengths: Lengths | None) -> Finding | None:
    limit = side.context
    if limit is None:
        return None
    shortest, longest = (lengths.shortest, lengths.longest[0]) if lengths else (1, 1)
    room = limit - longest
    fix = (
        f"{key}={room}"
        if room > 0
        else "shorter prompts (prompts.template), or a model with a longer context"
    )
    if shortest + new > limit:
        what = f"{which} prompts of {shortest:,} tokens and more" if lengths else "any prompt"
        text = f"{what} + {key}={new:,} exceed the {limit:,} of {side.label}: every answer would be an error"
        return Finding("context", FAIL, text, fix if lengths else f"{key} well below {limit}")
    if longest + new > limit:
        over = sum(length + new > limit for length in lengths.longest)
        many = f"{over} {'or more ' if over == len(lengths.longest) else ''}{which} prompts"
        text = f"{many} (up to {longest:,} tokens) + {key}={new:,} exceed the {limit:,} of {side.label}"
        return Finding("context", WARN, text, fix)
    return None
