"""Chapter 10: every format and source, broken records, budgets, licences; the same bytes whatever the workers, the order or a kill."""

import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shisa import sample, sources, stage
from shisa.config import ShisaError
from shisa.sample import data_folder
from shisa.stage import Artifact, Work, run_stage

DATA = data_folder()
GOOD = {"text": "これは文書です。", "lang": "ja", "license": "CC0-1.0", "source": "example.jp", "id": "a"}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
quick = settings(max_examples=80, deadline=None)


def work_in(folder: Path) -> Work:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Work(folder / "out", folder / "scratch", folder / "status.json", "test")


def tables(folder: Path, name: str) -> pl.DataFrame:
    """All shards of a table in a work folder; an empty frame where there is none."""
    found = sorted((folder / "out").glob(f"{name}-*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in found]) if found else stage.reject_frame([])


def read(folder: Path, work: Path, **changes) -> tuple[pl.DataFrame, pl.DataFrame, Work]:
    """Documents, rejects and the work of a folder source, broken records counted."""
    config = sources.Config(kind="folder", folder=str(folder), broken="reject").change(**changes)
    done = work_in(work)
    done.metrics = sources.run(config, {}, done)
    counts = done.counts
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    frame, rejects = tables(work, "documents"), tables(work, "rejects")
    assert frame.height == counts["kept"] and frame.columns == list(sources.SCHEMA) and frame.null_count().sum_horizontal()[0] == 0
    told = Counter(counts["dropped"])
    del told[sample.OVER_BUDGET], told[sample.OTHER]  # those stay in their file
    assert Counter(rejects["reason"]) == told
    return frame, rejects, done


def jsonl(path: Path, *rows: dict | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK["." + path.name.rpartition(".")[2] if path.suffix in PACK else ""](b"\n".join(lines) + b"\n"))
    return path


def rows(count: int, first: int = 0, size: int = 3) -> list[dict]:
    return [{**GOOD, "id": f"d{n}", "text": f"文書{n}。" + "川べりを歩いた。" * (n % size)} for n in range(first, first + count)]


# ── formats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_keeps_source_licence_and_origin(tmp_path):
    jsonl(tmp_path / "c" / "ja_notes.jsonl", GOOD, {**GOOD, "id": "b", "license": "CC BY 4.0"})
    frame, _, work = read(tmp_path / "c", tmp_path / "w")
    assert frame["source"].to_list() == ["ja_notes"] * 2 and frame["licence"].to_list() == ["CC0-1.0", "CC BY 4.0"]
    assert frame["id"].to_list() == ["ja_notes/a", "ja_notes/b"]
    assert json.loads(frame["meta"][0])["origin"] == "example.jp" and len(work.licences) == 2


@given(st.none() | st.text(max_size=20) | st.sampled_from(['","pair":null', '"origin":null,', "\\\"\n"]), st.sampled_from([None, "a", "x@1:ja/b.md"]))
@quick
def test_meta_is_json_of_what_is_known(origin, id):
    raw = pl.DataFrame({"text": "a", "id": id, "lang": "ja", "licence": "MIT", "origin": sample.plain(origin), "line": 1}, schema=sources._RAW)
    config, entry = sources.Config(kind="folder"), sample.file_entry("ja_x.jsonl", Path("ja_x.jsonl"))
    frame = sources.named(sources.clean(raw, entry, config), entry, config)
    expected = {"origin": origin} if origin else {}
    assert json.loads(frame["meta"][0]) == expected | ({"pair": "x:b.md"} if id and ":" in id else {})


def test_all_formats_in_one_folder_and_its_sub_folders(tmp_path):
    folder = tmp_path / "c"
    for number, ending in enumerate(PACK):
        jsonl(folder / f"ja_{number}.jsonl{ending}", *rows(3))
        (folder / f"ja_letter{number}.txt{ending}").write_bytes(PACK[ending]("\ufeff一行\r\n二行\u2028".encode()))
    (folder / "ja_web" / "deep").mkdir(parents=True)
    for name in ("ja_web/part-0", "ja_web/part-1", "ja_web/deep/part-0"):
        pl.DataFrame(rows(3, len(name))).write_parquet(folder / f"{name}.parquet")
    (folder / ".hidden.jsonl").write_bytes(b"nothing")
    (folder / "README.md").write_bytes(b"nothing")
    (folder / "loop").symlink_to(folder)
    frame, rejects, _ = read(folder, tmp_path / "w", licences={"text": "CC0-1.0"})
    assert rejects.height == 3  # part-0 and part-1 of one domain have the same ids
    assert frame["source"].unique(maintain_order=True).to_list() == ["ja_0", "ja_1", "ja_2", "text", "ja_web/deep", "ja_web"]
    letters = frame.filter(pl.col("source") == "text")
    assert letters["text"].to_list() == ["一行\n二行\u2028"] * 3 and letters["id"].to_list() == [f"text/ja_letter{n}" for n in range(3)]
    assert set(frame["lang"]) == {"ja"}


@pytest.mark.parametrize(("name", "source", "lang"), [
    ("ja_law.jsonl.zst", "ja_law", "ja"), ("web/2023/en_x.parquet", "web/2023", "en"), ("ja_web.parquet/part-0.parquet", "ja_web", "ja"),
    ("en_letter.txt.gz", "text", "en"), ("notes.jsonl", "notes", "und"), ("ja/a.txt", "ja", "ja")])
def test_the_name_of_a_file_says_its_domain_and_language(name, source, lang):
    entry = sample.file_entry(name, Path(name))
    assert (entry["source"], entry["lang"]) == (source, lang)
    assert sample.file_entry(name, Path(name), "fr")["lang"] == "fr"


@pytest.mark.parametrize("globs", [("ja_a.jsonl",), ("ja_*.jsonl",), ("web/*", "ja_b.*")])
def test_globs_and_paths_choose_files(tmp_path, globs):
    for name in ("ja_a", "ja_b", "web/ja_c"):
        jsonl(tmp_path / f"{name}.jsonl", GOOD)
    names = list(sample.folder_files(tmp_path, globs))
    assert names == {0: ["ja_a.jsonl"], 1: ["ja_a.jsonl", "ja_b.jsonl"], 2: ["ja_b.jsonl", "web/ja_c.jsonl"]}[
        [("ja_a.jsonl",), ("ja_*.jsonl",), ("web/*", "ja_b.*")].index(globs)]
    assert list(sample.folder_files(tmp_path / "ja_a.jsonl")) == ["ja_a.jsonl"]


def test_parquet_rows_with_odd_values_are_counted(tmp_path):
    text = pa.array([b"one", "日本".encode("cp932"), None, b" ", "三\r\n".encode(), b"x" * 5000], pa.binary()).view(pa.string())
    table = pa.table({"text": text, "id": pa.array(range(6)), "license": pa.array([["mit", "cc-by-4.0"]] * 6)})
    (tmp_path / "c").mkdir()
    pq.write_table(table, tmp_path / "c" / "en_odd.parquet")
    pl.DataFrame({"text": [1, 2]}).write_parquet(tmp_path / "c" / "en_numbers.parquet")
    pl.DataFrame({"body": ["a"]}).write_parquet(tmp_path / "c" / "en_other.parquet")
    pl.DataFrame({"text": ["a", "b"], "license": "MIT"}, schema_overrides={"text": pl.Categorical}).write_parquet(tmp_path / "c" / "en_p.parquet")
    frame, rejects, _ = read(tmp_path / "c", tmp_path / "w", max_record_bytes=4000)
    assert frame["text"].to_list() == ["one", "三\n", "a", "b"] and frame["licence"][0] == "mit, cc-by-4.0"
    assert dict(rejects.select("where", "reason").iter_rows()) == {
        "en_odd.parquet:2": sample.NOT_UTF8, "en_odd.parquet:3": sample.NULL_TEXT, "en_odd.parquet:4": sample.EMPTY,
        "en_odd.parquet:6": sample.TOO_LONG, "en_numbers.parquet:0": sample.NOT_TEXT, "en_other.parquet:0": sample.NO_TEXT}


def test_other_names_of_fields(tmp_path):
    jsonl(tmp_path / "c" / "x.jsonl", {"content": "a", "licence": "MIT", "url": "http://a", "lang": "en"})
    frame, _, _ = read(tmp_path / "c", tmp_path / "w", text_field="content")
    assert frame.row(0) == ("x/x.jsonl:1", "a", "x", "en", "MIT", '{"origin":"http://a"}')


# ── broken records ────────────────────────────────────────────────────────────────────────────────────────────────────


KINDS = {  # line, and what becomes of it ("": kept)
    "empty line": (b"", sample.BLANK),
    "empty text": (json.dumps({**GOOD, "text": " \u3000"}).encode(), sample.EMPTY),
    "null record": (b"null", sample.NOT_JSON),
    "null text": (b'{"text": null}', sample.NULL_TEXT),
    "wrong type": (b'{"text": 5}', sample.NOT_TEXT),
    "missing text": (b'{"id": "x"}', sample.NO_TEXT),
    "lone surrogate": (b'{"text": "a\\ud83d"}', sample.SURROGATE),
    "NUL byte": (b'{"text": "a\0b"}', sample.NUL),
    "NUL characters": (b'{"text": "a\\u0000b"}', sample.NUL),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({**GOOD, "id": "bom"}).encode(), ""),
    "CRLF": (json.dumps({**GOOD, "id": "crlf", "text": "一\r\n二"}).encode() + b"\r", ""),
    "10 MB line": (json.dumps({**GOOD, "text": "x" * 10_000_000}).encode(), sample.TOO_LONG),
    "Shift-JIS": (json.dumps(GOOD, ensure_ascii=False).encode("cp932"), sample.NOT_UTF8),
    "U+2028": (json.dumps({**GOOD, "id": "sep", "text": "一\u2028二\x85三"}, ensure_ascii=False).encode(), ""),
    "duplicate id": (json.dumps(GOOD).encode(), sample.REPEATED),
    "torn": (b'{"text": "a', sample.NOT_JSON),
    "NaN elsewhere": (b'{"text": "a", "license": "MIT", "id": "nan", "score": NaN}', ""),
    "surrogate elsewhere": (b'{"text": "a", "license": "MIT", "id": "s", "title": "\\udc00"}', ""),
    "no licence": (b'{"text": "a"}', sample.UNLICENSED),
    "stray NUL": (json.dumps({**GOOD, "id": "stray", "text": "a" * 2000 + "\0"}).encode(), ""),
}
MENDED = {"crlf": "一\n二", "sep": "一\u2028二\x85三", "stray": "a" * 2000, "bom": GOOD["text"]}


def test_twelve_kinds_and_more_are_kept_or_counted(tmp_path):
    jsonl(tmp_path / "c" / "ja_k.jsonl", GOOD, *(line for line, _ in KINDS.values()), {**GOOD, "id": "last"})
    frame, rejects, work = read(tmp_path / "c", tmp_path / "w")
    assert work.counts["in"] == len(KINDS) + 2
    found = dict(rejects.select("where", "reason").iter_rows())
    for number, (kind, (_, reason)) in enumerate(KINDS.items(), 2):
        assert found.get(f"ja_k.jsonl:{number}", "") == reason, kind
    texts = {id.removeprefix("ja_k/"): text for id, text in frame.select("id", "text").iter_rows()}
    assert {id: texts[id] for id in MENDED} == MENDED and "last" in texts
    assert work.metrics["mended"] == 2 and rejects["excerpt"].str.len_chars().max() <= 200


@pytest.mark.parametrize("kind", [kind for kind, (_, reason) in KINDS.items() if reason])
def test_refuse_names_file_line_and_way_out(tmp_path, kind):
    line, reason = KINDS[kind]
    jsonl(tmp_path / "c" / "ja_k.jsonl", GOOD, line, {**GOOD, "id": "b"})
    if reason in (sample.BLANK, sample.EMPTY, sample.REPEATED):  # counted, never refused
        assert read(tmp_path / "c", tmp_path / "w", broken="refuse")[0].height == 2
        return
    with pytest.raises(ShisaError, match=r"ja_k\.jsonl:2: .*broken='reject'") as caught:
        read(tmp_path / "c", tmp_path / "w", broken="refuse")
    assert "\n" not in str(caught.value) and reason in str(caught.value)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
                 st.recursive(st.none() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(
                     st.sampled_from(["text", "id", "license"]), inner), max_leaves=6).map(lambda value: json.dumps(value).encode())))
@example(b"[" * 100_000)
@example(b"9" * 10_000)
@example(b'{"text": "\\ud800", "id": "\\udfff"}')
@quick
def test_any_line_gives_a_record_or_a_reason(line):
    record, reason = sample.parse(line)
    assert isinstance(reason, str) and (reason or record["text"].strip())
    if record is not None:
        assert all(isinstance(key, str) for key in record)
    if not reason:
        record["text"].encode()


LINE = st.one_of(
    st.sampled_from([line for line, _ in KINDS.values() if len(line) < 5000]), st.binary(max_size=12),
    st.text("ab\r\ufeff\0 ", max_size=8).map(lambda text: json.dumps({**GOOD, "id": text, "text": text + "x"}).encode()))


@given(st.lists(LINE, max_size=12), st.sampled_from(sorted(PACK)))
@quick
def test_every_line_is_kept_or_counted(tmp_path_factory, lines, ending):
    folder = tmp_path_factory.mktemp("any")
    content = b"\n".join(lines)
    path = folder / f"ja_x.jsonl{ending}"
    path.write_bytes(PACK[ending](content))
    reader = sources.Reader(sources.Config(kind="folder", broken="reject"), folder, folder, 0)
    reader.read(sample.file_entry(path.name, path))
    facts = reader.facts()
    pieces = content.split(b"\n")
    pieces = pieces[:-1] if not pieces[-1] else pieces
    blank = [not piece or piece.isspace() for piece in pieces]
    expected = sum(not (now and before) for now, before in zip(blank, [False, *blank], strict=False))
    assert sum(part["rows"] for part in facts["parts"]) + sum(facts["dropped"].values()) == expected


def test_many_rejects_are_written_as_several_shards(tmp_path, monkeypatch):
    reader = sources.Reader(sources.Config(kind="folder", broken="reject"), tmp_path, tmp_path, 3)
    entry = sample.file_entry("ja_x.jsonl", tmp_path / "ja_x.jsonl")
    for line in range(100_001):
        reader.reject(entry, line, sample.NOT_JSON, b"x")
    assert reader.facts()["dropped"] == {sample.NOT_JSON: 100_001}
    assert [pl.read_parquet(path).height for path in sorted(tmp_path.glob("rejects-*"))] == [100_000, 1]


# ── broken files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_torn_file_gives_what_is_whole(tmp_path, ending):
    body = b"".join(json.dumps({**row, "noise": random.Random(row["id"]).randbytes(300).hex()}).encode() + b"\n" for row in rows(3000))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"ja_torn.jsonl{ending}").write_bytes(PACK[ending](body)[:-5000])
    jsonl(tmp_path / "c" / "ja_whole.jsonl", GOOD)
    frame, rejects, _ = read(tmp_path / "c", tmp_path / "w")
    assert 2000 < frame.height < 3000 and rejects["reason"].to_list() == [sample.TORN]
    assert frame["text"].to_list()[:-1] == [row["text"] for row in rows(frame.height - 1)]  # to the line before the tear
    assert rejects["where"].to_list() == [f"ja_torn.jsonl{ending}:{frame.height}"]
    with pytest.raises(ShisaError, match=f"ja_torn.*:{frame.height}: torn file; fetch the file again"):
        read(tmp_path / "c", tmp_path / "v", broken="refuse")


def test_a_torn_parquet_file_and_torn_text(tmp_path):
    jsonl(tmp_path / "c" / "ja_good.jsonl", GOOD)
    pl.DataFrame(rows(50)).write_parquet(tmp_path / "c" / "ja_cut.parquet")
    whole = (tmp_path / "c" / "ja_cut.parquet").read_bytes()
    (tmp_path / "c" / "ja_cut.parquet").write_bytes(whole[:-50])
    (tmp_path / "c" / "ja_page.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])
    (tmp_path / "c" / "ja_letter.txt.gz").write_bytes(gzip.compress(b"letter")[:-3])
    (tmp_path / "c" / "ja_old.txt").write_bytes("日本語".encode("cp932"))
    frame, rejects, _ = read(tmp_path / "c", tmp_path / "w")
    assert frame.height == 1 and dict(rejects.select("where", "reason").iter_rows()) == {
        "ja_cut.parquet:1": sample.UNREADABLE, "ja_page.parquet:1": sample.UNREADABLE, "ja_letter.txt.gz:1": sample.TORN,
        "ja_old.txt:1": sample.NOT_UTF8}
    assert not rejects["excerpt"].str.contains(str(tmp_path), literal=True).any()


def a_link(folder: Path) -> None:
    (folder / "ja_bad.jsonl").symlink_to(folder / "nowhere")


@pytest.mark.parametrize("make", [
    a_link, lambda folder: (folder / "ja_bad.jsonl").mkdir(), lambda folder: (folder / "ja_bad.parquet").write_bytes(b"no Parquet")])
def test_an_unreadable_file_is_counted_or_refused_in_one_line(tmp_path, make):
    jsonl(tmp_path / "c" / "ja_good.jsonl", GOOD)
    make(tmp_path / "c")
    config = sources.Config(kind="folder", folder=str(tmp_path / "c"), broken="reject")
    artifact = run_stage("10_sources", "tiny", tmp_path / "run", config=config)
    assert artifact.counts == {"in": 2, "kept": 1, "dropped": {sample.UNREADABLE: 1}}
    with pytest.raises(ShisaError, match="ja_bad.*unreadable file.*mend or remove the file") as caught:
        run_stage("10_sources", "tiny", tmp_path / "other", config=config.change(broken="refuse"))
    assert "\n" not in str(caught.value)


BOMB = """
import re, sys, zlib, zstandard
from pathlib import Path
unit, ending, folder = {"zeros": bytes(1 << 20), "lines": b"\\n" * (1 << 20), "records": b'{"text":"%s","license":"MIT"}\\n' % (b"a" * 100) * 9000}[sys.argv[1]], sys.argv[2], Path(sys.argv[3])
path = folder / f"en_bomb.jsonl{ending}"
packer = zlib.compressobj(6, wbits=31) if ending == ".gz" else zstandard.ZstdCompressor(3).compressobj()
with open(path, "wb") as handle:
    for _ in range(1200):
        handle.write(packer.compress(unit))
    handle.write(packer.flush())
assert path.stat().st_size < 8_000_000
from shisa import sources
from shisa.stage import run_stage
artifact = run_stage("10_sources", "tiny", folder / "run", config=sources.Config(kind="folder", folder=str(folder), broken="reject", files=("*.jsonl*",)))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])  # ru_maxrss starts at the parent's
print(artifact.counts, peak // 1024)
assert artifact.counts["dropped"]["expands too far"] == 1
assert peak < 1_000_000
"""


@pytest.mark.parametrize(("unit", "ending"), [("zeros", ".gz"), ("zeros", ".zst"), ("lines", ".gz"), ("records", ".zst")])
def test_a_bomb_stops_at_a_cap_within_a_gigabyte(tmp_path, unit, ending):
    jsonl(tmp_path / "en_good.jsonl", GOOD)
    done = subprocess.run([sys.executable, "-c", BOMB, unit, ending, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


# ── the folder ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("make", "message"), [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no .jsonl"),
    (lambda folder: (folder.mkdir(), (folder / "a.jsonl").write_bytes(b"")), "corpus is empty"),
    (lambda folder: jsonl(folder / "ja.jsonl", b"{", b"null"), "corpus is empty.*2 × not a JSON object"),
    (lambda folder: jsonl(folder / "ja.jsonl", {**GOOD, "lang": "xx"}), "languages"),
])
def test_missing_and_empty_sources_are_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "corpus")
    with pytest.raises(ShisaError, match=message) as caught:
        read(tmp_path / "corpus", tmp_path / "w")
    assert "\n" not in str(caught.value)


def test_a_refused_source_leaves_no_artifact(tmp_path):
    config = sources.Config(kind="folder", folder=str(tmp_path / "nowhere"))
    with pytest.raises(ShisaError):
        run_stage("10_sources", "tiny", tmp_path / "run", config=config)
    assert not (tmp_path / "run" / "10_sources").exists()


def test_folder_identity_is_content_not_place(tmp_path):
    for name in ("one", "two"):
        jsonl(tmp_path / name / "ja_notes.jsonl", GOOD)
    first, second = (sources.external(sources.Config(kind="folder", folder=str(tmp_path / n))) for n in ("one", "two"))
    assert first == second and list(first) == ["ja_notes.jsonl"]


# ── licences ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("licence", ["unknown", "See repo", "", None, " other "])
def test_an_unknown_licence_is_refused_unless_named(tmp_path, licence):
    record = {key: value for key, value in GOOD.items() if key != "license"} | ({"license": licence} if licence is not None else {})
    jsonl(tmp_path / "c" / "ja_x.jsonl", record)
    jsonl(tmp_path / "c" / "ja_y.jsonl", {**GOOD, "license": "CC BY-SA 4.0"})
    with pytest.raises(ShisaError, match=r"ja_x\.jsonl:1: unknown licence; .*licences=\{'ja_x': '…'\}"):
        read(tmp_path / "c", tmp_path / "w0", broken="refuse")
    frame, rejects, _ = read(tmp_path / "c", tmp_path / "w1")
    assert frame["source"].to_list() == ["ja_y"] and rejects["reason"].to_list() == [sample.UNLICENSED]
    frame, _, work = read(tmp_path / "c", tmp_path / "w2", licences={"ja_x": "CC0-1.0", "ja_y": "not asked"})
    assert frame["licence"].to_list() == ["CC0-1.0", "CC BY-SA 4.0"]
    assert [(row["licence"], row["share_alike"], row["documents"]) for row in work.licences] == [
        ("CC0-1.0", False, 1), ("CC BY-SA 4.0", True, 1)]
    assert read(tmp_path / "c", tmp_path / "w3", licences={"ja_x": "unknown"})[0]["licence"].to_list()[0] == "unknown"


@pytest.mark.parametrize(("licence", "expected"), [
    ("CC BY-SA 4.0", True), ("cc-by-sa-3.0", True), ("CC BY-NC-SA 4.0", True), ("GPL-3.0-only", True), ("LGPL-2.1", True),
    ("GNU AGPL v3", True), ("GFDL-1.3", True), ("ODbL-1.0", True), ("Attribution-ShareAlike", True), ("MIT", False),
    ("Apache-2.0", False), ("CC BY 4.0", False), ("CC0-1.0 (translation) / PSF-2.0 (source text)", False), ("ODC-BY-1.0", False),
    ("public domain in Japan (Copyright Act art. 13)", False), ("USA government work", False)])
def test_share_alike(licence, expected):
    assert sample.share_alike(licence) is expected


@pytest.mark.shared
@pytest.mark.skipif(DATA is None, reason="no shared data")
def test_the_shared_corpus_has_one_source_without_a_licence(tmp_path):
    named = sources.config("h100").change(folder=str(DATA / "corpus"), files=("*jsprimer*", "ja_docs_vue*"), shard_bytes=1 << 20)
    with pytest.raises(ShisaError, match="ja_docs_jsprimer.*unknown licence"):
        sources.run(named.change(licences={}), {}, work_in(tmp_path / "a"))
    work = work_in(tmp_path / "b")
    sources.run(named, {}, work)
    assert {row["source"]: row["licence"] for row in work.licences} == {
        "ja_docs_jsprimer": named.licences["ja_docs_jsprimer"], "ja_docs_vue": "CC BY 4.0"}


# ── budgets and ids ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 1000), min_size=1), st.integers(0, 3000), st.floats(0.05, 1))
@quick
def test_water_level_is_fair_and_within_budget(sizes, budget, largest):
    taken = sources.water_level(sizes, budget, largest)
    assert sum(taken.values()) <= budget and all(taken[name] <= size for name, size in sizes.items())
    assert max(taken.values()) <= budget * largest
    lowest = min((taken[n] for n, size in sizes.items() if taken[n] < min(size, int(budget * largest))), default=None)
    assert lowest is None or max(taken.values()) - lowest <= len(sizes)  # nobody gets less while another gets more


@given(st.lists(st.tuples(st.sampled_from(["ja", "en"]), st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60),
       st.integers(0, 900), st.integers(1, 4), st.floats(0.2, 1))
@quick
def test_bounds_draw_what_sorting_would(items, budget, parts, largest):
    frame = pl.DataFrame({"id": [str(n) for n in range(len(items))], "lang": [lang for lang, _, _ in items],
                          "source": [source for _, source, _ in items], "text": ["x" * size for _, _, size in items],
                          "licence": "", "where": ""})
    keys = sources.keys_of(frame, 7)
    pieces = [keys[start::parts].lazy() for start in range(parts)]
    found = keys.join(sources.bounds(lambda: iter(pieces), {"ja": budget, "en": 0}, largest), on=["lang", "source"])
    found = found.filter(pl.col("rank") // (sources.RANKS // sources.BINS) < pl.col("bound"))
    assert found.filter(pl.col("lang") == "en").height == keys.filter(pl.col("lang") == "en").height
    own = keys.filter(pl.col("lang") == "ja")
    sizes = dict(own.group_by("source").agg(pl.col("size").sum()).iter_rows())
    levels = sources.water_level(sizes, budget or sum(sizes.values()), largest if budget else 1.0)
    expected, bins = 0, own["rank"] // (sources.RANKS // sources.BINS)
    if bins.is_unique().all():  # a bin is taken whole
        for source, level in levels.items():
            ordered = own.filter(pl.col("source") == source).sort("rank")["size"].to_numpy()
            expected += int((np.cumsum(ordered) - ordered < level).sum())
        assert found.filter(pl.col("lang") == "ja").height == expected


def test_budgets_are_kept_by_domain(tmp_path):
    for name, count in (("ja_small", 20), ("ja_mid", 400), ("ja_large", 4000)):
        jsonl(tmp_path / "c" / f"{name}.jsonl", *rows(count))
    jsonl(tmp_path / "c" / "en_all.jsonl", *({**row, "lang": "en"} for row in rows(50)), {**GOOD, "id": "fr", "lang": "fr"})
    frame, _, work = read(tmp_path / "c", tmp_path / "w", budgets={"ja": 20_000, "en": 0}, largest_domain=1.0, shard_bytes=5000)
    size = dict(frame.group_by("source").agg(pl.col("text").str.len_bytes().sum()).iter_rows())
    small = sum(len(row["text"].encode()) for row in rows(20))
    level = (20_000 - small) // 2
    assert size["ja_small"] == small and frame.filter(pl.col("source") == "en_all").height == 50
    assert all(level <= size[name] < level + 100 for name in ("ja_mid", "ja_large"))  # to the document over the brim
    assert work.counts["dropped"][sample.OTHER] == 1 and work.counts["dropped"][sample.OVER_BUDGET] > 3000
    shards = [pl.read_parquet(path)["text"].str.len_bytes().sum() for path in sorted((tmp_path / "w" / "out").glob("documents-*"))]
    assert max(shards) <= 5000 and len(shards) < 1.5 * sum(shards) / 5000 + 2  # small remains are put together
    again, _, _ = read(tmp_path / "c", tmp_path / "v", budgets={"ja": 20_000, "en": 0}, largest_domain=1.0, shard_bytes=5000, seed=2)
    assert set(again["id"]) != set(frame["id"])


def test_repeated_ids_are_found_across_shards(tmp_path):
    jsonl(tmp_path / "c" / "ja_x" / "1.jsonl", *rows(300))
    jsonl(tmp_path / "c" / "ja_x" / "2.jsonl", *rows(300, 290))
    jsonl(tmp_path / "c" / "ja_y.jsonl", *rows(300))
    frame, rejects, work = read(tmp_path / "c", tmp_path / "w", shard_bytes=2000)
    assert frame["id"].n_unique() == frame.height == 890 and len(list((tmp_path / "w" / "out").glob("documents-*"))) > 5
    assert rejects["where"].to_list() == [f"ja_x/2.jsonl:{line}" for line in range(1, 11)]
    parts = [pl.read_parquet(path).with_row_index("row") for path in sorted((tmp_path / "w" / "scratch").glob("*-keys.parquet"))]
    found = [sources.repeats(lambda: (part.lazy() for part in parts), 900, most).sort("part", "row").rows() for most in (900, 40)]
    assert found[0] == found[1] and len(found[0]) == 10


# ── the same bytes ────────────────────────────────────────────────────────────────────────────────────────────────────


PROGRAM = """
import sys
from shisa import sources
from shisa.stage import run_stage
config = sources.Config(kind="folder", folder=sys.argv[1], broken="reject", budgets={"ja": 60_000}, shard_bytes=8000, largest_domain=0.5,
                        workers=int(sys.argv[3]))
run_stage("10_sources", "tiny", sys.argv[2], config=config)
"""


def corpus(folder: Path, order: int) -> Path:
    """Six files of three formats with broken lines in them, made in some order."""
    names = [f"ja_{n}.{kind}" for n in range(2) for kind in ("jsonl", "jsonl.gz", "parquet")]
    random.Random(order).shuffle(names)
    for name in names:
        own = rows(400, sum(map(ord, name)))
        if name.endswith("parquet"):
            folder.mkdir(exist_ok=True)
            pl.DataFrame(own).write_parquet(folder / name)
        else:
            jsonl(folder / name, *own, *(line for line, _ in KINDS.values() if len(line) < 5000))
    return folder


def made(folder: Path, out: Path, workers: int, seed: str = "0") -> dict:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder), str(out), str(workers)], check=True, env=environment, timeout=200)
    return Artifact(out / "10_sources").manifest["files"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder and the files that one worker makes of it."""
    place = tmp_path_factory.mktemp("same")
    folder = corpus(place / "one", 1)
    return folder, made(folder, place / "run", 1)


@pytest.mark.parametrize(("order", "workers", "seed"), [(2, 1, "1"), (3, 2, "7")])
def test_same_bytes_for_any_order_workers_and_hash_seed(reference, tmp_path, order, workers, seed):
    assert len(reference[1]) > 6
    assert made(corpus(tmp_path / "two", order), tmp_path / "run", workers, seed) == reference[1]


def test_same_bytes_after_being_killed(reference, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(reference[0]), str(tmp_path / "run"), "1"]
    kills = 0
    for moment in random.Random(3).sample(range(30), 6):
        process = subprocess.Popen(command, start_new_session=True)
        work, limit = tmp_path / "run" / ".work", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if len(list(work.rglob("*.parquet"))) >= moment:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait(timeout=60)
        assert not (tmp_path / "run" / "10_sources").exists() or process.returncode == 0
    assert kills >= 3 and made(reference[0], tmp_path / "run", 1) == reference[1]


# ── the Hub ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def mirror(root: Path, files: int = 4) -> Path:
    """A folder laid out like MADLAD-400; each file has a torn line in the middle."""
    for lang, body in (("ja", "日本語の文書です。"), ("en", "A document.")):
        (root / "data" / lang).mkdir(parents=True, exist_ok=True)
        for number in range(files):
            lines = [json.dumps({"text": f"{body}{number}-{i}\\n次の行"}, ensure_ascii=False).encode() for i in range(200)]
            lines[100] = lines[100][:10]
            (root / "data" / lang / f"{lang}_clean_{number:04d}.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return root


def hub_config(**changes) -> sources.Config:
    return sources.config("a100x16").change(workers=1, **changes)


def test_hub_reader_on_a_folder_laid_out_like_madlad400(tmp_path):
    config = hub_config(folder=str(mirror(tmp_path / "hub")), budgets={"ja": 9000, "en": 0})
    first, second = (run_stage("10_sources", "tiny", tmp_path / name, config=config) for name in ("a", "b"))
    assert first.manifest["files"] == second.manifest["files"]
    frame = first.table("documents")
    assert first.counts["dropped"][sample.NOT_JSON] == 4 + 2  # English whole, Japanese until the budget is reached: torn lines are counted
    counts = Counter(frame["lang"])
    assert counts["en"] == 4 * 199 and 9000 <= frame.filter(pl.col("lang") == "ja")["text"].str.len_bytes().sum() < 9100
    assert set(frame["source"]) == {"madlad400_ja", "madlad400_en"} and set(frame["licence"]) == {"ODC-BY-1.0"}
    assert frame["text"].str.contains("\n次の行", literal=True).all()
    text = frame["text"][0]
    assert frame["id"][0] == f"madlad400_{frame['lang'][0]}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def test_hub_files_come_in_a_seeded_order_until_the_budget_is_reached(tmp_path):
    root = str(mirror(tmp_path / "hub", 12))
    orders = {seed: [entry["name"] for entry in sources.hub_files(hub_config(folder=root, seed=seed), "ja")] for seed in (1, 2)}
    assert orders[1] != orders[2] and sorted(orders[1]) == sorted(orders[2])
    files = hub_config(folder=root).change(budgets={"ja": 20_000})
    work = work_in(tmp_path / "w")
    sources.run(files, {}, work)
    read_files = work.counts["dropped"][sample.NOT_JSON]  # one in each file
    assert read_files == 3 and sorted(path.name for path in (tmp_path / "w" / "scratch").glob("read-*")) == ["read-ja-00000", "read-ja-00001"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"folder": "/nowhere/at/all"}, "cannot be read"), ({"pattern": "data/none_{lang}_*.gz"}, "no such file"),
    ({"pattern": "data/*/*.gz"}, "same files for ja and en")])
def test_a_hub_data_set_that_cannot_be_read_is_one_line(tmp_path, changes, message):
    config = hub_config(**{"folder": str(mirror(tmp_path / "hub", 1)), **changes})
    with pytest.raises(ShisaError, match=message) as caught:
        sources.run(config, {}, work_in(tmp_path / "w"))
    assert "\n" not in str(caught.value)


def test_a_revision_must_be_a_commit():
    with pytest.raises(ShisaError, match="revision"):
        sources.Config().change(revision="main")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that reading a data set needs, from a folder; `cut` bytes are missing of every transfer."""

    root, cut, asked = Path(), 0, []

    def log_message(self, *told):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) - self.cut] if self.cut and "resolve" in self.path else body)

    def do_GET(self):
        self.asked.append(self.path)
        place = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if "/resolve/" in place:
            body = (self.root / place.split("/resolve/")[1].split("/", 1)[1]).read_bytes()
            start, end = (self.headers.get("range") or f"bytes=0-{len(body) - 1}")[6:].split("-")
            return self.answer(body[int(start) : int(end or len(body)) + 1], 206 if "range" in self.headers else 200, etag='"x"')
        if "/tree/" in place:
            folder = self.root / (place.split("/tree/")[1].split("/", 1) + [""])[1]
            found = [{"type": "directory" if path.is_dir() else "file", "path": path.relative_to(self.root).as_posix(), "oid": "0" * 40,
                      "size": path.stat().st_size} for path in sorted(folder.iterdir())]
            return self.answer(json.dumps(found).encode(), content_type="application/json")
        revision = sources.Config().revision
        self.answer(json.dumps({"id": "allenai/MADLAD-400", "sha": revision, "siblings": [], "tags": [], "downloads": 0, "likes": 0,
                                "private": False}).encode(), content_type="application/json")


    def do_POST(self):
        asked = self.rfile.read(int(self.headers["content-length"])).decode()
        paths = urllib.parse.parse_qs(asked).get("paths") or json.loads(asked)["paths"]
        found = [{"type": "file", "path": path, "oid": "0" * 40, "size": (self.root / path).stat().st_size} for path in paths]
        self.answer(json.dumps(found).encode(), content_type="application/json")


HUB = """
import json, sys
from shisa import sources
from shisa.stage import run_stage
config = sources.config("a100x16").change(workers=1, budgets={"ja": 9000, "en": 0}, **json.loads(sys.argv[2]))
run_stage("10_sources", "tiny", sys.argv[1], config=config)
"""


@pytest.fixture
def hub(tmp_path):
    """A local server that answers like the Hub, and a function that runs the stage against it."""
    handler = type("Handler", (FakeHub,), {"root": mirror(tmp_path / "hub"), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
                   "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    def far(**changes):
        command = [sys.executable, "-c", HUB, str(tmp_path / "far"), json.dumps(changes)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    yield handler, far
    server.shutdown()


def test_the_hub_is_streamed_at_its_revision_and_gives_what_a_folder_gives(hub, tmp_path):
    handler, far = hub
    done = far()
    assert done.returncode == 0, done.stderr[-2000:]
    near = run_stage("10_sources", "tiny", tmp_path / "near", config=hub_config(folder=str(handler.root), budgets={"ja": 9000, "en": 0}))
    assert Artifact(tmp_path / "far" / "10_sources").manifest["files"] == near.manifest["files"]
    files = [path for path in handler.asked if "/resolve/" in path]
    assert len(files) == 6 and all(f"/resolve/{sources.Config().revision}/" in path for path in files)  # two Japanese, four English


def test_a_broken_transfer_is_no_torn_file(hub, tmp_path):
    handler, far = hub
    handler.cut = 200
    done = far()
    assert done.returncode != 0 and "ShisaError" in done.stderr and "check the network" in done.stderr
    assert not (tmp_path / "far" / "10_sources").exists()
    handler.cut = 0
    done = far()
    assert done.returncode == 0, done.stderr[-2000:]


def test_parquet_on_the_hub_has_its_own_ids_and_licences(hub, tmp_path):
    handler, far = hub
    for lang in ("ja", "en"):
        frame = pl.DataFrame([{**row, "lang": lang, "license": "CC BY-SA 4.0"} for row in rows(500)] + [{**GOOD, "text": None, "lang": lang}])
        frame.write_parquet(handler.root / "data" / lang / "part-0.parquet", row_group_size=100)
    changes = {"pattern": "data/{lang}/*.parquet", "hub": "someone/Docs", "unescape": False}
    done = far(**changes)
    assert done.returncode == 0, done.stderr[-2000:]
    artifact = Artifact(tmp_path / "far" / "10_sources")
    assert artifact.counts["dropped"][sample.NULL_TEXT] == 2 and any(row["share_alike"] for row in artifact.manifest["licences"])
    assert "docs_en/d7" in set(artifact.table("documents")["id"])
    near = run_stage("10_sources", "tiny", tmp_path / "near", config=hub_config(
        folder=str(handler.root), budgets={"ja": 9000, "en": 0}, **changes))
    assert artifact.manifest["files"] == near.manifest["files"]


def test_a_short_stream_is_an_error():
    import io

    whole = sample.Whole(io.BytesIO(b"abc"), 3)
    assert whole.read(2) + whole.read(2) == b"abc" and whole.read(2) == b""
    with pytest.raises(OSError, match="2 bytes too early"):
        short = sample.Whole(io.BytesIO(b"abc"), 5)
        short.read(9), short.read(9)


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=400), st.integers(1, 40))
@quick
def test_lines_of_a_stream_are_its_content(content, longest):
    import io

    from shisa.text import line_blocks

    for ending, pack in PACK.items():
        lines = [line for block in line_blocks(io.BytesIO(pack(content)), ending) for line in block]
        assert b"\n".join(lines) == content.removesuffix(b"\n")
        short = [line for block in line_blocks(io.BytesIO(pack(content)), ending, longest) for line in block]
        assert len(short) == len(lines) and all(a == b or len(a) > longest < len(b) for a, b in zip(short, lines, strict=True))
