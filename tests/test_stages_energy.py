"""Counters that wrap, fail, or are not there; and stages that record what was read, resumed or not."""

import sys
import types

import pytest

from distill import stages
from distill import stages as energy
from distill.stages import (
    IDENTITY,
    EnergyMeter,
    Stage,
    Wrapping,
    nvml_counters,
    open_meter,
    rapl_counters,
    used_gpus,
)
from distill.storage import read_json

RANGE = 1_000_000  # microjoules after which the counter of the fake wraps


def zone(folder, name: str, label: str, microjoules: int):
    (folder / name).mkdir()
    (folder / name / "name").write_text(label + "\n")
    (folder / name / "max_energy_range_uj").write_text(str(RANGE))
    (folder / name / "energy_uj").write_text(str(microjoules))
    return folder / name / "energy_uj"


class FakeNvml(types.ModuleType):
    """Two GPUs; millijoules since the driver was loaded."""

    def __init__(self):
        super().__init__("pynvml")
        self.energy = {0: 5_000, 1: 9_000}

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA H200"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle not in self.energy:
            raise RuntimeError("not supported")
        return self.energy[handle]


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """One package with DRAM and parts; no GPU binding, no codecarbon, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy, "codecarbon_counters", dict)
    folder = tmp_path / "powercap"
    folder.mkdir()
    files = {
        "package": zone(folder, "intel-rapl:0", "package-0", 100_000),
        "dram": zone(folder, "intel-rapl:0:2", "dram", 0),
        "core": zone(folder, "intel-rapl:0:0", "core", 0),
        "psys": zone(folder, "intel-rapl:1", "psys", 0),
        "mmio": zone(folder, "intel-rapl-mmio:0", "package-0", 0),
    }
    monkeypatch.setattr(stages, "open_meter", lambda: open_meter(folder))
    return folder, files


def test_nothing_is_counted_twice(powercap):
    folder, files = powercap
    meter = open_meter(folder)
    for microjoules, name in enumerate(files):
        files[name].write_text(str(200_000 + microjoules))
    assert meter.kwh() == pytest.approx({"package-0": 0.1 / 3.6e6, "package-0 dram": 0.200001 / 3.6e6})
    meter.close()


def test_a_counter_that_starts_again_goes_on(powercap):
    folder, files = powercap
    read = Wrapping(folder / "intel-rapl:0")
    seen = []
    for microjoules in (100_000, 900_000, 100_000, 50_000):
        files["package"].write_text(str(microjoules))
        seen.append(read())
    assert seen == [0.1, 0.9, 1.1, 2.05]


def test_a_sampler_sees_a_wrap_that_nobody_asked_about(powercap, monkeypatch):
    folder, files = powercap
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.01)
    meter = open_meter(folder)
    for microjoules in (900_000, 200_000):
        files["package"].write_text(str(microjoules))
        assert _until(lambda: meter._counters["package-0"]._last == microjoules)  # noqa: B023 - used at once
    assert meter.kwh()["package-0"] == pytest.approx(1.1 / 3.6e6)
    meter.close()
    assert not meter._thread.is_alive()


def _until(condition) -> bool:
    import time

    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_without_counters_there_is_no_meter(powercap, tmp_path):
    assert open_meter(tmp_path / "absent") is None
    folder, _ = powercap
    (folder / "intel-rapl:0" / "energy_uj").unlink()
    (folder / "intel-rapl:0:2" / "energy_uj").write_text("")
    assert rapl_counters(folder) == {}, "for root alone, or broken: not read"


def test_a_counter_lost_later_gives_nothing(powercap):
    folder, files = powercap
    meter = open_meter(folder)
    files["package"].unlink()
    assert meter.kwh() is None
    meter.close()


def test_gpus_of_this_launch_alone(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert list(nvml_counters()) == ["GPU 0 NVIDIA H200"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = nvml_counters()
    assert [read() for read in found.values()] == [5.0, 9.0]
    fake.energy[1] = 10_000
    assert found["GPU 1 NVIDIA H200"]() == 10.0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert list(nvml_counters()) == ["GPU 1 NVIDIA H200"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert used_gpus(2) == [] and nvml_counters() == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert nvml_counters() == {}, "a GPU without such a counter"


def test_codecarbon_here_measures_or_says_nothing():
    """With the extra installed and no counter on this machine, its estimate is not taken for a reading."""
    pytest.importorskip("codecarbon")
    found = energy.codecarbon_counters()
    if not (rapl_counters() or nvml_counters()) and sys.platform == "linux":
        assert found == {}


# ---- stages --------------------------------------------------------------------------------------------


def stage(run_dir, **config) -> Stage:
    return Stage(run_dir, "student", config, inputs={})


def test_a_stage_records_what_the_counters_said(powercap, tmp_path):
    _, files = powercap
    made = stage(tmp_path)
    made.begin()
    files["package"].write_text("460000")
    manifest = made.finish({}, device="cpu (2 threads)")
    assert manifest["energy"]["counters"] == {"package-0": 1e-7, "package-0 dram": 0.0}
    assert manifest["energy"]["kwh"] == 1e-7 and 0 <= manifest["energy"]["seconds"] <= manifest["seconds"]
    assert stage(tmp_path).done(), "what was read takes no part in the identity"


def test_a_resumed_stage_adds_what_was_read_before(powercap, tmp_path):
    _, files = powercap
    first = stage(tmp_path)
    first.begin()
    files["package"].write_text("460000")
    first.checkpoint_clock()
    first.release()  # as a kill after it would
    before = read_json(tmp_path / "student" / IDENTITY)["energy"]["seconds"]
    files["package"].write_text("500000")  # between the two: nobody's
    again = stage(tmp_path)
    again.begin()
    files["package"].write_text("860000")
    manifest = again.finish({}, device="cpu (2 threads)")
    assert manifest["energy"]["kwh"] == pytest.approx(2e-7) and manifest["energy"]["seconds"] >= before > 0


def test_without_a_counter_energy_is_null(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "open_meter", lambda: None)
    made = stage(tmp_path)
    made.begin()
    assert made.finish({}, device="cpu (2 threads)")["energy"] is None


@pytest.mark.parametrize("device, counted", [("cpu (2 threads)", False), ("2 x NVIDIA H200", True)])
def test_a_stage_on_the_cpu_has_no_gpu_in_its_energy(tmp_path, monkeypatch, device, counted):
    monkeypatch.setattr(
        stages, "open_meter", lambda: EnergyMeter({"GPU 0 x": lambda: 0.0, "package-0": lambda: 0.0})
    )
    made = stage(tmp_path)
    made.begin()
    assert ("GPU 0 x" in made.finish({}, device=device)["energy"]["counters"]) == counted
