"""Where to listen inside a model while it trains: its decoder layers, and when its forward pass is running.

    backbone, layers = decoder_layers(model)       # PEFT, DDP and torch.compile looked through
    gate = Gate(backbone)                          # gate.running: inside the model's own forward pass
    gate.close()

Two things go wrong with a plain hook in training. Gradient checkpointing runs the inside of every layer (and,
as some wrap it, the layer itself) a second time during `backward`, so a hook fires twice: what it hears
counts only while the backbone's own forward is running. And whatever a hook computes there is a saved tensor
that the second run does not make, which torch refuses: hooks here only hold references, the arithmetic comes
after the pass.

Shapes: B rows, T time, d width.
"""

import torch
from torch import nn

from distill.errors import RunError, UserError
from distill.routers import bare_model


def decoder_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(backbone, its decoder layers) of any causal LM: what every forward pass goes through, and its blocks.

    Found by structure: from the input embedding upwards, the first module that holds a `ModuleList`; of
    several lists the one with the most parameters. Raises UserError where there is none, or where the layers
    are spread over several lists of one length (xlm).
    """
    base = bare_model(model)
    base = next(
        (m for m in base.modules() if hasattr(m, "get_input_embeddings")), base
    )  # in a KeptLogits, say
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


class Gate:
    """Open while `backbone` runs its forward pass, shut during the recomputation of gradient checkpointing.

    `passes` counts the passes begun. `with_gradient` says whether the last one was to be differentiated.
    """

    def __init__(self, backbone: nn.Module):
        self.running, self.passes, self.with_gradient = False, 0, False
        # A graph break per hook, instead of side effects baked into a compiled graph.
        begin, end = torch.compiler.disable(self._begin), torch.compiler.disable(self._end)
        self._handles = [
            backbone.register_forward_pre_hook(begin),
            backbone.register_forward_hook(end, always_call=True),
        ]

    def _begin(self, *_) -> None:
        self.running, self.passes, self.with_gradient = True, self.passes + 1, torch.is_grad_enabled()

    def _end(self, *_) -> None:
        self.running = False

    def check_gradient(self, where: str) -> None:
        """Called from a hook. Raises UserError where re-entrant checkpointing hides the graph from it."""
        if self.with_gradient and not torch.is_grad_enabled():
            raise UserError(
                f"{where} runs without gradient inside a pass that has one: gradient checkpointing is "
                "re-entrant; enable it with use_reentrant=False, or turn it off"
            )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def not_heard(gate: Gate, what: str) -> RunError:
    """The error of a tap asked for what no forward pass has brought it."""
    if gate.passes:
        return RunError(
            f"a forward pass ran but {what} was not heard; take what a pass brought once, before the next "
            "pass, and make the tap before torch.compile"
        )
    return RunError(f"{what} was asked for before any forward pass; call the model first")
