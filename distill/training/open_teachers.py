"""From the recipe to its live teacher: which kind, loaded where and in what.

teacher = live_teachers(recipe, student.model, tokenizer, ends, device)       # a LiveTeacher, called by every step
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from distill.config.recipe import Recipe
from distill.data.signals import HEAD
from distill.errors import UserError
from distill.models.head import load_head
from distill.models.layers import decoder_layers
from distill.models.load import load_model, load_tokenizer, same_vocabulary
from distill.training.asked_otherwise import SampledRoutings, ToldTeacher
from distill.training.live_teachers import (
    CrossTeacher,
    FrozenTeacher,
    LiveTeacher,
    OwnStart,
    RoutedTeachers,
    StoredTeacher,
)

ALONE = (
    "teacher.device=sharded: there is one process, and nothing to spread the teacher over; start several with "
    "accelerate launch, or set teacher.device=auto (or cpu)"
)


def live_teachers(
    recipe: Recipe,
    student: nn.Module,
    tokenizer,
    ends: set[int],
    device: torch.device,
    half: torch.dtype | None = None,
) -> LiveTeacher:
    """What the recipe's objectives with a live teacher are taken from. `ends`: ids that end the student's turn.

    half: the 16-bit format that the student multiplies in. With teacher.dtype=auto a teacher stored in float32 then
    computes in it on a GPU too, since float32 products there take several times as long; elsewhere it is as stored.
    Raises UserError where a vocabulary differs from the student's by content: then only text can be distilled.
    """
    section = recipe.train.teachers
    if recipe.reads_states:
        head = load_head(recipe.path / "dataset" / HEAD, device)
        computes = teacher_dtype(recipe.teacher.dtype, device, half, head.weight.dtype)
        return StoredTeacher(replace(head, weight=head.weight.to(computes)))
    if section.own_start:
        own = OwnStart(student)
        return ToldTeacher(own, tokenizer) if section.context else own
    if any(o.signal == "aligned" for o in recipe.train.objectives):
        model = _load(recipe, recipe.teacher.model, device, half)
        return CrossTeacher(
            model, load_tokenizer(recipe.teacher.model, recipe.teacher.chat_template_kwargs), tokenizer, ends
        )
    names = {recipe.teacher.model, *section.models.values()}
    problems = [
        f"teacher '{name}' and the student have different vocabularies, so their logits cannot be compared; use "
        "train.objectives=[{name: cross_entropy}] (distil its text), {name: uld} (across tokenizers), or a "
        "student with its tokenizer"
        for name in sorted(names)
        if not same_vocabulary(load_tokenizer(name), tokenizer)
    ]
    if problems:
        raise UserError(*problems)
    remember, k = 1e9 * section.remember_gb / len(names), section.experts_per_token
    loaded = {name: FrozenTeacher(_load(recipe, name, device, half), remember, k) for name in names}
    if section.routings:
        loaded = {name: SampledRoutings(teacher, section.routings) for name, teacher in loaded.items()}
    default = loaded[recipe.teacher.model]
    by_tag = {tag: loaded[name] for tag, name in section.models.items()}
    found = RoutedTeachers(by_tag, default) if by_tag else default
    return ToldTeacher(found, tokenizer) if section.context else found


def teacher_dtype(
    asked: str, device: torch.device, half: torch.dtype | None, stored: torch.dtype
) -> torch.dtype:
    """What a live teacher computes in: see `live_teachers`."""
    narrower = asked == "auto" and device.type == "cuda" and half is not None and stored == torch.float32
    return half if narrower else stored


def _load(recipe: Recipe, name: str, device: torch.device, half: torch.dtype | None = None) -> nn.Module:
    """A teacher where `teacher.device` wants it. Raises UserError where nothing could be sharded over."""
    where = recipe.teacher.device
    if where == "sharded" and not dist.is_initialized():
        raise UserError(ALONE)
    place = device if where == "auto" else torch.device("cpu")
    model = load_model(name, recipe.teacher.dtype, place, quantize=recipe.teacher.quantize)
    if recipe.teacher.quantize == "none":
        model.to(teacher_dtype(recipe.teacher.dtype, place, half, model.dtype))
    return shard_layers(model, device) if where == "sharded" else model


def shard_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread a frozen model's decoder layers over all processes (FSDP2); each is whole only while it computes.

    Embedding, last norm and output head stay whole everywhere: the head is read outside of the forward pass. Every
    process must then call the model equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(model.requires_grad_(False))[1]:
        # Said explicitly: a layer that nothing sharded stands around would stay whole after its first pass.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return model.to(device)
