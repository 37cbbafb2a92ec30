"""What the tests of chapters 12 to 14 share: artifacts made of frames, steps that workers can import, and a chain to be killed."""
import json
import os
import time
from pathlib import Path
from typing import Any

import polars as pl

from shisa import dedup, dsir, split
from shisa.config import file_sha256, write_json
from shisa.stage import Artifact, Stage, Work, run_stage, write_shard

COLUMNS = ("id", "text", "source", "lang", "licence", "meta")


def document(id: str, text: str, source: str = "s", lang: str = "ja", **meta: Any) -> dict[str, str]:
    """One document in the schema of every table of documents."""
    return {"id": id, "text": text, "source": source, "lang": lang, "licence": "CC0-1.0", "meta": json.dumps(meta)}


def table(rows: list[dict[str, str]]) -> pl.DataFrame:
    """Documents as a frame, its columns there when no row is."""
    return pl.DataFrame(rows, schema=dict.fromkeys(rows[0] if rows else COLUMNS, pl.String))


def artifact(folder: Path, frames: list[pl.DataFrame], fingerprint: str = "toy") -> Artifact:
    """A finished artifact whose table `documents` has these frames as its shards."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        write_shard(frame, folder / f"documents-{number:05d}.parquet")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.glob("*.parquet"))}
    write_json(folder / "manifest.json", {"files": files, "metrics": {}, "counts": {}, "fingerprint": fingerprint, "identity": {}})
    return Artifact(folder)


def cut(frame: pl.DataFrame, places: list[int]) -> list[pl.DataFrame]:
    """A frame in pieces, cut before these rows (a place named twice gives an empty piece)."""
    ends = [0, *sorted(min(place, frame.height) for place in places), frame.height]
    return [frame[first:end] for first, end in zip(ends, ends[1:], strict=False)]


def work_in(folder: Path) -> Work:
    """A work folder for a stage's function, without the runtime around it."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "test")


def run_on(stage: Stage, frames: list[pl.DataFrame], config: Any, folder: Path) -> tuple[dict[str, Any], Work]:
    """Metrics and work folder of a stage's function run on documents in these shards."""
    work = work_in(folder / "work")
    return stage.run(config, {stage.inputs[0]: artifact(folder / "in", frames)}, work), work


def written(work: Work, name: str) -> pl.DataFrame:
    """All shards of a table that a stage has written."""
    return pl.concat([pl.read_parquet(path) for path in sorted(work.path.glob(f"{name}-*.parquet"))])


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by name of a finished stage's files, as its manifest has them, after checking that they stand."""
    made = Artifact(folder)
    made.verify()
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*made.manifest["files"], "manifest.json"}
    return {name: entry["sha256"] for name, entry in made.manifest["files"].items()}


def stages(root: Path, workers: int = 1, count: int = 3) -> None:
    """Chapters 12 to 14 (the first `count` of them) at `tiny` from the artifact 11_filters that stands in `root`."""
    for module in (dedup, dsir, split)[:count]:
        name = module.STAGE.name
        run_stage(name, "tiny", root, config=module.config("tiny").change(workers=workers))


def doubled(item: int, folder: Path) -> dict[str, Any]:
    """A step: a file of its own and facts; an item that stands in `broken` raises, and one in `deadly` kills its process."""
    time.sleep(0.02)
    if (folder / f"broken-{item}").exists():
        raise ValueError(f"item {item} is broken")
    if (folder / f"deadly-{item}").exists():
        os._exit(9)
    with open(folder / "log", "a", encoding="utf-8") as handle:
        handle.write(f"{item}\n")
    write_shard(pl.DataFrame({"value": [item, 2 * item]}), folder / f"value-{item}.parquet")
    return {"item": item, "double": 2 * item}
