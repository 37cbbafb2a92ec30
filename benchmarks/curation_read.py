"""How fast chapter 10 reads: MB of text per CPU second, beside `datasets`, datatrove and the floor that orjson sets.

    python benchmarks/curation_read.py --data ../shared/data [--json OUT.json]

Every reader gets the same files, in a process of its own with one thread per library, and is measured from the first byte to
the last document (imports left out). A figure is the best of `RUNS` runs; ratios are of such figures from the same call.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = 2
ODD = ("ja_lit_aozora",)  # has columns of its own, which `datasets` does not put beside others


def files_of(folder: Path) -> list[Path]:
    """The files that every reader gets."""
    return sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl.zst", ".parquet")) and not path.name.startswith(ODD))


def config_of(folder: Path) -> Any:
    """The config of the stage for these files; broken records are counted."""
    from shisa import sources

    kinds = tuple(path.name for path in files_of(folder))
    return sources.config("h100").change(folder=str(folder), files=kinds, broken="reject", budgets={"ja": 0, "en": 0})


def shisa_read(folder: Path, scratch: Path) -> Callable[[], None]:
    """Documents of the schema in memory, some megabytes at a time: parsed, mended, checked, named; nothing is written."""
    from shisa import sample, sources

    class Frames(sources.Reader):
        def flush(self) -> None:
            self.frames, self.size = [], 0

    def go() -> None:
        reader = Frames(config_of(folder), scratch, scratch, 0)
        for path in files_of(folder):
            reader.read(sample.file_entry(path.name, path))

    return go


def shisa_stage(folder: Path, scratch: Path) -> Callable[[], None]:
    """The whole stage: read, keys, repeated ids, budgets, shards of zstd Parquet."""
    from shisa import sources
    from shisa.stage import Work

    for name in ("out", "scratch"):
        (scratch / name).mkdir()
    work = Work(scratch / "out", scratch / "scratch", scratch / "status.json", "10_sources")
    config = config_of(folder)
    return lambda: sources.run(config, {}, work) and None


def floor(folder: Path, scratch: Path) -> Callable[[], None]:
    """Decompress, split into lines, parse with orjson; or read the column `text` with polars. Nothing is checked or kept."""
    import orjson
    import polars as pl
    import zstandard

    def go() -> None:
        for path in files_of(folder):
            if path.suffix == ".parquet":
                pl.read_parquet(path, columns=["text"])
                continue
            with open(path, "rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as stream:
                rest = b""
                while block := stream.read(1 << 20):
                    *lines, rest = (rest + block).split(b"\n")
                    for line in lines:
                        orjson.loads(line)

    return go


def datasets_load(folder: Path, scratch: Path) -> Callable[[], None]:
    """`datasets.load_dataset`: Arrow files in a cache."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    names = [str(path) for path in files_of(folder)]
    kind = "parquet" if names[0].endswith(".parquet") else "json"
    return lambda: load_dataset(kind, data_files=names, split="train", cache_dir=str(scratch / "cache")) and None


def datasets_stream(folder: Path, scratch: Path) -> Callable[[], None]:
    """`datasets` in streaming mode, as the chapter read the Hub before."""
    from datasets import load_dataset

    names = [str(path) for path in files_of(folder)]
    kind = "parquet" if names[0].endswith(".parquet") else "json"
    return lambda: sum(1 for _ in load_dataset(kind, data_files=names, split="train", streaming=True)) and None


def datatrove_read(folder: Path, scratch: Path) -> Callable[[], None]:
    """datatrove's JsonlReader or ParquetReader; its documents are dropped as they come."""
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from loguru import logger

    logger.remove()
    pattern = "*.parquet" if files_of(folder)[0].suffix == ".parquet" else "*.jsonl.zst"
    reader = (ParquetReader if pattern == "*.parquet" else JsonlReader)(str(folder), glob_pattern=pattern)
    return lambda: sum(1 for _ in reader()) and None


READERS = {"read": shisa_read, "stage": shisa_stage, "floor": floor, "datasets": datasets_load, "stream": datasets_stream,
           "datatrove": datatrove_read}


def alone(reader: str, folder: Path) -> dict[str, float]:
    """CPU seconds and peak MiB of one reader in a process of its own, the best of `RUNS`."""
    threads = dict.fromkeys(("POLARS_MAX_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--one", reader, "--data", str(folder)]
    told = [json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(RUNS)]
    return {"seconds": min(run["seconds"] for run in told), "peak": max(run["peak"] for run in told)}


def one(reader: str, folder: Path) -> None:
    """Run one reader here and print its CPU seconds and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        go = READERS[reader](folder, Path(scratch))
        start = time.process_time()
        go()
        seconds = time.process_time() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss would start at the parent's
    print(json.dumps({"seconds": seconds, "peak": int(peak[1]) / 1024}))


def measure(data: Path) -> dict[str, float]:
    """MB of UTF-8 text per CPU second for JSON lines (zstd) and Parquet; ratios to the peers; memory for one and four copies.

    `read_mb_s`: documents in memory, from .jsonl.zst. `sources_mb_s`: the whole stage, shards written. `…_ratio` over 1:
    the chapter is faster, its reading against a peer's reading, its stage against `datasets`' load, which also writes.
    """
    import polars as pl
    from shisa.sample import Records, file_entry

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        lines, tables, four = (Path(place, name) for name in ("lines", "tables", "four"))
        for folder in (lines, tables, four):
            folder.mkdir()
        size = 0
        for path in files_of(data / "corpus"):
            (lines / path.name).symlink_to(path.resolve())
            for copy in range(4):
                (four / f"{path.name.partition('.')[0]}_{copy}.jsonl.zst").symlink_to(path.resolve())
            rows = [record for records, _, _ in Records(file_entry(path.name, path), print) for record in records]
            frame = pl.DataFrame(rows).select("id", "text", "source", "lang", "license")
            frame.write_parquet(tables / f"{path.name.partition('.')[0]}.parquet")
            size += int(frame["text"].str.len_bytes().sum())
        cpu = {(kind.name, reader): alone(reader, kind) for kind in (lines, tables) for reader in READERS if reader != "stage"}
        stage = {kind.name: alone("stage", kind) for kind in (lines, tables, four)}
    for kind, prefix in (("lines", "read"), ("tables", "read_parquet")):
        own = cpu[kind, "read"]["seconds"]
        found[f"{prefix}_mb_s"] = size / 1e6 / own
        found |= {f"{prefix}_{peer}_ratio": cpu[kind, peer]["seconds"] / own for peer in ("datatrove", "stream", "floor")}
        found[f"{prefix.replace('read', 'sources')}_mb_s"] = size / 1e6 / stage[kind]["seconds"]
        found[f"{prefix.replace('read', 'sources')}_datasets_ratio"] = cpu[kind, "datasets"]["seconds"] / stage[kind]["seconds"]
    found |= {"sources_peak_mib": stage["lines"]["peak"], "sources_peak_mib_4x": stage["four"]["peak"], "read_text_mb": size / 1e6}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure and print, or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        return one(told.one, told.data)
    found = measure(told.data)
    print(json.dumps(found, indent=1))
    if told.json:
        told.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
