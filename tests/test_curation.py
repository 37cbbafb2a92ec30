"""Chapters 11 to 14: filters, duplicates, resampling, the split; the same bytes twice (chapter 10: test_sources.py)."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa import dedup, dsir, filters, sources, split, text
from shisa.config import ShisaError
from shisa.sample import data_folder, documents, evaluation, japanese, noise
from shisa.stage import Artifact, Work, run_stage

CHAIN = ("10_sources", "11_filters", "12_dedup", "13_dsir", "14_split")
JAPANESE = st.text(st.sampled_from("あいうえおかきくけこ山川海空木、。アイ abcXY12\n"), max_size=80)
ANY = st.text(max_size=60)
quick = settings(max_examples=60, deadline=None)
DATA = data_folder()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The five artifacts at tiny."""
    out = tmp_path_factory.mktemp("chain")
    return {name: run_stage(name, "tiny", out) for name in CHAIN}


def work_in(folder: Path) -> Work:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "test")


# ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(ANY)
@quick
def test_normalise_is_idempotent(value):
    once = text.normalise(value)
    assert text.normalise(once) == once == unicodedata.normalize("NFKC", once)


def reference_hash(gram: str) -> int:
    """FNV-1a over code points and MurmurHash3's finaliser, in plain Python."""
    mask, value = 2**64 - 1, 0xCBF29CE484222325
    for character in gram:
        value = (value ^ ord(character)) * 0x100000001B3 & mask
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor & mask
    return value ^ value >> 33


@given(ANY, st.integers(1, 6))
@quick
def test_ngram_hashes_match_plain_python(value, size):
    expected = [reference_hash(value[i : i + size]) for i in range(len(value) - size + 1)]
    assert text.ngram_hashes(value, size).tolist() == expected
    assert text.ngram_hashes(value, size, 1000).tolist() == [number % 1000 for number in expected]


@given(ANY)
@quick
def test_script_shares_sum_to_one(value):
    total = sum(text.script_shares(value).values())
    assert total == pytest.approx(1) or (total == 0 and not value.strip())


def test_lines_are_cut_at_newline_alone(tmp_path):
    body = '{"text": "一\u2028二\x85三"}\r\n{"text": "四"}'.encode()
    writers = {"a.jsonl": body, "a.jsonl.gz": gzip.compress(body), "a.jsonl.zst": zstandard.compress(body)}
    for name, data in writers.items():
        (tmp_path / name).write_bytes(data)
        assert [json.loads(line)["text"] for _, line in text.read_text_lines(tmp_path / name)] == ["一\u2028二\x85三", "四"]


def test_torn_compressed_files_are_refused(tmp_path):
    body = os.urandom(4000).hex().encode() + b"\n"
    for name, data in (("a.gz", gzip.compress(body)), ("a.zst", zstandard.compress(body))):
        (tmp_path / name).write_bytes(data[:-20])
        with pytest.raises(ShisaError, match=f"{name}:.*torn"):
            list(text.read_text_lines(tmp_path / name))


def test_planted_evaluation_items_are_found_and_near_misses_are_not():
    items = [item for item in evaluation() if item["task"] in ("MC", "RC")]
    against = [{"id": item["id"], "text": item["input"]} for item in items]
    plain = [document["ja"] for document in documents()]
    planted = [f"{plain[i]}\n{item['input']}" for i, item in enumerate(items)]
    assert all(text.contaminated(planted, against))
    assert not any(text.contaminated(plain, against))


# ── filters ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_caught_and_clean_documents_pass(chain):
    table = {row["label"]: row for row in chain["11_filters"].metrics["confusion"]}
    assert table["clean"]["dropped"] <= 0.05 * table["clean"]["documents"]
    noisy = [row for label, row in table.items() if label not in ("clean", "near_duplicate")]
    assert sum(r["dropped"] for r in noisy) >= 0.8 * sum(r["documents"] for r in noisy)
    assert sum(row["documents"] for row in table.values()) == 2 * len(documents()) + len(japanese()) + len(noise())


@pytest.mark.parametrize(("value", "reason"), [
    ("短い。", "too_short"),
    ("春の午後、商店街で小さな急須を買った。".encode().decode("cp932", "replace") * 4, "mojibake"),
    ("+----+----+\n| 00 | 00 |\n" * 9, "symbols"),
    ("这条街早上六点就开始热闹起来，卖豆浆的老板记得每个熟客的口味，看见我远远走过来就先盛好一碗不加糖的豆浆。" * 2, "language"),
    ("駅まで歩く。駅から帰る。" * 20, "repetition"),
    ("会社概要 | 採用情報 | サイトマップ | お問い合わせ | プライバシーポリシー\n無断転載を禁じます。ページの先頭へ", "boilerplate"),
])
def test_each_rule_names_its_reason(value, reason):
    assert filters.judge(value, filters.Config())[0] == reason


@given(ANY)
@quick
def test_any_text_gets_a_verdict(value):
    reason, language = filters.judge(value, filters.Config())
    assert reason in filters.RULES or (reason == "" and language in ("ja", "en"))


# ── duplicates ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 10**6), min_size=30, max_size=200, unique=True), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_minhash_estimates_jaccard(numbers, share):
    values = np.sort(np.random.default_rng(len(numbers)).permutation(np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    cut = int(share * values.size / 2)
    first, second = values[: values.size - cut], values[cut:]
    estimate = np.mean(dedup.signature(first) == dedup.signature(second))
    assert abs(estimate - dedup.jaccard(first, second)) < 0.25  # five standard errors of 112 places


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
@quick
def test_groups_are_connected_components(pairs):
    roots = dedup.Groups(20).join(pairs).roots()
    assert all(roots[a] == roots[b] for a, b in pairs)
    assert all(root <= member and roots[root] == root for member, root in enumerate(roots))


def test_planted_near_duplicates_go_and_their_originals_stay(chain):
    kept = set(chain["12_dedup"].table("documents.parquet")["id"])
    planted = [item for item in noise() if item["label"] == "near_duplicate"]
    assert sum(item["id"] in kept for item in planted) <= 1
    assert all(f"{item['of']}-{item['lang']}" in kept or item["of"] in kept for item in planted)


def test_exact_duplicates_survivor_and_order(tmp_path):
    body = documents()[0]["ja"]
    rows = [sources.row(id, value, "s", "ja", "CC0-1.0", **meta) for id, value, meta in (
        ("b", body, {}), ("c", body.replace("、", "､"), {}), ("a", body, {"pair": "p"}), ("d", documents()[1]["ja"], {}))]
    seen = []
    for number, order in enumerate((rows, rows[::-1])):
        folder = tmp_path / str(number)
        work = work_in(folder / "work")
        (folder / "in").mkdir()
        pl.DataFrame(order).write_parquet(folder / "in" / "documents.parquet")
        source = type("Source", (), {"table": lambda self, name, at=folder: pl.read_parquet(at / "in" / name)})()
        dedup.run(dedup.Config(workers=1 + number), {"11_filters": source}, work)
        seen.append((work.path / "documents.parquet").read_bytes())
        assert pl.read_parquet(work.path / "documents.parquet")["id"].to_list() == ["a", "d"]
    assert seen[0] == seen[1]


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no shared data")
def test_recall_and_precision_on_labelled_near_duplicates():
    folder = DATA / "neardup"
    rows = [json.loads(line) for _, line in text.read_text_lines(folder / "laravel_versions_docs.jsonl.zst") if line]
    place = {row["id"]: number for number, row in enumerate(rows)}
    pairs = [json.loads(line) for _, line in text.read_text_lines(folder / "laravel_versions_pairs.jsonl.zst") if line]
    pairs = [(place[p["a"]], place[p["b"]], p["jaccard_char5"]) for p in pairs if p["a"] in place and p["b"] in place]
    config = dedup.Config()
    sets, signatures = dedup.sign([row["text"] for row in rows], config)
    candidates = {tuple(pair) for pair in dedup.candidates(signatures, config.rows).tolist()}
    found = dedup.verified(sets, np.array(sorted(candidates)), config.near)
    group = dedup.Groups(len(rows)).join(found).roots()
    high = [(a, b) for a, b, similarity in pairs if similarity >= 0.9]
    middle = [(a, b) for a, b, similarity in pairs if 0.8 <= similarity < 0.9]
    assert len(high) > 50 and len(middle) > 50
    assert np.mean([group[a] == group[b] for a, b in high]) >= 0.99
    assert np.mean([group[a] == group[b] for a, b in middle]) >= 0.95
    assert all(dedup.jaccard(sets[a], sets[b]) >= config.near for a, b in found)  # verified: precision 1 at the threshold


# ── resampling ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_target_documents_weigh_more():
    kinds = ("tale", "code")
    rows = [{"id": f"{d['id']}", "text": d["ja"], "source": f"sample/{d['kind']}", "lang": "ja"}
            for d in documents() if d["kind"] in kinds]
    weighed = dsir.weigh(pl.DataFrame(rows), dsir.Config(target=("sample/tale",), share=0.5, sharpness=100.0), "ja")
    chosen = weighed.filter("chosen")
    assert chosen.height == round(len(rows) / 2)
    assert (chosen["source"] == "sample/tale").mean() >= 0.9


def test_an_empty_target_is_refused(chain):
    with pytest.raises(ShisaError, match="target for .* is empty"):
        dsir.target_texts(chain["12_dedup"].table("documents.parquet"), dsir.Config(target=("nowhere",)), "ja")


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20), st.floats(0.01, 5))
@quick
def test_smoothed_distribution_is_one(counts, smoothing):
    assert np.exp(dsir.log_distribution(np.array(counts), smoothing)).sum() == pytest.approx(1)


# ── split ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.sampled_from(["c1", "c2", "c3", "c4", ""]), st.sampled_from(["p1", "p2", "p3", ""])), max_size=15),
       st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_split_keeps_clusters_and_pairs_together(keys, seed):
    groups = split.group_ids(keys)
    for kind in (0, 1):
        for key in {own[kind] for own in keys} - {""}:
            assert len({groups[i] for i, own in enumerate(keys) if own[kind] == key}) == 1
    bodies = [f"文書番号{i}の本文はここにあります。" * 3 for i in range(len(keys))]
    frame = pl.DataFrame({"id": [f"d{i}" for i in range(len(keys))], "text": bodies, "source": ["s"] * len(keys),
                          "lang": ["ja"] * len(keys)}, schema=dict.fromkeys(("id", "text", "source", "lang"), pl.String))
    taken = split.hold_out(frame, groups, split.shared_lines(bodies, groups), split.Config(share=0.3, seed=seed))
    assert taken <= set(groups) and (not groups or taken != set(groups))


def test_the_split_of_the_sample(chain):
    artifact = chain["14_split"]
    train, held = (artifact.table(f"{name}.parquet") for name in ("train", "heldout"))
    assert not set(train["id"]) & set(held["id"]) and train.columns == held.columns
    assert set(held["source"]) == set(train["source"]) and artifact.metrics["leak_share"] < 0.01
    for key in (lambda row: row["cluster"], lambda row: json.loads(row["meta"]).get("pair")):
        sides = [{key(row) for row in part.iter_rows(named=True)} - {None} for part in (train, held)]
        assert not sides[0] & sides[1]
    size = {name: sum(part["text"].str.len_bytes()) for name, part in (("train", train), ("held", held))}
    assert 0.05 < size["held"] / sum(size.values()) < 0.13
    assert split.leak_share(held["text"], train["text"]) == pytest.approx(artifact.metrics["leak_share"])


def test_contaminated_documents_are_dropped_with_their_item(tmp_path):
    item = next(item for item in evaluation() if item["task"] == "RC")
    rows = [sources.row(f"d{i}", d["ja"], "s", "ja", "CC0-1.0") for i, d in enumerate(documents()[:4])]
    rows[1]["text"] += "\n" + item["input"]
    work = work_in(tmp_path)
    kept = split.decontaminate(pl.DataFrame(rows), split.Config(), work)
    assert kept["id"].to_list() == ["d0", "d2", "d3"]
    assert work._rejects[0]["reason"] == "contaminated" and item["dataset"] in work._rejects[0]["where"]


# ── the chain ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_counts_balance_through_the_chain(chain):
    kept = None
    for name in CHAIN:
        counts = chain[name].counts
        assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
        assert kept is None or counts["in"] == kept
        kept = counts["kept"]
        assert chain[name].table("rejects.parquet").height == sum(counts["dropped"].values())


def test_same_bytes_in_another_folder_process_and_with_other_workers(chain, tmp_path):
    program = (
        "import sys; from shisa.stage import get_stage, run_stage\n"
        f"for name in {CHAIN!r}:\n"
        "    config = get_stage(name).config('tiny')\n"
        "    config = config.change(workers=1) if name == '12_dedup' else config\n"
        "    run_stage(name, 'tiny', sys.argv[1], config=config)\n")
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "other")], check=True, env=environment, cwd=tmp_path)
    for name in CHAIN:
        other = Artifact(tmp_path / "other" / name)
        assert other.manifest["files"] == chain[name].manifest["files"]
        assert other.manifest["fingerprint"] == chain[name].manifest["fingerprint"]


def test_artifacts_hold_no_absolute_path(chain):
    for artifact in chain.values():
        described = json.dumps({key: artifact.manifest[key] for key in ("identity", "metrics", "licences")})
        assert str(artifact.path.parent) not in described
