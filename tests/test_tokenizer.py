"""The extended tokenizer on any text at all: nothing of the base changes, nothing is lost, the fast twin agrees."""

import unicodedata
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shisa.base import base_tokenizer, save_spm_tokenizer, spm_proto
from shisa.config import ShisaError
from shisa.sample import documents
from shisa.tokenizer import (
    JAPANESE,
    NORMAL,
    allowed,
    append_pieces,
    balanced_lines,
    encode_fast,
    extend,
    new_characters,
    prove,
    spm_processor,
    strip_padding,
)

NEW = 1200
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
    st.sampled_from(list(" \t\n\r\0\x1b\u3000\u200d\u2028\ufeff“”—…0１あいカー々漢字。、「」😀")),
    st.sampled_from(list("abcdefghijklmnopqrstuvwxyz  ETAOIN")),
)
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.lists(
        st.sampled_from(
            [
                "日本語",
                "です。",
                "ました",
                " ",
                "  ",
                "the ",
                "and",
                "\n",
                "def f(x):",
                "<s>",
                "</s>",
                "<0x0A>",
                "<|extra_0|>",
                "東京",
            ]
        ),
        max_size=20,
    ).map("".join),
)
FAST = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(folder: Path, lines: list[str]) -> Path:
    base_tokenizer(folder / "base")
    extended = extend(spm_proto(folder / "base" / "tokenizer.model"), lines, NEW)
    (folder / "spm.model").write_bytes(extended.SerializeToString(deterministic=True))
    save_spm_tokenizer(folder / "spm.model", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def lines():
    rows = [
        {"id": d["id"], "text": d["ja"], "source": "sample", "meta": '{"kind": "%s"}' % d["kind"]} for d in documents()
    ]
    return balanced_lines(pl.DataFrame(rows), cap=100_000, seed=0)


@pytest.fixture(scope="session")
def made(tmp_path_factory, lines):
    return make(tmp_path_factory.mktemp("first"), lines)


@pytest.fixture(scope="session")
def base(made):
    return spm_proto(made / "base" / "tokenizer.model")


@pytest.fixture(scope="session")
def old(base):
    return spm_processor(base)


@pytest.fixture(scope="session")
def new(made):
    return spm_processor(spm_proto(made / "tokenizer" / "tokenizer.model"))


@pytest.fixture(scope="session")
def fast(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(made / "tokenizer"))


@FAST
@given(text=TEXTS)
def test_any_text_comes_back(fast, text):
    assert fast.decode(encode_fast(fast, [text])[0][1:], clean_up_tokenization_spaces=False) == text


@FAST
@given(text=TEXTS)
def test_fast_is_sentencepiece_with_exactly_one_bos(fast, new, text):
    ids = encode_fast(fast, [text])[0]
    assert ids == [fast.bos_token_id, *new.encode(text)]
    assert ids.count(fast.bos_token_id) == 1


@FAST
@given(text=TEXTS.map(lambda text: "".join(c for c in text if ord(c) < 0x2E80)))
def test_text_without_japanese_keeps_its_ids(old, new, text):
    assert new.encode(text) == old.encode(text)


def test_english_documents_keep_their_ids(old, new):
    texts = [line for d in documents() for line in d["en"].split("\n") if not JAPANESE.search(line)]
    assert len(texts) > 500
    assert new.encode(texts) == old.encode(texts)


def test_base_pieces_stay_and_new_ones_are_as_promised(made, base):
    extended = spm_proto(made / "tokenizer" / "tokenizer.model")
    assert list(extended.pieces[:32_000]) == list(base.pieces)
    added = extended.pieces[32_000:]
    learnt = [piece for piece in added if piece.type == NORMAL]
    assert len(learnt) == NEW and all(allowed(piece.piece) for piece in learnt)
    lowest = min(p.score for p in base.pieces if p.type == NORMAL and p.score > -1e8)
    assert all(piece.score < lowest for piece in learnt)
    assert len(extended.pieces) % 64 == 0
    padding = [piece.piece for piece in added if piece.type != NORMAL]
    assert padding == [f"<|extra_{i}|>" for i in range(len(padding))] and padding


def test_pad_is_not_eos(fast):
    assert fast.pad_token == "<|extra_0|>" and fast.pad_token_id not in (fast.eos_token_id, fast.bos_token_id)


def test_rebuilt_elsewhere_it_has_the_same_bytes(made, lines, tmp_path):
    again = make(tmp_path / "another folder", lines)
    files = sorted(p.name for p in (made / "tokenizer").iterdir())
    assert "tokenizer.json" in files and files == sorted(p.name for p in (again / "tokenizer").iterdir())
    for name in files:
        assert (made / "tokenizer" / name).read_bytes() == (again / "tokenizer" / name).read_bytes(), name


def test_no_path_in_the_model(made, tmp_path_factory):
    data = (made / "tokenizer" / "tokenizer.model").read_bytes()
    assert str(made).encode() not in data and b"/mnt/" not in data


def test_a_padded_base_gives_the_same_extension(base, lines):
    from shisa.base import pad_pieces

    padded = type(base)()
    padded.CopyFrom(base)
    pad_pieces(padded)
    assert strip_padding(padded).pieces == strip_padding(base).pieces
    one, two = (append_pieces(proto, ["漢字", "です。"]) for proto in (base, padded))
    assert list(one.pieces) == list(two.pieces)


def test_characters_come_before_merges(made, lines, base):
    added = [p.piece for p in spm_proto(made / "tokenizer" / "tokenizer.model").pieces[32_000:] if p.type == NORMAL]
    singles = new_characters(lines, {p.piece for p in base.pieces}, 1)
    assert added[: len(singles)] == singles and all(len(piece) > 1 for piece in added[len(singles) :])


@pytest.mark.parametrize("piece", ["", "▁", "Rustの", "10円", "１月", "“あ”", "―", "……", "〜", "あ▁い", "–", "no"])
def test_what_may_not_be_added(piece):
    assert not allowed(piece)


@pytest.mark.parametrize("piece", ["漢", "です。", "▁日本", "カー", "々", "𠮷", "」と", "三日"])
def test_what_may_be_added(piece):
    assert allowed(piece)
    assert unicodedata.category(piece[-1]) != "Nd"


def test_too_many_pieces_for_the_text_is_one_clear_line(base):
    with pytest.raises(ShisaError, match="lower new_pieces"):
        extend(base, ["短い文です。", "もう一つ。"] * 3, 50_000)


def test_the_proof_finds_a_piece_that_changes_english(made, base, tmp_path):
    from shisa.base import pad_pieces

    wrong = append_pieces(base, ["漢字を", "▁educationof", "ationof"])
    pad_pieces(wrong)
    (tmp_path / "spm.model").write_bytes(wrong.SerializeToString())
    save_spm_tokenizer(tmp_path / "spm.model", tmp_path / "tokenizer")
    with pytest.raises(ShisaError, match="not safe.*not allowed"):
        prove(base, tmp_path / "tokenizer", ["漢字を書く"], ["the nationof people"])


def test_domains_are_balanced_and_heldout_is_a_matter_of_the_split():
    rows = [
        {"id": f"{s}{i}", "text": "あ" * 100, "source": s, "meta": "{}"}
        for s, n in (("a", 50), ("b", 3))
        for i in range(n)
    ]
    lines = balanced_lines(pl.DataFrame(rows), cap=500, seed=1)
    assert len(lines) == 5 + 3
    assert lines == balanced_lines(pl.DataFrame(rows[::-1]), cap=500, seed=1)


def test_new_rows_are_means_at_the_input_and_zero_for_padding(made, base, fast):
    import numpy as np
    import torch
    from shisa.base import new_model
    from shisa.embeddings import extend_model, output_rows, subtokens

    model = new_model(32_000, 16, 1, 2, 64, seed=0)
    before = [layer.weight.data.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    groups = subtokens(base, spm_proto(made / "tokenizer" / "tokenizer.model"))
    assert len(groups) == NEW
    direction, shares = torch.ones(16, dtype=torch.float64), np.full(NEW, -2.0)
    rows = output_rows("first_share", before[1], groups, direction, shares)
    assert torch.allclose(rows[5], before[1][groups[5][0]] - 2.0, atol=1e-6)
    extend_model(model, fast, groups, 32_000, rows)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert inputs.shape == outputs.shape == (len(fast), 16)
    assert torch.equal(inputs[:32_000], before[0]) and torch.equal(outputs[:32_000], before[1])
    assert torch.allclose(inputs[32_007], before[0][groups[7]].mean(0), atol=1e-6)
    assert not inputs[32_000 + NEW :].any() and not outputs[32_000 + NEW :].any()
    logits = model(torch.tensor([[1, 5, 9]])).logits
    assert logits.softmax(-1)[..., 32_000 + NEW :].max() == 0
