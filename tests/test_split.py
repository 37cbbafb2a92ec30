"""Chapter 14: planted benchmark items and near misses, groups kept whole, the leak recounted, shards."""
import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_toys import cut, document, run_on, table, work_in, written

from shisa import split, text
from shisa.config import ShisaError
from shisa.evalsets import evaluation_texts
from shisa.sample import data_folder, documents, evaluation, japanese
from shisa.stage import run_stage

CONFIG = split.Config(share=0.1)
DATA = data_folder()
quick = settings(max_examples=60, deadline=None)
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # to full-width forms
ITEMS = evaluation_texts(None)
SEARCHED = [item for item in ITEMS if len(text.letters(item["text"])) >= 26]  # twice an n-gram: what a cut leaves is still one
PLAIN = [item["ja"] for item in documents()] + [item["ja"] for item in japanese()]


# ── evidence ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def planted(item: str, way: int, body: str) -> str:
    """A document that holds an item: as it stands or changed in one of the ways that the definition sees through."""
    middle = body.find("。") + 1
    return (
        item,
        f"{body}\n{item}",
        body[:middle] + item.replace("\n", "") + body[middle:],  # inside a line
        item.replace("、", "，").replace("。", ".").replace("？", "?!").replace("「", "『").replace("」", "』"),
        item.translate(WIDE).lower(),
        "\n".join(item[at : at + 9] for at in range(0, len(item), 9)),  # lines broken anew
        " ".join(item),
        "・" + item[: math.ceil(len(item) * 0.85)] + "……",  # the end is cut off
    )[way]


def test_100_planted_items_are_found_and_none_of_100_near_misses():
    ways, wanted = 8, [SEARCHED[place % len(SEARCHED)] for place in range(100)]
    texts = [planted(item["text"], number % ways, PLAIN[number % len(PLAIN)]) for number, item in enumerate(wanted)]
    found = split.contaminated(texts, ITEMS)
    assert [(number % ways, wanted[number]["text"]) for number, evidence in enumerate(found) if evidence is None] == []
    misses = near_misses(ITEMS, PLAIN)
    assert [misses[number] for number, evidence in enumerate(split.contaminated(misses, ITEMS)) if evidence] == []


def near_misses(items: list[dict[str, str]], plain: list[str]) -> list[str]:
    """100 texts that are no copies: every eighth letter another, the first half of a line, texts on the items' subjects."""
    found: list[str] = []
    for item in items:
        for line in item["text"].split("\n"):
            unit = text.letters(line)
            if len(unit) >= 26 and len(found) < 40:
                found.append("".join("々" if place % 8 == 7 else letter for place, letter in enumerate(unit)))
            if 26 <= len(unit) < 78 and len(found) < 70 and len(found) >= 40:
                found.append(unit[: min(len(unit) // 2, 39)])
    return found + plain[: 100 - len(found)]


def test_labels_layout_and_short_lines():
    item = "質問：傘の骨を数えるときに使う言葉は何でしょうか、一つ選んでください"
    against = [{"id": "set/1", "text": item}, {"id": "set/2", "text": "短い問い"}]
    same = "傘の骨を数えるときに使う言葉は何でしょうか一つ選んでください"
    assert all(split.contaminated([item, same, f"　{same}", f"Q. {same}？"], against))
    assert not any(split.contaminated(["短い問い", "", "傘の骨を数える", "\n\n"], against))
    assert not any(split.contaminated([item, ""], []))
    evidence = split.contaminated([f"前の文。{item}後の文。"], against)[0]
    assert evidence.item == "set/1" and evidence.share == 1.0 and evidence.run == len(same) and evidence.excerpt == same


LINES = st.lists(st.text(st.sampled_from("あいう。"), max_size=14), max_size=4)


def plain_evidence(body: str, against: list[str], n: int, share: float, run: int) -> tuple[float, int] | None:
    """The definition, said again: the largest share of an item's line, and the longest stretch of n-grams of any of them."""
    units = {unit for item in against for line in item.split("\n") if len(unit := text.letters(split._LABEL.sub("", line))) >= n}
    grams = [{unit[at : at + n] for at in range(len(unit) - n + 1)} for unit in sorted(units)]
    body = text.letters(body)
    hits = [any(body[at : at + n] in own for own in grams) for at in range(len(body) - n + 1)]
    longest = max((len(part) for part in "".join("x" if hit else " " for hit in hits).split()), default=0)
    if not longest:
        return None
    there = {body[at : at + n] for at in range(len(body) - n + 1)}
    best = max(len(own & there) / len(own) for own in grams)
    return (best, longest + n - 1) if best >= share or longest + n - 1 >= run else None


@given(st.lists(LINES.map("\n".join), max_size=5), st.lists(LINES.map("\n".join), max_size=4))
@quick
def test_evidence_is_the_plain_definition(texts, against):
    found = split.Benchmarks(against, 5).evidence(pl.Series(texts, dtype=pl.String), 0.7, 9)
    for body, evidence in zip(texts, found, strict=True):
        expected = plain_evidence(body, against, 5, 0.7, 9)
        assert (evidence is None) == (expected is None)
        if evidence:
            assert evidence.share == pytest.approx(expected[0], abs=1e-4) and evidence.run == expected[1]


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no local data folder: set SHISA_DATA")
def test_all_benchmarks_planted_in_the_corpus():
    items = evaluation_texts(DATA)
    assert len({item["id"].partition("/")[0] for item in items}) > 10
    draw, bodies = np.random.default_rng(1), []
    for path in sorted((DATA / "corpus").glob("ja_*"))[:10]:
        lines = [line for _, (_, line) in zip(range(60), text.read_text_lines(path), strict=False)]
        bodies += [json.loads(line)["text"][:3000] for line in lines]
    benchmarks = split.Benchmarks(items)
    clean = [body for body, evidence in zip(bodies, benchmarks.evidence(pl.Series(bodies), 0.6, 40), strict=True) if evidence is None]
    assert len(clean) > 0.9 * len(bodies) >= 300
    long = [item for item in items if len(text.letters(item["text"])) >= 26]
    chosen = [long[place] for place in draw.choice(len(long), 100, replace=False)]
    texts = [planted(item["text"], number % 8, clean[number]) for number, item in enumerate(chosen)]
    found = benchmarks.evidence(pl.Series(texts), 0.6, 40)
    assert [(number % 8, chosen[number]["text"]) for number, evidence in enumerate(found) if evidence is None] == []
    misses = near_misses(chosen, clean)
    assert not any(benchmarks.evidence(pl.Series(misses), 0.6, 40))


# ── groups and lines ──────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = st.lists(st.tuples(st.sampled_from(["c1", "c2", "c3", "c4", None]), st.sampled_from(["p1", "p2", "p3", None])), max_size=15)


@given(KEYS)
@quick
def test_groups_keep_clusters_and_pairs_together(keys):
    columns = [pl.Series([own[kind] for own in keys], dtype=pl.String) for kind in (0, 1)]
    groups = split.group_ids(*columns).tolist()
    linked = lambda one, other: any(a is not None and a == b for a, b in zip(keys[one], keys[other], strict=True))  # noqa: E731
    expected = list(range(len(keys)))
    for _ in keys:
        for one in range(len(keys)):
            for other in range(one):
                if linked(one, other):
                    low = min(expected[one], expected[other])
                    expected = [low if root in (expected[one], expected[other]) else root for root in expected]
    assert groups == expected


@given(st.lists(st.lists(st.text(st.sampled_from("あいｱＡ 。"), max_size=16), max_size=4).map("\n".join), max_size=6))
@quick
def test_line_hashes_are_equal_where_folded_lines_are(texts):
    rows, hashes = split.line_hashes(pl.Series(texts, dtype=pl.String))
    lines = [(row, folded) for row, body in enumerate(texts) for line in body.split("\n")
             if len(folded := text.normalise(line)) >= split.MIN_LINE]
    assert rows.tolist() == [row for row, _ in lines]
    for one, (_, line) in zip(hashes, lines, strict=True):
        assert (hashes == one).tolist() == [other == line for _, other in lines]


SIZES = st.dictionaries(st.sampled_from([f"g{number}" for number in range(12)]),
                        st.tuples(st.dictionaries(st.sampled_from("abc"), st.integers(1, 400), min_size=1), st.integers(0, 5),
                                  st.integers(5, 60)), min_size=1)


@given(SIZES, st.floats(0.01, 0.4), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_hold_out_keeps_its_promises(groups, share, seed):
    members = {name: sizes for name, (sizes, _, _) in groups.items()}
    shared = {name: (some, lines) for name, (_, some, lines) in groups.items()}
    total = sum((Counter(sizes) for sizes in members.values()), Counter())
    config = split.Config(share=share, seed=seed)
    taken = split.hold_out(members, shared, dict(total), config)
    assert taken == split.hold_out(dict(reversed(members.items())), shared, dict(reversed(total.items())), config)
    leaked, lines = (sum(shared[name][place] for name in taken) for place in (0, 1))
    assert leaked <= config.max_leak * max(lines, 100)
    for domain, size in total.items():
        assert sum(members[name].get(domain, 0) for name in taken) < size, f"{domain} gave all it has"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), min_size=1, max_size=20), st.floats(0.01, 0.4), st.integers(0, 5))
@quick
def test_hold_out_is_near_its_quota_in_every_domain(groups, share, seed):
    members = {f"g{number}": {domain: size} for number, (domain, size) in enumerate(groups)}
    total = sum((Counter(sizes) for sizes in members.values()), Counter())
    taken = split.hold_out(members, dict.fromkeys(members, (0, 9)), dict(total), split.Config(share=share, seed=seed))
    for domain, size in total.items():
        own = [size for _, sizes in sorted(members.items()) for name, size in sizes.items() if name == domain]
        held = [members[name][domain] for name in taken if domain in members[name]]
        assert bool(held) == (len(own) > 1)  # the only group of a domain stays in training
        assert sum(held) <= 1.7 * share * size or held == [min(own)]  # a larger one only where no group is small enough


# ── the stage ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def split_rows(rows, places, folder, config=CONFIG):
    """Metrics, work, training and held-out documents of the stage on documents cut before these rows."""
    frame = table(rows) if "cluster" in rows[0] else table(rows).with_columns(cluster="id")
    metrics, work = run_on(split.STAGE, cut(frame, places), config, folder)
    return metrics, work, *(written(work, name) for name in ("train", "heldout"))


def naive_leak(train: pl.DataFrame, held: pl.DataFrame) -> float:
    """The share of held-out lines of ten characters or more that also stand in training."""
    def lines(frame: pl.DataFrame) -> list[str]:
        folded = (text.normalise(line) for body in frame["text"] for line in body.split("\n"))
        return [line for line in folded if len(line) >= split.MIN_LINE]

    seen, own = set(lines(train)), lines(held)
    return sum(line in seen for line in own) / max(len(own), 1)


def test_the_split_of_the_sample(tmp_path):
    for name in ("10_sources", "11_filters", "12_dedup", "13_dsir", "14_split"):
        artifact = run_stage(name, "tiny", tmp_path)
    train, held = (artifact.table(name) for name in ("train", "heldout"))
    assert not set(train["id"]) & set(held["id"]) and train.columns == held.columns
    assert set(held["source"]) == set(train["source"]) and artifact.metrics["leak_share"] < 0.01
    for key in (lambda row: row["cluster"], lambda row: json.loads(row["meta"]).get("pair")):
        sides = [{key(row) for row in part.iter_rows(named=True)} - {None} for part in (train, held)]
        assert not sides[0] & sides[1]
    size = {name: sum(part["text"].str.len_bytes()) for name, part in (("train", train), ("held", held))}
    assert 0.05 < size["held"] / sum(size.values()) < 0.13
    assert naive_leak(train, held) == pytest.approx(artifact.metrics["leak_share"])
    for name, part in (("train", train), ("heldout", held)):
        assert artifact.metrics["bytes"][name] == {lang: sum(len(body.encode()) for body in part.filter(lang=lang)["text"])
                                                   for lang in ("en", "ja")}
        assert {row["source"]: row[name] for row in artifact.metrics["by_source"]} == {
            source: int(part.filter(source=source)["text"].str.len_chars().sum()) for source in set(train["source"])}


SHARED_LINE = "この行はあちこちの文書に立っています。"


def corpus(count: int, seed: int) -> list[dict[str, str]]:
    """Small documents of three sources and two languages, some in clusters or pairs, some with a line that others have."""
    draw = np.random.default_rng(seed)
    letters = np.array([chr(code) for code in range(0x4E00, 0x5200)])
    rows = []
    for number in range(count):
        body = "\n".join("".join(draw.choice(letters, 20)) for _ in range(draw.integers(1, 6)))
        extra = f"\n{SHARED_LINE}" if draw.random() < 0.15 else ""
        pair = {"pair": f"p{number // 2}"} if draw.random() < 0.3 else {}
        own = document(f"d{number:03}", body + extra, f"s{draw.integers(3)}", str(draw.choice(["ja", "en"])), **pair)
        rows.append(own | {"cluster": f"d{number - number % 3:03}" if draw.random() < 0.4 else own["id"]})
    return rows


@given(st.integers(12, 60), st.integers(0, 40), st.lists(st.integers(0, 60), max_size=4), st.sampled_from([0.05, 0.2]))
@settings(max_examples=15, deadline=None)
def test_shards_hold_out_the_same_documents(tmp_path_factory, count, seed, places, share):
    rows, folder = corpus(count, seed), tmp_path_factory.mktemp("split")
    config = split.Config(share=share, max_leak=0.05)
    whole, parts = (split_rows(rows, own, folder / name, config) for name, own in (("whole", []), ("parts", places)))
    assert whole[0] == parts[0]
    for one, other in zip(whole[2:], parts[2:], strict=True):
        assert one["id"].to_list() == other["id"].to_list()
    metrics, _, train, held = whole
    assert sorted([*train["id"], *held["id"]]) == [row["id"] for row in rows] and metrics["heldout"] == held.height > 0
    assert metrics["leak_share"] == pytest.approx(naive_leak(train, held))
    for kind in ("cluster", "pair"):
        values = [{row["cluster"] if kind == "cluster" else json.loads(row["meta"]).get("pair") for row in part.iter_rows(named=True)}
                  for part in (train, held)]
        assert not values[0] & values[1] - {None}


def test_the_random_split_is_recounted(tmp_path):
    rows = corpus(200, 3)
    metrics, _, _, _ = split_rows(rows, [70, 140], tmp_path, split.Config(share=0.2))
    frame = table(rows)
    random = pl.Series(split.uniform(frame["id"], 1) < 0.2)
    expected = naive_leak(frame.filter(~random), frame.filter(random))
    assert metrics["leak_share_random"] == pytest.approx(expected) and expected > 0


def test_every_domain_has_held_out_text_where_it_can(tmp_path):
    rows = [document(f"{source}{number}", f"{source}の文書{number}。" + chr(0x4E00 + number) * (5 + number * size), source)
            for source, size, count in (("many", 1, 80), ("two", 40, 2), ("one", 3, 1)) for number in range(count)]
    metrics, _, train, held = split_rows(rows, [30], tmp_path)
    assert {"many", "two"} == set(held["source"]) and set(train["source"]) == {"many", "two", "one"}
    assert {row["source"] for row in metrics["by_source"]} == {"many", "two", "one"}


def test_a_larger_corpus_offers_a_part_of_its_groups(tmp_path):
    rows = corpus(300, 5)
    config = split.Config(share=0.01, offered=10)  # eight shares
    _, work, _, held = split_rows(rows, [100, 200], tmp_path, config)
    decided = pl.concat([pl.read_parquet(path) for path in sorted(work.scratch.glob("decided-*.parquet"))])
    assert 0.02 < decided["offered"].mean() < 0.2 and held.height > 0
    assert all(decided.group_by("group").agg(pl.col("offered").n_unique())["offered"] == 1)


def test_contaminated_documents_are_dropped_with_their_item(tmp_path):
    item = next(item for item in evaluation() if item["task"] == "RC")
    rows = [document(f"d{number}", own["ja"]) for number, own in enumerate(documents()[:30])]
    rows[1]["text"] += "\n" + item["input"]
    metrics, work, train, held = split_rows(rows, [1, 2], tmp_path)
    assert sorted([*train["id"], *held["id"]]) == sorted(row["id"] for row in rows if row["id"] != "d1")
    rejected = written(work, "rejects").to_dicts()
    assert [(row["id"], row["reason"]) for row in rejected] == [("d1", "contaminated")]
    assert rejected[0]["where"].startswith(item["dataset"]) and "100% of a line" in rejected[0]["where"]
    assert work.counts == {"in": 30, "kept": 29, "dropped": {"contaminated": 1}}
    assert metrics["removed_by_benchmark"] == {item["dataset"]: 1} and metrics["removed_by_decontamination"] == 1


@pytest.mark.parametrize(("count", "message"), [(1, "fewer than two documents"), (2, "cannot be split")])
def test_too_few_documents_are_refused_in_one_line(count, message, tmp_path):
    rows = [document(f"d{number}", f"同じ対の文書{number}です。", pair="p") | {"cluster": f"d{number}"} for number in range(count)]
    with pytest.raises(ShisaError, match=message) as caught:
        split_rows(rows, [], tmp_path)
    assert "\n" not in str(caught.value)


def test_benchmarks_without_a_data_folder_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(split, "data_folder", lambda: None)
    with pytest.raises(ShisaError, match="set SHISA_DATA or benchmarks=False"):
        split.external(CONFIG.change(benchmarks=True))
    assert list(split.external(CONFIG)) == ["sample"] and work_in(tmp_path).path.is_dir()
