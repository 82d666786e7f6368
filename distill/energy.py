"""What a stage's energy counters say, in kWh: read while it runs, and nothing where there is no counter.

    meter = open_meter()                 # None: no counter can be read here
    meter.kwh()                          # {"package-0": 0.0021, "GPU 0 NVIDIA H200": 0.0310} since it was opened
    meter.close()

Counters, in this order: the CPU's own (RAPL, /sys/class/powercap: packages and DRAM; many systems let only root
read it); the GPU's own (NVML's total energy, Volta and later, with the extra `energy`); and where neither exists,
what codecarbon (the same extra) *measures*, as on Apple chips, Windows and AMD GPUs. Where it would estimate from
a data sheet and the load, nothing is recorded: an estimate is no reading. Counters are of whole devices, so their
idle share and other programs are in them; disks, fans and the power supply are not, nor memory that RAPL does not
see. Only the machine of the main process is read. Imports no torch.
"""

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
# RAPL counters wrap after some 262 kJ, a quarter of an hour at 300 W: somebody has to look more often.
SAMPLE_SECONDS = 30.0
GPU = "GPU "  # how the names of GPU counters begin
# Of codecarbon's ways to know a CPU's power; the others are a data sheet's figure, scaled by the load.
MEASURED_MODES = ("intel_rapl", "intel_power_gadget", "windows_emi")


class Meter:
    """Sums counters from the moment it is made. `counters`: name -> reading in joules, which never falls."""

    def __init__(self, counters: dict[str, Callable[[], float]]):
        self._counters = counters
        self._start = {name: read() for name, read in counters.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
        self._thread.start()

    def kwh(self) -> dict[str, float] | None:
        """Per counter, kWh since the start. None where one of them can no longer be read."""
        try:
            return {
                name: (read() - self._start[name]) / JOULES_PER_KWH for name, read in self._counters.items()
            }
        except Exception:  # whatever a driver says: a run does not fail over its meter
            return None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.kwh()


def open_meter(powercap: Path = POWERCAP) -> Meter | None:
    """A running meter of every counter that can be read here; None where there is none."""
    try:
        counters = rapl_counters(powercap) | nvml_counters()
        counters = counters or codecarbon_counters()
        return Meter(counters) if counters else None
    except Exception:  # a half-working driver is no meter
        return None


class Wrapping:
    """A RAPL zone's energy in joules, carried on where the counter starts again from 0."""

    def __init__(self, zone: Path):
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._wraps = 0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            now = int(self._file.read_text())
            self._wraps += now < self._last
            self._last = now
            return (now + self._wraps * self._range) / 1e6


def rapl_counters(powercap: Path = POWERCAP) -> dict[str, Callable[[], float]]:
    """CPU packages and their DRAM. Not `core` and `uncore`, parts of a package, nor `psys`, which holds it."""
    counters: dict[str, Callable[[], float]] = {}
    packages: dict[str, str] = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too; intel-rapl-mmio repeats the same package
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                packages[zone.name] = name
            elif name != "dram":
                continue
            owner = packages.get(zone.name.rpartition(":")[0])
            counters[f"{owner} dram" if name == "dram" and owner else name] = Wrapping(zone)
        except (OSError, ValueError):
            continue
    return counters


def nvml_counters() -> dict[str, Callable[[], float]]:
    """The GPUs that this launch uses, by NVML, where its Python binding (nvidia-ml-py) and a driver are."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [(name, _handle(pynvml, name)) for name in used_gpus(pynvml.nvmlDeviceGetCount())]
        found: dict[str, Callable[[], float]] = {}
        for name, handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older GPUs and MIG slices have none
            label = pynvml.nvmlDeviceGetName(handle)
            label = label.decode() if isinstance(label, bytes) else label
            found[f"{GPU}{name} {label}"] = lambda h=handle: (
                pynvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3
            )
        return found
    except Exception:  # no binding, no driver, no counter: each raises its own error
        return {}


def used_gpus(count: int) -> list[str]:
    """Names of the first GPUs that this process sees, one per local process of the launch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")
    return [name.strip() for name in names if name.strip()][: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]


def _handle(pynvml, name: str):
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


@lru_cache(maxsize=1)  # finding out what the hardware offers takes it seconds
def codecarbon_counters() -> dict[str, Callable[[], float]]:
    """What codecarbon measures here; {} without it, and where it would estimate. Offline, no file, no country."""
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:
        return {}
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # it asks for one to speak of carbon; only its kWh are read
        save_to_file=False,
        log_level="critical",
        allow_multiple_runs=True,
        measure_power_secs=SAMPLE_SECONDS,
    )
    tracker.start()

    def joules(attribute: str) -> float:
        tracker.flush()
        return getattr(tracker, attribute).kWh * JOULES_PER_KWH

    counters: dict[str, Callable[[], float]] = {}
    for hardware in tracker._hardware:
        kind, part = type(hardware).__name__, getattr(hardware, "chip_part", None)
        if getattr(hardware, "_mode", None) in MEASURED_MODES or (kind, part) == ("AppleSiliconChip", "CPU"):
            counters["CPU by codecarbon"] = lambda: joules("_total_cpu_energy")
        elif kind == "GPU" or (kind, part) == ("AppleSiliconChip", "GPU"):
            counters[f"{GPU}by codecarbon"] = lambda: joules("_total_gpu_energy")
    if not counters:
        tracker.stop()
    return counters
