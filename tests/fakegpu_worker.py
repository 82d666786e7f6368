"""What the tests of the pretend accelerator run, in a process of its own: `python tests/fakegpu_worker.py FOLDER`.

Writes found.json: for every check the largest difference from the CPU and how often the host waited for the device.
"""

import gc
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import step_example
import torch
from conftest import CHATML, byte_tokenizer
from fakegpu import HELD, OnDevice, pretend, to_device
from step_example import V, mla, rows
from torch import nn

from distill.config.training import Objective
from distill.data.scoring import score_rows
from distill.data.signals import Sampled, SignalFormat, States, TopK
from distill.models.decode import Sampling, decode
from distill.models.hooks import AtHead, Head
from distill.models.layers import attend_by_row, rows_apart
from distill.moe.interventions import drop_experts, route, use_top_k
from distill.moe.recording import record_routing
from distill.training.checkpoint import load_state, save_state
from distill.training.live_teachers import CrossTeacher, FrozenTeacher, RoutedTeachers, StoredTeacher
from distill.training.losses import fused
from distill.training.losses.routers import ExpertBiasBalancer
from distill.training.step import StudentStep, state_objectives

GPU = torch.device("gpu", 0)
CPU = torch.device("cpu")
DENSE = (
    "forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl",
    "total_variation", "alpha_beta_divergence", "ranking_hinge", "ranking_logistic", "top_reverse_kl",
)  # fmt: skip
FOUND: dict[str, dict] = {}


def note(name: str, waits, difference: float, **more) -> None:
    where = {f"{what} at {place}": n for (what, place), n in sorted(waits.last.items())}
    FOUND[name] = {"difference": float(difference), "waits": sum(where.values()), "where": where, **more}


def there(model):
    """On the device, as `load_model` leaves it there."""
    return attending(to_device(model))


def build(family: str, seed: int = 0, vocabulary: int = V):
    """As a user's model attends: by torch's own product wherever the family has it."""
    model = step_example.build(family, seed)
    if vocabulary != V:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if family != "gemma2":
        model.set_attn_implementation("sdpa")
    return model


@cache
def kept(family: str, seed: int, vocabulary: int, where: torch.device):
    """A model for many checks, none of which changes its weights: trying how it attends takes longer than a step."""
    model = build(family, seed, vocabulary)
    return there(model) if where == GPU else attending(model)


def attending(model):
    attend_by_row(model)
    return model


def host(tensor):
    return tensor.raw if isinstance(tensor, OnDevice) else tensor


def far(a, b) -> float:
    """Largest difference of two dicts of tensors, or of two tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((far(a[key], b[key]) for key in a), default=0.0)
    return float((host(a).double() - host(b).double()).abs().max()) if a.numel() else 0.0


def stored(form: str, n: int):
    rng = np.random.default_rng(5)
    ids = torch.from_numpy(np.stack([rng.permutation(V)[:6] for _ in range(n)]))
    if form == "sparse":
        return TopK(ids, torch.from_numpy(rng.standard_normal((n, V))[:, :6]).log_softmax(-1).float() - 0.1)
    return Sampled(ids, torch.full((n, 6), 1 / 6))


def one_step(
    where: torch.device,
    waits,
    objectives,
    student="qwen3 tied",
    teacher="qwen3",
    make=FrozenTeacher,
    packed=False,
    vocabulary=V,
):
    """(loss, gradients, waits of one forward and backward pass) of a batch of ragged rows on a device."""
    model, other = kept(student, 0, vocabulary, where), kept(teacher, 1, vocabulary, where)
    said = make(other)
    states = state_objectives(objectives, model, said, seed=0)
    if where == GPU:
        to_device(states)
    step = StudentStep(model, objectives, states)
    data = rows()
    batch = data.pack(np.arange(len(data))) if packed else data.collate(np.arange(len(data)), 0)
    batch.messages = [[{"role": "user", "content": f"question {i}"}] for i in range(len(data))]
    batch.tags = np.array(["a", "b"] * 4, dtype=object)[: len(data)]
    for o in objectives:
        if o.signal in ("sparse", "sampled"):
            batch.signal = stored(o.signal, len(batch.targets))
        if o.signal == "drawn":
            batch.drawn = torch.linspace(-6, -1, len(batch.targets))
    if isinstance(said, StoredTeacher):
        batch.signal = States(torch.randn(len(batch.targets), 32, generator=torch.Generator().manual_seed(3)))
    # On the device twice: the first time a router's score function is told, and a teacher's head travels.
    for _ in range(2 if where == GPU else 1):
        model.zero_grad(set_to_none=True)
        waits.take()
        here = step.ready(batch, where)
        with rows_apart(here.rows):
            total, sums = step(here, said(here) if any(o.live for o in objectives) else {})
            (total / 10).backward()
        waits.take()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return total.detach(), sums, grads


def compare_steps(name: str, waits, objectives, **how) -> None:
    plain = one_step(CPU, waits, objectives, **how)
    found = one_step(GPU, waits, objectives, **how)
    note(
        name,
        waits,
        max(far(dict(enumerate(a[:2])) | a[2], dict(enumerate(b[:2])) | b[2]) for a, b in [(plain, found)]),
    )


def objectives(waits) -> None:
    o = lambda name, **more: Objective(name=name, **more)  # noqa: E731
    compare_steps("cross_entropy", waits, [o("cross_entropy")])
    for name in DENSE:
        compare_steps(name, waits, [o("cross_entropy"), o(name)])
    compare_steps("sampled_reverse_kl", waits, [o("sampled_reverse_kl", clip=0.2)])
    for target in ("tokens", "model"):
        compare_steps(
            f"multi_token {target}", waits, [o("multi_token", target=target, weight=0.1), o("cross_entropy")]
        )
    for tail in ("renormalise", "tail_bucket", "zero"):
        compare_steps(f"sparse_forward_kl {tail}", waits, [o("sparse_forward_kl", tail=tail)])
    compare_steps("sampled_cross_entropy", waits, [o("sampled_cross_entropy")])
    for name in ("hidden_cosine", "hidden_mse"):
        compare_steps(name, waits, [o(name), o("cross_entropy")])
    moe = {"student": "olmoe", "teacher": "olmoe"}
    for name in ("router_distillation", "sequence_balance", "batch_balance"):
        compare_steps(name, waits, [o(name), o("cross_entropy")], **moe)
    several = lambda model: RoutedTeachers({"a": FrozenTeacher(model)}, FrozenTeacher(model))  # noqa: E731
    compare_steps("several teachers", waits, [o("forward_kl")], make=several)
    alone = lambda model: StoredTeacher(AtHead(model).head())  # noqa: E731
    compare_steps("stored states", waits, [o("forward_kl")], make=alone)
    compare_steps("own head with a soft cap", waits, [o("forward_kl")], student="gemma2")
    compare_steps("packed rows", waits, [o("cross_entropy"), o("forward_kl")], packed=True)
    tokenizers = byte_tokenizer(CHATML), byte_tokenizer(CHATML, ("<|extra|>",))
    across = lambda model: CrossTeacher(model, *reversed(tokenizers), ends=set())  # noqa: E731
    large = {"vocabulary": len(tokenizers[1]), "make": across}
    compare_steps("uld", waits, [o("cross_entropy"), o("uld")], **large)
    compare_steps("uld with packed rows", waits, [o("cross_entropy"), o("uld")], packed=True, **large)


def memory() -> None:
    """Device memory of a loss beside its inputs, in float32 tensors of a piece, chunks of logits left out."""
    vocabulary, width, chunk, piece = 512, 8, 64, 8
    fused.ACCELERATOR_CHUNK, before = piece * vocabulary, fused.ACCELERATOR_CHUNK
    made = lambda *shape: OnDevice(torch.randn(*shape, dtype=torch.bfloat16))  # noqa: E731
    found = {}
    for name in ("cross_entropy", *DENSE):
        options = Objective(name=name).options
        hidden, head = made(chunk, width).detach().requires_grad_(), Head(made(vocabulary, width))
        dense = fused.Projected(made(chunk, width), Head(made(vocabulary, width)))
        signals = {"dense": dense, "targets": fused.Given((OnDevice(torch.randint(vocabulary, (chunk,))),))}
        form = "targets" if name == "cross_entropy" else "dense"
        chunks = (1 if form == "targets" else 2) * chunk * vocabulary * 2
        peaks = []
        for _ in range(5):  # the least: when Python collects what it no longer needs is chance
            gc.collect()
            start = HELD.reset()
            fused.fused_loss(hidden, head, [fused.Term(name, form, 1.0, options)], {form: signals[form]})
            peaks.append(HELD.peak - start - chunks)
        found[name] = min(peaks) / (4 * piece * vocabulary)
    fused.ACCELERATOR_CHUNK = before
    FOUND["memory"] = found


def decoding(waits) -> None:
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10]]
    for name, sampling in (
        ("decode greedy", Sampling(max_new_tokens=12)),
        ("decode sampled", Sampling(0.8, 0.9, max_new_tokens=12)),
    ):
        answers = {}
        for where in (CPU, GPU):
            model = build("qwen3").eval()
            if where == GPU:
                there(model)
            waits.take()
            answers[where] = decode(
                model, prompts, sampling, eos_ids=set(), pad_id=0, keys=[(i,) for i in range(4)], batch_size=8
            )
            waits.take()
        same = [a.ids == b.ids for a, b in zip(answers[CPU], answers[GPU])]
        note(name, waits, 0.0 if all(same) else 1.0, steps=12)


def scoring(waits) -> None:
    data = rows(n=12)
    for kind in ("none", "top_k", "sampled", "hidden"):
        form = None if kind == "none" else SignalFormat(kind, 32 if kind == "hidden" else 4, V, 1.0, 16, {})
        scores = {}
        for where in (CPU, GPU):
            model = build("qwen3").eval()
            if where == GPU:
                there(model)
            waits.take()
            scores[where] = score_rows(
                model, data, form, keys=[(i,) for i in range(12)], pad_id=0, vocabulary=V, batch_size=4
            )
            waits.take()
        far_off = max(
            abs(x - y) for a, b in zip(scores[CPU], scores[GPU]) for x, y in zip(a.logprobs, b.logprobs)
        )
        note(f"score {kind}", waits, far_off, batches=3)


def routing(waits) -> None:
    prompts, sampling = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7]], Sampling(max_new_tokens=24)
    summaries = {}
    for where in (CPU, GPU):
        model = build("olmoe").eval()
        if where == GPU:
            there(model)
        waits.take()
        with record_routing(model, keep="counts") as recording:
            decode(model, prompts, sampling, eos_ids=set(), pad_id=0, batch_size=8)
        waits.take()
        summaries[where] = {name: record.counts for name, record in recording.layers.items()}
    note("routing while decoding", waits, far(summaries[CPU], summaries[GPU]), steps=24, layers=2)
    changes = {
        "top-k 1": lambda m: use_top_k(m, 1),
        "drop an expert": lambda m: drop_experts(m, {"0": [1]}),
        "random routing": lambda m: route(m, "random", 0),
        "uniform routing": lambda m: route(m, "uniform", 0),
        "shuffled routing": lambda m: route(m, "shuffled", 0),
    }
    ids = torch.arange(3, 23).view(2, 10)
    for name, change in changes.items():
        logits = {}
        for where in (CPU, GPU):
            model = build("olmoe").eval()
            if where == GPU:
                there(model)
            given = ids.to(where, non_blocking=True)
            with torch.no_grad(), change(model):
                waits.take()
                logits[where] = model(given, use_cache=False).logits
                waits.take()
        note(f"intervention {name}", waits, far(logits[CPU], logits[GPU]))


class OnPretended:
    """What a training step needs of Accelerate, on the device."""

    num_processes, process_index, is_main_process, scaler, mixed_precision = 1, 0, True, None, "no"

    def __init__(self, device):
        self.device = device

    def reduce(self, tensor):
        return tensor

    def no_sync(self, _model):
        import contextlib

        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, most):
        return nn.utils.clip_grad_norm_(list(parameters), most)


def optimizer_steps(waits, folder: Path) -> None:
    """Micro-batches, clipping, the update and the balancer as `train_student` has them; a state saved and read."""
    from distill.config.training import Train
    from distill.training.sources import StoredRows
    from distill.training.train import MicroBatches, StepFound, make_optimizer

    objectives = [
        Objective(name="cross_entropy"),
        Objective(name="forward_kl"),
        Objective(name="batch_balance"),
    ]
    for optimizer_name in ("sgd", "adamw"):
        ends = {}
        for where in (CPU, GPU):
            train = Train(
                optimizer=optimizer_name, objectives=objectives, micro_batch_size=2, learning_rate=0.01
            )
            model, other = build("olmoe"), build("olmoe", seed=1)
            if where == GPU:
                there(model), there(other)
            teacher = FrozenTeacher(other)
            step = StudentStep(model, objectives, state_objectives(objectives, model, teacher, 0))
            accelerator, data = OnPretended(where), rows()
            optimizer = make_optimizer(train, list(step.parameters()))
            for group in optimizer.param_groups:
                group["fused"] = False if optimizer_name == "adamw" else None
            micro = MicroBatches(train, 0, accelerator, step)
            micro.saved_bytes = 0  # storages have no address here to count them by
            source = StoredRows(data, len(data), 0)
            collated, real = [], data.collate
            data.collate = lambda *given, real=real, seen=collated: seen.append(1) or real(*given)
            made = []
            for number in range(4):
                waits.take()
                lot, before = micro.lot(source, number), len(collated)
                sums = micro.accumulate(step, optimizer, lot, teacher, None)
                made.append(len(collated) - before)
                norm = accelerator.clip_grad_norm_(step.parameters(), 1.0)
                micro.look_ahead(source, number + 1)
                seen = StepFound(torch.cat([sums, torch.zeros_like(sums[:1])]), norm, None, lot.tokens)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                waits.take()
                if number == 1:  # stop here, and go on from the file
                    state = folder / f"{optimizer_name}-{where.type}"
                    save_state(state, 2, step, optimizer, {})
                    with torch.no_grad():
                        for p in step.parameters():
                            p.zero_()
                    for fused in (True, False):  # as the kernel of a real device is, and as it is here
                        optimizer.state.clear()
                        for group in optimizer.param_groups:
                            group["fused"] = fused if optimizer_name == "adamw" else None
                        load_state(state / "state-0000002", step, optimizer)
                        counters = [
                            held["step"].device for held in optimizer.state.values() if "step" in held
                        ]
                        if where == GPU and counters:
                            FOUND.setdefault("step counters", {})[str(fused)] = sorted(
                                set(map(str, counters))
                            )
            FOUND.setdefault("batches made within a step", {})[where.type] = made
            last = dict(waits.last)
            ends[where] = {n: p.detach() for n, p in step.named_parameters()} | {
                "means": torch.tensor(seen.means)
            }
            waits.last = last
        note(f"optimizer steps {optimizer_name}", waits, far(ends[CPU], ends[GPU]), micro_batches=4)


def balancer(waits) -> None:
    biases = {}
    for where in (CPU, GPU):
        torch.manual_seed(0)
        model = mla()
        if where == GPU:
            there(model)
        balance = ExpertBiasBalancer(model.train())
        ids = torch.arange(3, 23).view(2, 10).to(where, non_blocking=True)
        balance.mask = torch.ones_like(ids)
        waits.take()
        model(ids, use_cache=False)
        balance.update(0.01)
        waits.take()
        biases[where] = {str(i): r.bias for i, r in enumerate(balance.routers)}
    assert all(float(host(b).abs().max()) > 0 for b in biases[CPU].values())
    note("expert bias", waits, far(biases[CPU], biases[GPU]))


def refuses_to_mix(waits) -> None:
    """The helper itself: two devices do not meet unseen, and what waits is counted."""
    there = OnDevice(torch.arange(4.0))
    try:
        there + torch.arange(4.0)
        mixed = "went through"
    except RuntimeError as error:
        mixed = str(error)
    waits.take()
    _ = float(there.sum()), there[there > 1], there.tolist(), there.cpu(), torch.ones(3).to(GPU)
    waits.take()
    note("the helper", waits, 0.0, mixed=mixed)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: every collection would look at all of it
    gc.enable()
    with pretend() as waits:
        for check in (refuses_to_mix, objectives, decoding, scoring, routing, balancer):
            check(waits)
        memory()
        optimizer_steps(waits, folder)
    (folder / "found.json").write_text(json.dumps(FOUND, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
