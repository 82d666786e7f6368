"""What makes a stage resumable: one guard that decides skip, start, continue or refuse, and the manifest.

Every stage reads the same, and nothing is written before `begin` has accepted the folder, `recipe.yaml` included:

    stage = Stage(run_dir, "generations", config, {"prompts": manifest_fingerprint}, resolved(recipe))
    if stage.done(redo): return stage.manifest
    stage.begin(redo)            # continues, starts or refuses; locks the folder against a second run
    ...write parts...
    stage.finish(counts=..., extra=...)

The identity of a stage is the hash of its own configuration and of its inputs' fingerprints; seconds, energy,
device and versions are recorded but do not take part, so a rebuilt but identical input changes nothing.

What a stage's energy counters say, in kWh: read while it runs, and nothing where there is no counter.

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

import contextlib
import datetime
import fcntl
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill import __version__
from distill.errors import UserError
from distill.files import is_leftover, remove_dead, remove_leftovers, write_atomic, writing
from distill.storage import (
    MANIFEST,
    entries,
    fingerprint,
    read_json,
    read_manifest,
    record_entries,
    remove_changed,
    sealed_text,
    verify_folder,
    write_sealed,
)

IDENTITY = ".identity.json"  # what the unfinished folder is being made from
RECIPE = "recipe.yaml"  # of a run: what its newest stage was made from


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"distill": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def input_fingerprint(folder: Path, command: str) -> str:
    """The fingerprint of a finished stage folder, which is about to be read.

    Raises UserError (with the command to run) if it is unfinished, or if a file is not what the stage wrote.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not finished; run `distill {command}` first")
    verify_folder(folder)
    found = read_manifest(folder).get("fingerprint")
    if not isinstance(found, str):
        raise UserError(
            f"{folder / MANIFEST} has no fingerprint; delete it and run `distill {command}` again"
        )
    return found


def write_record(path: Path, text: str) -> None:
    """A text file with its checksum, replaced where it says something else."""
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != sealed_text(text):
        write_atomic(path, sealed_text(text))


def stored_date(run_dir: Path) -> datetime.date | None:
    """The day that chat templates with a clock read when a stage of this run, finished or not, was made."""
    folders = sorted(run_dir.iterdir()) if run_dir.is_dir() else ()
    return next((date for date in map(folder_date, folders) if date), None)


def folder_date(folder: Path) -> datetime.date | None:
    """The same of one stage folder."""
    for name in (MANIFEST, IDENTITY):
        if (folder / name).is_file():
            config = read_json(folder / name).get("config") or {}
            for part in (config, config.get("identity"), config.get("tokenizer")):
                if isinstance(part, dict) and part.get("date"):
                    return datetime.date.fromisoformat(part["date"])
    return None


class Stage:
    """One stage folder of a run. `name` is the folder; `config` is all that its result depends on.

    `recipe`: the resolved recipe as text, the run's `recipe.yaml` from when the stage begins.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: dict[str, Any],
        inputs: dict[str, str],
        recipe: str | None = None,
    ):
        self.folder = run_dir / name
        self.name = name
        self.config = config
        self.inputs = inputs
        self.recipe = recipe
        self.identity = {"config": config, "inputs": inputs}
        self._lock = None
        self._start = time.perf_counter()
        self._earlier_seconds = 0.0
        self._meter: EnergyMeter | None = None
        self.elsewhere = "set another run_dir"  # how to keep what is in the folder
        self._earlier_energy: dict[str, Any] = {"seconds": 0.0, "kwh": {}}

    def done(self, redo: bool = False) -> bool:
        """True if the finished folder was made from exactly these inputs.

        If from others, raises UserError saying which, or with `redo` says no so that it is rebuilt. Raises it too
        for a file that is not what the stage wrote; one that was deleted for that is made again.
        """
        if not (self.folder / MANIFEST).is_file():
            return False
        changed = self._changed()
        if changed and not redo:
            raise self._refusal(changed)
        if changed or not self._is_whole():
            return False
        try:
            verify_folder(self.folder)
        except UserError:
            if redo:
                return False
            raise
        self._tidy()
        return True

    def _is_whole(self) -> bool:
        """Every file of the manifest is there: one deleted because it was damaged is made again."""
        manifest = self.manifest
        return all(
            (self.folder / name).is_file() for name in {**manifest["files"], **manifest.get("records", {})}
        )

    def _tidy(self) -> None:
        """What a kill between the manifest and the end of `finish` has left; not while somebody holds the lock."""
        left = [self.folder / IDENTITY, self._lock_path]
        with contextlib.suppress(OSError, UserError):  # read-only, or another process is at work
            if any(path.exists() for path in left):
                self._take_lock()
                (self.folder / IDENTITY).unlink(missing_ok=True)
                self.release()

    def begin(self, redo: bool = False) -> None:
        """Take the folder: to continue work on the same inputs, or to start.

        Raises UserError if another run is writing it, or if it was made from other inputs or by someone
        else and `redo` is off; with `redo` such a folder is emptied.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            changed = self._changed()
            if changed and not redo:
                raise self._refusal(changed)
        except UserError:
            self.release()
            raise
        if changed:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        elif redo:
            remove_changed(self.folder)  # to be made again; what is whole stays
        remove_leftovers(self.folder)
        remove_dead(self.folder.parent, RECIPE)
        if self.recipe is not None:
            write_record(self.folder.parent / RECIPE, self.recipe)
        begun = self.folder / IDENTITY
        if begun.is_file():
            earlier = read_json(begun)
            self._earlier_seconds = earlier.get("seconds", 0.0)
            self._earlier_energy = earlier.get("energy", self._earlier_energy)
        self._meter, self._metered_from = open_meter(), time.perf_counter()
        self.checkpoint_clock()
        # Unfinished again, until all of it is there. Only now: a kill before this line must leave one of the two.
        (self.folder / MANIFEST).unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.folder.parent / f".{self.name}.lock"

    def _take_lock(self) -> None:
        """Raises UserError where another process has it.

        `release` unlinks the file while it is still locked. Whoever waited for that lock then holds a file that has
        no name any more, and somebody else could lock the next one: so the name is looked at again.
        """
        while True:
            lock = open(self._lock_path, "w")  # noqa: SIM115 - held until release
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise UserError(
                    f"another run is writing {self.folder}; wait for it, or use another run_dir"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock_path)):
                    self._lock = lock
                    return
            lock.close()

    def checkpoint_clock(self) -> None:
        """Remember seconds and energy spent so far, so that a resumed stage reports all of them."""
        spent = {"seconds": self.seconds(), "energy": self._energy()}
        write_sealed(self.folder / IDENTITY, {**self.identity, **spent})

    def seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._start

    def _energy(self) -> dict[str, Any]:
        """`seconds` that were metered and `kwh` by counter, interrupted runs included."""
        read = self._meter.kwh() if self._meter else None
        earlier = self._earlier_energy
        if read is None:
            return earlier
        kwh = {name: earlier["kwh"].get(name, 0.0) + read.get(name, 0.0) for name in earlier["kwh"] | read}
        return {"seconds": earlier["seconds"] + time.perf_counter() - self._metered_from, "kwh": kwh}

    def _energy_record(self, device: str) -> dict[str, Any] | None:
        """`kwh` in all, `seconds` they cover, and `counters`. None without a counter. A stage on a CPU has no GPU's."""
        found = self._energy()
        counters = {
            name: round(kwh, 9)
            for name, kwh in found["kwh"].items()
            if not (name.startswith(GPU) and "cpu" in device)
        }
        if not counters:
            return None
        kwh = round(sum(counters.values()), 9)
        return {"kwh": kwh, "seconds": round(found["seconds"], 3), "counters": counters}

    def finish(
        self, counts: dict[str, Any], device: str, without: tuple[str, ...] = (), **extra: Any
    ) -> dict[str, Any]:
        """Write the manifest, last of all files, and release the folder. `without`: files that will not stay."""
        manifest = {
            "stage": self.name,
            "config": self.config,
            "inputs": self.inputs,
            "counts": counts,
            "seconds": round(self.seconds(), 3),
            "energy": self._energy_record(device),
            "device": device,
            "versions": versions(),
            **extra,
        }
        data = [*self.folder.rglob("*.parquet"), *self.folder.glob("*.safetensors")]
        manifest["files"] = entries(self.folder, (p for p in data if p.name not in without))
        manifest["records"] = record_entries(self.folder)
        manifest["fingerprint"] = fingerprint({"identity": self.identity, "files": manifest["files"]})
        write_sealed(self.folder / MANIFEST, manifest)
        (self.folder / IDENTITY).unlink(missing_ok=True)
        self.release()
        return manifest

    def abandon(self) -> None:
        """Empty and release a folder whose work turned out to be impossible, so that any recipe may start it."""
        shutil.rmtree(self.folder)
        self.release()

    def release(self) -> None:
        if self._meter:
            self._meter.close()
            self._meter = None
        if self._lock:
            self._lock_path.unlink(missing_ok=True)  # before it is closed: see _take_lock
            self._lock.close()
            self._lock = None

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / MANIFEST)

    def _changed(self) -> list[str]:
        """How what is in the folder differs from what this stage would make; [] if it does not."""
        for name in (MANIFEST, IDENTITY):
            if (self.folder / name).is_file():
                found = read_json(self.folder / name)
                made_from = {key: found.get(key) for key in self.identity}
                return list(_differences(made_from, self.identity))
        if self.folder.is_dir() and any(not is_leftover(path) for path in self.folder.iterdir()):
            return ["it holds files that no stage of this run made"]
        return []

    def _refusal(self, changed: list[str]) -> UserError:
        shown = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
        message = (
            f"{self.folder} was made from other inputs ({shown}); "
            "rebuild it with --redo, or keep it and set another run_dir"
        )
        return UserError(message.replace("set another run_dir", self.elsewhere))


def _differences(old: Any, new: Any, where: str = ""):
    """Paths at which two JSON values differ, as `key: old -> new`, short enough to print."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    # JSON has no tuples: a resolved recipe read back is compared by its JSON form.
    elif fingerprint(old) != fingerprint(new):
        name = where.removeprefix("config.").removeprefix("inputs.")
        if where.startswith("inputs."):
            yield f"{name} changed"
        else:
            yield f"{name}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


# RAPL counters wrap after some 262 kJ, a quarter of an hour at 300 W: somebody has to look more often.
SAMPLE_SECONDS = 30.0
GPU = "GPU "  # how the names of GPU counters begin


# Of codecarbon's ways to know a CPU's power; the others are a data sheet's figure, scaled by the load.
MEASURED_MODES = ("intel_rapl", "intel_power_gadget", "windows_emi")


class EnergyMeter:
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


def open_meter(powercap: Path = POWERCAP) -> EnergyMeter | None:
    """A running meter of every counter that can be read here; None where there is none."""
    try:
        counters = rapl_counters(powercap) | nvml_counters()
        counters = counters or codecarbon_counters()
        return EnergyMeter(counters) if counters else None
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
