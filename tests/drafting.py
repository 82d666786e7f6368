"""Pages and speeds as drafts: a run writes them by the way, and they are more than half of its time.

Figures are empty, speeds are measured on a few tokens; pages and metrics are whole but for that. Tests of pages and of
speeds have the real ones: conftest.py says which, and `DRAWN_HERE=1` in the environment of a forked process
(warm.py).
"""

import contextlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def draft_pages() -> Iterator[None]:
    from distill.evaluation import usage
    from distill.report import drawing

    def empty(figure) -> str:
        width, height = 72 * figure.get_size_inches()
        return f'<svg viewBox="0 0 {width} {height}"><g></g></svg>'

    def plain_map(_title, rows, cells, shades, _uniform, said, **_how) -> str:
        assert cells.shape == shades.shape and len(rows) == len(cells)
        return drawing.to_svg(drawing.new_figure(4, 3), said)

    empty.real, plain_map.real = drawing.written_svg, drawing._drawn
    with (
        mock.patch.object(drawing, "written_svg", empty),
        mock.patch.object(drawing, "_drawn", plain_map),
        mock.patch.object(usage, "DECODE_TOKENS", 4),
        mock.patch.object(usage, "_REPEATS", 1),
    ):
        yield
