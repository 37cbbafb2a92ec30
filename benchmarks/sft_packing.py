"""What packing conversations is worth: tokens a second and padding of the same fine-tuning rows, packed and padded.

    python benchmarks/sft_packing.py [--run runs/tiny] [--length 512] [--tokens 20000] [--rounds 3] [--json FILE]

Three arms read the same conversations with the same model: one a row, shuffled; one a row, in batches of like length (what 51
does); packed into rows of `length` tokens. Time is the process's CPU time, so that other work on the machine does not
count; the arms take turns. A GPU needs wall time instead: it is used where there is one.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
from shisa.chat_format import install_template
from shisa.config import environment
from shisa.models import device, load_model, load_tokenizer, pad_id
from shisa.packing import IGNORE
from shisa.sft import training_rows
from shisa.tuning import Collator, order_rows, pack_units


def batches(rows: list[dict], arm: str, length: int, budget: int, seed: int) -> list[list[list[int]]]:
    """Batches of units of one pass, each of about `budget` positions."""
    sizes = [len(row["input_ids"]) for row in rows]
    if arm == "packed":
        units = pack_units(sizes, length, 1, 1, seed)
        return [units[at : at + budget // length] for at in range(0, len(units), budget // length)]
    order = order_rows(sizes, 1, 1, seed)
    order = sorted(order, key=sizes.__getitem__) if arm == "padded, by length" else random.Random(seed).sample(order, len(order))
    out: list[list[list[int]]] = [[]]
    for row in order:
        widest = max([sizes[row], *(sizes[unit[0]] for unit in out[-1])])
        if out[-1] and widest * (len(out[-1]) + 1) > budget:
            out.append([])
        out[-1].append([row])
    random.Random(seed).shuffle(out)
    return out


def one_pass(model: Any, rows: list[dict], arm: str, length: int, tokens: int, collate: Collator, seed: int) -> dict[str, float]:
    """Forward and backward until `tokens` tokens are read: seconds, real tokens, positions."""
    import torch

    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    seconds, read, positions = 0.0, 0, 0
    for units in batches(rows, arm, length, 4 * length, seed):
        batch = {name: tensor.to(model.device) for name, tensor in collate([{"unit": unit} for unit in units]).items()}
        labels = batch.pop("labels")[:, 1:]
        started = clock()
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1][labels != IGNORE]
        torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden).float(), labels[labels != IGNORE]).backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += clock() - started
        model.zero_grad()
        read += sum(len(rows[row]["input_ids"]) for unit in units for row in unit)
        positions += labels.shape[0] * (labels.shape[1] + 1)
        if read >= tokens:
            break
    return {"seconds": seconds, "tokens": read, "positions": positions}


def main() -> None:
    """Measure the arms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.run / "31_pretrain" / "model"
    tokenizer, model = install_template(load_tokenizer(folder)), load_model(folder).to(device()).train()
    talks = pl.read_parquet(options.run / "43_sft_data" / "train.parquet")["messages"].to_list()
    rows = [row for row in training_rows(tokenizer, talks) if len(row["input_ids"]) <= options.length]
    arms = ("padded, shuffled", "padded, by length", "packed")
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed in range(options.rounds + 1):  # the first round warms up
        for arm in arms:
            collate = Collator(rows, pad_id(tokenizer), arm == "packed")
            found[arm].append(one_pass(model, rows, arm, options.length, options.tokens, collate, seed))
    table = [{"arm": arm, "tokens a second": round(median(each["tokens"] / each["seconds"] for each in each_round[1:])),
              "padding share": round(1 - sum(e["tokens"] for e in each_round[1:]) / sum(e["positions"] for e in each_round[1:]), 3)}
             for arm, each_round in found.items()]
    record = {"study": "sft_packing", "date": time.strftime("%Y-%m-%d"), "run": options.run.name, "rows": len(rows),
              "length": options.length, "rounds": options.rounds, "device": model.device.type,
              "hardware": environment()["hardware"], "table": table}
    print(json.dumps(record, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
