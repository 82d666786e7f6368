"""Rows of text as an aligned table: what the cost commands print.

text_table([("stage", "USD"), ("student", "$2")])      # the first row is the head
"""


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
