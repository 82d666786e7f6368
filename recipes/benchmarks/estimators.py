"""How noisy the gradient of on-policy reverse KL is: by the whole vocabulary, by some tokens of it, by one.

    python recipes/benchmarks/estimators.py                   # the embedded pair, a few minutes on one core
    python recipes/benchmarks/estimators.py --student MODEL --teacher MODEL --out FILE.json

The student answers the same problems again and again, and every estimator gives the gradient of its mean loss a token
on the same text. Of each: the noise of a step (trace of the covariance over the squared norm of the mean; 1 is as much
noise as signal), what of it the choice of tokens makes on a text that is held, and the cosine between its mean and that
of the whole vocabulary, which for a biased estimator stays below 1 however many steps there are. The squared norm of a
mean over few steps is too large by noise / steps, which is taken off.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from distill.data.batches import TokenRows
from distill.models.chat import prompt_ids
from distill.models.decode import Sampling, decode
from distill.models.load import eos_ids, load_model, load_tokenizer
from distill.tasks.problems import sample_problems
from distill.training import losses

ESTIMATORS = {
    "whole vocabulary": ("reverse_kl", {}),
    "teacher's 16": ("top_reverse_kl", {"top": 16}),
    "teacher's 4": ("top_reverse_kl", {"top": 4}),
    "token drawn": ("sampled_reverse_kl", {}),
    "token drawn, clipped": ("sampled_reverse_kl", {"clip": 0.2}),
}


class Moments:
    """Mean and trace of the covariance of gradient vectors, without keeping them; Welford's sums in float64."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, gradient: torch.Tensor) -> None:
        self.count += 1
        before = gradient.double() - self.mean
        self.mean = self.mean + before / self.count
        self.squares += float((before * (gradient.double() - self.mean)).sum())

    @property
    def trace(self) -> float:
        return self.squares / max(1, self.count - 1)

    @property
    def signal(self) -> float:
        """The squared norm of the mean, without what noise adds to it."""
        return max(float((self.mean**2).sum()) - self.trace / self.count, 0.0)


class Pair:
    def __init__(self, student: str, teacher: str, rows: int, max_new_tokens: int, seed: int):
        self.student, self.teacher = (load_model(name, "fp32") for name in (student, teacher))
        self.tokenizer = load_tokenizer(student)
        self.ends = eos_ids(self.student, self.tokenizer)
        problems = sample_problems("train", {"easy": rows // 2, "medium": rows - rows // 2}, seed)
        self.prompts = [
            prompt_ids(self.tokenizer, [{"role": "user", "content": p.question}]) for p in problems
        ]
        self.sampling = Sampling(1.0, max_new_tokens=max_new_tokens)
        self.seed = seed

    def text(self, number: int):
        """(batch, the teacher's logits [N, V]) of one set of answers by the student."""
        keys = [(self.seed, number, i) for i in range(len(self.prompts))]
        found = decode(
            self.student, self.prompts, self.sampling, eos_ids=self.ends, pad_id=self.tokenizer.pad_token_id,
            keys=keys, vocab_limit=len(self.tokenizer),
        )  # fmt: skip
        rows = TokenRows(self.prompts, [answer.ids for answer in found])
        rows.drawn = np.concatenate([answer.logprobs for answer in found])
        batch = rows.collate(np.arange(len(rows)), self.tokenizer.pad_token_id)
        with torch.no_grad():
            return batch, self._logits(self.teacher, batch)

    @staticmethod
    def _logits(model, batch):
        return model(**batch.inputs(), use_cache=False).logits.flatten(0, 1).index_select(0, batch.places)

    def gradients(self, batch, teacher, targets, drawn) -> dict[str, tuple[torch.Tensor, float]]:
        """{estimator: (gradient of its mean loss, seconds of it)} on one text."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        logits, found = self._logits(self.student, batch), {}
        for name, (function, options) in ESTIMATORS.items():
            begun = time.perf_counter()
            more = (targets, drawn) if function == "sampled_reverse_kl" else ()
            loss = getattr(losses, function)(logits, teacher, *more, **options).mean()
            slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
            found[name] = torch.cat([s.flatten() for s in slopes]), time.perf_counter() - begun
        return found


def measure(pair: Pair, repeats: int) -> dict[str, dict[str, float]]:
    pair.student.requires_grad_(True)
    over_text = {name: Moments() for name in ESTIMATORS}
    on_a_text = {name: Moments() for name in ESTIMATORS}
    seconds = dict.fromkeys(ESTIMATORS, 0.0)
    for number in range(repeats):
        batch, teacher = pair.text(number)
        for name, (gradient, spent) in pair.gradients(batch, teacher, batch.targets, batch.drawn).items():
            over_text[name].add(gradient)
            seconds[name] += spent
    # The text held, its tokens drawn again at every place.
    with torch.no_grad():
        logs = pair._logits(pair.student, batch).log_softmax(-1)
    generator = torch.Generator().manual_seed(pair.seed)
    for _ in range(repeats):
        targets = torch.multinomial(logs.exp(), 1, generator=generator)
        drawn = logs.gather(1, targets)[:, 0]
        for name, (gradient, _) in pair.gradients(batch, teacher, targets[:, 0], drawn).items():
            on_a_text[name].add(gradient)
    whole, found = over_text["whole vocabulary"].mean, {}
    for name in ESTIMATORS:
        moments = over_text[name]
        cosine = float((moments.mean * whole).sum() / (moments.mean.norm() * whole.norm()))
        found[name] = {
            "noise": moments.trace / moments.signal if moments.signal else math.inf,
            "noise_on_a_text": on_a_text[name].trace / moments.signal if moments.signal else math.inf,
            "cosine": cosine,
            "seconds": seconds[name] / repeats,
        }
    return {"tokens": len(batch.targets), "repeats": repeats, "estimators": found}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--student", default="checkpoints/base")
    parser.add_argument("--teacher", default="checkpoints/teacher")
    parser.add_argument("--rows", type=int, default=32, help="answers in a step")
    parser.add_argument("--repeats", type=int, default=24, help="steps over which means are taken")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    asked = parser.parse_args(arguments)
    pair = Pair(asked.student, asked.teacher, asked.rows, asked.max_new_tokens, asked.seed)
    found = measure(pair, asked.repeats)
    print(f"{asked.repeats} steps of {asked.rows} answers, {found['tokens']} tokens in the last")
    print(f"{'':22}{'noise':>10}{'on a text':>11}{'cosine':>9}{'ms':>8}")
    for name, values in found["estimators"].items():
        print(f"{name:22}{values['noise']:10.2f}{values['noise_on_a_text']:11.2f}{values['cosine']:9.4f}"
              f"{1e3 * values['seconds']:8.0f}")  # fmt: skip
    if asked.out:
        asked.out.write_text(
            json.dumps({"student": asked.student, "teacher": asked.teacher, **found}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
