"""Sums kept while tokens pass: each forward pass apart, NaN named, and two processes equal to one."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from warm import Started

from distill.errors import RunError, UserError
from distill.models.routers import Router
from distill.moe import metrics
from distill.moe.recording import Recording, record_routing
from distill.moe.totals import LoadTotals

HAND = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3], [2, 3], [2, 3]])  # passes of 4 and 2 tokens


def router(experts: int = 4, k: int = 2, name: str = "layer") -> Router:
    return Router(name, torch.nn.Module(), None, None, experts, k, None)


def decisions(tokens: int, experts: int = 4, k: int = 2, seed: int = 0):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights, indices = logits.softmax(-1).topk(k)
    return logits, weights / weights.sum(-1, keepdim=True), indices


def test_every_figure_of_hand_made_routing():
    load = LoadTotals(4, 2)
    load.add(HAND, [4, 0, 2])  # the pass in between had padding only
    found = load.summary()
    assert load.counts.tolist() == [4, 2, 3, 3] and load.batches == 2 and load.tokens == 6
    assert found["max_violation"] == pytest.approx(1 / 3)  # 4 against a mean of 3
    # Pass one: 4, 2, 1, 1 of 8; pass two: 0, 0, 2, 2 of 4.
    assert found["max_violation_batch_mean"] == found["max_violation_batch_max"] == 1.0
    floors = [metrics.max_violation_noise_floor(n, 4, 2) for n in (4, 2)]
    assert found["max_violation_batch_noise_floor"] == pytest.approx(sum(floors) / 2)
    assert found["dead_experts"] == 0
    # Capacity 3 for all twelve assignments: one too many at expert 0. Per pass 2 and 1: two and two.
    assert found["token_drop"]["1.0"] == pytest.approx(1 / 12)
    assert found["token_drop_batch"]["1.0"] == pytest.approx((2 + 2) / 12)
    assert found["token_drop_batch"]["1.25"] == pytest.approx(1 / 12)  # capacities 3 and 2
    assert found["token_drop_batch"]["2.0"] == 0
    expected = [[0, 0.5, 0.25, 0.25], [1, 0, 0, 0], [1 / 3, 0, 0, 2 / 3], [1 / 3, 0, 2 / 3, 0]]
    torch.testing.assert_close(
        torch.tensor(found["coactivation"]["matrix"]), torch.tensor(expected), atol=1e-4, rtol=0
    )
    assert found["coactivation"]["uniform"] == pytest.approx(1 / 3)


def test_parts_add_up_and_more_than_128_experts_keep_64_pairs():
    others = 8 + torch.rand(500, 20, generator=torch.Generator().manual_seed(0)).topk(2).indices
    indices = torch.cat([torch.tensor([[7, 190]]).expand(500, 2), others], 1)
    at_once, parts = LoadTotals(200, 4), LoadTotals(200, 4)
    at_once.add(indices, [300, 200])
    parts.add(indices[:300], [300])
    parts.add(indices[300:], [200])
    assert at_once.summary() == parts.summary()
    pairs = at_once.summary()["coactivation"]
    assert pairs["matrix"] is None and len(pairs["strongest"]) == 64
    assert {(7, 190, 1.0), (190, 7, 1.0)} <= {tuple(pair) for pair in pairs["strongest"]}


def test_one_expert_per_token_has_no_pairs():
    load = LoadTotals(3, 1)
    load.add(torch.tensor([[0], [1], [1]]), [3])
    assert load.summary()["coactivation"] == {"uniform": 0.0, "matrix": [[0.0] * 3] * 3, "strongest": []}


def test_opinion_equals_the_float64_definition_also_when_certain():
    from distill.moe.totals import SCORES, _opinion

    logits = torch.cat([torch.randn(300, 16), 30 * torch.randn(300, 16), torch.zeros(5, 16)])
    indices = logits.topk(4).indices
    for rule in ("softmax", "sigmoid", "sqrtsoftplus"):
        entropy, confidence = _opinion(SCORES[rule](logits), indices)
        scores = SCORES[rule](logits.double())
        assert float(entropy) == pytest.approx(float(metrics.router_entropy(scores).sum()), rel=1e-5)
        assert float(confidence) == pytest.approx(float(metrics.confidence(scores, indices).sum()), rel=1e-5)


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_nan_is_named_and_the_load_survives(where):
    recording = Recording([router()], keep="decisions")
    logits, weights, indices = decisions(50)
    (logits if where == "logits" else weights)[7] = math.nan
    record = recording.layers["layer"]
    record.add(logits, weights, indices, None)
    for read in (recording.summary, lambda: record.scores):
        with pytest.raises(RunError, match=r"layer: router logits or weights are NaN for 1 of 50 tokens"):
            read()
    assert record.counts.sum() == 100 and record.load_summary()["tokens"] == 50


def test_infinite_logits_that_mask_an_expert_are_not_nan():
    recording = Recording([router()], keep="counts")
    logits, *_ = decisions(50)
    logits[:, 3] = -math.inf
    weights, indices = logits.softmax(-1).topk(2)
    recording.layers["layer"].add(logits, weights, indices, None)
    assert recording.summary()["layers"]["layer"]["score_function"] == "softmax"


def test_what_began_in_inference_mode_goes_on_outside():
    with torch.inference_mode():
        recording = Recording([router()], keep="counts")
        recording.layers["layer"].add(*decisions(20), None)
        recording.layers["layer"].flush()
    recording.layers["layer"].add(*decisions(20, seed=1), None)
    assert recording.layers["layer"].tokens == 40


def test_take_gives_each_part_once_and_totals_stay():
    recording = Recording([router()], keep="decisions")
    record = recording.layers["layer"]
    first, second = decisions(5), decisions(7, seed=1)
    record.add(*first, None)
    assert torch.equal(record.take().indices, first[2])
    record.add(*second, None)
    taken = record.take()
    assert torch.equal(taken.indices, second[2]) and torch.equal(taken.weights, second[1])
    assert len(record.take().indices) == 0 and record.tokens == 12


WORKER = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tests/moe")
from test_totals import decisions, mixtral, router, text
from distill.moe.recording import Recording, record_routing
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def total(tensor):
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor
recording = Recording([router(), router(6, 3, "other")], keep="counts")
for seed in ([0, 1], [2])[rank]:
    recording.layers["layer"].add(*decisions(40 + 30 * seed, seed=seed), None)
    recording.layers["other"].add(*decisions(20, 6, 3, seed=seed), None)
recording.reduce(total)
parallel = torch.nn.parallel.DistributedDataParallel(mixtral())
with record_routing(parallel, keep="counts") as wrapped:
    for part in text(rank):
        parallel(input_ids=part, use_cache=False).logits.sum().backward()
wrapped.reduce(total)
(folder / f"{rank}.json").write_text(json.dumps([recording.summary(), wrapped.summary()]))
"""


def mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(0, 1)
    return model


def text(rank: int) -> list[torch.Tensor]:
    """The batches of one process."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(32, (2, 5 + 4 * rank), generator=generator) for _ in range(2)]


def test_two_processes_equal_one(tmp_path):
    """Ragged shares, one process with twice the passes: every ratio is that of all tokens in one process.

    The second recording is of a model that trains under DistributedDataParallel.
    """
    (tmp_path / "worker.py").write_text(WORKER)
    started = [Started([rank, tmp_path], tmp_path / "worker.py") for rank in range(2)]
    assert [process.wait(120) for process in started] == [0, 0], started[0].errors
    alone = Recording([router(), router(6, 3, "other")], keep="counts")
    for seed in range(3):
        for record, call in zip(
            alone.layers.values(), (decisions(40 + 30 * seed, seed=seed), decisions(20, 6, 3, seed=seed))
        ):
            record.add(*call, None)
            record.flush()
    model = mixtral()
    with torch.no_grad(), record_routing(model, keep="counts") as unwrapped:
        for part in text(0) + text(1):
            model(input_ids=part, use_cache=False)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    pairs = [
        (layer, found["layers"][name])
        for found, expected in zip(both[0], (alone.summary(), unwrapped.summary()), strict=True)
        for name, layer in expected["layers"].items()
    ]
    assert len(pairs) == 4
    for layer, got in pairs:
        nested = {"coactivation", "token_drop", "token_drop_batch"}
        assert {k: got[k] for k in nested} == {k: layer[k] for k in nested}
        plain = layer.keys() - nested - {"score_function", "load"}
        assert {k: got[k] for k in plain} == pytest.approx({k: layer[k] for k in plain}, rel=1e-6)
        assert got["load"] == layer["load"] and got["score_function"] == "softmax"


def test_reduce_alone_changes_nothing_and_twice_is_refused():
    recording = Recording([router()], keep="counts")
    recording.layers["layer"].add(*decisions(50), None)
    before = recording.summary()
    recording.reduce(lambda tensor: tensor)
    assert recording.summary() == before
    with pytest.raises(UserError, match="reduce a recording once"):
        recording.reduce(lambda tensor: tensor)


def test_a_candidate_ruled_out_in_one_process_is_out():
    """Process two cannot tell (equal logits fit every function); process one can, and decides for both."""
    sure, unsure = (Recording([router()], keep="counts").layers["layer"] for _ in range(2))
    sure.add(*decisions(50), None)
    unsure.add(torch.zeros(9, 4), torch.full((9, 2), 0.5), torch.tensor([[0, 1]] * 9), None)
    with pytest.raises(RunError, match="cannot tell"):
        _ = unsure.score_function
    sent = []
    sure.reduce(lambda tensor: sent.append(tensor) or tensor, 0, 2)
    queue = iter(sent)
    unsure.reduce(lambda tensor: tensor + next(queue), 1, 2)
    assert unsure.score_function == "softmax" and unsure.tokens == 59
