"""The table of small wrong changes goes with the code: every entry applies, and what does not is refused."""

import pytest
from mutants import TABLE, Mutant, TableError, changed, problems, read_table


def test_every_entry_applies_to_the_code_as_it_is():
    mutants = read_table(TABLE.read_text(encoding="utf-8"))
    assert len(mutants) > 500 and len({m.file for m in mutants}) > 30
    assert problems(mutants) == []


def test_the_form_of_the_table():
    text = "# a comment\n@ a.py: t.py u.py\n- x = 1\n+ x = 2\n- y = 1\n-     z\n+ y = 2\n= why\n\n@ b.py: t.py\n- w\n"
    assert read_table(text) == [
        Mutant("a.py", ("t.py", "u.py"), "x = 1", "x = 2"),
        Mutant("a.py", ("t.py", "u.py"), "y = 1\n    z", "y = 2", "why"),
        Mutant("b.py", ("t.py",), "w", ""),
    ]
    with pytest.raises(TableError, match="line 1: begins with none"):
        read_table("x = 1")


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("x", "y", "found 2 times"),
        ("q = 1", "q = 2", "found 0 times"),
        ("x = 1", "x = (", "no Python"),
        ("x = 1", "x  =  1", "changes nothing"),
    ],
)
def test_what_does_not_apply_is_refused(tmp_path, before, after, said):
    (tmp_path / "distill").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("")
    (tmp_path / "distill" / "a.py").write_text("x = 1\nprint(x)\n")
    mutant = Mutant("a.py", ("t.py",), before, after)
    with pytest.raises(TableError, match=said):
        changed(mutant, tmp_path / "distill")
    assert len(problems([mutant], tmp_path)) == 1
    good = Mutant("a.py", ("t.py",), "x = 1", "x = 2")
    assert problems([good], tmp_path) == [] and changed(good, tmp_path / "distill") == "x = 2\nprint(x)\n"
    assert "written twice" in problems([good, good], tmp_path)[0]
    assert "no test u.py" in problems([Mutant("a.py", ("u.py",), "x = 1", "x = 2")], tmp_path)[0]
