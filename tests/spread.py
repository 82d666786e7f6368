"""Long tables in two suites: a spread-out sample in the ordinary one, every case in `pytest -m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def spread(cases: Iterable[Any], every: int) -> list[Any]:
    """Cases for `parametrize`: each `every`th one as it is, the others marked slow. A tuple is a case's arguments."""
    return [case if i % every == 0 else _slow(case) for i, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
