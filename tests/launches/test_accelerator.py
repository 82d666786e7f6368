"""A pretend accelerator (tests/fakegpu.py) runs everything that touches a device, and counts how often the host waits.

Waits are what a GPU costs that nobody sees on a CPU. One a training step, one a decoding step (its end check), and a
few a batch where results go to disk.
"""

import json
import os
import subprocess

import pytest
from conftest import PYTHON, ROOT

OBJECTIVES = (
    "cross_entropy", "forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl",
    "adaptive_kl", "total_variation", "alpha_beta_divergence", "ranking_hinge", "ranking_logistic",
    "top_reverse_kl", "sampled_reverse_kl", "multi_token tokens", "multi_token model",
    "sparse_forward_kl renormalise", "sparse_forward_kl tail_bucket", "sparse_forward_kl zero",
    "sampled_cross_entropy", "hidden_cosine", "hidden_mse", "router_distillation", "sequence_balance",
    "batch_balance", "several teachers", "stored states", "own head with a soft cap", "packed rows", "uld",
    "uld with packed rows",
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerator")
    # No fork: torch takes a new kind of device only where nothing has asked for its operators yet.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    # Without a search for garbage among what is imported, as in conftest.py.
    start = (
        "import gc; gc.disable(); import fakegpu_worker as worker, sys; worker.main(worker.Path(sys.argv[1]))"
    )
    command = [PYTHON, "-c", start, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_the_helper_counts_and_refuses(found):
    """Five kinds of waits are tried on purpose, and a CPU tensor beside one of the device is an error."""
    assert found["the helper"]["waits"] == 5, found["the helper"]["where"]
    assert "same device" in found["the helper"]["mixed"]


def test_every_objective_is_right_and_never_waits(found):
    from distill.config.section import OBJECTIVES as KNOWN

    assert {name.split()[0] for name in OBJECTIVES} >= KNOWN.keys()
    for name in OBJECTIVES:
        assert found[name]["difference"] < 2e-5, name
        assert found[name]["waits"] == 0, (name, found[name]["where"])


def test_a_loss_takes_the_memory_that_its_module_says(found):
    """Float32 tensors of a piece, beside chunks of logits: what does not grow with the chunk."""
    most = dict.fromkeys(found["memory"], 13.4)
    most |= {"forward_kl": 5.2, "reverse_kl": 5.2, "generalized_jsd": 7.2, "cross_entropy": 3.2}
    # One tensor more: when Python frees the last of them is chance.
    assert all(2 < found["memory"][name] <= most[name] + 1 for name in most), found["memory"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizer_step_waits_once(found, optimizer):
    """Four micro-batches, a teacher, batch_balance, clipping; resumed from a file in the middle."""
    step = found[f"optimizer steps {optimizer}"]
    # Adam's first steps have the size of the rate, 0.01, whatever the gradient: roundings of attention show.
    assert step["difference"] < (1e-4 if optimizer == "adamw" else 2e-5)
    assert step["waits"] == 1 and "train.py" in next(iter(step["where"])), step["where"]


def test_the_first_micro_batch_of_a_step_is_made_before_the_wait_of_the_last(found):
    """On a device, that is; four micro-batches, which batch_balance reads twice: once to count, once to train."""
    made = found["batches made within a step"]
    assert made == {"cpu": [8, 8, 8, 8], "gpu": [8, 6, 6, 6]}


def test_the_step_counter_comes_back_to_where_the_update_reads_it(found):
    """The fused update is one kernel, which refuses a counter on the CPU; the plain one reads it on the host."""
    assert found["step counters"] == {"True": ["gpu:0"], "False": ["cpu"]}


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_a_decoding_step_waits_for_its_end_check_alone(found, how):
    decoded = found[f"decode {how}"]
    assert decoded["difference"] == 0
    assert decoded["waits"] <= decoded["steps"] + 12, decoded["where"]


def test_routing_is_recorded_without_waiting_for_it(found):
    """The sums are made once at the end; the version before looked three times a layer and step."""
    routed = found["routing while decoding"]
    assert routed["difference"] == 0
    assert routed["waits"] <= routed["steps"] + 12 + 20 * routed["layers"], routed["where"]


@pytest.mark.parametrize("kind, a_batch", [("none", 2), ("top_k", 4), ("sampled", 3), ("hidden", 3)])
def test_scores_go_to_the_host_once_a_batch(found, kind, a_batch):
    scored = found[f"score {kind}"]
    assert scored["difference"] < 1e-5 and scored["waits"] <= a_batch * scored["batches"], scored["where"]


@pytest.mark.parametrize(
    "name", ["top-k 1", "drop an expert", "random routing", "uniform routing", "shuffled routing"]
)
def test_interventions_are_those_of_the_cpu(found, name):
    changed = found[f"intervention {name}"]
    assert changed["difference"] < 1e-6 and changed["waits"] <= 2, changed["where"]


def test_the_expert_bias_is_counted_without_waiting(found):
    assert found["expert bias"]["difference"] < 1e-7
    assert not any("balance.py" in place for place in found["expert bias"]["where"])
