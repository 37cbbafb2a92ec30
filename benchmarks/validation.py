"""How many planted faults the validators of chapter 40 find, and how many good human translations they refuse.

    python benchmarks/validation.py --data ../shared/data [--model runs/tiny/51_sft/model] [--out nbs/studies/validation.json]
    python benchmarks/validation.py --data ../shared/data --draw second --count 60      # pairs to be read and labelled

The labels stand in the study file, made by reading each pair before a validator ran on it: ids, a prefix of the pair's sha256, `good`
or what is wrong. They are kept, everything else is measured anew. Only ids, labels and counts are written, no text of the data.
Faults are planted by `shisa.faults` and, for nine kinds, by asking the chat model of a `tiny` run badly (`--model`; without it those
rows are kept as they were).
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shisa.config import ShisaError, write_json
from shisa.faults import FAULTS, is_japanese, spoil
from shisa.leaks import wilson
from shisa.sample import conversations
from shisa.text import read_text_lines
from shisa.validate import check, length_bounds, sizes

SEEDS = {"measured": "validation-2026", "second": "validation-second"}  # of the two draws
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


def good_pairs(data: Path, labels: dict[str, str]) -> dict[str, Pair]:
    """The pairs that were read and found good, by id; raises `ShisaError` where the data is not what was read."""
    every, found = python_docs(data) | small_parallel(data), {}
    for name, label in labels.items():
        digest, _, verdict = label.partition(" ")
        if name not in every or pair_sha256(every[name]) != digest:
            raise ShisaError(f"{name}: not the pair that was labelled")
        if verdict == "good":
            found[name] = every[name]
    return found


# what few items have is put around them: code, Markdown, formulas, placeholders, URLs, numbers

CODE = ("```python\ndef total(rows):\n    result = 0  # start\n    for row in rows:\n        result += row[\"amount\"]\n    return result\n```",
        "```js\nconst url = new URL(link);\nif (url.host) {\n  console.log(url.host);\n}\n```", "```bash\ngit switch main\ngit pull --rebase origin main\n```",
        "```sql\nSELECT city, COUNT(*) AS members\nFROM users\n  WHERE active = 1\nGROUP BY city;\n```", "```yaml\nserver:\n  port: 8080\n  host: localhost\n```")
NUMBERED = (("The ticket costs {n:,} yen.", "切符は{n:,}円です。"), ("About {m} million people visited in {y}.", "{y}年には約{m}00万人が訪れました。"), ("It takes {k} minutes and {p}% of the budget.", "{k}分と予算の{p}%がかかります。"),
            ("The shop opens at {h}:30 on May {d}.", "店は5月{d}日の{h}時30分に開きます。"), ("The sample weighed {f} kg at {k} degrees.", "試料は{k}度で{f} kgでした。"), ("Call 03-5555-{y} or use version {h}.{d}.2.", "03-5555-{y}に電話するか、バージョン{h}.{d}.2をお使いください。"))
FILLED = (("Dear {name}, ", "{name}様、"), ("Order <ORDER_ID>: ", "注文<ORDER_ID>："), ("%(count)s files were found. ", "%(count)s個のファイルが見つかりました。"), ("Hello ${USER_NAME}. ", "こんにちは、${USER_NAME}さん。"), ("See [ROOM_NAME]. ", "[ROOM_NAME]をご覧ください。"),
          ("{{title}}: ", "{{title}}："), ("Saved to %s. ", "%sに保存しました。"))
LINKS = (("See https://example.com/docs/{k}/index.html for details.", "詳しくは https://example.com/docs/{k}/index.html をご覧ください。"), ("Write to help{k}@example.org.", "help{k}@example.org へご連絡ください。"),
         ("The form is at https://shop.example.jp/form?id={k}&lang=en.", "申込書は https://shop.example.jp/form?id={k}&lang=en にあります。"))
MARKUP = (("# Plan {k}\n\n{a0}\n\n- {b0}\n- {c0}", "# 計画{k}\n\n{a1}\n\n- {b1}\n- {c1}"), ("1. {a0}\n2. {b0}\n3. {c0}", "1. {a1}\n2. {b1}\n3. {c1}"), ("> {a0}\n\n{b0}\n\n**Note {k}**: {c0}", "> {a1}\n\n{b1}\n\n**注意{k}**：{c1}"),
          ("## Table\n\n| no | text |\n|---|---|\n| 1 | {a0} |\n| 2 | {b0} |", "## 表\n\n| 番号 | 文 |\n|---|---|\n| 1 | {a1} |\n| 2 | {b1} |"), ("{a0}\n\nWhere $x_{k} = \\frac{{a}}{{b}}$ holds, {b0}", "{a1}\n\n$x_{k} = \\frac{{a}}{{b}}$が成り立つとき、{b1}"),
          ("{a0} See [the guide](https://example.com/guide/{k}).\n\n- [ ] {b0}\n- [x] {c0}", "{a1}[手引き](https://example.com/guide/{k})をご覧ください。\n\n- [ ] {b1}\n- [x] {c1}"),
          ('{{"name": "tea {k}", "price": 300, "tags": ["hot", "green"]}}', '{{"name": "お茶{k}", "price": 300, "tags": ["熱い", "緑"]}}'))


def plain(pair: Pair) -> bool:
    """Whether a pair is one sentence without marks of its own, so that it can stand inside of others."""
    return not re.search(r"[`*\n|<>{}\[\]$#%~:_]", pair[0]) and bool(re.search(r"[.?!]$", pair[0])) and len(pair[0]) > 15


def framed(pairs: list[Pair], kind: str, count: int) -> Iterator[Pair]:
    """`count` pairs with what a fault of this kind needs, made of read sentences and a frame; drawn by a seed."""
    draw, sentences = random.Random(f"frames {kind}"), [pair for pair in pairs if plain(pair)]
    for _ in range(count):
        (a0, a1), (b0, b1), (c0, c1) = draw.sample(sentences, 3)
        values = {"k": draw.randint(12, 59), "n": draw.randrange(1200, 98000, 100), "m": draw.randint(2, 9), "y": draw.randint(1990, 2024), "p": draw.randint(15, 95),
                  "h": draw.randint(6, 11), "d": draw.randint(13, 28), "f": draw.randint(12, 97) / 10}
        if kind == "lost_code":
            block = draw.choice(CODE)
            yield f"{a0}\n\n{block}\n\n{b0}", f"{a1}\n\n{block}\n\n{b1}"
        elif kind == "lost_markdown":
            source, target = draw.choice(MARKUP)
            yield tuple(text.format(a0=a0, a1=a1, b0=b0, b1=b1, c0=c0, c1=c1, **values) for text in (source, target))  # type: ignore[misc]
        elif kind in ("lost_number", "lost_url"):
            source, target = draw.choice(NUMBERED if kind == "lost_number" else LINKS)
            yield f"{a0} {source.format(**values)}", a1 + target.format(**values)
        else:
            source, target = draw.choice(FILLED)
            yield source + a0, target + a1


FRAMED = ("lost_code", "lost_url", "lost_number", "lost_placeholder", "lost_markdown")


def sources_of(kind: str, pairs: list[Pair]) -> list[Pair]:
    """What a fault of this kind is planted in: the pairs, and frames around them where few have what it takes."""
    if kind == "mixed_register":
        polite = [pair for pair in pairs if re.search(r"(?:です|ます|ました)。$", pair[1]) and pair[1].count("。") == 1]
        draw = random.Random("register")
        groups = [draw.sample(polite, 3) for _ in range(480)]
        return [(" ".join(source for source, _ in group), "".join(target for _, target in group)) for group in groups]
    return pairs + list(framed(pairs, kind, 260)) if kind in FRAMED else pairs


def row(kind: str, by: str, cases: list[tuple[str, str]], langs: tuple[str, str], misses: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Of spoilt translations, how many are found for their reason and refused for any; what is missed is collected."""
    named = refused = 0
    for source, spoilt in cases:
        found = check(source, spoilt, *langs, warnings=True)  # type: ignore[arg-type]
        hit = any(reason.kind == kind for reason in found)
        named, refused = named + hit, refused + any(not reason.warning for reason in found)
        if not hit:
            misses.append((f"{kind} by {by}", source, spoilt))
    low, high = wilson(named, len(cases))
    return {"fault": kind, "by": by, "direction": "→".join(langs), "planted": len(cases), "named": named, "refused": refused,
            "recall": round(named / max(len(cases), 1), 4), "interval": f"{low:.1%}–{high:.1%}"}


def by_program(pairs: list[Pair], langs: tuple[str, str], misses: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """A row a fault, planted in every pair that takes it."""
    rows = []
    for kind in FAULTS:
        cases = []
        for source, target in sources_of(kind, pairs):
            source, target = (source, target) if langs[0] == "en" else (target, source)
            spoilt = spoil(kind, source, target, f"study:{source}")
            if spoilt is not None:
                cases.append((source, spoilt))
        if cases and not (langs[1] == "en" and kind == "mixed_register"):
            rows.append(row(kind, "program", cases, langs, misses))
    return rows


def asked(folder: Path, pairs: dict[str, Pair], questions: list[str]) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(kind, what was asked of the chat model, [(source, what came back)]): the label follows from the request, and was looked at."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shisa.infer import complete, generate

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    sources = [source for source, _ in pairs.values()]

    def ask(texts: list[str], tokens: int, temperature: float) -> list[Any]:
        return generate(model, tokenizer, [[{"role": "user", "content": text}] for text in texts], tokens, temperature, 0)

    said = ask(questions, 40, 0.7)
    yield "answered", "a question or request itself as the user's turn, temperature 0.7", [(q, r.text) for q, r in zip(questions, said, strict=True) if r.stopped and re.search(r"\w", r.text) and is_japanese(r.text)]
    long = [source for source in sources if len(source) >= 60]
    long += [" ".join(group) for shift in (0, 1) for group in zip(sources[shift::2], sources[shift + 1 :: 2], strict=False) if len(" ".join(group)) >= 60]
    yield "length_ratio", "a text of 60 characters or more as the user's turn, greedy, 4 tokens, answers of at most 10 characters", [
        (s, r.text) for s, r in zip(long, ask(long, 4, 0.0), strict=True) if re.search(r"\w", r.text) and len(r.text) <= 10]
    prompts = [target for _, target in pairs.values()] * 3
    starts = [target[: 2 + len(target) * part // 4] for part in (1, 2, 3, 4) for _, target in pairs.values()]
    before = AutoModelForCausalLM.from_pretrained(folder.parents[1] / "31_pretrain" / "model").eval()
    going = complete(before, tokenizer, starts, 40, 0.0)
    yield "looping", "of the model before fine-tuning: continue the first part of a Japanese text, greedy, 40 tokens, never ended; fewer than a third of its 4-grams of characters differ", [
        (s, r.text) for s, r in zip(sources * 4, going, strict=True)
        if not r.stopped and len(r.text) > 30 and re.search(r"[^\W\d]", r.text) and len({r.text[k : k + 4] for k in range(len(r.text) - 3)}) < (len(r.text) - 3) / 3]
    short = complete(model, tokenizer, prompts, 14, 1.3)
    ended = [s for s in sources if re.search(r"[.?!]$", s)]
    yield "truncated", "continue a Japanese text at temperature 1.3, cut after 14 tokens, no mark at the end", [
        (s, r.text) for s, r in zip(ended * 9, short, strict=False) if not r.stopped and is_japanese(r.text) and re.search(r"[ぁ-んァ-ヶ一-龠]$", r.text)]
    for kind in FRAMED:
        texts = [source for source, _ in framed(list(pairs.values()), kind, 320)]
        yield kind, "a text that has what must be kept as the user's turn, temperature 0.7", [(s, r.text) for s, r in zip(texts, ask(texts, 40, 0.7), strict=True) if r.text]


def by_model(folder: Path, pairs: dict[str, Pair], questions: list[str], misses: list[tuple[str, str, str]], show: int) -> list[dict[str, Any]]:
    """A row a fault that the chat model made."""
    rows = []
    for kind, request, cases in asked(folder, pairs, questions):
        rows.append(row(kind, "model", cases, ("en", "ja"), misses) | {"asked": request})
        for source, text in random.Random("look").sample(cases, min(show, len(cases))):
            print(f"  {kind}: {source[:90]!r} -> {text[:90]!r}")
    return rows


def false_refusals(pairs: dict[str, Pair], langs: tuple[str, str] = ("en", "ja")) -> dict[str, Any]:
    """How many good pairs are refused, with id, reason and the part of the evidence that is no text of the data."""
    found = {}
    for name, (english, japanese) in pairs.items():
        reasons = check(*((english, japanese) if langs[0] == "en" else (japanese, english)), *langs)  # type: ignore[arg-type]
        if reasons:
            found[name] = ", ".join(map(str, reasons))
    low, high = wilson(len(found), len(pairs))
    return {"items": len(pairs), "refused": len(found), "share": round(len(found) / max(len(pairs), 1), 4), "interval": f"{low:.1%}–{high:.1%}", "which": found}


def length_rows(every: list[Pair]) -> list[dict[str, Any]]:
    """Quantiles of Japanese characters a character of English by length, beside the bounds of `check`."""
    places = sorted(sizes(*pair) for pair in every if pair[0] != pair[1])
    rows = []
    for low, high in ((10, 20), (20, 30), (30, 45), (45, 70), (70, 110), (110, 200), (200, 400), (400, 1000)):
        ratios = sorted(came / size for size, came in places if low <= size < high)
        at = lambda share: round(ratios[int(share * (len(ratios) - 1))], 2)  # noqa: E731
        middle = (low + high) / 2
        bounds = [round(bound / middle, 2) for bound in length_bounds(middle)]
        rows.append({"characters": f"{low}–{high}", "pairs": len(ratios), "0.2%": at(0.002), "5%": at(0.05), "half": at(0.5), "95%": at(0.95), "99.8%": at(0.998),
                     "shortest believed": bounds[0], "longest believed": bounds[1]})
    return rows


def without_source(data: Path, count: int = 2000) -> dict[str, Any]:
    """What the checks that need no source say of machine-translated answers (dolly_ja): counts by reason."""
    rows = [json.loads(line) for _, line in read_text_lines(data / "parallel" / "dolly_ja" / "dolly_ja.jsonl.zst") if line]
    rows = random.Random("dolly").sample(rows, count)
    found = Counter(reason.kind for each in rows for reason in check(None, each["output"]))
    refused = sum(bool(check(None, each["output"])) for each in rows)
    return {"answers": count, "refused": refused, "reasons": dict(found.most_common())}


def speed(pairs: list[Pair]) -> dict[str, float]:
    """Pairs a second on one core, the median of three: short sentences and documentation apart."""
    rates = {}
    for name, chosen in (("up to 60 characters", [pair for pair in pairs if len(pair[0]) <= 60]), ("over 60", [pair for pair in pairs if len(pair[0]) > 60])):
        times = []
        for turn in range(3):
            texts = [(source, target + "\u200b" * turn) for source, target in chosen]  # other strings: nothing is remembered
            start = time.process_time()
            for pair in texts:
                check(*pair)
            times.append(time.process_time() - start)
        rates[name] = round(len(chosen) / sorted(times)[1])
    return rates


def measure(data: Path, before: dict[str, Any], model: Path | None, show: int = 0) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """The study but for its labels, and what was missed (for reading; it is not written)."""
    misses: list[tuple[str, str, str]] = []
    good = good_pairs(data, before["measured labels"])
    pairs = list(good.values())
    requests = [json.loads(line)["instruction"] for _, line in read_text_lines(data / "parallel" / "self_instruct" / "data" / "seed_tasks.jsonl")]
    asking = [pair[0] for name, pair in small_parallel(data).items() if pair[0].rstrip().endswith("?")]
    questions = random.Random("questions").sample(asking, 140) + [text for text in requests if len(text) < 200][:100]
    spoilt = by_program(pairs, ("en", "ja"), misses) + by_program(pairs, ("ja", "en"), misses)
    made = by_model(model, good, questions, misses, show) if model else [each for each in before.get("recall", ()) if each["by"] == "model"]
    bundled = {f"{chat['id']}:{turn}": (english["content"], japanese["content"]) for chat in conversations()
               for turn, (english, japanese) in enumerate(zip(chat["messages_en"], chat["messages_ja"], strict=True))}
    falses = {"300 read pairs": false_refusals(good), "300 read pairs, ja→en": false_refusals(good, ("ja", "en")),
              "bundled conversations": false_refusals(bundled), "bundled conversations, ja→en": false_refusals(bundled, ("ja", "en"))}
    if "second labels" in before:
        falses["second sample"] = false_refusals(good_pairs(data, before["second labels"]))
    docs, short = list(python_docs(data).values()), list(small_parallel(data).values())
    draw = random.Random("lengths")
    return {"recall": spoilt + made, "false refusals": falses, "lengths": length_rows(draw.sample(docs, 6000) + draw.sample(short, 6000)),
            "dolly_ja": without_source(data), "pairs a second": speed(pairs)}, misses


def main() -> None:
    """Run the study and write it, or print pairs to be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("nbs/studies/validation.json"))
    parser.add_argument("--draw", choices=SEEDS)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--show", type=int, default=0, help="print so many misses of each kind, and answers of the model")
    options = parser.parse_args()
    os.environ["SHISA_DATA"] = str(options.data.resolve())
    before = json.loads(options.out.read_text(encoding="utf-8"))
    if options.draw:
        for pairs in (python_docs(options.data), small_parallel(options.data)):
            names = [name for name in drawn(pairs, SEEDS[options.draw]) if options.draw == "measured" or name not in before["measured labels"]]
            for name in names[: options.count]:
                print(name, pair_sha256(pairs[name]), *pairs[name], sep=" | ")
        return
    found, misses = measure(options.data, before, options.model, options.show)
    labels = {name: value for name, value in before.items() if name.endswith("labels") or name in ("notes", "why")}
    write_json(options.out, labels | found | {"study": "validation", "date": time.strftime("%Y-%m-%d"), "hardware": f"{os.cpu_count()} cores {platform.machine()}", "seeds": SEEDS})
    for each in found["recall"]:
        print(f"{each['fault']:17} {each['by']:8} {each['direction']} {each['planted']:4} {each['recall']:.3f} refused {each['refused'] / max(each['planted'], 1):.3f}")
    print(json.dumps(found["false refusals"] | {"speed": found["pairs a second"], "dolly": found["dolly_ja"]}, ensure_ascii=False, indent=1))
    kinds = sorted({kind for kind, _, _ in misses})
    for kind in kinds if options.show else ():
        chosen = [miss for miss in misses if miss[0] == kind]
        for _, source, spoilt in random.Random(kind).sample(chosen, min(options.show, len(chosen))):
            print(f"MISS {kind}: {source[-150:]!r} -> {spoilt[-150:]!r}")


if __name__ == "__main__":
    try:
        main()
    except ShisaError as error:
        sys.exit(f"error: {error}")
