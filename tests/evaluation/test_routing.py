"""Decisions token by token: aligned with their rows, equal to decoding, whole on disk, comparable over checkpoints."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import CHATML, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config.evaluation import Evaluate
from distill.errors import RunError, UserError
from distill.evaluation import routing as module
from distill.evaluation.answers import thinking_tokens
from distill.evaluation.routes import read_routes, spread, token_pieces, write_routes
from distill.evaluation.routing import (
    CLASSES,
    add_saturation,
    comparable,
    finished,
    route_rows,
    routing_report,
    routing_section,
    saturation,
    saturation_between,
    token_classes,
)
from distill.models.decode import Sampling, decode
from distill.models.routers import find_routers
from distill.moe.recording import Decisions, record_routing
from distill.report.drawing import layer_labels

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"head_dim": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 6}
SIZES |= {"num_experts_per_tok": 2, "vocab_size": 300, "bos_token_id": None, "eos_token_id": None}


def make(family: str = "qwen3_moe", seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes})).eval()
    for router in find_routers(model):
        router.router.weight.data.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_tokenizer(CHATML)
    found.pad_token = found.eos_token
    return found


def ragged(count: int = 11, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = np.random.default_rng(seed)
    return [
        tuple(generator.integers(2, 250, generator.integers(1, 9)).tolist() for _ in range(2))
        for _ in range(count)
    ]


@pytest.fixture
def answers(tokenizer) -> tuple[list[dict], list[dict]]:
    """(problems, rows as an evaluation leaves them): two families, two levels, thinking, a cut-off, a failure."""
    problems, rows = [], []
    for i in range(24):
        family, level = ("add", "sort")[i % 2], ("easy", "hard")[i // 12]
        problem = {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"{family} {i * 7}?"}]}
        text = f"<think>{'+' if i % 2 else 'zz'}{i}</think>{i}"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        problems.append(problem)
        rows.append(
            {"prompt_id": f"p{i}", "family": family, "level": level, "completion_ids": ids, "error": None}
            | {"verdict": "correct" if i % 3 else "wrong"}
        )
    rows[3] |= {"completion_ids": rows[3]["completion_ids"][:9], "verdict": "truncated"}
    rows[5] |= {"completion_ids": [], "verdict": "error", "error": "non-finite logits"}
    for row in rows:
        text = tokenizer.decode(row["completion_ids"])
        row["thinking_tokens"] = thinking_tokens(tokenizer, [], row["completion_ids"], text)
    return problems, rows


# ------------------------------------------------------------------------------------- rows and tokens


@pytest.mark.parametrize("limit", [16384, 40])  # tokens of one pass: all rows in one, or a few in each
def test_every_fed_token_once_with_the_decisions_it_has_alone(model, monkeypatch, limit):
    monkeypatch.setattr(module, "BATCH_TOKENS", limit)
    rows, seen = ragged(), {}
    for batch in route_rows(model, rows, pad_id=0, batch_size=6):
        assert len(set(batch.answer.tolist())) <= 6
        for n, key in enumerate(zip(batch.answer.tolist(), batch.position.tolist())):
            assert key not in seen
            seen[key] = (
                int(batch.token_ids[n]),
                {name: (d.indices[n], d.weights[n]) for name, d in batch.layers.items()},
            )
    for row, (prompt, completion) in enumerate(rows):
        fed = [*prompt, *completion][:-1]
        with torch.no_grad(), record_routing(model) as alone:
            model(input_ids=torch.tensor([fed]))
        for position, token in enumerate(fed):
            found, layers = seen.pop((row, position))
            assert found == token
            for name, record in alone.layers.items():
                indices, weights = layers[name]
                assert weights.tolist() == sorted(weights.tolist(), reverse=True)
                assert set(indices.tolist()) == set(record.indices[position].tolist())
                torch.testing.assert_close(weights, record.weights[position].sort(descending=True).values)
    assert not seen


def test_teacher_forced_counts_are_those_of_decoding(model):
    prompts = [prompt for prompt, _ in ragged()]
    with record_routing(model, keep="counts") as decoding:
        found = decode(model, prompts, Sampling(max_new_tokens=9), eos_ids={5, 9, 33}, pad_id=0, batch_size=4)
    *_, last = route_rows(model, [(p, c.ids) for p, c in zip(prompts, found)], pad_id=0)
    for name, record in last.recording.layers.items():
        assert torch.equal(record.counts, decoding.layers[name].counts)
        assert record.tokens == sum(len(p) + len(c.ids) - 1 for p, c in zip(prompts, found))


def test_rows_without_tokens_and_dense_models_are_refused(model, hub):
    with pytest.raises(UserError, match="leave failed answers out"):
        next(route_rows(model, [([1], [])], pad_id=0))
    dense = make("qwen3")
    with pytest.raises(UserError, match="dense model"):
        next(route_rows(dense, [([1], [2, 3])], pad_id=0))


def test_a_layer_that_sees_other_tokens_is_an_error(model):
    class Blind(torch.nn.Module):  # the mask does not say what is padding: nothing can be aligned
        def __init__(self):
            super().__init__()
            self.model = model

        def get_base_model(self):
            return model

        def forward(self, input_ids, attention_mask, use_cache, **_):
            return model(input_ids=input_ids, use_cache=False)

    with pytest.raises(RunError, match=r"model\.layers\.0\.mlp routed 8 of 5 tokens"):
        next(route_rows(Blind(), [([1, 2], [3, 4, 5]), ([1], [3])], pad_id=0))


def test_heaviest_first_moves_experts_with_their_weights():
    found = module._heaviest_first(Decisions(torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[7, 1, 4]])))
    assert found.indices.tolist() == [[1, 4, 7]] and found.weights[0].tolist() == pytest.approx(
        [0.5, 0.3, 0.2]
    )


def test_rare_token_ids_are_of_no_group(model, tokenizer, answers):
    from collections import Counter

    from distill.evaluation.routing import _Labels, token_pairs

    problems, rows = answers
    kept = finished(rows, 99)
    pairs = token_pairs(tokenizer, kept, problems)
    labels, seen = _Labels(tokenizer, kept, pairs), Counter(i for p, c in pairs for i in (p + c)[:-1])
    assert min(seen.values()) < 10 <= max(seen.values())
    for batch in route_rows(model, pairs, pad_id=0):
        for place, token in zip(labels.of(batch)["token"].tolist(), batch.token_ids.tolist()):
            assert (place == -1) == (seen[token] < 10) and (
                place == -1 or labels.groups["token"][place] == token
            )


def test_token_classes_by_hand():
    named = [[CLASSES[i] for i in token_classes(2, 5, thinking)] for thinking in (3, 0, 5)]
    assert named[0] == ["prompt"] * 2 + ["thinking"] * 3 + ["answer"]  # the fifth is never fed
    assert named[1] == ["prompt"] * 2 + ["answer"] * 4
    assert named[2] == ["prompt"] * 2 + ["thinking"] * 4


# ------------------------------------------------------------------------------------- the report


def test_report_counts_groups_as_a_loop_over_tokens_does(model, tokenizer, answers):
    problems, rows = answers
    found = json.loads(json.dumps(routing_report(model, tokenizer, rows, problems, limit=100)))
    assert (found["answers"], found["answers_total"]) == (23, 24)
    reached, members = {}, {}
    for problem, row in zip(problems, rows):
        if row["error"]:
            continue
        prompt = tokenizer.apply_chat_template(
            problem["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        ids = [*prompt, *row["completion_ids"]][:-1]
        text, thinking = "", True
        with torch.no_grad(), record_routing(model) as alone:
            model(input_ids=torch.tensor([ids]))
        chosen = alone.layers["model.layers.1.mlp"].indices
        for t, token in enumerate(ids):
            kind = "prompt" if t < len(prompt) else "thinking" if thinking else "answer"
            if t >= len(prompt):
                text += tokenizer.decode([token])
                thinking = not text.endswith("</think>") and thinking
            for label in (
                ("family", row["family"]),
                ("level", row["level"]),
                ("token_class", kind),
                ("token", token),
            ):
                members[label] = members.get(label, 0) + 1
                for e in chosen[t].tolist():
                    reached[*label, e] = reached.get((*label, e), 0) + 1
    layer = found["layers"]["model.layers.1.mlp"]
    assert layer["tokens"] == found["tokens"] == sum(n for (kind, _), n in members.items() if kind == "level")
    for kind in ("family", "level", "token_class"):
        table = layer["specialisation"][kind]
        assert table["baseline"] == pytest.approx(2 / 6)
        for group, tokens, shares in zip(table["groups"], table["tokens"], table["share"]):
            assert tokens == members[kind, group]
            assert shares == pytest.approx(
                [reached.get((kind, group, e), 0) / tokens for e in range(6)], abs=1e-4
            )
    assert layer["specialisation"]["token"]
    for entry in layer["specialisation"]["token"]:
        n = members["token", entry["id"]]
        assert entry["n"] == n >= 10 and entry["token"] == tokenizer.decode([entry["id"]])
        assert entry["share"] == pytest.approx(reached["token", entry["id"], entry["expert"]] / n)
        assert entry["share"] > 2 / 6
    assert found["model"]["routed_layers"] == 2 and "strongest" in layer["coactivation"]


def test_limit_takes_answers_evenly_and_failures_never(answers):
    _, rows = answers
    assert [row["prompt_id"] for row in finished(rows, 3)] == ["p0", "p12", "p23"]
    assert len(finished(rows, 100)) == 23 and finished([rows[5]], 9) == []


def test_nothing_to_route_and_an_undecidable_router_are_said_not_raised(tokenizer, answers):
    problems, rows = answers
    nothing = routing_section(make(), tokenizer, [rows[5]], problems, Evaluate())
    assert nothing["layers"] == {} and "no answer" in nothing["error"]
    flat = make()
    for router in find_routers(flat):
        router.router.weight.data.zero_()
    found = routing_report(flat, tokenizer, rows, problems, 100)
    layer = found["layers"]["model.layers.0.mlp"]
    assert layer["score_function"] is layer["router_entropy"] is None and "cannot tell" in layer["undecided"]
    assert layer["max_violation"] == pytest.approx(2.0) and found["model"]["confidence"] is None


def test_a_layer_passed_twice_has_a_record_for_each_time(tokenizer, answers, tmp_path):
    problems, rows = answers
    looped = make()
    looped.model.layers.append(looped.model.layers[1])
    looped.config.num_hidden_layers = 3
    names = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp pass 2"]
    found = routing_section(looped, tokenizer, rows, problems, Evaluate(), tmp_path / "looped.parquet")
    assert list(found["layers"]) == names == read_routes(tmp_path / "looped.parquet").layers
    assert {layer["tokens"] for layer in found["layers"].values()} == {found["tokens"]}
    assert found["layers"][names[1]]["load"] != found["layers"][names[2]]["load"]
    assert layer_labels(names) == ["layer 0", "layer 1", "layer 1 pass 2"]
    same = saturation_between(looped, looped, ragged(), 0)
    assert list(same["layers"]) == names and same["overlap"] == 1


# ------------------------------------------------------------------------------------- on disk


def test_routes_hold_every_decision_of_a_spread_of_answers(model, tokenizer, answers, tmp_path):
    problems, rows = answers
    path = tmp_path / "routes" / "tiny.parquet"
    routing_section(model, tokenizer, rows, problems, Evaluate(routes=8), routes=path)
    assert [p.name for p in path.parent.iterdir()] == ["tiny.parquet"]
    found = read_routes(path)
    assert found.layers == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (found.num_experts, found.experts_per_token, found.null_experts) == ([6, 6], [2, 2], [0, 0])
    assert {(r.family, r.level, r.verdict == "correct") for r in found.rows} == {
        (f, l, right) for f in ("add", "sort") for l in ("easy", "hard") for right in (True, False)
    }
    by_id = {row["prompt_id"]: row for row in rows}
    for row in found.rows:
        with torch.no_grad(), record_routing(model) as alone:
            model(input_ids=torch.tensor([row.token_ids]))
        assert row.experts.dtype == np.uint8 and row.weights.dtype == np.float16
        for layer, record in enumerate(alone.layers.values()):
            weights, order = record.weights.sort(dim=-1, descending=True, stable=True)
            assert (row.experts[layer] == record.indices.gather(1, order).numpy()).all()
            np.testing.assert_allclose(row.weights[layer], weights.numpy(), atol=1e-3)
        text = "".join(row.tokens)
        assert text == tokenizer.decode(row.token_ids) and len(row.tokens) == len(row.token_ids) == len(
            row.classes
        )
        answer = "".join(t for t, c in zip(row.tokens, row.classes) if c == "answer")
        assert answer in (row.prompt_id[1:], "") and by_id[row.prompt_id]["verdict"] == row.verdict
        assert "".join(t for t, c in zip(row.tokens, row.classes) if c == "thinking").startswith("<thi")


def test_wide_and_uneven_layers(tmp_path, tokenizer):
    from types import SimpleNamespace

    routers = [
        SimpleNamespace(name="a", num_experts=300, top_k=3, null_experts=0),
        SimpleNamespace(name="b", num_experts=16, top_k=1, null_experts=2),
    ]
    layers = {
        "a": Decisions(torch.tensor([[3.0, 2, 1]]), torch.tensor([[299, 255, 0]])),
        "b": Decisions(torch.tensor([[0.5]]), torch.tensor([[15]])),
    }
    row = {"prompt_id": "p", "family": None, "level": "easy", "verdict": "wrong"}
    row |= {"token_ids": [40], "classes": ["prompt"]}
    write_routes(tmp_path, "wide", tokenizer, [row], [layers], routers)
    found = read_routes(tmp_path / "wide.parquet")
    assert found.rows[0].experts.tolist() == [[[299, 255, 0]], [[15, 65535, 65535]]]
    assert found.rows[0].weights.tolist() == [[[3, 2, 1]], [[0.5, 0, 0]]] and found.null_experts == [0, 2]
    with pytest.raises(RunError, match="1 decisions for the 2 tokens of p"):
        write_routes(tmp_path, "w", tokenizer, [{**row, "token_ids": [40, 41]}], [layers], routers)
    (tmp_path / "wide.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(UserError, match="is damaged"):
        read_routes(tmp_path / "wide.parquet")
    with pytest.raises(UserError, match="is missing"):
        read_routes(tmp_path / "other.parquet")


@pytest.mark.parametrize("text", ["héllo 漢字 🙂!", "  two  spaces\n", "<|im_start|>x<|im_end|>"])
def test_pieces_join_to_the_text_and_split_characters_appear_once(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    cut = token_pieces(tokenizer, tokenizer("漢")["input_ids"][:2])
    assert len(cut) == 2 and cut[0] == "" and "\ufffd" in cut[1]


def test_spread_takes_turns_and_keeps_what_there_is():
    rows = [
        {"family": f, "level": "easy", "verdict": v} for f, v in 9 * [("a", "wrong")] + [("b", "correct")]
    ]
    assert spread(rows, 3) == [0, 9, 1] and spread(rows, 99)[-1] == 8 and spread([], 5) == []


# ------------------------------------------------------------------------------------- two checkpoints


def nudged(model, amount: float):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data.add_(amount * torch.randn_like(parameter))
    return other


def test_saturation_by_hand_and_between_models(model):
    weights = torch.ones(3, 2)
    a = {"x": Decisions(weights, torch.tensor([[0, 1], [2, 3], [4, 5]]))}
    b = {"x": Decisions(weights, torch.tensor([[0, 1], [3, 2], [1, 5]]))}
    assert saturation(a, b)["x"] == pytest.approx({"overlap": (1 + 1 + 0.5) / 3, "top1": 1 / 3})
    with pytest.raises(ValueError, match="different routed layers"):
        saturation(a, {"y": b["x"]})

    rows = ragged(40)
    same, near, far = (
        saturation_between(model, other, rows, 0) for other in (model, nudged(model, 0.01), make(seed=9))
    )
    assert same["overlap"] == same["top1"] == 1 and same["uniform"] == pytest.approx(1 / 3)
    assert 1 > near["overlap"] > far["overlap"] and far["overlap"] == pytest.approx(1 / 3, abs=0.12)
    assert same["tokens"] == sum(len(p) + len(c) - 1 for p, c in rows)
    with pytest.raises(UserError, match="other layers or experts"):
        saturation_between(model, make(num_experts=8), rows, 0)


def test_saturation_of_a_long_pass_is_the_mean_over_tokens(model):
    """Batches of unlike sizes: compared with all tokens at once."""
    other, rows = nudged(model, 0.05), ragged(30, seed=2)
    whole = [next(route_rows(m, rows, 0, batch_size=99)) for m in (model, other)]
    at_once = saturation(whole[0].layers, whole[1].layers)
    found = saturation_between(model, other, rows, 0, batch_size=7)
    for name, layer in found["layers"].items():
        assert layer == pytest.approx(at_once[name])


def test_comparable_checkpoints_and_where_saturation_goes(model, tokenizer, answers):
    problems, rows = answers
    shape = dict.fromkeys(("architecture", "layers", "hidden_size", "vocab_size"), 1) | {
        "experts_per_token": 2
    }
    results = {
        name: {"model": {**shape, "experts": experts}, **({"moe": {"layers": {}}} if experts else {})}
        for name, experts in (("base", 6), ("dense", 0), ("other", 8), ("student", 6), ("teacher", 6))
    }
    assert comparable(results, teacher="teacher") == [("student", ["base"])]
    assert comparable(results) == [("teacher", ["base", "student"])]
    loaded = []

    def load(name: str):
        loaded.append(name)
        return (model if name == "student" else nudged(model, 0.01)), tokenizer

    add_saturation(results, dict.fromkeys(results, rows), problems, load, teacher="teacher")
    assert loaded == ["student", "base"]
    found = results["base"]["moe"]["saturation"]["student"]
    assert 0.5 < found["overlap"] < 1 and list(found["layers"]) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert all(
        "saturation" not in results[n].get("moe", {}) for n in ("dense", "other", "student", "teacher")
    )


def test_evaluating_two_checkpoints_of_one_model_leaves_all_of_it(hub, tmp_path):
    from distill.evaluation.evaluate import evaluate_checkpoints
    from distill.models.load import load_model, load_tokenizer
    from distill.storage import read_json

    earlier = tmp_path / "earlier"
    nudged(load_model(hub["qwen3_moe"], "fp32"), 0.02).save_pretrained(earlier)
    load_tokenizer(hub["qwen3_moe"]).save_pretrained(earlier)
    section = Evaluate(levels={"easy": 7}, max_new_tokens=6, speed=False)
    checkpoints = {"earlier": str(earlier), "last": hub["qwen3_moe"]}
    manifest = evaluate_checkpoints(checkpoints, None, tmp_path / "out", section, [])
    models = read_json(tmp_path / "out" / "metrics.json")["models"]
    assert "saturation" not in models["last"]["moe"]
    found = models["earlier"]["moe"]
    assert 0.5 < found["saturation"]["last"]["overlap"] < 1
    assert found["answers"] == 7 and found["model"]["routed_layers"] == 2
    for name in checkpoints:
        assert len(read_routes(tmp_path / "out" / "routes" / f"{name}.parquet").rows) == 7
        assert f"routes/{name}.parquet" in manifest["files"]
