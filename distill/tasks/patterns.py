r"""How large a regular expression becomes when it is compiled, before anything compiles it.

`a{999999999}` is eleven characters, and took a compiler 8 GB until the system stopped it. Repeats multiply where they
are nested, and a compiler writes them out. So their counts are read first, and a pattern beyond a limit is refused:

    check_size(r"\d{4}-\d{2}")          # fine
    check_size(r"(a{1000}){1000}")      # ValueError: 1,000,000 parts

What is read is what `re` and `regex` share: escapes, classes, groups, `{n}`, `{n,}`, `{n,m}`. Anything else counts as
one part a character, so the estimate is never far below what a compiler makes of it.
"""

import re

MOST_PARTS = 20_000
MOST_CHARACTERS = 10_000
MOST_GROUPS = 200  # opened in each other: compilers go down with them
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def check_size(pattern: str) -> None:
    """Raises ValueError where the pattern is too long, too deep, or too large once its repeats are written out."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"has {len(pattern):,} characters; at most {MOST_CHARACTERS:,}")
    parts = written_out(pattern)
    if parts > MOST_PARTS:
        about = f"{parts:,}" if parts < 10**15 else "more than 10^15"
        raise ValueError(
            f"repeats itself into {about} parts; lower its {{counts}}, at most {MOST_PARTS:,} in all"
        )


def written_out(pattern: str) -> int:
    """Parts of a pattern with every `{n,m}` written out m times. Raises ValueError for groups too deep."""
    sizes = [0]  # of the groups that are open, the pattern itself first
    last = 0  # of the part that a count would repeat
    position = 0
    while position < len(pattern):
        character = pattern[position]
        repeat = _REPEAT.match(pattern, position) if character == "{" else None
        if repeat and (repeat[1] or repeat[2]):
            count = max(int(number[:30]) for number in repeat.groups() if number)
            sizes[-1] += last * max(count - 1, 0)
            last *= max(count, 1)
            position = repeat.end()
            continue
        if character == "(":
            sizes.append(0)
            if len(sizes) > MOST_GROUPS:
                raise ValueError(f"opens more than {MOST_GROUPS} groups in each other; write it flatter")
            last, position = 0, position + 1
            continue
        if character == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
            position += 1
            continue
        position = _after_part(pattern, position)
        last = 1
        sizes[-1] += 1
    return sum(sizes)


def _after_part(pattern: str, position: int) -> int:
    """Where the escape, the class or the character that begins here ends."""
    if pattern[position] == "\\":
        return position + 2
    if pattern[position] != "[":
        return position + 1
    position += 2 if pattern[position + 1 : position + 2] == "^" else 1
    if pattern[position : position + 1] == "]":  # the first one is a member
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
