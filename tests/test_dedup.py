"""Chapter 12: signatures, candidates, true similarity, groups, survivors; shards against memory; labelled pairs."""
import json
from collections import Counter
from functools import cache
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shard_toys import artifact, cut, document, run_on, table, written

from shisa import dedup, text
from shisa.config import ShisaError
from shisa.sample import data_folder, documents, noise
from shisa.stage import run_stage

CONFIG = dedup.Config()
DATA = data_folder()
quick = settings(max_examples=80, deadline=None)
LETTERS = np.array([chr(code) for code in range(0x4E00, 0x5600)])


def grams(body: str, size: int = 5) -> set[str]:
    """The n-grams of a text; a shorter one is its own."""
    body = text.normalise(body)
    return {body[i : i + size] for i in range(max(len(body) - size, 0) + 1)} if body else set()


@cache
def grams_of(body: str, size: int) -> frozenset[str]:
    """The same, kept: texts are compared with several others."""
    return frozenset(grams(body, size))


def true_jaccard(one: str, other: str, size: int = 5) -> float:
    left, right = grams_of(one, size), grams_of(other, size)
    common = len(left & right)
    return common / max(len(left) + len(right) - common, 1)


def edited(body: np.ndarray, rate: float, draw: np.random.Generator) -> str:
    """A text with some of its characters changed, and a part of its end cut off."""
    changed = np.where(draw.random(body.size) < rate, draw.choice(LETTERS, body.size), body)
    return "".join(changed[: max(1, int(body.size * (1 - draw.random() * rate * 5)))])


# ── signatures and candidates ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("length", "pairs"), [(8, 800), (30, 800), (150, 800), (3000, 150)])
def test_signatures_estimate_jaccard_without_bias(length, pairs):
    draw = np.random.default_rng(length)
    ones = [draw.choice(LETTERS, length) for _ in range(pairs)]
    others = [edited(body, draw.random() * 0.1, draw) for body in ones]
    ones = ["".join(body) for body in ones]
    first, second = (dedup.sign(*text.fold(pl.Series(texts)), CONFIG) for texts in (ones, others))
    errors = (first == second).mean(axis=1) - [true_jaccard(*pair) for pair in zip(ones, others, strict=True)]
    assert abs(errors.mean()) < 4 * errors.std() / pairs**0.5 + 1e-3  # no bias
    assert errors.std() < (0.2 if length < 100 else 0.06)  # 128 minima of a long text: at most 0.044


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8))
@quick
def test_signatures_depend_on_the_text_alone(texts):
    both = dedup.sign(*text.fold(pl.Series(texts, dtype=pl.String)), CONFIG)
    for body, signature in zip(texts, both, strict=True):
        alone = dedup.sign(*text.fold(pl.Series([body])), CONFIG)[0]
        assert np.array_equal(alone, signature)
        assert np.all(signature == 0xFFFFFFFF) == (not text.normalise(body))


def naive_pairs(keys: list[int], rows: list[int]) -> list[tuple[int, int]]:
    buckets: dict[int, list[int]] = {}
    for key, row in zip(keys, rows, strict=True):
        buckets.setdefault(key, []).append(row)
    found = set()
    for members in buckets.values():
        for before, member in zip(members, members[1:], strict=False):
            found |= {(before, member), (members[0], member)}
    return sorted(found)


@given(st.lists(st.sampled_from([0, 1, 2, 5, 2**63, 2**64 - 1]), max_size=30), st.integers(0, 2**31))
@quick
def test_bucket_pairs_are_the_naive_ones(keys, shift):
    rows = [shift + 3 * place for place in range(len(keys))]
    pairs = dedup.bucket_pairs(np.array(keys, np.uint64), np.array(rows, np.int64))
    assert list(zip(*(part.tolist() for part in dedup.unpack(pairs)), strict=True)) == naive_pairs(keys, rows)


@given(st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=12), st.integers(1, 8))
@quick
def test_band_keys_are_equal_where_all_places_of_a_band_are(rows, size):
    signatures = np.array(rows, np.uint32)
    keys = dedup.band_keys(signatures, size)
    assert keys.shape == (8 // size, len(rows))
    for band, own in enumerate(keys):
        part = signatures[:, band * size : (band + 1) * size]
        for one in range(len(rows)):
            assert np.array_equal(own == own[one], np.all(part == part[one], axis=1))


# ── similarity and groups ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.text(st.sampled_from("あいうえ "), max_size=30), min_size=1, max_size=6), st.integers(1, 6))
@example(["", "", "あ"], 5)
@quick
def test_jaccard_is_that_of_the_sets(texts, size):
    sets = [dedup.shingle_set(text.codepoints(text.normalise(body)), size) for body in texts]
    places = np.array([(one, other) for one in range(len(texts)) for other in range(len(texts))])
    found = dedup.jaccard(places[:, 0], places[:, 1], sets)
    assert found.tolist() == [true_jaccard(texts[one], texts[other], size) for one, other in places]


def components(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The smallest member of each row's component, by joining until nothing changes."""
    roots = list(range(count))
    for _ in range(count):
        for one, other in pairs:
            roots = [min(roots[one], roots[other]) if root in (roots[one], roots[other]) else root for root in roots]
    return roots


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)).filter(lambda pair: pair[0] < pair[1]), max_size=30))
@quick
def test_groups_are_connected_components(pairs):
    packed = np.unique(np.array([one << 32 | other for one, other in pairs], np.uint64))
    expected = components(20, pairs)
    assert dedup.groups_of(20, packed) == expected
    rows, roots = dedup.groups(packed)
    assert rows.tolist() == sorted({row for pair in pairs for row in pair})
    assert roots.tolist() == [expected[row] for row in rows]


def best(members: list[dict]) -> dict:
    """The survivor's rule, said again: with a translation before without, then the longest, then the smallest id."""
    return min(members, key=lambda row: (not row["paired"], -row["characters"], row["id"]))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.randoms())
@quick
def test_the_survivor_is_paired_then_longest_then_first_by_id(rows, shuffle):
    ids = [f"d{number}" for number in range(len(rows))]
    shuffle.shuffle(ids)
    frame = pl.DataFrame([{"row": number, "root": root, "id": ids[number], "characters": size, "paired": paired}
                          for number, (root, size, paired) in enumerate(rows)]).cast({"characters": pl.UInt32})
    for row in (judged := dedup.survivors(frame)).iter_rows(named=True):
        assert row["kept_id"] == best([other for other in frame.iter_rows(named=True) if other["root"] == row["root"]])["id"]
    assert judged["row"].to_list() == frame["row"].to_list()


@given(st.lists(st.sampled_from(["ガラス", "ｶﾞﾗｽ", " がらす ", "がらす", "", " ", "ABC", "abc", "ａｂｃ"]), max_size=10))
@quick
def test_exact_groups_have_the_same_folded_text(texts):
    plain = [text.normalise(body) for body in texts]
    assert dedup.exact_groups(texts) == [plain.index(body) for body in plain]


# ── the stage ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_memory(rows: list[dict[str, str]], config: dedup.Config) -> dict[str, tuple[str, str]]:
    """What becomes of every document, by id: (reason, survivor) or ("", cluster); from whole lists, by the rules as they stand."""
    def survivor(members: list[int]) -> int:
        facts = [{"row": row, "id": rows[row]["id"], "characters": len(rows[row]["text"]),
                  "paired": json.loads(rows[row]["meta"]).get("pair") is not None} for row in members]
        return best(facts)["row"]

    def kept_of(groups: list[int], places: list[int]) -> dict[int, int]:
        members: dict[int, list[int]] = {}
        for place, group in zip(places, groups, strict=True):
            members.setdefault(group, []).append(place)
        return {place: survivor(own) for own in members.values() for place in own}

    texts = [row["text"] for row in rows]
    exact = kept_of(dedup.exact_groups(texts), list(range(len(rows))))
    left = sorted(set(exact.values()))
    near, clusters = dedup.near_duplicates([texts[row] for row in left], config) if left else ([], [])
    alike = kept_of(near, left)
    fates = {rows[row]["id"]: ("exact duplicate", rows[kept]["id"]) for row, kept in exact.items() if row != kept}
    for row, cluster in zip(left, clusters, strict=True):
        kept = alike[row]
        fates[rows[row]["id"]] = ("", rows[left[cluster]]["id"]) if kept == row else ("near duplicate", rows[kept]["id"])
    return fates


def sharded(rows: list[dict[str, str]], places: list[int], config: dedup.Config, folder) -> tuple[dict, dict, pl.DataFrame]:
    """The same from the stage on documents cut before these rows; its metrics and documents."""
    metrics, work = run_on(dedup.STAGE, cut(table(rows), places), config, folder)
    kept, rejects = written(work, "documents"), written(work, "rejects")
    fates = {id: ("", cluster) for id, cluster in kept.select("id", "cluster").iter_rows()}
    fates |= {row["id"]: (row["reason"], row["where"].removeprefix("kept: ")) for row in rejects.iter_rows(named=True)}
    assert len(fates) == len(rows) == kept.height + rejects.height
    assert work.counts == {"in": len(rows), "kept": kept.height, "dropped": dict(sorted(Counter(rejects["reason"]).items()))}
    return fates, metrics, kept


BODIES = ["".join(np.random.default_rng(seed).choice(LETTERS, 60)) for seed in range(4)]
EDITS = st.tuples(st.sampled_from(BODIES), st.integers(0, 59), st.sampled_from(["", "前書き。", "あ" * 30, "　"]), st.booleans())


@given(st.lists(EDITS, min_size=1, max_size=14), st.lists(st.integers(0, 14), max_size=4), st.sampled_from([1 << 23, 3]),
       st.sampled_from([1 << 25, 50]))
@settings(max_examples=25, deadline=None)
def test_any_sharding_gives_what_memory_gives(tmp_path_factory, edits, places, rows_at_once, items_at_once):
    rows = [document(f"d{number * 7 % 15:02}", extra + body[at:] + body[: at // 8], **({"pair": "p"} if paired else {}))
            for number, (body, at, extra, paired) in enumerate(edits)]
    folder = tmp_path_factory.mktemp("dedup")
    with mock.patch.object(dedup, "ROWS_AT_ONCE", rows_at_once), mock.patch.object(dedup, "SET_ITEMS_AT_ONCE", items_at_once):
        fates, metrics, kept = sharded(rows, places, CONFIG, folder)
    expected = in_memory(rows, CONFIG)
    assert {id: fate[:1] if not fate[0] else fate for id, fate in fates.items()} == {
        id: fate[:1] if not fate[0] else fate for id, fate in expected.items()}
    ours, theirs = ({id: name for id, (reason, name) in found.items() if not reason} for found in (fates, expected))
    assert ours == theirs
    assert kept["id"].to_list() == [row["id"] for row in rows if row["id"] in ours]  # the order of the input
    assert metrics["clusters"] == len(set(ours.values())) and metrics["largest_cluster"] == max(Counter(ours.values()).values())
    assert metrics["removed_exact"] + metrics["removed_near"] == len(rows) - len(ours)


def test_documents_without_candidates_and_no_documents_at_all(tmp_path):
    rows = [document(f"d{number}", body) for number, body in enumerate(BODIES)]
    fates, metrics, _ = sharded(rows, [0, 2, 2], CONFIG, tmp_path / "few")
    assert fates == {row["id"]: ("", row["id"]) for row in rows} and metrics["clusters"] == len(rows)
    _, metrics, kept = sharded([], [], CONFIG, tmp_path / "none")
    assert kept.is_empty() and metrics["clusters"] == metrics["largest_cluster"] == 0


def test_a_band_longer_than_the_signature_is_refused(tmp_path):
    with pytest.raises(ShisaError, match="rows: .*less than or equal to 8"):
        sharded([document("a", BODIES[0])], [], CONFIG.change(places=8, rows=9), tmp_path)


def test_exact_duplicates_survivor_and_order(tmp_path):
    body = documents()[0]["ja"]
    rows = [document(id, value, **meta) for id, value, meta in (
        ("b", body, {}), ("c", body.replace("、", "､"), {}), ("a", body, {"pair": "p"}), ("d", documents()[1]["ja"], {}))]
    for number, order in enumerate((rows, rows[::-1])):
        fates, _, kept = sharded(order, [1, 3], CONFIG, tmp_path / str(number))
        assert sorted(kept["id"]) == ["a", "d"]
        assert fates["b"] == fates["c"] == ("exact duplicate", "a")


def test_planted_near_duplicates_go_and_their_originals_stay(tmp_path):
    for name in ("10_sources", "11_filters", "12_dedup"):
        finished = run_stage(name, "tiny", tmp_path)
    kept = set(finished.table("documents")["id"])
    planted = [item for item in noise() if item["label"] == "near_duplicate"]
    assert planted and not [item["id"] for item in planted if item["id"] in kept]
    assert all(f"{item['of']}-{item['lang']}" in kept or item["of"] in kept for item in planted)


def test_the_order_of_documents_changes_no_survivor(tmp_path):
    """Of the bundled sample, its near duplicates and two copies of each, in three orders."""
    rows = [document(f"{item['id']}-{lang}", item[lang], pair=item["id"]) for item in documents()[:40] for lang in ("ja", "en")]
    rows += [document(item["id"], item["text"]) for item in noise() if item["label"] == "near_duplicate"]
    rows += [document(f"{row['id']}-{copy}", row["text"] + copy) for row in rows[:30] for copy in ("", " 追記。")]
    seen = []
    for seed in range(3):
        order = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
        fates, _, _ = sharded(order, [50, 100], CONFIG, tmp_path / str(seed))
        seen.append({id: fate for id, fate in fates.items() if fate[0]})
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) >= 60


@pytest.fixture(scope="module")
def labelled():
    """Texts of the labelled pairs and (one, other, similarity), as places in the texts."""
    folder = DATA / "neardup"
    rows = [json.loads(line) for _, line in text.read_text_lines(folder / "laravel_versions_docs.jsonl.zst") if line]
    place = {row["id"]: number for number, row in enumerate(rows)}
    pairs = [json.loads(line) for _, line in text.read_text_lines(folder / "laravel_versions_pairs.jsonl.zst") if line]
    return [row["text"] for row in rows], [(place[p["a"]], place[p["b"]], p["jaccard_char5"])
                                           for p in pairs if p["a"] in place and p["b"] in place]


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no local data folder: set SHISA_DATA")
def test_recall_and_precision_on_labelled_near_duplicates(labelled):
    texts, pairs = labelled
    folded = text.fold(pl.Series(texts))
    signatures = dedup.sign(*folded, CONFIG)
    found = [dedup.bucket_pairs(keys, np.arange(len(texts))) for keys in dedup.band_keys(signatures, CONFIG.rows)]
    candidates = set(np.unique(np.concatenate(found)).tolist())
    near, _ = dedup.near_duplicates(texts, CONFIG)
    for low, high, wanted in ((0.9, 2.0, 0.99), (0.8, 0.9, 0.97)):
        own = [(one, other) for one, other, similarity in pairs if low <= similarity < high]
        assert len(own) > 50
        assert np.mean([near[one] == near[other] for one, other in own]) >= wanted
    assert len(candidates) < 20 * len(texts)
    # precision: a document is removed for nothing but a chain of verified pairs
    linked = {(one, other) for one, other, similarity in pairs if similarity >= CONFIG.near}
    members: dict[int, list[int]] = {}
    for row, root in enumerate(near):
        members.setdefault(root, []).append(row)
    for own in (own for own in members.values() if len(own) > 1):
        for row in own:
            assert any(true_jaccard(texts[row], texts[other]) >= CONFIG.near for other in own if other != row)
    assert len(linked) > 100


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no local data folder: set SHISA_DATA")
def test_shards_give_what_memory_gives_on_labelled_documents(labelled, tmp_path):
    texts, _ = labelled
    rows = [document(f"d{number}", body) for number, body in enumerate(texts)]
    with mock.patch.object(dedup, "ROWS_AT_ONCE", 200), mock.patch.object(dedup, "SET_ITEMS_AT_ONCE", 1 << 20):
        fates, _, _ = sharded(rows, list(range(40, len(rows), 40)), CONFIG, tmp_path)
    assert fates == in_memory(rows, CONFIG)


def test_an_artifact_of_one_file_is_read_too(tmp_path):
    (made := artifact(tmp_path / "in", [table([document("a", BODIES[0])])])).path.joinpath("documents-00000.parquet").rename(
        tmp_path / "in" / "documents.parquet")
    made.manifest["files"] = {"documents.parquet": made.manifest["files"]["documents-00000.parquet"]}
    assert [path.name for path in made.shards("documents")] == ["documents.parquet"]
    assert made.table("documents")["id"].to_list() == ["a"] == made.table("documents.parquet")["id"].to_list()
