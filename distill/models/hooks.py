"""How this project attaches to a model it did not write: hooks, and the head on kept tokens only.

Three small tools, and nothing stays behind.

    hooks = Hooks(); hooks.before(module, f); hooks.after(module, g); hooks.close()      # any hooks that go together
    with replaced_forward(head, function): model(**batch)         # a function is called instead of one module
    gate = Gate(backbone); gate.running                           # inside the model's own forward pass, and only there
    class MyTap(Tap): ...; tap.take(...)                          # what the last forward pass let one hear, once

Two things go wrong with a plain hook in training. Gradient checkpointing runs the inside of every layer (and, as some
wrap it, the layer itself) a second time during `backward`, so a hook fires twice: what it hears counts only while the
backbone's own forward is running (`Gate`). And whatever a hook computes there is a saved tensor that the second run
does not make, which torch refuses: taps only hold references, the arithmetic comes after the pass.

Hooks are kept out of compiled code: a graph break per hook, instead of side effects baked into a graph.

Kept tokens only: their logits [N, V], or the hidden states [N, d] that the head would make logits of.

Half of a chat batch is prompt, and with a vocabulary of 150,000 the head is most of the work, so computing logits
that no loss reads wastes both time and memory. `KeptLogits` selects the kept hidden states before the head sees
them; `AtHead` goes further and calls a function instead of the head, which `distill.training.losses.fused` uses to
make head and loss one. Either way the model's own forward runs around it, with PEFT, autocast and wrappers.

`save_head` and `load_head` keep a head on disk by itself: with stored hidden states it is a teacher without a body.

    kept = KeptLogits(model); logits = kept(input_ids, attention_mask, keep)      # [N, V]
    at = AtHead(model); found = at(lambda hidden: hidden[keep], input_ids=ids, attention_mask=mask)     # [N, d]

Shapes: B rows, T time, N kept tokens, V vocabulary, d hidden size.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import RunError, UserError
from distill.files import replacing


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


# ==== Kept tokens only ====


@dataclass(frozen=True)
class Head:
    """logits = transform(hidden @ weight.T + bias): weight [V, d], bias [V].

    `scale` and `softcap` are what the model's own forward does after its head (see `distill.training.step`):
    logits * scale, then softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    known_finite: bool | None = None  # where somebody has looked

    def raw(self, hidden: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Logits [n, V] before the transform, written into `out`; `weight` is this head's, in out's dtype."""
        torch.mm(hidden, weight.t(), out=out)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out

    @property
    def finite(self) -> bool:
        """Whether logits of finite hidden states are: a bias of -inf forbids its token."""
        if self.known_finite is not None:
            return self.known_finite
        return self.bias is None or bool(self.bias.isfinite().all())

    @property
    def plain(self) -> bool:
        return self.scale == 1 and self.softcap is None

    def transform(self, raw: Tensor) -> Tensor:
        if self.plain:
            return raw
        logits = raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def pull_back(self, gradient: Tensor, raw: Tensor) -> Tensor:
        """d loss / d raw from d loss / d logits, both [m, V]."""
        if self.plain:
            return gradient
        if self.softcap is not None:
            gradient = gradient * (1 - torch.tanh(raw * (self.scale / self.softcap)).square())
        return gradient * self.scale


def save_head(path: Path, head: Head) -> None:
    """One safetensors file, whole or not at all: weight and bias as they are, scale and soft cap beside them."""
    tensors = {"weight": head.weight.detach().cpu().contiguous().clone()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().clone()
    with replacing(path, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file(tensors, temporary, {"transform": json.dumps([head.scale, head.softcap])})


def load_head(path: Path, device: torch.device) -> Head:
    """What `save_head` wrote. Raises UserError for a file that it did not."""
    # A process of a launch on CPUs is told "cpu:1", which safetensors takes for no device.
    where = device.type if device.type == "cpu" else str(device)
    try:
        with safe_open(path, framework="pt", device=where) as file:
            scale, softcap = json.loads(file.metadata()["transform"])
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 - not a dict
            finite = bias is None or bool(bias.isfinite().all())
            return Head(file.get_tensor("weight"), bias, scale, softcap, finite)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no output head of a teacher ({str(error).splitlines()[0]}); run generate and filter with --redo"
        ) from error


def at_places(states: Tensor, places: Tensor) -> Tensor:
    """Of states [B, T, ...] those at `places` [N], numbers in B * T -> [N, ...].

    What a mask would select, but nobody has to wait for how many they are.
    """
    return states.flatten(0, 1).index_select(0, places)


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits. Raises UserError where the model has none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UserError(
            f"{type(model).__name__} has no output head to compute logits with; is it a causal LM?"
        )
    return head


class KeptLogits(nn.Module):
    """Wraps a causal LM (or a PeftModel): forward(input_ids [B,T], attention_mask [B,T], keep [B,T]) -> [N,V].

    `keep` is a mask, or the places [N] of the kept tokens in B * T (`Batch.places`).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._keep: Tensor | None = None
        self._hooks = Hooks()
        self._hooks.before(output_head(model), self._select)

    def __enter__(self) -> "KeptLogits":
        return self

    def __exit__(self, *_exc) -> None:
        """Give the model back as it was; a model kept for training need not be."""
        self._hooks.close()

    def _select(self, _head, args):
        if self._keep is None:
            return None
        masked = self._keep.dtype == torch.bool
        return (args[0][self._keep] if masked else at_places(args[0], self._keep), *args[1:])  # -> [N, d]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, keep: Tensor, **more) -> Tensor:
        self._keep = keep
        try:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more
            ).logits
        finally:
            self._keep = None


class AtHead:
    """Runs a model's forward and calls a function of the hidden states [B, T, d] instead of its output head.

    `fusable` says whether the head is one plain matrix followed by a scale and a soft cap that are known; then
    `head()` is that head. Both are found by asking the model's own forward what it does to known numbers after
    its head, so no list of families is kept.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.module = output_head(model)
        # Exactly nn.Linear: an adapted, quantised or otherwise replaced head computes something else.
        self.fusable = type(self.module) is nn.Linear
        self.scale, self.softcap = 1.0, None
        self._finite: bool | None = None  # asked of the weights once: training moves no finite number to -inf
        if self.fusable:
            self.fusable = self._find_transform()

    def head(self) -> Head:
        """The head as tensors. Under FSDP they are whole inside the wrapped forward only: ask there."""
        bias = self.module.bias
        if self._finite is None:
            self._finite = bias is None or bool(bias.isfinite().all())
        return Head(self.module.weight, bias, self.scale, self.softcap, self._finite)

    def __call__(self, function: Callable[[Tensor], Any], **inputs) -> Any:
        """The result of function(hidden [B, T, d]), which model(**inputs) calls instead of its head."""
        found = []

        def instead(hidden: Tensor) -> Tensor:
            found.append(function(hidden))
            return hidden[..., :1].detach()  # what the model goes on with; nobody looks at it

        self._run(instead, inputs)
        return found[0]

    def _run(self, instead: Callable[[Tensor], Tensor], inputs: dict) -> Tensor:
        with replaced_forward(self.module, instead):
            return self.model(use_cache=False, **inputs).logits

    @torch.no_grad()
    def _find_transform(self) -> bool:
        """What the forward does to logits after the head: nothing, a scale, a soft cap, or something unknown."""
        training, device = self.model.training, self.module.weight.device
        probe = torch.linspace(-40, 40, 33, dtype=torch.float64, device=device)[None, None]
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.model.eval()
        try:
            seen = self._run(lambda _hidden: probe, {"input_ids": token, "attention_mask": token + 1})
        finally:
            self.model.train(training)
        x, y = probe.flatten(), seen.double().flatten()
        if y.shape != x.shape:
            return False
        near_zero = float(y[17] / x[17])  # the smallest positive number of the probe, 2.5
        config = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        cap = getattr(text, "final_logit_softcapping", None)
        for scale, softcap in ((1.0, None), (near_zero, None), *([(1.0, float(cap))] if cap else [])):
            if torch.allclose(Head(self.module.weight, None, scale, softcap).transform(x), y, rtol=1e-5):
                self.scale, self.softcap = scale, softcap
                return True
        return False
