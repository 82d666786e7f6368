"""Held-out rows and the memory of looks at them, by numbers given: what is due, what is best, when it is enough."""

import pytest
import torch
from accelerate import Accelerator
from training_example import stored

from distill.config.recipe import load_recipe
from distill.config.training import Validation
from distill.errors import UserError
from distill.training.checkpoint import BEST, saved_step
from distill.training.log import Validator, split_rows


class Says(torch.nn.Module):
    """A step module whose cross-entropy is so much a token in every look, and whose weighted loss is twice that."""

    def __init__(self, *values: float):
        super().__init__()
        self.values, self.modes, self.states = list(values), [], ()
        self.weight = torch.nn.Parameter(torch.tensor([1.0]))

    def ready(self, batch, device):
        return batch.to(device)

    def forward(self, batch, signals, held_out=False):
        assert held_out
        self.modes.append(self.training)
        plain = torch.tensor(self.values[0] * len(batch.targets))
        return 2 * plain, None, plain


@pytest.fixture
def looking(make_recipe, tmp_path):
    """looking(values, "key=value", ...) -> (validator, what every look gave, steps 0, 1, ...)."""

    def look(values: list[float], *options: str):
        path, _ = make_recipe()
        train = load_recipe(path, ["train.steps=20", *options]).train
        validator = Validator(train, stored(7), 0, Accelerator(cpu=True), tmp_path)
        found = []
        for step, value in enumerate(values):
            found.append(validator.look(step, Says(value), Says(value), None))
            if validator.finished:
                break
        return validator, found

    return look


def test_best_step_and_patience_count_from_the_last_better_look(looking):
    section = "train.validation={rows: 7, every: 1, patience: 2}"
    validator, found = looking([5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 1.0], section)
    assert found == pytest.approx([5.0, 4.0, 4.5, 3.0, 3.5, 3.0]), (
        "two looks running without a better one end it"
    )
    assert (validator.best, validator.best_step, validator.worse) == (3.0, 4, 2)
    assert validator.close(torch.nn.Identity()) == {"validation": {"rows": 7, "best": 3.0, "best_step": 4}}
    endless, _ = looking([1.0, 2.0, 3.0, 4.0], "train.validation={rows: 7, every: 1}")
    assert endless.worse == 3 and not endless.finished


def test_its_memory_comes_back(looking):
    section = "train.validation={rows: 7, every: 1, patience: 2}"
    known, fresh = looking([5.0, 4.0, 4.5], section)[0], looking([], section)[0]
    assert fresh.state() == {"best": None, "best_step": 0, "worse": 0}
    other = looking([], section)[0]
    other.restore(fresh.state())
    assert other.best == float("inf")
    other.restore(known.state())
    assert (other.best, other.best_step, other.worse) == (4.0, 2, 1) and other.state() == known.state()


def test_the_best_weights_carry_the_step_that_they_are_of(looking, tmp_path):
    """A state that is as old as they are keeps them; an older one forgets that look, which comes again."""
    section = "train.validation={rows: 7, every: 1, keep_best: true}"
    known = looking([5.0, 4.0, 4.5], section)[0]
    assert saved_step(tmp_path / BEST) == known.best_step == 2
    same, older = looking([], section)[0], looking([], section)[0]
    same.restore(known.state())
    assert (same.best, same.best_step) == (4.0, 2)
    older.restore({"best": 5.0, "best_step": 1, "worse": 0})
    assert older.best == float("inf")


def test_looks_are_due_after_every_so_many_steps_and_after_the_last(looking):
    validator, _ = looking([], "train.validation={rows: 7, every: 3}", "train.steps=8")
    assert [step for step in range(8) if validator.due(step)] == [2, 5, 7]
    validator.rows = None
    assert not any(map(validator.due, range(8)))


def test_a_look_is_in_eval_mode_and_leaves_each_module_in_its_own(looking):
    validator, _ = looking([], "train.validation={rows: 7, every: 3}", "train.micro_batch_size=4")
    module = Says(1.0)
    module.frozen = torch.nn.Dropout(0.5)
    module.train().frozen.eval()
    assert validator.look(0, module, module, None) == pytest.approx(1.0)
    assert validator.objective == pytest.approx(2.0)
    assert module.modes == [False, False] and module.training and not module.frozen.training


def test_a_seeded_choice_of_rows_is_held_out():
    rows = stored(12)
    key = lambda part: [tuple(map(int, c)) for _, c in map(part.row, range(len(part)))]  # noqa: E731
    trained, held = split_rows(rows, Validation(rows=4), 0)
    assert (len(trained), len(held)) == (8, 4) and sorted(key(trained) + key(held)) == sorted(key(rows))
    assert [k for k in key(rows) if k in key(held)] == key(held), "in their order"
    again, other = (split_rows(rows, Validation(rows=4), seed)[1] for seed in (0, 1))
    assert key(again) == key(held) != key(other)
    assert split_rows(rows, Validation(rows=0), 0) == (rows, None)
    assert len(split_rows(rows, Validation(rows=11), 0)[0]) == 1
    for many in (12, 13):
        with pytest.raises(UserError, match="leaves none of the dataset's 12 rows"):
            split_rows(rows, Validation(rows=many), 0)
