"""What makes a stage resumable: one guard that decides skip, start, continue or refuse, and the manifest.

Every stage reads the same:

    stage = Stage(run_dir, "generations", config, inputs={"prompts": manifest_fingerprint})
    if stage.done(redo): return stage.manifest
    stage.begin(redo)            # continues, starts or refuses; locks the folder against a second run
    ...write parts...
    stage.finish(counts=..., extra=...)

The identity of a stage is the hash of its own configuration and of its inputs' fingerprints; seconds, energy,
device and versions are recorded but do not take part, so a rebuilt but identical input changes nothing.
"""

import fcntl
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill import __version__
from distill.energy import GPU, Meter, open_meter
from distill.errors import UserError
from distill.shards import MANIFEST, fingerprint, hash_file, is_leftover, read_json, write_json

IDENTITY = ".identity.json"  # what the unfinished folder is being made from


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
    """The fingerprint of a finished stage folder. UserError (with the command to run) if unfinished."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not finished; run `distill {command}` first")
    return read_json(folder / MANIFEST)["fingerprint"]


class Stage:
    """One stage folder of a run. `name` is the folder; `config` is all that its result depends on."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], inputs: dict[str, str]):
        self.folder = run_dir / name
        self.name = name
        self.config = config
        self.inputs = inputs
        self.identity = {"config": config, "inputs": inputs}
        self._lock = None
        self._start = time.perf_counter()
        self._earlier_seconds = 0.0
        self._meter: Meter | None = None
        self._earlier_energy: dict[str, Any] = {"seconds": 0.0, "kwh": {}}

    def done(self, redo: bool = False) -> bool:
        """True if the finished folder was made from exactly these inputs.

        If from others, raises UserError saying which, or with `redo` says no so that it is rebuilt.
        """
        if not (self.folder / MANIFEST).is_file():
            return False
        changed = self._changed()
        if changed and not redo:
            raise self._refusal(changed)
        return not changed and self._is_whole()

    def _is_whole(self) -> bool:
        """Every file of the manifest is there in its size: one deleted because it was damaged is made again."""
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        files = {name: self.folder / name for name in sizes}
        return all(file.is_file() and file.stat().st_size == sizes[name] for name, file in files.items())

    def begin(self, redo: bool = False) -> None:
        """Take the folder: to continue work on the same inputs, or to start.

        Raises UserError if another run is writing it, or if it was made from other inputs or by someone
        else and `redo` is off; with `redo` such a folder is emptied.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder.parent / f".{self.name}.lock", "w")  # noqa: SIM115 - held until finish
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing {self.folder}; wait for it, or use another run_dir"
            ) from None
        if changed := self._changed():
            if not redo:
                raise self._refusal(changed)
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        begun = self.folder / IDENTITY
        if begun.is_file():
            earlier = read_json(begun)
            self._earlier_seconds = earlier.get("seconds", 0.0)
            self._earlier_energy = earlier.get("energy", self._earlier_energy)
        self._meter, self._metered_from = open_meter(), time.perf_counter()
        self.checkpoint_clock()
        # Unfinished again, until all of it is there. Only now: a kill before this line must leave one of the two.
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def checkpoint_clock(self) -> None:
        """Remember seconds and energy spent so far, so that a resumed stage reports all of them."""
        spent = {"seconds": self.seconds(), "energy": self._energy()}
        write_json(self.folder / IDENTITY, {**self.identity, **spent})

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

    def finish(self, counts: dict[str, Any], device: str, **extra: Any) -> dict[str, Any]:
        """Write the manifest, last of all files, and release the folder."""
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
        data = sorted([*self.folder.rglob("*.parquet"), *self.folder.glob("*.safetensors")])
        manifest["files"] = {
            str(p.relative_to(self.folder)): {"bytes": p.stat().st_size, "hash": hash_file(p)} for p in data
        }
        manifest["fingerprint"] = fingerprint({"identity": self.identity, "files": manifest["files"]})
        write_json(self.folder / MANIFEST, manifest)
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
            os.unlink(self._lock.name)
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
        return UserError(
            f"{self.folder} was made from other inputs ({shown}); "
            "rebuild it with --redo, or keep it and set another run_dir"
        )


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
