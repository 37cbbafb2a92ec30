"""Curation on real text: this project's steps beside data-selection and datatrove, on the same files, in CPU time.

    python benchmarks/curation.py --data ../shared/data --json OUT.json [--peers DIR] [--work DIR] [--only dsir,dedup,...]

The peers get an environment of their own in DIR (made on the first run: pip install data-selection datatrove). Every part
runs in a fresh process with one thread a library; compiling is done before the clock starts. The parts are read, filters,
dsir, dedup, chain, workers, tokens; OUT.json has the figures that the parts print.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from shisa import dedup, dsir, filters
from shisa.config import THREADS, ShisaError, markdown_table
from shisa.leaks import trait_counts
from shisa.stage import Work, write_shard
from shisa.text import SCRIPTS, fold, read_text_lines, utf8

PEERS = ("data-selection==1.0.3", "datatrove[io]==0.10.1", "xxhash<4", "spacy", "nltk", "scipy", "tokenizers")
TARGET = ("ja_wiki_leads", "ja_lit_aozora", "en_lit_classics")
KINDS = {"ja_wiki_leads": "encyclopedia", "ja_lit_aozora": "literature, Japanese", "ja_law_egov": "law", "ja_chat_realpersona": "chat",
         "ja_blog_azu": "blog", "en_lit_classics": "literature, English"}
SHARD = 64_000_000


def corpus(data: Path) -> pl.DataFrame:
    """All documents of the folder's corpus in the schema of 10_sources."""
    rows = []
    for path in sorted((data / "corpus").glob("*.jsonl.zst")):
        domain = path.name.partition(".")[0]
        for _, line in read_text_lines(path):
            record = orjson.loads(line)
            rows.append((f"{domain}/{record['id']}", record["text"], domain, domain[:2], record.get("license", ""), "{}"))
    if not rows:
        raise ShisaError(f"{data / 'corpus'} holds no .jsonl.zst file: --data names the folder with the corpus")
    return pl.DataFrame(rows, schema=["id", "text", "source", "lang", "licence", "meta"], orient="row")


def write_shards(frame: pl.DataFrame, folder: Path, first: int = 0) -> int:
    """Cut a frame into shards of about 64 MB of text; returns how many there are now."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = frame.with_columns(part=pl.col("text").str.len_bytes().cum_sum() // SHARD).partition_by("part", include_key=False)
    for number, part in enumerate(parts, first):
        write_shard(part, folder / f"documents-{number:05d}.parquet")
    return first + len(parts)


def turned(frame: pl.DataFrame, by: int) -> pl.DataFrame:
    """Another corpus of the same shape: kanji, kana and Latin letters moved on by `by` within their blocks."""
    starts, codes = [0], []
    for text in frame["text"]:
        codes.append(np.frombuffer(text.encode("utf-32-le"), np.uint32))
        starts.append(starts[-1] + codes[-1].size)
    flat = np.concatenate(codes)
    for low, high, step in ((0x4E00, 0x9F00, 97), (0x3041, 0x3094, 1), (0x30A1, 0x30F4, 1), (0x61, 0x7A, 1), (0x41, 0x5A, 1)):
        inside = (flat >= low) & (flat <= high)
        flat[inside] = (flat[inside] - low + step * by) % (high - low + 1) + low
    texts = [flat[first:end].tobytes().decode("utf-32-le") for first, end in zip(starts, starts[1:], strict=False)]
    return frame.with_columns(text=pl.Series(texts), id=pl.col("id") + f"/{by}")


def work_in(folder: Path) -> Work:
    """An empty work folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "benchmark")


def megabytes(shards: list[Path]) -> float:
    """UTF-8 text of some shards in MB."""
    return sum(int(pl.scan_parquet(shard).select(pl.col("text").str.len_bytes().sum()).collect().item()) for shard in shards) / 1e6


class Shards:
    """A folder of shards in place of an artifact."""

    def __init__(self, folder: Path):
        self.folder = folder

    def shards(self, name: str) -> list[Path]:
        """Its Parquet files, in order."""
        return sorted(self.folder.glob(f"{name}-*.parquet"))


def by_scripts(frame: pl.DataFrame) -> np.ndarray:
    """The chain's filter: 5% kana in Japanese, 40% Latin letters in English, of what is not space."""
    counts = trait_counts(*utf8(frame["text"]))
    size = np.maximum(sum(counts[script] for script in SCRIPTS[1:]), 1)
    return np.where(frame["lang"] == "ja", (counts["hiragana"] + counts["katakana"]) / size >= 0.05, counts["latin"] / size >= 0.4)


def by_all_filters(frame: pl.DataFrame, config: filters.Config) -> np.ndarray:
    """Every rule of 11_filters, language identification too."""
    return (filters.judge_frame(frame, config)["reason"] == "").to_numpy()


def timed(run: Callable[[], Any], warm: Callable[[], Any]) -> dict[str, float]:
    """CPU and wall seconds of `run` after `warm`, and the peak memory of the process in MB."""
    warm()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss would count the parent's memory too
    return seconds | {"peak_mb": int(peak[1]) / 1000}


# ── parts that run in a process of their own ──────────────────────────────────────────────────────────────────────────


def part_dsir(raw: str, target: str, out: str) -> dict[str, float]:
    """DSIR from JSON lines to JSON lines, the way of 13_dsir: count, weigh, draw half."""
    def run(source: str) -> None:
        config = dsir.Config(fit_bytes=10**12)
        texts = pl.read_ndjson(source)
        there = dsir.count_features(texts["text"], config)
        wanted = dsir.count_features(pl.read_ndjson(target)["text"], config)
        ratio = dsir.log_distribution(wanted, 1.0) - dsir.log_distribution(there, 1.0)
        del texts
        texts = pl.read_ndjson(source)  # a second reading: the text is not kept
        keys = dsir.log_weights(texts["text"], ratio, config) + dsir.gumbel(texts["id"], 1)
        limit = dsir.kth_largest([keys], texts.height // 2)
        texts.filter(pl.Series(keys >= limit)).write_ndjson(f"{out}/chosen.jsonl")

    return timed(partial(run, raw), partial(run, target))


def part_dedup(folder: str, small: str, out: str) -> dict[str, float]:
    """12_dedup from Parquet to Parquet, near duplicates alone (datatrove has no clusters)."""
    def run(source: str) -> None:
        work = work_in(Path(out))
        dedup.run(dedup.Config(group_rows=0), {"11_filters": Shards(Path(source))}, work)
        print(work.counts, file=sys.stderr)

    return timed(partial(run, folder), partial(run, small))


def part_chain(folder: str, small: str, out: str, every_filter: str, workers: str) -> dict[str, float]:
    """The chain in three readings, Parquet to Parquet; with `every_filter` all rules of 11_filters."""
    keep = partial(by_all_filters, config=filters.config("small")) if every_filter == "1" else by_scripts
    config = dsir.Config(target=TARGET, share=0.5, workers=int(workers))

    def run(source: str) -> None:
        work = work_in(Path(out))
        dsir.curate(Shards(Path(source)).shards("documents"), work, keep, dedup.Config(group_rows=0, workers=int(workers)), config)
        print(work.counts, file=sys.stderr)

    return timed(partial(run, folder), partial(run, small))


def part_read(folder: str, small: str) -> dict[str, float]:
    """Parquet into memory by polars, the text alone: says how fast the machine is in this hour."""
    def run(source: str) -> None:
        for shard in Shards(Path(source)).shards("documents"):
            pl.read_parquet(shard, columns=["text"])

    return timed(partial(run, folder), partial(run, small))


def child(command: list[str], threads: int = 1) -> dict[str, Any]:
    """Run a part in a fresh process; its last line of output is JSON."""
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads)), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ShisaError(f"{' '.join(command[:3])} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def own(part: str, *arguments: Any) -> dict[str, Any]:
    """Run a `part_*` of this file in a fresh process."""
    return child([sys.executable, __file__, "--part", part, *map(str, arguments)])


# ── the parts of the report ───────────────────────────────────────────────────────────────────────────────────────────


def r_precision(weights: np.ndarray, inside: np.ndarray) -> float:
    """Of the k documents with the largest weights the share that is of the domain, k being the domain's size."""
    best = np.argsort(-weights, kind="stable")[: int(inside.sum())]
    return float(inside[best].mean())


def dsir_report(frame: pl.DataFrame, peer: str, work: Path) -> dict[str, float]:
    """Speed file to file, and R-precision of finding each of ten domains in the mixed corpus, targets held out."""
    work.mkdir(parents=True, exist_ok=True)
    rows = frame.select("id", "text", "source").sample(fraction=1.0, shuffle=True, seed=1)
    raw, target = work / "raw.jsonl", work / "target.jsonl"
    rows.write_ndjson(raw)
    rows.filter(pl.col("source").is_in(TARGET)).head(800).write_ndjson(target)
    size = rows["text"].str.len_bytes().sum() / 1e6
    ours, theirs = own("dsir", raw, target, work), child([peer, "benchmarks/curation_peers.py", "dsir", str(raw), str(target), str(work)])
    figures = {"dsir_mb_s": size / ours["cpu"], "dsir_peer_mb_s": size / theirs["seconds"], "dsir_ratio": theirs["seconds"] / ours["cpu"]}
    return figures | find_report(frame, peer, work)


def find_report(frame: pl.DataFrame, peer: str, work: Path) -> dict[str, Any]:
    """R-precision of finding kinds of text, and single sources of 500 documents or more, in a quarter of the corpus; another
    quarter is the target. Each method ranks by its weights, without noise."""
    kind = pl.col("source").replace(KINDS).str.replace("^ja_docs.*", "manuals, Japanese").str.replace("^en_docs.*", "manuals, English")
    some = frame.sample(fraction=1.0, shuffle=True, seed=1).with_columns(kind=kind, quarter=pl.int_range(pl.len()).over("source") % 4)
    some = some.filter(pl.col("quarter") < 2).select("text", "kind", "source", "quarter")
    some.write_ndjson(work / "some.jsonl")
    sources = [name for name, count in some["source"].value_counts().rows() if count >= 250]
    targets = [("kind", name) for name in sorted(some["kind"].unique())] + [("source", name) for name in sorted(sources)]
    (work / "targets.json").write_text(json.dumps(targets))
    child([peer, "benchmarks/curation_peers.py", "weights", str(work / "some.jsonl"), str(work / "targets.json"), str(work)])
    pool, config = some.filter(pl.col("quarter") == 0), dsir.Config()
    counts, table = dsir.count_features(pool["text"], config), []
    for place, (column, name) in enumerate(targets):
        wanted = dsir.count_features(some.filter((pl.col("quarter") == 1) & (pl.col(column) == name))["text"], config)
        ratio = dsir.log_distribution(wanted, config.smoothing) - dsir.log_distribution(counts, config.smoothing)
        inside = (pool[column] == name).to_numpy()
        theirs = np.load(work / f"weights-{place}.npy")
        table.append({"by": column, "target": name, "documents": int(inside.sum()),
                      "shisa": r_precision(dsir.log_weights(pool["text"], ratio, config), inside), "data-selection": r_precision(theirs, inside)})
    means = {f"dsir_r_precision{end}{tail}": float(np.mean([row[who] for row in table if row["by"] == column]))
             for who, end in (("shisa", ""), ("data-selection", "_peer")) for column, tail in (("kind", ""), ("source", "_sources"))}
    return means | {"dsir_targets": table}


def neardup_curve(data: Path) -> dict[str, Any]:
    """Precision and recall on the labelled pairs, by the similarity that is asked for."""
    def records(name: str) -> list[dict[str, Any]]:
        return [orjson.loads(line) for _, line in read_text_lines(data / "neardup" / name) if line]

    documents, config = records("laravel_versions_docs.jsonl.zst"), dedup.Config()
    place = {row["id"]: number for number, row in enumerate(documents)}
    pairs = [p for p in records("laravel_versions_pairs.jsonl.zst") if p["a"] in place and p["b"] in place]
    ones, others = (np.array([place[p[end]] for p in pairs]) for end in "ab")
    ones, others = np.minimum(ones, others), np.maximum(ones, others)
    true = np.array([p["jaccard_char5"] for p in pairs])
    starts, codes = fold(pl.Series([row["text"] for row in documents]))
    keys = dedup.band_keys(dedup.sign(starts, codes, config), config.rows)
    rows = np.arange(len(documents))
    every = ones.astype(np.uint64) << np.uint64(32) | others.astype(np.uint64)
    shared = np.any([own[ones] == own[others] for own in keys], axis=0)  # the pair itself falls into one bucket
    linked = np.unique(np.concatenate([dedup.bucket_pairs(own, rows) for own in keys]))
    sets = [dedup.shingle_set(codes[a:b], config.shingle) for a, b in zip(starts, starts[1:], strict=False)]
    similar = dedup.jaccard(*dedup.unpack(linked), sets)
    curve = []
    for limit in np.arange(0.5, 1.0, 0.05).round(2):
        roots = np.array(dedup.groups_of(len(documents), linked[similar >= limit]))
        together, right = roots[ones] == roots[others], true >= limit
        curve.append({"similarity": float(limit), "pairs": int(right.sum()), "recall": float(together[right].mean()) if right.any() else 1.0,
                      "precision of links": float(np.mean(similar[similar >= limit] >= limit)) if (similar >= limit).any() else 1.0,
                      "precision of groups": float(right[together].mean()) if together.any() else 1.0,
                      "recall of candidates": float(shared[right].mean()) if right.any() else 1.0})
    at = dedup.groups_of(len(documents), linked[similar >= config.near])
    together = np.array(at)[ones] == np.array(at)[others]
    high, middle = true >= 0.9, (true >= 0.8) & (true < 0.9)
    return {"dedup_recall_90": float(together[high].mean()), "dedup_recall_80": float(together[middle].mean()),
            "dedup_candidates_90": float(shared[high].mean()), "dedup_candidates_80": float(shared[middle].mean()),
            "dedup_labelled_pairs": int(every.size), "dedup_curve": curve}


def dedup_report(data: Path, shards: Path, small: Path, peer: str, work: Path) -> dict[str, Any]:
    """Parquet to Parquet, and recall on labelled pairs."""
    size = megabytes(Shards(shards).shards("documents"))
    ours = own("dedup", shards, small, work / "dedup")
    theirs = child([peer, "benchmarks/curation_peers.py", "minhash", str(shards), str(work / "datatrove")])
    return {"dedup_mb_s": size / ours["cpu"], "dedup_peer_mb_s": size / theirs["seconds"], "dedup_ratio": theirs["seconds"] / ours["cpu"],
            **neardup_curve(data)}


def chain_report(shards: Path, large: Path, small: Path, work: Path) -> dict[str, float]:
    """MB/s of one core, with the script rule and with every filter; peak memory on the corpus and on ten times as much."""
    sizes = {name: megabytes(Shards(folder).shards("documents")) for name, folder in (("1x", shards), ("10x", large))}
    one, ten = (own("chain", folder, small, work / "chain", 0, 1) for folder in (shards, large))
    every = own("chain", shards, small, work / "chain", 1, 1)
    return {"chain_mb_s": sizes["10x"] / ten["cpu"], "chain_mb_s_1x": sizes["1x"] / one["cpu"], "chain_peak_mb_1x": one["peak_mb"],
            "chain_peak_mb_10x": ten["peak_mb"], "chain_filters_mb_s": sizes["1x"] / every["cpu"], "chain_filters_peak_mb": every["peak_mb"],
            "anchor_parquet_read_mb_s": sizes["1x"] / own("read", shards, small)["cpu"], "chain_size_mb": sizes["1x"], "chain_size_mb_10x": sizes["10x"], "chain_wall_10x": ten["wall"]}


def workers_report(large: Path, small: Path, work: Path) -> dict[str, float]:
    """Wall time of one worker over that of two, on ten times the corpus."""
    one, two = (own("chain", large, small, work / "chain", 0, workers) for workers in (1, 2))
    return {"workers_ratio": one["wall"] / two["wall"], "workers_wall_1": one["wall"], "workers_wall_2": two["wall"]}


def peer_python(folder: Path) -> str:
    """The interpreter of the peers' environment, made when it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS], check=True)
    return str(python)


def main() -> None:
    """Make the inputs, run the parts, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "shisa" / "peers")
    parser.add_argument("--work", type=Path, help="folder for inputs and results (default: a temporary one)")
    parser.add_argument("--only", default="read,filters,dsir,dedup,chain,workers,tokens")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        shards, large, small = work / "1x", work / "10x", work / "small"
        frame = corpus(arguments.data)
        if not shards.is_dir():
            write_shards(frame, shards)
            write_shards(frame.sample(400, seed=1), small)
        if {"chain", "workers"} & set(wanted) and not large.is_dir():
            count = write_shards(frame, large)
            for by in range(1, 10):
                count = write_shards(turned(frame, by), large, count)
        peer = peer_python(arguments.peers) if {"dsir", "dedup"} & set(wanted) else ""
        reports: dict[str, Callable[[], dict[str, Any]]] = {
            "read": lambda: measure_part("curation_read", arguments.data),
            "filters": lambda: measure_part("curation_filters", arguments.data),
            "dsir": lambda: dsir_report(frame, peer, work / "dsir"),
            "dedup": lambda: dedup_report(arguments.data, shards, small, peer, work),
            "chain": lambda: chain_report(shards, large, small, work),
            "workers": lambda: workers_report(large, small, work),
            "tokens": lambda: measure_part("curation_tokens", arguments.data)}
        figures: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
        for name in wanted:
            figures |= reports[name]()
            arguments.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
            print(name, "done", file=sys.stderr)
    print(markdown_table([{"figure": name, "value": value} for name, value in sorted(figures.items()) if isinstance(value, int | float)]).data)


def measure_part(module: str, data: Path) -> dict[str, float]:
    """The figures of another benchmark file beside this one."""
    sys.path.insert(0, str(Path(__file__).parent))
    return __import__(module).measure(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(globals()[f"part_{sys.argv[2]}"](*sys.argv[3:])))
    else:
        main()
