"""How many CPU threads a run takes: the recipe's word, then the environment's, then every core."""

import pytest
import torch

from distill.devices import asked_threads, cores, even_size, pick_device
from distill.errors import UserError

NAMES = ("DISTILL_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    before = torch.get_num_threads()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "environment, asked",
    [
        ({}, 0),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, 3),
        ({"OMP_NUM_THREADS": "3", "DISTILL_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "3", "DISTILL_THREADS": "0"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": " 4 "}, 4),
        ({"OMP_NUM_THREADS": "many"}, 0),
        ({"OMP_NUM_THREADS": ""}, 0),
        ({"OMP_NUM_THREADS": "0", "MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "9" * 50}, 0),
    ],
)
def test_what_the_environment_asks_for(monkeypatch, environment, asked):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert asked_threads() == asked


def test_the_recipe_wins_and_nothing_said_is_every_core(monkeypatch):
    pick_device("cpu")
    assert torch.get_num_threads() == cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pick_device("cpu")
    assert torch.get_num_threads() == 1
    pick_device("cpu", threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("value", ["many", "-1", "1.5", "99999999999", "1e3"])
def test_a_number_of_our_own_that_is_none_is_told(monkeypatch, value):
    monkeypatch.setenv("DISTILL_THREADS", value)
    with pytest.raises(UserError, match=r"DISTILL_THREADS=.*: give the number of CPU threads"):
        asked_threads()


def test_what_torchrun_sets_by_itself_is_not_the_users_wish(monkeypatch):
    """This process was not started with the variable; a launcher's child sees its launcher's environment."""
    monkeypatch.setattr("distill.devices.os.getppid", lambda: "self")
    monkeypatch.setattr("distill.devices.Path.read_bytes", lambda _path: b"HOME=/\0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert asked_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert asked_threads() == 0
    monkeypatch.setattr("distill.devices.Path.read_bytes", lambda _path: b"HOME=/\0OMP_NUM_THREADS=1\0")
    assert asked_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert asked_threads() == 2


@pytest.mark.parametrize(
    "count, most, size, pieces",
    [(0, 64, 1, 0), (63, 64, 63, 1), (127, 256, 127, 1), (128, 256, 64, 2), (200, 64, 50, 4), (840, 256, 210, 4),
     (600, 256, 150, 4), (10, 3, 3, 4), (1, 256, 1, 1)],
)  # fmt: skip
def test_pieces_that_two_processes_share_well(count, most, size, pieces):
    """An even number of one size, where that leaves enough rows for a forward pass."""
    assert even_size(count, most) == size <= most and -(-count // size) == pieces
