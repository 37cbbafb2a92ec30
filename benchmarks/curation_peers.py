"""What benchmarks/curation.py measures against, in an environment of its own: data-selection 1.0.3 and datatrove's MinHash.

    PEERS/bin/python benchmarks/curation_peers.py dsir|weights|minhash IN [TARGET] OUT

Nothing of shisa is imported. Each command prints one line of JSON with the CPU seconds of its work, imports left out.
"""

import json
import sys
import time
from pathlib import Path


def dsir(raw: str, target: str, out: str) -> None:
    """data-selection with its own settings, file to file: fit, weigh, resample half of the documents."""
    from data_selection import HashedNgramDSIR

    lines = sum(1 for _ in open(raw, "rb"))
    started = time.process_time()
    selection = HashedNgramDSIR([raw], [target], cache_dir=f"{out}/cache", num_proc=1)
    selection.fit_importance_estimator(num_tokens_to_fit="all")
    selection.compute_importance_weights()
    selection.resample(out_dir=f"{out}/chosen", num_to_sample=lines // 2, cache_dir=f"{out}/resampled")
    print(json.dumps({"seconds": time.process_time() - started}))


def weights(some: str, targets: str, out: str) -> None:
    """Log importance weights of the first quarter for every target (column, name) of the second, from data-selection's
    features and formula; features are made once. Without its draw, and without its rule that drops short documents."""
    import numpy as np
    from data_selection.hashed_ngram_dsir import get_ngram_counts
    from scipy.sparse import csr_array, vstack

    started = time.process_time()
    records = [json.loads(line) for line in open(some, encoding="utf-8")]
    features = vstack([csr_array(get_ngram_counts(record["text"])[None]) for record in records]).tocsr()
    quarter = np.array([record["quarter"] for record in records])

    def log_distribution(rows: np.ndarray, smoothing: float) -> np.ndarray:
        counts = np.asarray(features[np.flatnonzero(rows)].sum(axis=0)).ravel() + smoothing
        return np.log(counts / counts.sum() + 1e-8)  # as the package does it: target unsmoothed, plus a small number

    for place, (column, name) in enumerate(json.loads(Path(targets).read_text())):
        wanted = np.array([record[column] == name for record in records]) & (quarter == 1)
        ratio = log_distribution(wanted, 0.0) - log_distribution(quarter == 0, 0.0)
        np.save(f"{out}/weights-{place}.npy", features[np.flatnonzero(quarter == 0)] @ ratio)
    print(json.dumps({"seconds": time.process_time() - started}))


class Characters:
    """A tokenizer whose words are characters."""

    def word_tokenize(self, text: str) -> list[str]:
        """The characters of a text."""
        return list(text)


def minhash(folder: str, out: str) -> None:
    """datatrove's four steps on character 5-grams, 14 buckets of 8 hashes, Parquet to Parquet, in this process."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from loguru import logger

    logger.remove()
    config, shards = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8), len(list(Path(folder).glob("*.parquet")))
    started = time.process_time()
    sign = MinhashDedupSignature(f"{out}/signatures", config=config)
    sign.word_tokenizer = Characters()
    for rank in range(shards):
        sign.run(ParquetReader(folder, glob_pattern="*.parquet").run(rank=rank, world_size=shards), rank, shards)
    buckets = MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)
    for rank in range(config.num_buckets):
        buckets.run(None, rank, config.num_buckets)
    MinhashDedupCluster(f"{out}/buckets", f"{out}/removed", config=config).run(None, 0, 1)
    remove, kept = MinhashDedupFilter(f"{out}/removed"), 0
    for rank in range(shards):
        with ParquetWriter(f"{out}/documents") as writer:
            for document in remove.run(ParquetReader(folder, glob_pattern="*.parquet").run(rank=rank, world_size=shards), rank, shards):
                writer.write(document, rank)
                kept += 1
    print(json.dumps({"seconds": time.process_time() - started, "kept": kept}))


if __name__ == "__main__":
    {"dsir": dsir, "weights": weights, "minhash": minhash}[sys.argv[1]](*sys.argv[2:])
