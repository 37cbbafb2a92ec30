"""What the review of chapter 44 finds in a machine-translated instruction set, and how long it takes.

    python benchmarks/review.py --data ../shared/data [--out nbs/studies/review_dolly_ja.json]

Only counts and shares are written, no text of the set. Chapter 44 shows the table and the plot.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

from shisa.base import mistral_model_file
from shisa.config import ShisaError, markdown_table, write_json
from shisa.dedup import Config as NearConfig
from shisa.dedup import exact_groups, near_duplicates
from shisa.evalsets import evaluation_texts
from shisa.review import review
from shisa.text import read_text_lines


def human_written(data: Path) -> dict[str, float]:
    """The share of each mark of translation and language on text that people wrote in Japanese: Wikipedia's leads, given as answers."""
    texts = [json.loads(line)["text"] for _, line in read_text_lines(data / "corpus" / "ja_wiki_leads.jsonl.zst")]
    found = review(pl.DataFrame({"prompt": "次の項目を説明してください。", "response": texts}), against=[])
    marks = found.table.filter(pl.col("group").is_in(["translation", "language"]) | (pl.col("finding") == "answer cut off"))
    return dict(marks.select("finding", "share").rows())


def study(data: Path) -> dict[str, Any]:
    """Review parallel/dolly_ja of the data folder against every benchmark item; CPU seconds of the whole call."""
    against = evaluation_texts(data)
    warm = ["温めておく文章です。" * 3, "二つ目の文章です。" * 3]  # compiled kernels are kept on disk; opening them is not the review
    near_duplicates(warm, NearConfig()), exact_groups(warm)
    start = time.process_time()
    found = review(data / "parallel" / "dolly_ja", data / "tokenizers" / "llm-jp" / "llm-jp-tokenizer-100k.ver3.0b1.model",
                   mistral_model_file(), against)
    seconds = time.process_time() - start
    facts = {name: value for name, value in found.facts.items() if name != "largest clusters"}
    facts["largest clusters"] = [each["rows"] for each in found.facts["largest clusters"]]
    control = human_written(data)
    rows = [row | {"control": control.get(row["finding"])} for row in found.table.drop("examples", "definition").to_dicts()]
    return {"study": "review_dolly_ja", "source": "databricks-dolly-15k-ja, first release, 12,000 rows (CC BY-SA 3.0)", "facts": facts,
            "control": "leads of Japanese Wikipedia articles as answers, 3,263 rows (CC BY-SA 4.0)",
            "tokenizers": {"tokens": "llm-jp v3.0b1 (99,574 pieces)", "tokens, base": "Mistral 7B v0.1"},
            "findings": [{key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()} for row in rows],
            "cpu seconds": round(seconds, 1)}


def measure(data: Path) -> dict[str, float]:
    """{review_rows, review_cpu_seconds, review_rows_per_second} of one run."""
    found = study(data)
    return {"review_rows": found["facts"]["rows"], "review_cpu_seconds": found["cpu seconds"],
            "review_rows_per_second": round(found["facts"]["rows"] / found["cpu seconds"], 1)}


def main() -> None:
    """Run the study, write it, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("nbs/studies/review_dolly_ja.json"))
    options = parser.parse_args()
    os.environ["SHISA_DATA"] = str(options.data.resolve())
    found = study(options.data) | {"date": time.strftime("%Y-%m-%d"), "hardware": f"{os.cpu_count()} cores {platform.machine()}"}
    write_json(options.out, found)
    print(markdown_table([row for row in found["findings"] if row["count"]]).data)
    print(f"{found['facts']['rows']} rows in {found['cpu seconds']} s (CPU, one process)")


if __name__ == "__main__":
    try:
        main()
    except ShisaError as error:
        sys.exit(f"error: {error}")
