"""Records of runs: what is written is what is read, in every kind of answers."""

import numpy as np

from distill.bench.items import Items, Record, Records


def items(names: str, right: list[bool], *numbers: list[float]) -> Items:
    return Items(np.array(names.split()), np.array(right), *(np.array(n, np.float64) for n in numbers))


def test_records_are_read_as_they_were_written(tmp_path):
    """Two kinds of one run, of which a flaw has no tokens and no nats; a task that is no run; two files together."""
    nan = float("nan")
    hard = items("a b c", [True, False, True], [9, 20, 7], [1.5, nan, 0.1], [3, nan, 2])
    flaw = items("x y", [False, True], [nan, nan], [nan, nan], [nan, nan])
    used = {"steps": 3, "rows": 12, "tokens": 96, "tokens_read": 200, "flops": 10**15 + 1}
    run = Record(
        "f00", "0123abc", 12.5, "cpu", {"accuracy.hard": 2 / 3}, used, {"hard": hard, "flaw.bias": flaw}
    )
    first, second = Records(tmp_path), Records(tmp_path)
    first._known = {"answers-9": Record("answers-9", None, 1.0), "student-0": run}
    second._known = {"other-1": Record("f01", "0123abc", 2.0, "cpu", {}, None, {"hard": hard})}
    second.path = tmp_path / "records-2.parquet"
    first.write()
    second.write()
    found = Records(tmp_path)._known
    assert set(found) == {"answers-9", "student-0", "other-1"}
    for name, record in {**first._known, **second._known}.items():
        assert found[name].about() == record.about()
        assert list(found[name].items) == list(record.items)
        for kind, of in record.items.items():
            there = found[name].items[kind]
            for column in ("item", "right", "tokens", "nats_tokens"):
                np.testing.assert_array_equal(getattr(there, column), getattr(of, column))
            np.testing.assert_array_equal(there.nats, of.nats.astype(np.float32).astype(np.float64))


def test_of_two_records_of_a_task_this_machines_own_counts(tmp_path):
    mine, other = (Records(tmp_path) for _ in range(2))
    mine._known, other._known = ({"a-0": Record(name, None, 1.0)} for name in ("mine", "other"))
    other.path = tmp_path / "records-2.parquet"
    mine.write()
    other.write()
    assert Records(tmp_path)._known["a-0"].identity == "mine"


def test_an_empty_folder_knows_nothing(tmp_path):
    assert Records(tmp_path)._known == {} and Records(tmp_path / "nowhere")._known == {}
