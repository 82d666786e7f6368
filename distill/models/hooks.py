"""How this project attaches to a model it did not write: three small tools, and nothing stays behind.

    hooks = Hooks(); hooks.before(module, f); hooks.after(module, g); hooks.close()      # any hooks that go together
    with replaced_forward(head, function): model(**batch)         # a function is called instead of one module
    gate = Gate(backbone); gate.running                           # inside the model's own forward pass, and only there
    class MyTap(Tap): ...; tap.take(...)                          # what the last forward pass let one hear, once

Two things go wrong with a plain hook in training. Gradient checkpointing runs the inside of every layer (and, as some
wrap it, the layer itself) a second time during `backward`, so a hook fires twice: what it hears counts only while the
backbone's own forward is running (`Gate`). And whatever a hook computes there is a saved tensor that the second run
does not make, which torch refuses: taps only hold references, the arithmetic comes after the pass.

Hooks are kept out of compiled code: a graph break per hook, instead of side effects baked into a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill.errors import RunError, UserError


class Hooks:
    """Hooks that go together. `close()`, or leaving the context, gives the model back as it was."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, module: nn.Module, hook: Callable, *, named: bool = False, first: bool = False) -> None:
        """`hook(module, args)` ahead of every forward of `module`; with `named`, `hook(module, args, kwargs)`.

        first: ahead of the hooks that stand already.
        """
        disabled = torch.compiler.disable(hook)
        self._handles.append(module.register_forward_pre_hook(disabled, with_kwargs=named, prepend=first))

    def after(self, module: nn.Module, hook: Callable, *, always: bool = False) -> None:
        """`hook(module, args, output)` behind every forward; with `always`, also behind one that raised."""
        disabled = torch.compiler.disable(hook)
        self._handles.append(module.register_forward_hook(disabled, always_call=always))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, *_exc) -> None:
        self.close()


@contextmanager
def replaced_forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Calls of `module` go to `function` instead, for as long as the context lasts."""
    own = vars(module).get("forward")  # somebody else may have put one there
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Gate:
    """Open while `backbone` runs its forward pass, shut during the recomputation of gradient checkpointing.

    `passes` counts the passes begun. `with_gradient` says whether the last one was to be differentiated.
    """

    def __init__(self, backbone: nn.Module):
        self.running, self.passes, self.with_gradient = False, 0, False
        self._hooks = Hooks()
        self._hooks.before(backbone, self._begin)
        self._hooks.after(backbone, self._end, always=True)

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
        self._hooks.close()


class Tap:
    """What was heard at named places in the last forward pass, with gradient where the pass had one.

    A subclass puts its hooks into `hooks`, calls `hear` from them while `gate.running`, and takes what a pass brought
    once, behind it. One reference per place is held until then: with gradient that is memory the graph holds anyway.
    """

    def __init__(self, backbone: nn.Module):
        self.gate, self.hooks = Gate(backbone), Hooks()
        self._heard: dict[Any, tuple[int, Any]] = {}

    def hear(self, place: Any, what: Any, where: str) -> None:
        """Keep `what` for `place`. Raises UserError under re-entrant checkpointing; `where` names the place."""
        self.gate.check_gradient(where)
        self._heard[place] = (self.gate.passes, what)

    def heard_already(self, place: Any) -> bool:
        """Whether this pass has brought something for `place` before."""
        return self._heard.get(place, (0, None))[0] == self.gate.passes

    def take_heard(self) -> Callable[[Any, str], Any]:
        """A function (place, its name) -> what the last pass brought there; the tap lets go of all of it.

        The function raises RunError for a place that the last pass did not bring.
        """
        held, self._heard = self._heard, {}

        def of(place: Any, name: str) -> Any:
            number, what = held.get(place, (0, None))
            if number and number == self.gate.passes:
                return what
            if self.gate.passes:
                raise RunError(
                    f"a forward pass ran but {name} was not heard; take what a pass brought once, before the next "
                    "pass, and make the tap before torch.compile"
                )
            raise RunError(f"{name} was asked for before any forward pass; call the model first")

        return of

    def close(self) -> None:
        """Give the model back as it was."""
        self.gate.close()
        self.hooks.close()
