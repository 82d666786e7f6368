"""The benchmark of decoding on a model of one's own: every method makes the same tokens, and the floor is a floor."""

import torch
from decoding import REAL_LENGTHS, counting, floor_seconds, real_speed, real_workload


def test_every_method_runs_on_a_small_model(hub):
    threads = torch.get_num_threads()
    try:
        found = real_speed(hub["llama"], "fp32", prompts=16, rounds=1)
    finally:
        torch.set_num_threads(threads)
    (methods,) = found["results"].values()
    assert set(methods) >= {"model.generate, batches of 32", "generate_batch", "distill, 32 slots"}
    assert all(m["tokens_per_second"] > 0 for m in methods.values()) and found["floor_seconds"] > 0
    low, high = REAL_LENGTHS
    assert low <= found["answer_tokens"]["shortest"] <= found["answer_tokens"]["longest"] <= high


def test_prompts_say_how_long_their_answers_are(hub):
    prompts, lengths, first, end = real_workload(hub["llama"], 8)
    assert all(first <= p[-1] == first + n - 1 and max(p[:-1]) < first for p, n in zip(prompts, lengths))
    hook, made = counting(first, end), []
    token = torch.tensor([[prompts[0][-1]]])
    for _ in range(lengths[0]):
        output = type("Output", (), {"logits": torch.zeros(1, 1, first + 300)})()
        token = hook(None, None, {"input_ids": token}, output).logits[:, -1].argmax(-1, keepdim=True)
        made.append(int(token))
    assert made[-1] == end and end not in made[:-1]


def test_the_floor_grows_with_the_tokens(hub):
    from distill.models.load import load_model

    model = load_model(hub["llama"], "fp32")
    assert 0 < floor_seconds(model, 100, 100) < 5 * floor_seconds(model, 10_000, 10_000)
