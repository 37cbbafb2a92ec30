"""How many planted faults the validators of chapter 40 find, and how many good human translations they refuse.

    python benchmarks/validation.py draw --data ../shared/data [--set measured] [--from 0] [--count 40]   # pairs to be read and labelled
    python benchmarks/validation.py --data ../shared/data [--out nbs/studies/validation.json]

The labels stand in nbs/studies/validation.json, made by reading each pair before a validator ran on it: ids, a prefix of the pair's
sha256, `good` or what is wrong. Only ids, labels and counts are written, no text of the data.
"""

import hashlib
import json
import random
from pathlib import Path

from shisa.text import read_text_lines

SEED = "validation-2026"  # of the draw that is measured
Pair = tuple[str, str]


def python_docs(data: Path) -> dict[str, Pair]:
    """{id: (English, Japanese)} of parallel/python_docs."""
    path = data / "parallel" / "python_docs" / "python_docs_enja.jsonl.zst"
    rows = (json.loads(line) for _, line in read_text_lines(path) if line)
    return {f"python_docs:{row['id']}": (row["en"], row["ja"]) for row in rows}


def small_parallel(data: Path) -> dict[str, Pair]:
    """{file:line: (English, Japanese without the spaces between its tokens)} of parallel/small_parallel_enja."""
    folder, found = data / "parallel" / "small_parallel_enja", {}
    for name in ("dev", "test", "train"):
        ending = ".zst" if name == "train" else ""
        sides = [[line.decode() for _, line in read_text_lines(folder / f"{name}.{side}{ending}")] for side in ("en", "ja")]
        for number, (english, japanese) in enumerate(zip(*sides, strict=True), 1):
            if english and japanese:
                found[f"small_parallel_enja:{name}:{number}"] = (english, japanese.replace(" ", ""))
    return found


def drawn(pairs: dict[str, Pair], seed: str) -> list[str]:
    """The ids in the order of the draw: sorted, then shuffled by the printed seed."""
    ids = sorted(pairs)
    random.Random(seed).shuffle(ids)
    return ids


def pair_sha256(pair: Pair) -> str:
    """The first 12 hex digits of a pair's sha256."""
    return hashlib.sha256("\t".join(pair).encode("utf-8")).hexdigest()[:12]
