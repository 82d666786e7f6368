"""Near duplicates by MinHash: texts that share most word shingles, found without comparing all pairs.

    index = MinHash(threshold=0.8)
    index.nearest(text)        # (estimated Jaccard similarity, name) of the most similar text so far, or None
    index.add(text, name)

Broder 1997 ("On the resemblance and containment of documents"); banding as in Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4. With 128 hash functions the estimate's standard error is at most
0.044, and two texts at a threshold of 0.04 or more meet in a band with probability 0.99. The same every run.
Memory: 512 bytes of signature per text, and one entry per band.
"""

import re
import unicodedata
import zlib
from collections import defaultdict

import numpy as np

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
