"""What a person sees while a command runs: lines, progress, colour, and how much of each.

    with console.bar(total=512, desc="generate", unit="answer") as bar: bar.update()
    console.say("dataset: done")                       # on one process of a launch, not under --quiet
    console.paint("FAIL", "red", sys.stdout)           # colour on a terminal only, and never under NO_COLOR
    console.text_table([("stage", "USD"), ("student", "$2")])      # aligned rows; the first row is the head
    console.parameters(837_888)                        # 0.84 M: one way to say it, in lines, cards and pages

A bar redraws itself on a terminal. Where standard error is a file or a pipe it is a plain line at most every
`INTERVAL` seconds, and nothing at all for work that is done sooner. `--quiet` leaves out bars and lines, so that what
was asked for, warnings and errors remain; `--verbose` adds what the libraries say, notes and tracebacks.
"""

import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

INTERVAL = 30.0  # seconds between lines of progress where there is no terminal
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "cyan": 36, "bold": 1}
_verbosity = 0


def set_verbosity(level: int) -> None:
    """-1 quiet, 0 as usual, 1 verbose. For this process, until it is set again."""
    global _verbosity
    _verbosity = level


def quiet() -> bool:
    return _verbosity < 0


def verbose() -> bool:
    return _verbosity > 0


def first_process() -> bool:
    """Whether this is the process of a launch that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> int:
    """How many processes the launch has that this one belongs to: 1 without a launcher."""
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() and "RANK" in os.environ else 1


def say(line: str) -> None:
    """A line about how far the work is, on standard output."""
    if first_process() and not quiet():
        print(line, flush=True)


def warn(line: str) -> None:
    """A line that matters even under --quiet, on standard error."""
    if first_process():
        print(f"distill: {line}", file=sys.stderr, flush=True)


# Seconds after which a launcher has ended the other processes of a launch of which one has failed.
_LAUNCHER_ENDS = 2.0


def fail(lines: Sequence[str]) -> None:
    """The last lines of a process that ends by a mistake, on standard error.

    Most mistakes are found by every process of a launch: the first says so at once, and then the launcher ends the
    others. One that another process alone has found it says itself, a moment later and by its number.
    """
    if not first_process():
        time.sleep(_LAUNCHER_ENDS)
        lines = [f"process {os.environ['RANK']}: {line}" for line in lines]
    for line in lines:
        print(f"distill: {line}", file=sys.stderr, flush=True)


@contextmanager
def slow(what: str, after: float = 2.0) -> Iterator[None]:
    """One line on standard error where the block takes longer than `after` seconds: silence looks like a hang."""
    told = threading.Event()

    def tell() -> None:
        if not told.wait(after) and not quiet():
            warn(f"{what} takes a while ...")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        told.set()
        thread.join()


def coloured(stream: TextIO) -> bool:
    """Colour only on a terminal that has some, and not where NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if coloured(stream) else text


def shows_bars() -> bool:
    """Whether a bar of another library can be redrawn in its place, and is wanted."""
    return not quiet() and sys.stderr.isatty()


def hush_foreign_bars() -> None:
    """No bars of other libraries where nothing can redraw them. Before tqdm is imported, which reads this once."""
    if not shows_bars():
        os.environ.setdefault("TQDM_DISABLE", "1")


class _Lines:
    """A stream for tqdm where nothing can be redrawn: every state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def bar(*iterable: Any, main: bool = True, **options: Any) -> Any:
    """A tqdm bar with tqdm's own options (`total`, `initial`, `desc`, `unit`); `main` False shows none.

    Imported here, so that the command's help need not wait for it.
    """
    from tqdm import tqdm

    hidden = quiet() or not main
    if sys.stderr.isatty():
        return tqdm(*iterable, disable=hidden, mininterval=0.5, **options)
    return tqdm(
        *iterable,
        disable=hidden,
        file=_Lines(),
        mininterval=INTERVAL,
        maxinterval=INTERVAL,
        delay=INTERVAL,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        **options,
    )


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars out of ours; with --verbose their warnings are shown.

    A command calls it right before it imports what takes torch and transformers. That is 5 s of work for a CPU, so a
    line on standard error says what is waited for, unless they are there already.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not {"torch", "transformers"} <= sys.modules.keys():
        if first_process() and not quiet():
            print("loading torch and transformers ...", file=sys.stderr, flush=True)
        gc.disable()  # a fifth of the imports was a search for garbage among what stays
        try:
            import transformers.modeling_utils  # torch is imported with it
        finally:
            gc.freeze()
            gc.enable()
    if verbose():
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per 8-bit matmul otherwise
    # Notices about the libraries' own future; a user of this one can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")


def text_table(rows: list[tuple[str, ...]], text_columns: tuple[int, ...] = (0,)) -> list[str]:
    """One indented line per row; `text_columns` stand left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def millions(amount: list[float]) -> str:
    """[low, high] in USD as `$500M to $1,600M`; one figure where both are the same."""
    low, high = (f"${value / 1e6:,.{0 if value >= 1e7 else 2}f}M" for value in amount)
    return low if low == high else f"{low} to {high}"


def parameters(count: float) -> str:
    """A number of parameters, three significant digits or two decimals: 0.84 M, 3.23 M, 7.62 B, 12,345."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= 0.1 * scale:
            value = count / scale
            return f"{value:.2f} {unit}" if value < 9.995 else f"{float(f'{value:.3g}'):g} {unit}"
    return f"{count:,.0f}"
