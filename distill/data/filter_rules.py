"""The rules that drop teacher answers: each has a name, looks at one answer and says what it found.

    rules = Rules(recipe.filter, held_out)      # held_out: HeldOut, or None where nothing is to be kept apart
    rules.refuse(candidate)                     # (first rule that refuses, what it found), or None

Order matters and is fixed: what is broken or wrong first, then form, then what repeats a kept answer.
All rules are deterministic and depend on the order of the answers only through what was kept before.

Near duplicates are found by MinHash: texts that share most word shingles, without comparing all pairs.

    index = MinHash(threshold=0.8)
    index.nearest(text)        # (estimated Jaccard similarity, name) of the most similar text so far, or None
    index.add(text, name)

Broder 1997 ("On the resemblance and containment of documents"); banding as in Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4. With 128 hash functions the estimate's standard error is at most
0.044, and two texts at a threshold of 0.04 or more meet in a band with probability 0.99. The same every run.
Memory: 512 bytes of signature per text, and one entry per band.
"""

import functools
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.config.data import Filter
from distill.config.recipe import Recipe
from distill.data.prompts import held_out
from distill.storage import fingerprint

ORDER = (
    "error", "truncated", "finish_reason", "wrong_answer", "contaminated", "too_short", "too_long",
    "too_few_characters", "too_many_characters", "charset", "duplicate", "near_duplicate", "per_prompt_cap",
)  # fmt: skip
_SCRIPTS = {"latin": ("LATIN",), "cjk": ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")}


@dataclass(frozen=True)
class Candidate:
    """One teacher answer: its row of `generations`, its prompt, and the training row it would become.

    `new` is None where the row has no text (it failed).
    """

    row: dict
    prompt: dict
    new: dict | None


def question(prompt: dict) -> str:
    """What is asked, without a template's own words: those would make all prompts alike."""
    return prompt.get("question") or "\n".join(
        m["content"] for m in prompt["messages"] if m["role"] == "user"
    )


class HeldOut:
    """N-grams of all held-out questions, lower-cased (Brown et al. 2020, arXiv 2005.14165, appendix C)."""

    def __init__(self, questions: Iterable[str], n: int):
        self.n = n
        self._grams = {gram for text in questions for gram in ngrams(text, n)}
        self.fingerprint = fingerprint(sorted(self._grams))

    def overlap(self, text: str) -> float:
        """Share of the text's n-grams that are held out; the whole text counts as one where it is shorter."""
        grams = ngrams(text, self.n)
        return len(grams & self._grams) / len(grams) if grams else 0.0


def held_out_questions(recipe: Recipe) -> HeldOut | None:
    """What decontamination compares with; None where the recipe has it off.

    By default it is on for prompts from files and the hub. The embedded tasks are split by content and share
    wordings ("What is 3 + 4?"), so n-grams would accuse them wrongly.
    """
    section = recipe.filter
    wanted = recipe.prompts.source != "tasks" if section.decontaminate is None else section.decontaminate
    if not wanted or not recipe.teacher or recipe.prompts.documents:
        return None
    problems = held_out(recipe.evaluate, recipe.prompts, recipe.seed)
    return HeldOut(map(question, problems), section.decontaminate_ngram)


def identity(section: Filter, guard: HeldOut | None) -> dict[str, Any]:
    """What the rules' result depends on: settings of rules that are on, and the held-out questions."""
    settings = section.model_dump(mode="json")
    if section.charset is None:
        del settings["charset_share"]
    if not section.keep_unverified:  # off, a dataset is what it was before there was the key
        del settings["keep_unverified"]
    if section.completions != "shuffled" or section.shuffled_share == 1:  # as before there was the key
        del settings["shuffled_share"]
    if guard is None:
        del settings["decontaminate_ngram"], settings["decontaminate_share"]
    return {"filter": settings, **({"held_out": guard.fingerprint} if guard else {})}


class Rules:
    """One method per rule of ORDER: what it found in a candidate that it refuses, or None."""

    def __init__(self, section: Filter, guard: HeldOut | None = None):
        self.section, self.guard = section, guard
        self._texts: set[tuple[str, str]] = set()
        self._kept: Counter[str] = Counter()
        self._overlaps: dict[str, float] = {}
        self._near = MinHash(section.near_duplicates) if section.near_duplicates else None

    def refuse(self, candidate: Candidate) -> tuple[str, str] | None:
        """(rule, what it found) of the first rule that refuses; None for one that is kept, and remembered."""
        for name in ORDER:
            detail = getattr(self, name)(candidate)
            if detail is not None:
                return name, detail
        row = candidate.row
        self._texts.add((row["prompt_id"], row["text"]))
        self._kept[row["prompt_id"]] += 1
        if self._near:
            self._near.add(self._whole(candidate), f"{row['prompt_id']} sample {row['sample_idx']}")
        return None

    def error(self, c: Candidate) -> str | None:
        return c.row["error"] or None

    def truncated(self, c: Candidate) -> str | None:
        accepted = "length" in (self.section.finish_reasons or ()) and c.new and c.new["completion_ids"]
        return "" if c.row["finish_reason"] == "length" and not accepted else None

    def finish_reason(self, c: Candidate) -> str | None:
        wanted, reason = self.section.finish_reasons, c.row["finish_reason"]
        return str(reason) if wanted is not None and reason not in wanted else None

    def wrong_answer(self, c: Candidate) -> str | None:
        """Names the verdict and the reference: the two that a reader compares."""
        if not self.section.correct_only or c.row["verdict"] == "correct":
            return None
        if self.section.keep_unverified and not c.prompt["answer"] and ":" not in c.prompt["verifier"]:
            return None
        return f"{c.row['verdict']}, reference {c.prompt['answer'][:40]}"

    def contaminated(self, c: Candidate) -> str | None:
        if not self.guard:
            return None
        name = c.prompt["prompt_id"]
        if name not in self._overlaps:
            self._overlaps[name] = self.guard.overlap(question(c.prompt))
        share = self._overlaps[name]
        found = f"{share:.0%} of the prompt's {self.guard.n}-grams are held out"
        return found if share >= self.section.decontaminate_share else None

    def too_short(self, c: Candidate) -> str | None:
        return _below(len(c.new["completion_ids"]), self.section.min_tokens, "tokens")

    def too_long(self, c: Candidate) -> str | None:
        length = len(c.new["prompt_ids"]) + len(c.new["completion_ids"])
        return _above(length, self.section.max_tokens, "tokens with the prompt")

    def too_few_characters(self, c: Candidate) -> str | None:
        return _below(len(c.row["text"]), self.section.min_characters, "characters")

    def too_many_characters(self, c: Candidate) -> str | None:
        return _above(len(c.row["text"]), self.section.max_characters, "characters")

    def charset(self, c: Candidate) -> str | None:
        if self.section.charset is None:
            return None
        share = script_share(c.row["text"], self.section.charset)
        return f"{share:.0%} {self.section.charset}" if share < self.section.charset_share else None

    def duplicate(self, c: Candidate) -> str | None:
        seen = (c.row["prompt_id"], c.row["text"]) in self._texts
        return "" if self.section.deduplicate and seen else None

    def near_duplicate(self, c: Candidate) -> str | None:
        found = self._near.nearest(self._whole(c)) if self._near else None
        return f"similarity {found[0]:.2f} to {found[1]}" if found else None

    def per_prompt_cap(self, c: Candidate) -> str | None:
        cap = self.section.max_per_prompt
        return "" if cap and self._kept[c.row["prompt_id"]] >= cap else None

    def _whole(self, c: Candidate) -> str:
        """Question and answer: one short answer to two questions is no repetition."""
        return f"{question(c.prompt)}\n{c.row['text']}"


def script_share(text: str, charset: str) -> float:
    """Share of the text's letters in a script ("latin" or "cjk"); 1 where there are no letters."""
    letters = [c for c in text if c.isalpha()]
    return sum(_in_script(c, charset) for c in letters) / len(letters) if letters else 1.0


@functools.lru_cache(maxsize=65536)
def _in_script(character: str, charset: str) -> bool:
    """By the Unicode name; compatibility forms (full-width letters) count as what they stand for."""
    plain = unicodedata.normalize("NFKC", character)
    return all(unicodedata.name(c, "").startswith(_SCRIPTS[charset]) for c in plain if c.isalpha())


def _below(value: int, bound: int | None, what: str) -> str | None:
    return f"{value} {what}, at least {bound} asked" if bound and value < bound else None


def _above(value: int, bound: int | None, what: str) -> str | None:
    return f"{value} {what}, at most {bound} asked" if bound and value > bound else None


HASHES = 128
SHINGLE = 3  # words


# Without spaces between words, a character of CJK text counts as one; signs count, for 3 + 4 is not 3 - 4.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]"
)
_RANDOM = np.random.Generator(np.random.PCG64(0))
_FACTORS = _RANDOM.integers(1, 2**63, size=(HASHES, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, size=(HASHES, 1), dtype=np.uint64)


def words(text: str) -> list[str]:
    """Lower-case words, single CJK characters and single signs."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(text: str, n: int) -> set[str]:
    """All runs of n words; the whole text as one where it is shorter; empty without any word."""
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))} if found else set()


class MinHash:
    """Texts added so far, and a search for the one most similar to a new one."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        sizes = [r for r in (32, 16, 8, 4, 2) if 1 - (1 - threshold**r) ** (HASHES // r) >= 0.99]
        self._rows = max(sizes, default=1)
        self._buckets: dict[bytes, list[int]] = defaultdict(list)
        self._signatures: list[np.ndarray] = []
        self._names: list[str] = []

    def nearest(self, text: str) -> tuple[float, str] | None:
        """The most similar text of at least the threshold, the earliest of equals."""
        signature = self._signature(text)
        if signature is None:
            return None
        near = {i for key in self._bands(signature) for i in self._buckets.get(key, ())}
        found = [(float((self._signatures[i] == signature).mean()), -i) for i in near]
        best = max(found, default=(0.0, 0))
        return (best[0], self._names[-best[1]]) if found and best[0] >= self.threshold else None

    def add(self, text: str, name: str) -> None:
        signature = self._signature(text)
        if signature is None:
            return
        for key in self._bands(signature):
            self._buckets[key].append(len(self._names))
        self._signatures.append(signature)
        self._names.append(name)

    def _signature(self, text: str) -> np.ndarray | None:
        """uint32 [HASHES]: per function the smallest shingle hash (multiply-shift, Dietzfelbinger 1997)."""
        shingles = sorted(ngrams(text, SHINGLE))
        if not shingles:
            return None
        keys = np.array([zlib.crc32(s.encode(errors="replace")) for s in shingles], dtype=np.uint64)
        return ((_FACTORS * keys + _OFFSETS) >> np.uint64(32)).min(axis=1).astype(np.uint32)

    def _bands(self, signature: np.ndarray) -> list[bytes]:
        rows = self._rows
        return [bytes([b]) + signature[b * rows : (b + 1) * rows].tobytes() for b in range(HASHES // rows)]
