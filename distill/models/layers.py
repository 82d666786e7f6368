"""The decoder layers of any causal LM, found by structure; PEFT, DDP and torch.compile are looked through.

backbone, layers = decoder_layers(model)
compile_layers(student, teacher)
"""

from torch import nn

from distill.errors import UserError
from distill.models.routers import bare_model


def decoder_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(backbone, its decoder layers) of any causal LM: what every forward pass goes through, and its blocks.

    Found by structure: from the input embedding upwards, the first module that holds a `ModuleList`; of
    several lists the one with the most parameters. Raises UserError where there is none, or where the layers
    are spread over several lists of one length (xlm).
    """
    base = bare_model(model)
    # It may stand in a module of ours, in KeptLogits say.
    base = next((m for m in base.modules() if hasattr(m, "get_input_embeddings")), base)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    names = {id(module): name for name, module in base.named_modules()}
    place = names.get(id(embedding), "")
    while place:
        place = place.rpartition(".")[0]
        backbone = base.get_submodule(place)
        lists = sorted(_outermost_lists(backbone), key=_parameters, reverse=True)
        if lists and _parameters(lists[0]):
            if len(lists) > 1 and len(lists[0]) == len(lists[1]) > 1 and _parameters(lists[1]):
                break
            return backbone, lists[0]
    raise UserError(
        f"cannot tell which modules of {type(base).__name__} are its decoder layers: no single ModuleList "
        "stands beside or above its input embedding; hidden states of this architecture cannot be matched"
    )


def compile_layers(*models: nn.Module) -> None:
    """torch.compile of every decoder layer, in place and for any length; hooks that stand already are compiled in."""
    for model in models:
        for layer in decoder_layers(model)[1]:
            layer.compile(dynamic=True)


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    found = []
    for child in module.children():
        found += [child] if isinstance(child, nn.ModuleList) else _outermost_lists(child)
    return found


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
