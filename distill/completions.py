"""What of a teacher's answer the student is shown: all of it, its result alone, or another problem's.

    filter: {completions: reference_answer}        the prompts of the kept rows with their public answers, no working

`whole` is distillation. The others are controls for what in it matters: `teacher_answer` keeps the teacher's result
and drops its working, `reference_answer` drops the teacher as well, and `shuffled` gives each prompt the answer of
another prompt of its family and level: all of the form, none of the content. All four have the same prompts in the
same order, so that runs that differ in this alone differ in nothing else.
"""

from collections.abc import Callable, Iterable, Iterator

from distill.verify import extract_answer

# Rules of this module, in the account of what was dropped beside those of distill/filter_rules.py.
RULES = ("no_final_answer", "no_other_prompt")
Row = dict
Make = Callable[[Row, str], Row]  # (row, text) -> the row with that text in place of its own


def reduced(rows: Iterable[Row], how: str, prompts: dict[str, Row], make: Make) -> Iterator[Row]:
    """Kept rows (those without `rule`) with their completions as `how` says; dropped rows pass unchanged.

    An answer without a final result (`teacher_answer`) or a prompt without a reference is dropped, with the rule
    `no_final_answer`. `shuffled` holds all rows in memory, and drops those of a cell with a single prompt.
    """
    if how == "whole":
        yield from rows
    elif how == "shuffled":
        yield from _shuffled(rows, make)
    else:
        for row in rows:
            if "rule" in row:
                yield row
                continue
            known = prompts[row["prompt_id"]]["answer"]
            text = known if how == "reference_answer" else extract_answer(row["text"])
            yield make(row, text) if text else _refused(row, "no_final_answer")


def _shuffled(rows: Iterable[Row], make: Make) -> Iterator[Row]:
    """Each row with the text of a row further on in its (family, level), the last with those of the first."""
    kept: list[Row] = []
    for row in rows:
        if "rule" in row:
            yield row
        else:
            kept.append(row)
    cells: dict[tuple, list[Row]] = {}
    for row in kept:
        cells.setdefault((row["family"], row["level"]), []).append(row)
    donors: dict[tuple, str | None] = {}
    for cell in cells.values():
        by_prompt: dict[str, list[Row]] = {}
        for row in cell:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
        groups = list(by_prompt.values())
        for group, other in zip(groups, [*groups[1:], groups[0]]):
            for i, row in enumerate(group):
                text = other[i % len(other)]["text"] if other is not group else None
                donors[row["prompt_id"], row["sample_idx"]] = text
    for row in kept:
        text = donors[row["prompt_id"], row["sample_idx"]]
        yield _refused(row, "no_other_prompt") if text is None else make(row, text)


def _refused(row: Row, rule: str) -> Row:
    return {**row, "rule": rule, "verdict": None, "detail": None}
