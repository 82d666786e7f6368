"""What a training run says while it runs: metrics.jsonl, trackers, and the progress bar with rate and time left.

One JSON line per optimizer step: step, loss, lr, grad_norm, tokens (trained in this step), seconds (since the
start, over resumes), gflops (model FLOPs per second of this step), each objective's own mean; where there is
one, the held-out loss, what was sampled, the experts' MaxVio, and mfu, the share of the device's peak (PaLM, arXiv
2204.02311, appendix B). The file is the record; trackers (TensorBoard, Weights & Biases, Trackio, through
Accelerate) get the same numbers.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill import console
from distill.config.training import Train
from distill.devices import peak_flops
from distill.files import write_atomic, writing
from distill.training.sources import Lot


class StepLog:
    """Continues at step `first` with so many tokens trained and read.

    `flops_per_token`: of one token read, forward and backward, teacher included.
    """

    def __init__(
        self, folder: Path, first: int, tokens: int, read: int, accelerator: Accelerator, train: Train,
        flops_per_token: float = 0.0, recorded: str | None = None,
    ):  # fmt: skip
        self.steps, self.tokens, self.read = first, tokens, read
        self.train, self.accelerator, self.flops_per_token = train, accelerator, flops_per_token
        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self.peak = peak * accelerator.num_processes if peak else None
        self.start = self.before = time.perf_counter()
        self.bar = self.file = None
        if train.trackers:
            accelerator.init_trackers("distill")
        if accelerator.is_main_process:
            self.path = folder / "metrics.jsonl"
            self.earlier, self._digest = cut_back(self.path, first, recorded)
            with writing(folder):
                self.file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def progress(self, first: int, steps: int, title: str) -> Any:
        self.bar = console.bar(
            range(first, steps), initial=first, total=steps, desc=title, unit="step",
            main=self.accelerator.is_main_process,
        )  # fmt: skip
        return self.bar

    def write(self, step: int, means, rate: float, norm: float, lot: Lot, **more: Any) -> None:
        """One optimizer step; `more` is written where it is neither None nor empty."""
        self.steps, self.tokens, self.read = step + 1, self.tokens + lot.tokens, self.read + lot.read
        now = time.perf_counter()
        taken, self.before = max(now - self.before, 1e-9), now
        values = {o.name: float(m) for o, m in zip(self.train.objectives, means)}
        loss = sum(o.weight * float(m) for o, m in zip(self.train.objectives, means))
        more = {name: value for name, value in more.items() if value not in (None, {})}
        if self.train.trackers:
            flat = {k: v for k, v in more.items() if isinstance(v, (int, float))}
            logged = {"loss": loss, "lr": rate, "grad_norm": norm, **values, **flat}
            self.accelerator.log(logged, step=step + 1)
        if self.file is None:
            return
        speed = self.flops_per_token * lot.read / taken
        if self.peak:
            more["mfu"] = round(speed / self.peak, 4)
        line = {
            "step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": lot.tokens,
            "seconds": round(self.earlier + now - self.start, 3), "gflops": round(speed / 1e9, 2),
            "objectives": values, **more,
        }  # fmt: skip
        data = (json.dumps(line) + "\n").encode()
        with writing(self.path.parent, len(data)):
            self.file.write(data)
            self.file.flush()
        self._digest.update(data)
        shown = f"loss {loss:.3f}, {lot.tokens / taken:,.0f} tok/s" + (
            f", MFU {more['mfu']:.1%}" if self.peak else ""
        )
        self.bar.set_postfix_str(shown, refresh=False)

    def sync(self) -> str | None:
        """Before a state is saved: the record must not end before the state that a resume begins with.

        Returns the hash of the file, for that state; None in the processes that write none.
        """
        if self.file is None:
            return None
        with writing(self.path.parent):
            os.fsync(self.file.fileno())
        return self._digest.hexdigest()

    def close(self) -> None:
        if self.file:
            self.sync()
            self.file.close()
        if self.train.trackers:
            self.accelerator.end_training()


def cut_back(path: Path, first: int, recorded: str | None = None) -> tuple[float, Any]:
    """Leave the lines of the first `first` steps in metrics.jsonl; (seconds of the last one, the hash of them all).

    Lines past a resumed state belong to steps that run again, and one that a kill cut short is none. The file is
    touched only where there is such a line, and then replaced as a whole: at no moment are there fewer lines.
    recorded: the hash that the state has of these lines; others are told of.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    kept: list[str] = []
    last, seconds = 0, 0.0
    for line in text.splitlines():
        try:
            found = json.loads(line)
            step, spent = int(found["step"]), float(found["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
        if last < step <= first:
            kept.append(line + "\n")
            last, seconds = step, spent
    if len(kept) < first:
        console.warn(
            f"warning: {path} lacks {first - len(kept)} of the {first} steps that are done; curves have a gap"
        )
    digest = hashlib.blake2b("".join(kept).encode(), digest_size=16)
    if len(kept) == first and recorded not in (None, digest.hexdigest()):
        console.warn(
            f"warning: {path} is not as training wrote it (its hash is another); its numbers may be wrong"
        )
    if "".join(kept) != text:
        write_atomic(path, "".join(kept))
    return seconds, digest
