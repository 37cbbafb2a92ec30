"""Chapter lib/02: folding, scripts, hashes, whole columns against plain Python; lines of compressed files."""
import gzip
import json
import os
import unicodedata

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shisa import text
from shisa.config import ShisaError
from shisa.leaks import trait_counts

NASTY = (
    "aZ09 \t\n\r\x00\x0b\x1c\x85\xa0\u2028\u2029\u3000\u200b\ufeff"  # spaces of many kinds, NUL, marks without width
    "ΣσςϹ𝚺Αα.İıẞßKÅſ"  # what lower case changes, by place or in number
    "かハパｶﾞﾟ\u3099\u309aゔヴー｡､･"  # kana, half-width, voiced sound marks
    "각가ᄀᄁ\u1161\u11a8ㄱㅏﾡￂ"  # jamo of four kinds
    "e\u0301\u0323\u0345q\u0307\u0f71\u0f72क़ো"  # marks that join, and that change places
    "ﬁﬃ㍿㌖㌔ﷺﷲ⑴½²ªＡ１！～"  # one character that becomes several
    "漢神神𠮷🗻👩\u200d👩🏽🇯🇵𝒳\U000e0041\U0010ffff"  # compatibility ideographs, four bytes, the last code point
)
TEXT = st.text(st.sampled_from(NASTY), max_size=40) | st.text(max_size=40) | st.builds(
    lambda head, count, tail: head + " " * count + tail, st.text(max_size=5), st.integers(0, 3000), st.text(max_size=5))
quick = settings(max_examples=150, deadline=None)


def folded(texts: list[str]) -> list[str]:
    starts, codes = text.fold(pl.Series(texts, dtype=pl.String))
    assert starts[0] == 0 and starts[-1] == codes.size and codes.dtype == np.uint32
    return ["".join(map(chr, codes[first:end])) for first, end in zip(starts, starts[1:], strict=False)]


@given(TEXT)
@quick
def test_normalise_is_idempotent(value):
    once = text.normalise(value)
    assert text.normalise(once) == once == unicodedata.normalize("NFKC", once)


@given(st.lists(TEXT, max_size=8))
@example(["", "", ""])
@example(["ΑΣ", "ΑΣΑ", "Σ", "Α\u0345Σ", "αϹ", "α𝚺 b"])
@example(["ｶﾞﾊﾟ", "がぱ", "か\u3099は\u309a", "plain", "가각", "  a  ", "㌖㍿"])
@quick
def test_fold_is_normalise(texts):
    assert folded(texts) == [text.normalise(value) for value in texts]


@pytest.mark.parametrize("around", [("", ""), ("α", ""), ("か", "ﾞ")], ids=["alone", "after a letter", "before a mark"])
def test_fold_is_normalise_for_every_code_point(around):
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    if any(around):  # without what is not assigned
        codes = [code for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Co")]
    texts = [chr(code).join(around) for code in codes]
    wrong = [hex(ord(value[len(around[0])])) for value, got in zip(texts, folded(texts), strict=True) if got != text.normalise(value)]
    assert wrong == []


@given(st.lists(TEXT, max_size=12), st.integers(1, 60), st.integers(0, 3))
@quick
def test_folded_blocks_of_any_size_are_fold(texts, size, cut):
    column = pl.Series(texts, dtype=pl.String)[cut:]  # a slice: its bytes do not begin with the buffer's
    starts, codes = text.fold(column)
    rows, found = 0, []
    for first, own, part in text.folded_blocks(column, size):
        assert first == rows and own[0] == 0
        rows += own.size - 1
        found.append(part)
        assert np.array_equal(own, starts[first : first + own.size] - starts[first])
    assert rows == len(column) and np.array_equal(np.concatenate([*found, codes[:0]]), codes)


def test_fold_refuses_nulls():
    with pytest.raises(ValueError, match="1 texts are null"):
        text.fold(pl.Series("text", ["a", None]))


@given(st.lists(TEXT, max_size=8))
@quick
def test_script_counts_are_a_plain_count(texts):
    classes = text._script_table()
    counts = trait_counts(*text.utf8(pl.Series(texts, dtype=pl.String)))
    for kind, script in enumerate(text.SCRIPTS):
        assert counts[script].tolist() == [sum(classes[ord(character)] == kind for character in value) for value in texts]


def test_scripts_of_known_characters():
    known = {"hiragana": "あんゝ", "katakana": "アーｱ", "kanji": "漢々〇𠮷", "latin": "aZé", "digit": "0９",
             "hangul": "한ㄱ", "other": "яαक", "symbol": "。!-🗻", "space": " \u3000\n"}
    for kind, characters in known.items():
        counts = trait_counts(*text.utf8(pl.Series(list(characters))))
        assert all(counts[script].tolist() == [int(script == kind)] * len(characters) for script in text.SCRIPTS), kind


@given(TEXT)
@quick
def test_script_shares_sum_to_one(value):
    total = sum(text.script_shares(value).values())
    assert total == pytest.approx(1) or (total == 0 and not value.strip())


def reference_hash(gram: str) -> int:
    """A sum of products of code points with fixed odd numbers, then one round of mixing, in plain Python."""
    mask = 2**64 - 1
    value = sum(ord(character) * int(key) for character, key in zip(gram, text.KEYS, strict=False)) & mask
    value = (value ^ value >> 32) * 0xFF51AFD7ED558CCD & mask
    return value ^ value >> 32


@given(st.text(max_size=60), st.integers(1, 64))
@example("あ" * 1500, 5)
@example("長い文章の中" * 700, 13)
@quick
def test_gram_hashes_match_plain_python(value, size):
    expected = [reference_hash(value[i : i + size]) for i in range(len(value) - size + 1)]
    assert text.gram_hashes(text.codepoints(value), size).tolist() == expected == text.ngram_hashes(value, size).tolist()


def test_gram_hashes_spread_and_have_a_limit():
    hashes = text.gram_hashes(np.arange(0x3040, 0x3040 + 40_000, dtype=np.uint32), 1)
    assert np.unique(hashes).size == hashes.size
    for part in (hashes >> np.uint64(56), hashes & np.uint64(255)):  # of its ends, each byte is as frequent as another
        counts = np.bincount(part.astype(np.int64), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 2 * 255
    with pytest.raises(ValueError, match="from 1 to 64"):
        text.gram_hashes(hashes.astype(np.uint32), 65)


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
