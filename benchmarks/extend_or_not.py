"""Chapter 32's comparison with the reference tokenizer: what 88,073 pieces give Mistral 7B, and at most give bases that know Japanese.

    python benchmarks/extend_or_not.py --data ../shared/data --tokenizer DIR [--characters 400000]

DIR is what `benchmarks/tokenizer.py --out DIR` wrote; the text is what that command holds out. Budget, machine and prices are those of `a100x16`.
"""

import argparse
import os
import sys
from pathlib import Path

from shisa.base import mistral_model_file
from shisa.config import ShisaError, markdown_table
from shisa.cost import BASES, MACHINES
from shisa.pieces import spm_processor, spm_proto
from shisa.planner import Case, at_most, compare, config, drawn_texts, model_pieces, other_paths
from tokenizer import texts_in


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.model")
    parser.add_argument("--characters", type=int, default=400_000, help="held-out Japanese, at most")
    options = parser.parse_args()
    os.environ["SHISA_DATA"] = str(options.data)  # where other_paths looks
    plan, model = config("a100x16"), options.tokenizer / "tokenizer.model"
    _, ja, _ = texts_in(options.data)
    texts = drawn_texts([text for _, rows in sorted(ja.items()) for text in rows], options.characters, plan.seed)
    tokens = [sum(map(len, spm_processor(spm_proto(path)).encode(texts))) for path in (mistral_model_file(), model)]
    gain, rows = [sum(map(len, texts)) / count for count in tokens], len(spm_proto(model).pieces)
    found = {"Mistral 7B": ("measured", (gain[0], gain[1]), BASES["Mistral 7B"].with_rows(rows))}
    for name, path in other_paths(plan).items():
        found[name] = "at most", *at_most(path, model_pieces(model), texts, BASES[name])
    japanese = plan.tokens * (1 - plan.english_share) * plan.published[1]
    table = []
    for name, (source, characters, after) in found.items():
        case = Case(BASES[name], after, characters, japanese, plan.tokens * plan.english_share / japanese, plan.learning_tokens, plan.length)
        row = compare(case, MACHINES[plan.machine], plan.price, plan)
        table.append({"base": name, "characters per token": f"{characters[0]:.2f} → {characters[1]:.2f}, {source}", **{
            f"{what} pays from, 10⁹ characters": f"{(row[key] or float('inf')) / 1e9:.1f}"
            for what, key in (("training", "break_even_trained"), ("serving alone", "break_even_served"))}})
    print(markdown_table(table).data)


if __name__ == "__main__":
    try:
        main()
    except ShisaError as error:
        sys.exit(f"error: {error}")
