"""A live teacher that remembers: the same states, whichever rows of a batch it has read before."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from step_example import build, rows
from torch.distributed.tensor import DTensor

from distill.config.recipe import load_recipe
from distill.errors import UserError
from distill.models.layers import decoder_layers
from distill.models.load import load_tokenizer
from distill.moe.interventions import use_top_k
from distill.training.live_teachers import FrozenTeacher
from distill.training.open_teachers import live_teachers, shard_layers


def states(teacher: FrozenTeacher, batch) -> torch.Tensor:
    return teacher(batch)["dense"].hidden


@pytest.mark.parametrize("packed", [False, True])
def test_rows_read_before_are_not_read_again_and_say_the_same(packed):
    data = rows(n=7)
    plain, remembering = FrozenTeacher(build("qwen3")), FrozenTeacher(build("qwen3"), 1e9)
    read = []
    remembering.model.register_forward_pre_hook(
        lambda _m, _args, named: read.append(len(named["input_ids"])), with_kwargs=True
    )
    make = data.pack if packed else lambda picked: data.collate(picked, 0)
    for picked, new in (([0, 2, 5], 3), ([5, 1, 2, 6, 0], 2), ([6, 5, 4, 3], 2), ([3, 1], 0)):
        batch = data.collate(np.array(picked), 0)
        if not packed:
            torch.testing.assert_close(states(remembering, batch), states(plain, batch))
            assert sum(read) == new
        else:  # one sequence: read as a whole where any row is new
            batch = make(np.array([0]))
            torch.testing.assert_close(states(remembering, batch), states(plain, batch))
            assert len(read) == (picked == [0, 2, 5])
        read.clear()


def test_a_sharded_teachers_layer_is_whole_only_while_it_computes(tmp_path):
    """Left to itself FSDP2 keeps a layer whole after its first pass: every process would then hold all of them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, batch = build("qwen3"), rows().collate(np.arange(7), 0)
        said = states(FrozenTeacher(model), batch)
        asked = states(FrozenTeacher(shard_layers(model, torch.device("cpu"))), batch)
        torch.testing.assert_close(asked, said)
        assert all(isinstance(p, DTensor) for p in decoder_layers(model)[1].parameters())
    finally:
        dist.destroy_process_group()


def test_a_sharded_teacher_remembers_nothing(make_recipe, monkeypatch):
    """Who remembers a row skips the meeting that the others wait in."""
    path, _ = make_recipe()
    monkeypatch.setattr("distill.training.open_teachers._load", lambda *_: build("qwen3"))
    kept = {}
    for where in ("auto", "sharded"):
        recipe = load_recipe(path, [f"teacher.device={where}", "train.teachers={remember_gb: 1}"])
        tokenizer = load_tokenizer(recipe.teacher.model)
        teacher = live_teachers(recipe, None, tokenizer, set(), torch.device("cpu"))
        kept[where] = teacher._memory
    assert kept["auto"] is not None and kept["sharded"] is None
    with pytest.raises(UserError, match=r"every process asks equally often"):
        load_recipe(path, ["teacher.device=sharded", "train.teachers={own_start: true}"])


def test_a_part_of_a_batch_is_the_batch_of_those_rows():
    data = rows(n=6)
    whole = data.collate(np.arange(6), 0)
    for picked in ([1, 4], [4, 0, 3], [5]):
        part, alone = whole.select(picked), data.collate(np.array(picked), 0)
        width = alone.input_ids.shape[1]
        assert torch.equal(part.targets, alone.targets) and list(part.row_tokens) == list(alone.row_tokens)
        assert torch.equal(part.places, part.keep.flatten().nonzero()[:, 0])
        wide = torch.zeros_like(part.keep)
        start = 0 if whole.attention_mask[0, 0] else part.keep.shape[1] - width
        wide[:, start : start + width] = alone.keep
        assert torch.equal(part.keep, wide)


def test_a_mixture_may_score_with_more_experts_than_it_was_trained_with():
    data, plain = rows(n=4), FrozenTeacher(build("olmoe"))
    more = FrozenTeacher(build("olmoe"), experts_per_token=4)
    batch = data.collate(np.arange(4), 0)
    with use_top_k(plain.model, 4):
        expected = states(plain, batch)
    torch.testing.assert_close(states(more, batch), expected)
    assert not torch.allclose(states(plain, batch), expected)
    assert more.flops_per_token(8) > plain.flops_per_token(8)
