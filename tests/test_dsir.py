"""Chapter 13: counts, weights and the draw against plain definitions; targets, features, sizes, shards."""
import json
import math
import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shard_toys import cut, document, run_on, table, written
from xxhash import xxh3_64_intdigest, xxh32_intdigest

from shisa import dsir, text
from shisa.config import ShisaError
from shisa.sample import documents, japanese

TEXTS = st.lists(st.text(st.sampled_from("あいう漢字ABc ,。\n"), max_size=25), min_size=1, max_size=6)
quick = settings(max_examples=80, deadline=None)


# ── features and weights ──────────────────────────────────────────────────────────────────────────────────────────────


def units_of(body: str, features: str) -> list[int]:
    """What n-grams are made of: folded characters, or hashed words."""
    if features == "characters":
        return [ord(character) for character in text.normalise(body)]
    return [xxh32_intdigest(word.encode()) for word in re.findall(r"\w+|[^\w\s]+", body.lower())]


def bucket(units: list[int], bits: int) -> int:
    """The bucket of an n-gram: the upper bits of the sum of its units' products with fixed odd numbers."""
    return (sum(unit * int(key) for unit, key in zip(units, text.KEYS, strict=False)) & 2**64 - 1) >> 64 - bits


def buckets_of(body: str, config: dsir.Config) -> list[int]:
    """The bucket of every n-gram of 1 to `longest` units of a text."""
    units = units_of(body, config.features)
    return [bucket(units[first : first + size], config.bits)
            for size in range(1, config.longest + 1) for first in range(len(units) - size + 1)]


CONFIGS = st.builds(lambda features, longest, bits: dsir.Config(features=features, longest=longest, bits=bits),
                    st.sampled_from(["characters", "words"]), st.integers(1, 4), st.sampled_from([1, 5, 12, 16]))


@given(TEXTS, CONFIGS)
@quick
def test_counts_are_the_plain_ones(texts, config):
    expected = Counter(place for body in texts for place in buckets_of(body, config))
    found = dsir.count_features(pl.Series(texts), config)
    assert found.tolist() == [expected[place] for place in range(2**config.bits)]


@given(TEXTS, CONFIGS, st.integers(0, 5), st.sampled_from(["mean", "sum"]))
@quick
def test_weights_are_the_plain_ones(texts, config, seed, length):
    config = config.change(length=length, prior=30 * (seed % 2))
    ratio = np.random.default_rng(seed).normal(0, 3, 2**config.bits)
    for body, weight in zip(texts, dsir.log_weights(pl.Series(texts), ratio, config), strict=True):
        places = buckets_of(body, config)
        if not places:
            assert weight == -math.inf
            continue
        total = sum(float(ratio[place]) for place in places)
        expected = total if length == "sum" else config.sharpness * total / (len(places) + config.prior)
        assert weight == pytest.approx(expected, abs=1e-5 * max(len(places), 1))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20), st.floats(0.01, 5))
@quick
def test_smoothed_distribution_is_one(counts, smoothing):
    logs = dsir.log_distribution(np.array(counts), smoothing)
    assert np.exp(logs).sum() == pytest.approx(1)
    assert np.allclose(np.exp(logs) * (sum(counts) + smoothing * len(counts)), np.array(counts) + smoothing)


@given(st.lists(st.text(max_size=10), max_size=20, unique=True), st.integers(0, 3))
@quick
def test_noise_belongs_to_the_id(ids, seed):
    noise = dsir.uniform(ids, seed)
    assert noise.tolist() == [((xxh3_64_intdigest(id.encode(), seed) >> 12) + 0.5) / 2**52 for id in ids]
    assert np.allclose(dsir.gumbel(ids, seed), -np.log(-np.log(noise))) and np.all((noise > 0) & (noise < 1))


def test_noise_is_gumbel():
    drawn = dsir.gumbel(map(str, range(20_000)), 1)
    assert drawn.mean() == pytest.approx(0.5772, abs=0.04) and drawn.std() == pytest.approx(math.pi / 6**0.5, abs=0.03)


# ── the draw ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = st.floats(allow_nan=False) | st.sampled_from([-math.inf, -1.5, 0.0, 1.0, 1.0000000001, 5e-324])


@given(st.lists(st.lists(NUMBERS, max_size=8), min_size=1, max_size=5), st.data())
@example([[-math.inf, -math.inf, 3.0], [], [-2.0]], None)
@quick
def test_kth_largest_is_numpys(parts, data):
    flat = np.sort(np.concatenate([np.array(part, float) for part in parts]))[::-1]
    for k in range(1, flat.size + 1) if data is None else [data.draw(st.integers(1, flat.size))] if flat.size else []:
        assert dsir.kth_largest([np.array(part, float) for part in parts], k) == flat[k - 1]


def test_nothing_is_above_the_limit_of_an_empty_draw():
    assert dsir.kth_largest([np.array([1.0, 2.0])], 0) == math.inf


KINDS = ("tale", "code", "essay", "science")
ROWS = [document(f"{item['id']}-{lang}", item[lang], f"sample/{item['kind']}", lang) for item in documents() for lang in ("ja", "en")
        if item["kind"] in KINDS]


def drawn(rows, config, folder, places=()):
    """Ids drawn, weight of every one of them, metrics and work."""
    metrics, work = run_on(dsir.STAGE, cut(table(rows), list(places)), config, folder)
    kept, rejects = written(work, "documents"), written(work, "rejects")
    assert kept.height + rejects.height == len(rows) and set(rejects["reason"]) <= {"not drawn"}
    assert work.counts["in"] == len(rows) and work.counts["kept"] == kept.height
    assert kept["id"].to_list() == [row["id"] for row in rows if row["id"] in set(kept["id"])]  # the order of the input
    return dict(kept.select("id", "weight").iter_rows()), metrics, work


@pytest.mark.parametrize("features", ["characters", "words", "pieces"])
def test_target_documents_weigh_more_with_every_feature(features, tmp_path):
    changes = {"features": features}
    if features == "pieces":
        import sentencepiece

        (tmp_path / "text.txt").write_text("\n".join(line for item in japanese()[:60] for line in item["ja"].split("\n")))
        sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "toy"), vocab_size=2500,
                                                 character_coverage=1.0, minloglevel=2, num_threads=1, hard_vocab_limit=False)
        changes["pieces"] = str(tmp_path / "toy.model")
    rows = [row for row in ROWS if row["lang"] == "ja" and row["source"] in ("sample/tale", "sample/code")]
    share = sum(row["source"] == "sample/tale" for row in rows) / len(rows)
    config = dsir.Config(target=("sample/tale",), share=share, sharpness=100.0, **changes)
    ids, metrics, _ = drawn(rows, config, tmp_path)
    sources = [row["source"] for row in rows if row["id"] in ids]
    assert len(ids) == round(share * len(rows)) and sources.count("sample/tale") >= 0.9 * len(sources)
    weights = {row["source"]: row["weight"] for row in metrics["by_source"]}
    assert weights["sample/tale"] > 0 > weights["sample/code"]
    if features == "pieces":
        assert list(dsir.external(config)) == ["toy.model"]


def test_exactly_k_of_every_language_are_drawn_and_they_are_the_largest(tmp_path):
    config = dsir.Config(target=("sample/tale",), share=0.37)
    ids, metrics, work = drawn(ROWS, config, tmp_path, [5, 5, 40])
    for lang in ("ja", "en"):
        own = [row["id"] for row in ROWS if row["lang"] == lang]
        k = round(0.37 * len(own))
        keys = np.concatenate([np.load(path)[1] for path in sorted(work.scratch.glob("weights-*.npy"))])
        keys = keys[[row["lang"] == lang for row in ROWS]]
        assert np.unique(keys).size == len(own)
        assert {id for id in own if id in ids} == {own[place] for place in np.argsort(-keys)[:k]}
        assert metrics["by_language"][lang] == k / len(own)


def test_documents_of_a_language_replace_its_share(tmp_path):
    config = dsir.Config(target=("sample/tale",), share=0.5, documents={"ja": 7, "en": 0})
    ids, _, _ = drawn(ROWS, config, tmp_path / "few", [30])
    assert [id[-2:] for id in ids] == ["ja"] * 7
    everything, _, _ = drawn(ROWS, config.change(documents={"ja": 10**6, "en": 1}), tmp_path / "all", [30])
    assert Counter(id[-2:] for id in everything) == {"ja": sum(row["lang"] == "ja" for row in ROWS), "en": 1}


def test_a_document_without_features_is_drawn_last(tmp_path):
    rows = [*(row for row in ROWS if row["lang"] == "ja"), document("empty", " \u3000 ")]
    config = dsir.Config(target=("sample/tale",), documents={"ja": len(rows) - 1})
    ids, metrics, _ = drawn(rows, config, tmp_path)
    assert set(ids) == {row["id"] for row in rows} - {"empty"}
    json.dumps(metrics, allow_nan=False)  # the manifest is JSON that every reader takes


@given(st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=8, deadline=None)
def test_shards_do_not_change_the_draw(tmp_path_factory, places):
    folder = tmp_path_factory.mktemp("dsir")
    config = dsir.Config(target=("sample/tale",), share=0.4)
    whole, metrics, _ = drawn(ROWS, config, folder / "whole")
    parts, again, _ = drawn(ROWS, config, folder / "parts", places)
    assert whole == parts and metrics == again


def test_a_part_of_the_corpus_stands_for_it(tmp_path):
    rows = [document(f"{row['id']}-{copy}", row["text"][copy * 20 :], row["source"], row["lang"]) for row in ROWS for copy in range(6)]
    config = dsir.Config(target=("sample/tale",), share=0.5, sharpness=100.0)
    size = sum(len(row["text"].encode()) for row in rows)
    whole, _, full = drawn(rows, config, tmp_path / "whole", [100, 200])
    part, _, some = drawn(rows, config.change(fit_bytes=size // 3), tmp_path / "part", [100, 200])
    counted = [sum(np.load(path)[::2].sum() for path in work.scratch.glob("counts-*.npy")) for work in (full, some)]
    assert 0.15 < counted[1] / counted[0] < 0.6
    assert len(set(whole) & set(part)) > 0.9 * len(whole)
    both = sorted(set(whole) & set(part))
    assert np.corrcoef([whole[id] for id in both], [part[id] for id in both])[0, 1] > 0.85


# ── targets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_target_from_files_is_named_by_its_content(tmp_path):
    for lang in ("ja", "en"):
        lines = [json.dumps({"text": row["text"]}, ensure_ascii=False) for row in ROWS
                 if row["lang"] == lang and row["source"] == "sample/code"]
        (tmp_path / f"target_{lang}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = dsir.Config(target_files=(str(tmp_path / "target_{lang}.jsonl"),), share=0.2, sharpness=100.0)
    ids, _, _ = drawn(ROWS, config, tmp_path / "work")
    kinds = Counter(row["source"] for row in ROWS if row["id"] in ids)
    assert kinds["sample/code"] >= 0.8 * kinds.total()
    before = dsir.external(config)
    assert sorted(before) == ["target_en.jsonl", "target_ja.jsonl"] and "target_files" not in config.part("identity")
    (tmp_path / "target_ja.jsonl").write_text('{"text": "別の文です。"}\n', encoding="utf-8")
    after = dsir.external(config)
    assert before["target_ja.jsonl"] != after["target_ja.jsonl"] and before["target_en.jsonl"] == after["target_en.jsonl"]
    (tmp_path / "target_ja.jsonl").unlink()
    with pytest.raises(ShisaError, match=r"target_ja\.jsonl: no such file"):
        dsir.external(config)


def test_files_of_one_name_in_two_folders_both_count(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "target.jsonl").write_text(json.dumps({"text": f"{name}の文です。"}) + "\n", encoding="utf-8")
    config = dsir.Config(target_files=tuple(str(tmp_path / name / "target.jsonl") for name in ("one", "two")))
    marks = dsir.external(config)
    assert len(marks["target.jsonl"].split()) == 2
    both = dsir.target_counts("ja", config).sum()
    assert both == 2 * dsir.target_counts("ja", config.change(target_files=config.target_files[:1])).sum()


def test_a_target_of_parquet_files_is_read_until_it_is_large_enough(tmp_path):
    bodies = [row["text"] for row in ROWS if row["lang"] == "ja" and row["source"] == "sample/tale"]
    pl.DataFrame({"text": bodies, "title": bodies}).write_parquet(tmp_path / "ja.parquet", row_group_size=2)
    pattern = str(tmp_path / "{lang}.parquet")
    config = dsir.Config(target_hub=pattern)
    for rows in (3, len(bodies), 50_000):
        counts = dsir.target_counts("ja", config.change(target_rows=rows))
        assert np.array_equal(counts, dsir.count_features(pl.Series(bodies[:rows]), config))
    with pytest.raises(ShisaError, match="cannot be read") as caught:
        dsir.target_counts("ja", config.change(target_hub=str(tmp_path / "nothing.parquet")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [dsir.Config(), dsir.Config(target=("nowhere",))])
def test_an_empty_target_is_refused_in_one_line(config, tmp_path):
    with pytest.raises(ShisaError, match="the target for en is empty: none of .* has text") as caught:
        drawn(ROWS, config, tmp_path)
    assert "\n" not in str(caught.value)
