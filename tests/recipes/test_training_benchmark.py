"""The training-speed benchmark: agreement before ratios, the arithmetic of both, and real workers at tiny sizes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import training as train_speed
from cases import (
    DISTILLATION,
    GKD,
    HIDDEN,
    LARGE,
    LORA,
    NAIVE,
    OBJECTIVES,
    OURS,
    REAL,
    SMALL,
    STORED,
    Case,
    Method,
    Setting,
    all_cases,
    counted_work,
    floor_seconds,
    quick_cases,
)
from script import run_script
from worker import (
    distill_hidden_runner,
    distill_step_runner,
    make_workload,
    measure_loop,
    measure_rates,
    measure_step,
    naive_runner,
    stored_top_k,
)

from distill.errors import RunError, UserError

TINY = Setting("tiny", 200, 2, 16, (64, 2), (32, 1), warm_up=1, timed=2, patience=30.0)
TINY_REAL = Setting("tiny", 200, 2, 16, (64, 2), (64, 1), 1, 2, 30.0, attention=(2, 1, 32, 100))
FAST = dict.fromkeys(counted_work(TINY), 1e9)


def measured(seconds, cpu=None, loss=2.0, norm=1.0, system=0.0, later=1.9):
    cpu = cpu or seconds
    return {
        "seconds": seconds, "cpu_seconds": cpu, "user_seconds": sum(cpu) - system, "system_seconds": system,
        "page_faults": 10, "losses": [loss, later], "gradient_norms": [norm], "memory_peak": 10**9,
        "memory_after_imports": 10**8, "versions": {"torch": "2"},
    }  # fmt: skip


def compared(**found):
    """Rows of one group from {name: one or more measurements}."""
    methods = {"naive": NAIVE, "ours": OURS, "stored": STORED, "lora": LORA, "trl": DISTILLATION, "gkd": GKD}
    runs = {
        Case(TINY, methods[name], "forward_kl"): value if isinstance(value, list) else [value]
        for name, value in found.items()
    }
    (group,) = train_speed.compare(runs, {"tiny": FAST})
    return group, {name: group["methods"].get(methods[name].name) for name in found}


class TestRatios:
    def test_medians_over_all_steps_of_all_rounds(self):
        ours = [measured([1.0, 9.0]), measured([2.0])]
        group, rows = compared(naive=measured([3.0]), ours=ours, trl=measured([8.0, 5.0, 6.0]))
        row = rows["ours"]
        assert (row["step_seconds"], row["step_seconds_spread"], row["timed_steps"]) == (2.0, [1.0, 9.0], 3)
        assert row["tokens_per_second"] == 2 * 16 / 2.0
        assert row["times_faster_than"] == {DISTILLATION.name: 3.0}
        assert rows["trl"]["times_faster_than"] == {DISTILLATION.name: 1.0}
        assert rows["naive"]["times_faster_than"] == {DISTILLATION.name: 2.0}
        assert group["clock"] == "step_seconds"

    def test_a_shared_core_is_seen_and_ratios_are_of_cpu_seconds(self):
        group, rows = compared(ours=measured([9.0], cpu=[1.0]), trl=measured([5.0], cpu=[4.5]))
        assert group["clock"] == "step_cpu_seconds"
        assert rows["ours"]["times_faster_than"] == {DISTILLATION.name: 4.5}

    @pytest.mark.parametrize(
        "wrong", [{"loss": 2.1}, {"norm": 1.2}, {"loss": float("nan")}, {"later": 1.903}]
    )
    def test_other_arithmetic_gets_no_ratio(self, wrong):
        _, rows = compared(naive=measured([3.0]), ours=measured([2.0]), trl=measured([1.0], **wrong))
        assert rows["trl"]["agrees"] is False and rows["ours"]["agrees"] is True
        assert rows["ours"]["times_faster_than"] == {} == rows["trl"]["times_faster_than"]
        _, rows = compared(naive=measured([3.0]), ours=measured([1.0], **wrong), trl=measured([2.0]))
        assert rows["ours"]["times_faster_than"] == {}

    def test_stored_signals_and_lora_are_held_to_what_they_share(self):
        _, rows = compared(
            naive=measured([3.0]), stored=measured([1.0], loss=5.0, norm=7.0), lora=measured([2.0], norm=0.1),
            trl=measured([4.0]),
        )  # fmt: skip
        assert rows["stored"]["agrees"] is None and rows["stored"]["times_faster_than"] == {
            DISTILLATION.name: 4.0
        }
        assert rows["lora"]["agrees"] is True
        _, rows = compared(naive=measured([3.0]), lora=measured([2.0], loss=2.1))
        assert rows["lora"]["agrees"] is False

    def test_groups_do_not_mix(self):
        runs = {
            Case(TINY, OURS, "forward_kl"): [measured([1.0])],
            Case(TINY, OURS, "forward_kl", allocator="keeping"): [measured([1.0])],
            Case(TINY, DISTILLATION, "forward_kl", allocator="keeping"): [measured([3.0])],
        }
        first, second = train_speed.compare(runs, {"tiny": FAST})
        assert first["methods"][OURS.name]["times_faster_than"] == {}
        assert second["methods"][OURS.name]["times_faster_than"] == {DISTILLATION.name: 3.0}


class TestFloor:
    def test_heads_of_the_large_setting(self):
        """The heads by hand: N = 1,024 kept tokens, V = 151,936, widths 256 and 128, two FLOPs a product."""
        work = counted_work(LARGE)
        assert work["teacher_head"] == 2 * 1024 * 256 * 151_936
        assert work["student_head"] * 2 == work["student_head_back"] == work["teacher_head"]
        assert sum(v for k, v in work.items() if "head" in k) == pytest.approx(199e9, rel=0.01)

    def test_body_counts_what_torch_counts(self):
        """Matrix products of a forward pass by torch's own counter; its attention is counted in full, not causal."""
        from torch.utils.flop_counter import FlopCounterMode

        work = make_workload(vars(TINY), live=True, precision="fp32")
        work.teacher.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work.teacher.model(input_ids=work.ids)
        width, layers = TINY.teacher
        causal_half = 2 * layers * TINY.tokens * width * TINY.rows * TINY.tokens
        assert counter.get_total_flops() == pytest.approx(
            counted_work(TINY)["teacher_body"] + causal_half, rel=0.02
        )

    def test_each_method_its_own_work(self):
        work = counted_work(TINY)
        whole = sum(work.values()) / 1e9
        assert floor_seconds(TINY, FAST, OURS) == pytest.approx(whole)
        without = whole - (work["teacher_body"] + work["teacher_head"]) / 1e9
        assert floor_seconds(TINY, FAST, STORED) == pytest.approx(without)
        lora = whole - (work["student_head_back"] / 2 + work["student_body"] / 3) / 1e9
        assert floor_seconds(TINY, FAST, LORA) == pytest.approx(lora)


class TestPlan:
    def test_reduced_precision_only_where_it_can_gain(self):
        cases, left_out = all_cases({"fp32": 90e9, "bf16": 4e9, "medium": 91e9})
        assert {c.precision for c in cases} == {"fp32"} and len(left_out) == 2
        cases, left_out = all_cases({"fp32": 90e9, "bf16": 250e9, "medium": 240e9})
        assert {c.precision for c in cases} == {"fp32", "bf16", "medium"} and not left_out
        assert len(cases) == len(set(cases))

    def test_every_objective_meets_both_peers(self):
        cases, _ = all_cases({"fp32": 1.0, "bf16": 0.1, "medium": 1.0})
        for objective in OBJECTIVES:
            methods = {c.method for c in cases if c.setting is LARGE and c.objective == objective}
            assert {OURS, DISTILLATION, GKD} <= methods
        assert all(c.setting is SMALL for c in quick_cases())

    def test_memory_estimate_of_the_hungriest(self):
        """All logits of both models and their temporaries: tens of gigabytes, which must be asked for first."""
        assert 18e9 < Case(LARGE, GKD, "generalized_jsd").memory_needed < 26e9
        assert Case(LARGE, OURS, "forward_kl").memory_needed < 5e9


def test_objectives_agree_with_the_plain_definition():
    """The runners that need no peer, at their first step: loss and gradient of all three objectives."""
    for name, objective in OBJECTIVES.items():
        found = []
        for runner in (naive_runner, distill_step_runner):
            work = make_workload(vars(TINY), live=True, precision="fp32")
            loss = runner(work, objective, "fp32")()
            gradient = torch.cat([p.grad.flatten() for p in work.student.parameters()])
            found.append((loss, gradient))
        (expected, reference), (loss, gradient) = found
        assert expected > 0.05, name  # a loss near 0 would agree with anything
        assert loss == pytest.approx(expected, rel=1e-5), name
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_hidden_states_give_the_live_loss_and_only_the_head_of_the_teacher_stays():
    losses = []
    for runner in (distill_step_runner, distill_hidden_runner):
        work = make_workload(vars(TINY_REAL), live=True, precision="fp32")
        losses.append(runner(work, OBJECTIVES["forward_kl"], "fp32")())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and work.teacher is None
    live, stored = (floor_seconds(TINY_REAL, FAST, method) for method in (OURS, HIDDEN))
    assert live - stored == pytest.approx(counted_work(TINY_REAL)["teacher_body"] / 1e9)


def test_the_real_shape_is_that_of_the_model():
    """SmolLM2-135M: 134.5 million weights, of which the 61 norms of 576 are left out here."""
    assert REAL.parameters[0] + 61 * 576 == 134_515_008
    assert REAL.parameters[1] == 49_152 * 576 + 8 * (576 * 64 * 2 * (9 + 3) + 3 * 576 * 1536)
    work = make_workload(vars(TINY_REAL), live=True, precision="fp32")
    counted = sum(p.numel() for p in work.teacher.parameters() if p.dim() > 1)
    assert counted == TINY_REAL.parameters[0] and work.teacher.config.model_type == "llama"


def test_the_floor_of_bf16_is_at_the_rates_of_bf16():
    rates = FAST | {f"{part} bf16": 4e9 for part in FAST}
    assert floor_seconds(TINY, rates, OURS, "bf16") == pytest.approx(floor_seconds(TINY, rates, OURS) / 4)
    found = measure_rates({"setting": vars(TINY)})["rates"]
    assert ("teacher_body bf16" in found) == (found["bf16"] > found["fp32"]) and set(FAST) <= set(found)


def test_stored_signals_are_a_distribution_without_repeats():
    ids, logprobs = stored_top_k(50, 200)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert ids.min() >= 0 and ids.max() < 200
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.full((50,), 2.718281828**-0.1))


PEER = """
from worker import naive_runner

def right(work, objective, precision):
    return naive_runner(work, objective, precision)
"""
MEASURES = {"step": measure_step, "loop": measure_loop, "rates": measure_rates}


def test_workers_end_to_end_with_a_fake_peer(tmp_path, monkeypatch):
    """Ours (live, and the loop of `distill train` on stored signals), a peer of other arithmetic and one that does
    not fit, measured in this process to spare the imports; and an honest peer in a process of its own."""
    (tmp_path / "fake_peer.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(train_speed, "find_peer", lambda python: "0.0")
    started, real = [], train_speed.run_worker

    def run_worker(python, spec, allocator="glibc"):
        if spec.get("runner", "").startswith("fake_peer"):
            started.append(allocator)
            return real(python, spec, allocator)
        found = MEASURES[spec["do"]](spec)
        if spec.get("imports") == ("accelerate",):  # the one that is to be wrong
            found["gradient_norms"][0] *= 2
        return found

    monkeypatch.setattr(train_speed, "run_worker", run_worker)
    methods = (
        NAIVE,
        OURS,
        Method("peer right", "fake_peer:right", peer=True),
        Method("peer wrong", NAIVE.runner, ("accelerate",), peer=True),
        Method("peer huge", "fake_peer:right", peer=True, logits={"forward_kl": 1e12}),
    )
    cases = [Case(TINY, method, "reverse_kl", allocator="keeping") for method in methods]
    cases.append(Case(TINY, STORED, "forward_kl", do="loop"))
    found = train_speed.training_speed(cases=cases)
    json.dumps(found)

    live, loop = found["groups"]
    rows = live["methods"]
    assert started == ["keeping"]
    assert set(rows) == {NAIVE.name, OURS.name, "peer right", "peer wrong"}
    assert rows[OURS.name]["agrees"] and rows["peer right"]["agrees"] and not rows["peer wrong"]["agrees"]
    assert set(rows[OURS.name]["times_faster_than"]) == {"peer right"}
    assert rows[OURS.name]["timed_steps"] == 2
    assert rows["peer right"]["memory_peak"] >= rows["peer right"]["memory_after_imports"] > 5e7
    assert loop["methods"][STORED.name]["loop_overhead_seconds"] > -1
    assert [m["method"] for m in found["missing"]] == ["peer huge"]
    assert "are free" in found["missing"][0]["why"]
    text = train_speed.format_training_speed(found)
    assert "OTHER ARITHMETIC" in text and "are free" in text and "distill train" in text


def test_a_broken_worker_gives_its_last_line(monkeypatch):
    stderr = "Traceback\n  ...\nValueError: no such thing\n"
    done = type("Done", (), {"returncode": 1, "stdout": "", "stderr": stderr})
    monkeypatch.setattr(train_speed.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(RunError, match=r"^ValueError: no such thing$"):
        train_speed.run_worker(sys.executable, {})


def test_the_allocator_is_told_before_the_process_starts(monkeypatch):
    """What the child is given, not what the parent happens to have."""
    seen = {}

    def fake_run(command, env, **_):
        seen.update(env)
        return type("Done", (), {"returncode": 0, "stdout": 'noise\n{"a": 1}\n', "stderr": ""})

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setattr(train_speed.subprocess, "run", fake_run)
    assert train_speed.run_worker("python", {}, "keeping") == {"a": 1}
    assert seen["MALLOC_MMAP_MAX_"] == "0" and seen["OMP_NUM_THREADS"] == "1"
    assert "MALLOC_ARENA_MAX" not in seen


def test_missing_peers_are_named_with_the_line_that_installs_them(monkeypatch):
    monkeypatch.setattr(
        train_speed, "run_worker", lambda python, spec, *_: RATES if spec["do"] == "rates" else RUN
    )
    monkeypatch.setattr(train_speed, "find_peer", lambda python: None)
    found = train_speed.training_speed(quick=True)
    assert [m["method"] for m in found["missing"]] == [DISTILLATION.name, GKD.name]
    assert all("pip install --no-deps trl==" in m["why"] for m in found["missing"])
    text = train_speed.format_training_speed(found)
    assert text.count("pip install") == 2


RATES = {
    "rates": {**dict.fromkeys(counted_work(SMALL), 1e9), "fp32": 1, "bf16": 1, "medium": 1},
    "device": "cpu",
}
RUN = measured([1.0])


def test_our_own_failure_is_not_a_missing_row(monkeypatch):
    def fail(python, spec, *_):
        if spec["do"] == "rates":
            return RATES
        raise RunError("broken")

    monkeypatch.setattr(train_speed, "run_worker", fail)
    with pytest.raises(RunError, match="broken"):
        train_speed.training_speed(cases=[Case(SMALL, OURS, "forward_kl")])


def test_stopped_by_hand_it_keeps_what_was_measured(monkeypatch):
    said, answers = [], iter([RATES, RUN, RUN])

    def answer(*_):
        for found in answers:
            return found
        raise KeyboardInterrupt

    monkeypatch.setattr(train_speed, "run_worker", answer)
    cases = [Case(SMALL, OURS, name) for name in ("forward_kl", "reverse_kl", "generalized_jsd")]
    found = train_speed.training_speed(rounds=2, cases=cases, say=said.append)
    assert [g["objective"] for g in found["groups"]] == ["forward_kl", "reverse_kl"]
    assert found["left_out"] == ["stopped by hand after 2 of 18 measurements: rows and ratios are missing"]
    assert "stopped by hand" in train_speed.format_training_speed(found)
    assert "min left" not in said[0] and "about 0 min left" in said[1]
    answers = iter([RATES])
    with pytest.raises(KeyboardInterrupt):
        train_speed.training_speed(cases=cases)


def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_speed, "run_worker", lambda python, spec, *_: RATES if spec["do"] == "rates" else RUN
    )
    out = tmp_path / "speed.json"
    arguments = ["--quick", "--out", str(out), "--peer-python", sys.executable]

    def run(*words):
        code = run_script(lambda: train_speed.main(list(words)))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    code, text, _ = run(*arguments)
    assert code == 0 and "tokens/s" in text and "TRL DistillationTrainer" in text
    assert json.loads(out.read_text())["rounds"] == 1
    code, text, _ = run(*arguments, "--json")
    assert code == 0 and json.loads(text)["groups"]
    for wrong, words in (
        (("--rounds", "0"), "at least 1"),
        (("--out", str(tmp_path / "no" / "x.json")), "does not exist"),
        (("--peer-python", str(tmp_path / "python")), "give the path of a Python interpreter"),
    ):
        code, _, error = run("--quick", *wrong)
        assert code == 2 and words in error


def test_find_peer_refuses_what_is_no_interpreter(tmp_path):
    with pytest.raises(UserError, match="Python interpreter"):
        train_speed.find_peer(str(tmp_path / "nothing"))


def test_a_killed_worker_says_so(monkeypatch):
    done = type("Done", (), {"returncode": -9, "stdout": "", "stderr": ""})
    monkeypatch.setattr(train_speed.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(RunError, match="out of memory"):
        train_speed.run_worker(sys.executable, {})


def test_patience_ends_the_timing_of_slow_steps(monkeypatch):
    import worker as speed_worker

    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(speed_worker.time, "perf_counter", lambda: next(clock))
    calls = []
    found = speed_worker.time_steps(lambda: calls.append(1), warm_up=1, timed=9, patience=12.0)
    assert found["seconds"] == [5, 5, 5] and len(calls) == 4


def test_settings_reach_the_worker_whole():
    spec = Case(replace(TINY, timed=7), STORED, "forward_kl").spec
    assert spec["timed"] == 7 and spec["objective"]["name"] == "sparse_forward_kl" and spec["live"] is False
