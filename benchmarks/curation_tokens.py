"""Tokenising and packing the shared corpus: exact ids, speed beside `tokenizers`, documents cut and padding at 4,096.

    python benchmarks/curation_tokens.py --data ../shared/data [--tokenizer DIR] [--json OUT.json]

CPU time of one thread each, on the same texts in memory, one run. Without `--tokenizer` a small extension of Mistral's vocabulary is
built first, from a part of the corpus. `encode_batch` is the peer of the ratio; SentencePiece and, where it is installed, kitoken are
measured beside it, with the number of documents in which their ids differ.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each; read when tokenizers is first used

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from shisa.base import mistral_model_file, save_spm_tokenizer
from shisa.config import ShisaError
from shisa.mix import Encoder
from shisa.packing import Pieces, check_packed, gather, pack, spans
from shisa.pieces import spm_proto
from shisa.text import read_text_lines
from shisa.tokenizer import extend

LENGTH, SEED = 4096, 0
TRAIN_BYTES, MEASURED_BYTES, NEW_PIECES = 6_000_000, 12_000_000, 12_000


def corpus(data: Path) -> pl.DataFrame:
    """All documents of corpus/*.jsonl.zst in a seeded order: lang, text."""
    files = sorted((data / "corpus").glob("*.jsonl.zst"))
    if not files:
        raise ShisaError(f"{data / 'corpus'} holds no .jsonl.zst file: --data names the folder with the corpus")
    rows = [(path.name[:2], orjson.loads(line)["text"]) for path in files for _, line in read_text_lines(path) if line]
    frame = pl.DataFrame(rows, schema=["lang", "text"], orient="row")
    return frame[np.random.default_rng(SEED).permutation(len(frame))]


def up_to(texts: pl.Series, size: int) -> pl.Series:
    """The first texts, of about `size` bytes in all."""
    return texts.head(int(np.searchsorted(texts.str.len_bytes().cum_sum().to_numpy(), size)) + 1)


def small_tokenizer(documents: pl.DataFrame, folder: Path) -> Path:
    """Mistral's vocabulary and `NEW_PIECES` more, learnt from a part of the Japanese documents."""
    texts = up_to(documents.filter(pl.col("lang") == "ja")["text"], TRAIN_BYTES).to_list()
    proto = extend(spm_proto(mistral_model_file()), texts, 32_000 + NEW_PIECES)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    save_spm_tokenizer(folder / "tokenizer.model", folder)
    return folder


def seconds(work: Callable[[], Any], times: int = 1) -> tuple[Any, float]:
    """What the work gives, and its CPU time in seconds: the least of several runs."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        found = work()
        taken.append(time.process_time() - start)
    return found, min(taken)


def tokenising(encoder: Encoder, folder: Path, texts: pl.Series) -> dict[str, float]:
    """MB/s of the encoder and its peers on the same texts. Raises `ShisaError` where the encoder's ids are not those of
    tokenizers."""
    import sentencepiece

    size, rows, backend = texts.str.len_bytes().sum() / 1e6, texts.to_list(), encoder.tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    encoder(texts.head(2))  # compiled now, or read from numba's cache
    (tokens, sizes), own = seconds(lambda: encoder(texts), 3)
    found, batch = seconds(lambda: backend.encode_batch(rows, add_special_tokens=False))
    wanted = [np.array(row.ids, np.int32) for row in found]
    del found
    ids = np.split(tokens, np.cumsum(sizes)[:-1])
    if differ := sum(not np.array_equal(a[1:-1], b) for a, b in zip(ids, wanted, strict=True)):
        raise ShisaError(f"{differ} of {len(rows)} documents have other ids than those of tokenizers")
    _, fast = seconds(lambda: backend.encode_batch_fast(rows, add_special_tokens=False))
    out = {"tokenise_ratio": batch / own, "tokenise_mb_s": size / own, "encode_batch_mb_s": size / batch,
           "encode_batch_fast_mb_s": size / fast, "tokenise_documents": len(rows), "tokenise_differ": 0}
    peers = {"sentencepiece": sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode}
    try:
        import kitoken

        peers["kitoken"] = kitoken.Kitoken.from_sentencepiece_file(str(folder / "tokenizer.model")).encode_all
    except ImportError:
        pass
    for name, encode in peers.items():
        found, taken = seconds(lambda encode=encode: encode(rows))
        out[f"{name}_mb_s"] = size / taken
        out[f"{name}_differ"] = sum(not np.array_equal(np.array(a, np.int32), b) for a, b in zip(found, wanted, strict=True))
    return out


def chunked_cut(sizes: np.ndarray, length: int) -> np.ndarray:
    """Which documents concatenate-and-chunk cuts: those that reach over the end of a sequence."""
    ends = np.cumsum(sizes)
    return (ends - sizes) // length != (ends - 1) // length


def packing(encoder: Encoder, texts: pl.Series, length: int = LENGTH) -> dict[str, float]:
    """Share of the documents that fit into a sequence but are cut, and padding, counted on the packed sequences."""
    tokens, sizes = encoder(texts)
    owners, starts, counts = spans(sizes, length)
    heads = (np.cumsum(sizes) - sizes)[owners]
    pieces = Pieces(gather(tokens, heads, heads + starts, counts), counts, owners, starts + counts - 1 == sizes[owners])
    packed, taken = seconds(lambda: pack(pieces, length, 0, SEED))
    if check_packed(packed, encoder.begin, encoder.end) != len(texts):
        raise ShisaError("a document does not end in the packed sequences")
    in_pieces = np.bincount(packed.frame["documents"].explode().to_numpy(), minlength=len(sizes))
    fits, chunked = sizes <= length, chunked_cut(sizes, length)
    return {"pack_cut": float((in_pieces > 1)[fits].mean()), "pack_padding": packed.padding_share,
            "chunk_cut": float(chunked[fits].mean()), "chunk_padding": float(-sizes.sum() % length / sizes.sum()),
            "pack_longer": int((~fits).sum()), "pack_documents": len(sizes), "pack_sequences": len(packed),
            "pack_mtokens_s": sizes.sum() / 1e6 / taken}


def measure(data: Path, tokenizer: Path | None = None) -> dict[str, float]:
    """tokenise_ratio, tokenise_mb_s, pack_cut, pack_padding and what stands beside them, on the corpus below `data`."""
    documents = corpus(data)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer or small_tokenizer(documents, Path(folder))
        encoder = Encoder(tokenizer)
        if encoder.tables is None:
            raise ShisaError(f"{tokenizer}: not a tokenizer that the encoder knows; name an extension that 21_tokenizer wrote")
        texts = up_to(documents["text"], MEASURED_BYTES)
        longest = documents["text"].gather(documents["text"].str.len_bytes().arg_sort(descending=True).head(3))
        return {"vocabulary": len(encoder.tokenizer), **tokenising(encoder, tokenizer, pl.concat([texts, longest])),
                **packing(encoder, documents["text"])}


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds corpus/")
    parser.add_argument("--tokenizer", type=Path, help="a folder that 21_tokenizer wrote")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    found = measure(arguments.data, arguments.tokenizer)
    for name, value in found.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value:,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
