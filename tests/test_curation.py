"""Chapters 10 and 11: reading, filters; bad input."""

import gzip
import json
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa import filters, sources
from shisa.config import ShisaError
from shisa.sample import documents, japanese, noise
from shisa.stage import Work, run_stage

CHAIN = ("10_sources", "11_filters")
ANY = st.text(max_size=60)
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The two artifacts at tiny."""
    out = tmp_path_factory.mktemp("chain")
    return {name: run_stage(name, "tiny", out) for name in CHAIN}


def work_in(folder: Path) -> Work:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "test")


def read_sources(folder: Path, tmp_path: Path, **changes) -> tuple[pl.DataFrame, Work]:
    config = sources.Config(kind="folder", folder=str(folder)).change(**changes)
    work = work_in(tmp_path / "work")
    sources.run(config, {}, work)
    return pl.read_parquet(work.path / "documents.parquet"), work


# ── sources ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def jsonl(path: Path, *rows: dict | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = {"text": "これは文書です。", "lang": "ja", "license": "CC0-1.0", "source": "example.jp", "id": "a"}


def test_folder_keeps_source_licence_and_origin(tmp_path):
    jsonl(tmp_path / "ja_notes.jsonl", GOOD, {**GOOD, "id": "b", "license": "CC BY 4.0"})
    frame, work = read_sources(tmp_path, tmp_path)
    assert frame["source"].to_list() == ["ja_notes"] * 2 and frame["licence"].to_list() == ["CC0-1.0", "CC BY 4.0"]
    assert json.loads(frame["meta"][0])["origin"] == "example.jp" and len(work.licences) == 2


def test_a_torn_line_names_file_line_and_way_out(tmp_path):
    jsonl(tmp_path / "ja_notes.jsonl", GOOD, b'{"text": "\xe3\x81\x93\xe3', {**GOOD, "id": "b"})
    with pytest.raises(ShisaError, match=r"ja_notes\.jsonl:2: .*broken='reject'") as caught:
        read_sources(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_lines_are_counted_when_asked(tmp_path):
    broken = (b'{"text": "to', b"[1]", b'{"text": null}', b'{"text": " "}')
    jsonl(tmp_path / "ja_notes.jsonl", GOOD, *broken, GOOD, {**GOOD, "id": "z"})
    frame, work = read_sources(tmp_path, tmp_path, broken="reject")
    assert frame.height == 2
    assert work.counts == {"in": 7, "kept": 2, "dropped": {
        "not a JSON object": 2, "no text field": 1, "empty text": 1, "repeated id": 1}}
    assert {reject["where"] for reject in work._rejects} >= {"ja_notes.jsonl:2", "ja_notes.jsonl:3", "ja_notes.jsonl:4"}


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no .jsonl"),
    (lambda folder: (folder.mkdir(), (folder / "ja.jsonl").write_bytes(b"")), "corpus is empty"),
    (lambda folder: (folder.mkdir(), jsonl(folder / "ja.jsonl", {**GOOD, "lang": "xx"})), "languages"),
])
def test_missing_and_empty_sources_are_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "corpus")
    with pytest.raises(ShisaError, match=message) as caught:
        read_sources(tmp_path / "corpus", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_refused_source_leaves_no_artifact(tmp_path):
    config = sources.Config(kind="folder", folder=str(tmp_path / "nowhere"))
    with pytest.raises(ShisaError):
        run_stage("10_sources", "tiny", tmp_path / "run", config=config)
    assert not (tmp_path / "run" / "10_sources").exists()


def test_folder_identity_is_content_not_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "ja_notes.jsonl", GOOD)
    first, second = (sources.external(sources.Config(kind="folder", folder=str(tmp_path / n))) for n in ("one", "two"))
    assert first == second and list(first) == ["ja_notes.jsonl"]


def test_hub_reader_on_a_folder_laid_out_like_madlad400(tmp_path):
    for lang, body in (("ja", "日本語の文書です。"), ("en", "A document.")):
        (tmp_path / "hub" / "data" / lang).mkdir(parents=True)
        rows = "".join(json.dumps({"text": f"{body}{i}\\n次の行"}) + "\n" for i in range(20))
        (tmp_path / "hub" / "data" / lang / f"{lang}_clean_0000.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    config = sources.config("a100x16").change(folder=str(tmp_path / "hub"), budgets={"ja": 200, "en": 0})
    frames = []
    for name in ("first", "second"):
        work = work_in(tmp_path / name)
        sources.run(config, {}, work)
        frames.append(pl.read_parquet(work.path / "documents.parquet"))
    assert frames[0].equals(frames[1]) and len(config.revision) == 40
    counts = Counter(frames[0]["lang"])
    assert counts["en"] == 20 and 0 < counts["ja"] < 20 and set(frames[0]["source"]) == {"madlad400_ja", "madlad400_en"}
    assert all("\n次の行" in body for body in frames[0]["text"])


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 1000), min_size=1), st.integers(0, 3000), st.floats(0.05, 1))
@quick
def test_water_level_is_fair_and_within_budget(sizes, budget, largest):
    taken = sources.water_level(sizes, budget, largest)
    assert sum(taken.values()) <= budget and all(taken[name] <= size for name, size in sizes.items())
    assert max(taken.values()) <= budget * largest
    lowest = min((taken[n] for n, size in sizes.items() if taken[n] < min(size, int(budget * largest))), default=None)
    assert lowest is None or max(taken.values()) - lowest <= len(sizes)  # nobody gets less while another gets more


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
