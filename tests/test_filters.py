"""Chapter 11: every rule at its threshold, facts as their definitions say, labelled noise, languages, shards, word lists."""

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa import filters, sources
from shisa.config import ShisaError
from shisa.leaks import guess, trait_counts
from shisa.sample import data_folder, documents, japanese, noise
from shisa.stage import Work, run_stage
from shisa.text import fold, normalise, script_shares, utf8

DATA = data_folder()
CONFIG = filters.Config()
WORDS = filters.word_lists(CONFIG)
PROSE = documents()[0]["ja"]
LINES = json.loads((files("shisa") / "data" / "filters" / "languages.json").read_text(encoding="utf-8"))
TEXTS = st.text(st.one_of(st.sampled_from("あいアー山川国學\n\n  |>·ﾃ縺éaet.1０ https://www.sale の激安、"), st.characters(exclude_categories=["Cs"])),
                max_size=120)
quick = settings(max_examples=60, deadline=None)


def facts_of(*texts: str, **words: tuple[str, ...]) -> pl.DataFrame:
    return filters.facts(pl.Series(texts, dtype=pl.String), WORDS | words)


def fact(text: str, name: str) -> float:
    return facts_of(text)[name][0]


# ── the whole ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The stage at tiny."""
    out = tmp_path_factory.mktemp("filters")
    run_stage("10_sources", "tiny", out)
    return run_stage("11_filters", "tiny", out)


def test_noise_is_caught_and_clean_documents_pass(artifact):
    table = {row["label"]: row for row in artifact.metrics["confusion"]}
    assert table["clean"]["dropped"] <= 0.05 * table["clean"]["documents"]
    noisy = [row for label, row in table.items() if label not in ("clean", "near_duplicate")]
    assert all(row["dropped"] == row["documents"] for row in noisy) and len(noisy) == 7
    assert sum(row["documents"] for row in table.values()) == 2 * len(documents()) + len(japanese()) + len(noise())


def test_metrics_balance(artifact):
    metrics, counts = artifact.metrics, artifact.counts
    rules, overlap = metrics["rules"], np.array(metrics["overlap"])
    assert rules == list(filters.rules(CONFIG)) and overlap.shape == (len(rules),) * 2 and (overlap == overlap.T).all()
    assert counts["in"] == counts["kept"] + sum(metrics["by_rule"].values())
    for place, rule in enumerate(rules):
        assert overlap[place].max() == overlap[place, place] >= metrics["by_rule"][rule] >= metrics["alone"][rule]
    rejects = artifact.table("rejects")
    assert Counter(rejects["reason"]) == {rule: count for rule, count in metrics["by_rule"].items() if count}
    assert sum(row["dropped"] for row in metrics["by_source"]) == rejects.height
    assert sum(metrics["documents_by_language"].values()) == artifact.table("documents").height == counts["kept"]


def shards(folder: Path, texts: list[list[str]]):
    """Something like the artifact of 10_sources: one Parquet file per list of texts."""
    paths = []
    for number, own in enumerate(texts):
        rows = [sources.row(f"{number}-{place}", text, "s", "ja", "CC0-1.0", label="x" if place % 2 else None)
                for place, text in enumerate(own)]
        paths.append(folder / f"documents-{number:05d}.parquet")
        pl.DataFrame(rows, dict.fromkeys(("id", "text", "source", "lang", "licence", "meta"), pl.String)).write_parquet(paths[-1])
    return type("Source", (), {"shards": lambda self, name: paths})()


def work_in(folder: Path) -> Work:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "test")


def test_one_shard_of_documents_and_one_of_rejects_for_each_shard_whatever_the_workers(tmp_path):
    source = shards(tmp_path, [[PROSE, "短い。"], ["短い。"], [documents()[1]["en"], documents()[2]["ja"], "!" * 200]])
    seen = []
    for workers in (1, 2):
        work = work_in(tmp_path / str(workers))
        metrics = filters.run(CONFIG.change(workers=workers), {"10_sources": source}, work)
        seen.append(({path.name: path.read_bytes() for path in work.path.iterdir()}, metrics, work.counts))
    assert seen[0] == seen[1]
    assert sorted(seen[0][0]) == [f"{name}-{number:05d}.parquet" for name in ("documents", "rejects") for number in range(3)]
    assert seen[0][2] == {"in": 6, "kept": 3, "dropped": {"symbols": 1, "too_short": 2}}
    kept = pl.read_parquet(tmp_path / "1" / "out" / "documents-00002.parquet")
    assert kept["lang"].to_list() == ["en", "ja"] and kept.columns == ["id", "text", "source", "lang", "licence", "meta"]
    labels = {row["label"]: (row["documents"], row["dropped"]) for row in metrics["confusion"]}
    assert labels == {"clean": (4, 2), "x": (2, 1)}


def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path):
    with pytest.raises(ShisaError, match="no document passes the filters"):
        filters.run(CONFIG, {"10_sources": shards(tmp_path, [["短い。"]])}, work_in(tmp_path / "work"))


# ── any text ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(TEXTS)
@quick
def test_any_text_gets_a_verdict(value):
    reason, language = filters.judge(value, CONFIG)
    assert reason in filters.rules(CONFIG) or (reason == "" and language in ("ja", "en"))


def test_lone_surrogates_get_a_verdict_too():
    assert filters.judge("\ud800" * 50, CONFIG)[0] == "symbols" and filters.judge(PROSE + "\udfff", CONFIG) == ("", "ja")


@given(st.lists(TEXTS, max_size=6), st.randoms(use_true_random=False))
@quick
def test_a_batch_is_its_texts_one_by_one_in_any_order(texts, random):
    known = facts_of(*texts)
    for place, text in enumerate(texts):
        assert known[place].equals(facts_of(text)), text
    order = list(range(len(texts)))
    random.shuffle(order)
    assert known[order].equals(facts_of(*[texts[place] for place in order]))


def test_no_text_is_no_row():
    assert filters.judge_frame(pl.DataFrame({"text": []}, {"text": pl.String}), CONFIG).height == 0


# ── facts, against plain Python ───────────────────────────────────────────────────────────────────────────────────────


@given(TEXTS)
@quick
def test_scripts_and_traces_are_as_defined(value):
    known = facts_of(value).row(0, named=True)
    for script, share in script_shares(value).items():
        assert known[script] == pytest.approx(share)
    suspect = len(re.findall("[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0e-\x1f\x7f-\x9f縺繧繝蜷譁荳]", value))
    runs = re.findall("[\u00a1-\u00ff\u0192\u0152-\u0178\u02c6\u02dc\u2013-\u203a\u20ac\u2122\u2200-\u22ff]{3,}|[\uff61-\uff9f]{6,}", value)
    assert known["mojibake"] == pytest.approx((suspect + sum(map(len, runs))) / max(len(value), 1))
    assert known["characters"] == len(value)


def exact_repetition(text: str) -> tuple[float, float]:
    blocks = [text[start : start + filters.BLOCK] for start in range(0, len(text), filters.BLOCK)]
    grams = {n: [[block[i : i + n] for i in range(len(block) - n + 1)] for block in blocks] for n in (4, 8)}
    tops = {n: sum(n * most for own in grams[n] if own and (most := Counter(own).most_common(1)[0][1]) > 3) for n in (4, 8)}
    total = sum(map(len, grams[8]))
    return min(max(tops.values()) / max(len(text), 1), 1), sum(len(set(own)) for own in grams[8]) / total if total else 1.0


@pytest.mark.parametrize("text", [PROSE * 9, documents()[3]["en"] * 3, "とても" * 900, "あ", "", PROSE + "クリック！" * 500])
def test_repetition_is_close_to_its_exact_definition(text):
    folded = normalise(filters.windows(pl.Series([text]))[0])
    phrase, distinct = filters.repetition(*fold(filters.windows(pl.Series([text]))))
    exact = exact_repetition(folded)
    assert phrase[0] == pytest.approx(exact[0], abs=0.03) and exact[1] - 0.03 <= distinct[0] <= exact[1]


def test_long_texts_are_read_at_three_places():
    text = "".join(chr(0x4E00 + place) for place in range(9000))
    assert filters.windows(pl.Series([text, text[:6000]])).to_list() == [text[:2000] + text[3500:5500] + text[7000:], text[:6000]]


@given(st.lists(st.sampled_from(["本文。", "  ", "", "同じ行", "会社概要", "Careers"]), max_size=20))
@quick
def test_repeated_lines_and_boilerplate_ends_are_as_defined(lines):
    known = facts_of("\n".join(lines))
    sizes = [len(re.sub(r"\s", "", line)) for line in lines]
    full = [(line, size) for line, size in zip(lines, sizes, strict=True) if size]
    again = sum(size for place, (line, size) in enumerate(full) if line in [other for other, _ in full[:place]])
    framed = [line in ("会社概要", "Careers") for line, _ in full]
    head = next((place for place, flag in enumerate(framed) if not flag), len(full))
    tail = next((place for place, flag in enumerate(framed[::-1]) if not flag), len(full))
    ends = {*range(head), *range(len(full) - tail, len(full))}
    total = max(sum(sizes), 1)
    assert known["repeated_lines"][0] == pytest.approx(again / total)
    assert known["boilerplate"][0] == pytest.approx(sum(size for (_, size), flag in zip(full, framed, strict=True) if flag) / total)
    assert known["boilerplate_ends"][0] == pytest.approx(sum(full[place][1] for place in ends) / total)


def exact_hits(text: str, words: tuple[str, ...]) -> list[str]:
    """Hits of one list by the definition: earliest end first, no overlap, no neighbour of the same script at an edge."""
    text, found, free = text.translate({code: code + 32 for code in range(65, 91)}), [], 0
    same = (lambda c: c.isascii() and c.isalnum(), lambda c: "\u30a1" <= c <= "\u30ff")
    for end in range(1, len(text) + 1):
        for word in sorted(words, key=len, reverse=True):
            start = end - len(word)
            if start >= free and text[start:end] == word and not any(
                    kind(edge) and kind(near) for kind in same
                    for edge, near in ((word[0], text[start - 1 : start]), (word[-1], text[end : end + 1])) if near):
                found.append(word)
                free = end
                break
    return found


@given(st.text(st.sampled_from("abc ABアイウー山川。\n"), max_size=60),
       st.lists(st.text(st.sampled_from("abcアイ山川"), min_size=2, max_size=4), min_size=1, max_size=8, unique=True))
@quick
def test_the_automaton_finds_what_its_definition_says(text, words):
    lists = {"boilerplate": ("zz",), "spam": tuple(words), "other": tuple(words[:2])}
    data = pl.Series([text])
    found = filters.line_counts(*utf8(data), data.str.count_matches("\n").to_numpy(), lists)
    for name in ("spam", "other"):
        own = exact_hits(text, lists[name])
        assert found[f"{name} hits"][0] == len(own) and found[f"{name} different"][0] == len(set(own)), name


def test_urls_are_measured_and_hide_phrases():
    known = facts_of("見る https://example.com/sale?激安 と www.example.jp/a)。", "激安 格安 最安値 https://e.jp/送料無料")
    assert known["urls"][0] == pytest.approx((len("https://example.com/sale?") + len("www.example.jp/a")) / known["characters"][0])
    assert known["spam"][0] == 0 and known["spam"][1] == pytest.approx(1000 * 4 / known["characters"][1])


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

DISTINCT = "".join(chr(0x4E00 + 7 * place) + chr(0x3042 + place % 70) for place in range(400))  # nothing repeats
FILLER = "\n".join(DISTINCT[place : place + 20] for place in range(0, 800, 20))
LOOPS = {"min_distinct": 0, "max_common_phrase": 1}  # what loops may pass
PAIRS = {  # rule: (a text that breaks it, one that just does not, changes of the config that put the threshold between them)
    "mojibake": ("\ufffd" * 6 + DISTINCT[:94], "\ufffd" * 5 + DISTINCT[:95], {}),
    "symbols": ("!?" * 26 + DISTINCT[:48], "!?" * 25 + DISTINCT[:50], LOOPS),
    "digits": ("7" * 31 + DISTINCT[:69], "7" * 30 + DISTINCT[:70], LOOPS),
    "urls": ("http://e.jp/" + "x" * 19 + "　" + DISTINCT[:68], "http://e.jp/" + "x" * 18 + "　" + DISTINCT[:69], LOOPS),
    "too_short": (DISTINCT[:39], DISTINCT[:40], {}),
    "too_long": (DISTINCT[:101], DISTINCT[:100], {"max_characters": 100}),
    "language": ("这" * 3 + "们我说话时间车马" * 9, DISTINCT[:100], LOOPS),
    "kana_share": ("の" * 9 + "山川海空" * 23, "の" * 11 + "山川海空" * 22, LOOPS),
    "repeated_lines": (FILLER[:146] + ("\n" + FILLER[:20]) * 4, FILLER[:168] + ("\n" + FILLER[:20]) * 3, {}),
    "repeated_ngrams": (DISTINCT[:60] + "くりかえし。ここ" * 4, DISTINCT[:80] + "くりかえし。ここ" * 4, {}),
    "boilerplate": (DISTINCT[:58] + "\n" + DISTINCT[100:155] + "会社概要", DISTINCT[:59] + "\n" + DISTINCT[100:155] + "会社概要",
                    {"max_boilerplate_ends": 1}),
    "boilerplate_ends": ("会社概要\n" + DISTINCT[:14] + "\n採用情報", "会社概要\n" + DISTINCT[:15] + "\n採用情報", {"min_characters": 0}),
    "spam": ("激安。格安。最安値。" + DISTINCT[:139], "激安。格安。最安値。" + DISTINCT[:140], {}),
    "own": ("甲乙。丙丁。戊己。" + DISTINCT[:140], "甲乙。丙丁。戊己。" + DISTINCT[:141], {}),
}


@pytest.mark.parametrize("rule", PAIRS)
def test_each_rule_has_a_minimal_pair(rule, tmp_path):
    broken, passes, changes = PAIRS[rule]
    (tmp_path / "own.txt").write_text("# a comment\n甲乙\n丙丁\n戊己\n辛\n")
    config = CONFIG.change(**changes, word_lists={"own": str(tmp_path / "own.txt")}, max_words={"own": 20.0})
    judged = filters.judge_frame(pl.DataFrame({"text": [broken, passes]}), config)
    assert judged[rule].to_list() == [True, False], facts_of(broken, passes).to_dicts()
    assert judged["reason"].to_list() == [rule, ""]


def test_every_rule_has_a_pair_and_a_threshold():
    assert list(PAIRS)[:-1] == list(filters.rules(CONFIG))
    described = {field.description.partition(":")[0] for field in filters.Config.model_fields.values()}
    assert set(filters.rules(CONFIG)) <= described


@pytest.mark.parametrize(("value", "reason"), [
    ("短い。", "too_short"),
    ("春の午後、商店街で小さな急須を買った。".encode().decode("cp932", "replace") * 4, "mojibake"),
    ("+----+----+\n| 00 | 00 |\n" * 9, "symbols"),
    ("这条街早上六点就开始热闹起来，卖豆浆的老板记得每个熟客的口味，看见我远远走过来就先盛好一碗不加糖的豆浆。" * 2, "language"),
    ("駅まで歩く。駅から帰る。" * 20, "repeated_ngrams"),
    ("商品番号を入力してください。\n" * 20, "repeated_lines"),
    ("会社概要 | 採用情報 | サイトマップ | お問い合わせ | プライバシーポリシー\n無断転載を禁じます。ページの先頭へ", "boilerplate"),
    ("\n".join(f"https://example.com/{name}/index.html" for name in "abcdefgh"), "urls"),
])
def test_each_rule_names_its_reason(value, reason):
    assert filters.judge(value, CONFIG)[0] == reason


# ── language ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("language", "kind"), [(language, kind) for language, kinds in LINES.items() for kind in kinds])
def test_labelled_lines_are_read_at_least_as_well_as_by_the_identifier_alone(language, kind):
    lines = LINES[language][kind]
    told = sum(facts_of(*lines)["lang"] == language)
    assert told >= sum(guess(line)[0] == language for line in lines)
    assert told >= 0.9 * len(lines) or language not in ("ja", "zh", "en")


def test_kanji_of_one_country_alone_are_told_apart():
    counts = trait_counts(*utf8(pl.Series(["働込畑駅図広", "這麼裡嗎", "这么里吗", "山川"])))
    assert counts["not_japanese"].tolist() == [0, 2, 3, 0]
    assert counts["not_traditional"].tolist() == [6, 0, 2, 0] and counts["not_simplified"].tolist() == [6, 4, 0, 0]


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no shared data")
def test_kanji_lines_of_laws_are_japanese():
    from shisa.text import read_text_lines

    texts = (json.loads(line)["text"] for _, line in read_text_lines(DATA / "corpus" / "ja_law_egov.jsonl.zst") if line)
    lines = sorted({line for text in texts for line in re.findall(r"(?m)^[\u3400-\u9fff、。]{6,40}$", text)})
    assert len(lines) > 500 and (facts_of(*lines)["lang"] == "ja").mean() >= 0.99


# ── word lists ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_word_lists_are_identity_by_content_and_not_by_place(tmp_path):
    seen = []
    for name, words in (("one", "甲乙\n丙丁\n"), ("two", "丙丁\n\n甲乙\n# 戊己\n"), ("three", "甲乙\n")):
        (tmp_path / f"{name}.txt").write_text(words)
        config = CONFIG.change(word_lists={"own": str(tmp_path / f"{name}.txt")}, max_words={"own": 5.0})
        seen.append((filters.external(config), config.part("identity")))
    assert seen[0] == seen[1] != seen[2] and str(tmp_path) not in json.dumps(seen)


def test_lists_do_not_see_each_other():
    alone = facts_of("お問い合わせ。お問い合わせください。激安。", own=("お問い合わせください", "激安", "。激"))
    assert facts_of("お問い合わせ。お問い合わせください。激安。")["spam"].equals(alone["spam"])
    assert alone["list own"][0] == 0 and facts_of("激安。激。お問い合わせください", own=("お問い合わせください", "激安", "。激"))["list own"][0] > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"word_lists": {"own": "nowhere/*.txt"}, "max_words": {"own": 1.0}}, r"nowhere/\*\.txt: no such word list"),
    ({"word_lists": {"own": "nowhere.txt"}}, "they must be the same"),
    ({"max_words": {"own": 1.0}}, "they must be the same"),
    ({"word_lists": {"spam": "x"}, "max_words": {"spam": 1.0}}, "not spam"),
])
def test_bad_word_lists_are_refused_in_one_line(changes, message):
    with pytest.raises(ShisaError, match=message) as caught:
        filters.word_lists(CONFIG.change(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.shared
@pytest.mark.skipif(DATA is None or not (DATA / "wordlists").is_dir(), reason="no shared word lists")
def test_shared_word_lists_are_read_where_they_lie():
    config = filters.config("small")
    lists = filters.word_lists(config)
    assert set(config.max_words) == {"adult", "violence", "discrimination", "advertisement", "header_footer"} and len(lists["adult"]) > 1000
    words = [word for word in lists["adult"] if len(word) > 2][:40]
    judged = filters.judge_frame(pl.DataFrame({"text": ["。".join(words), PROSE]}), config)
    assert judged["adult"].to_list() == [True, False]
