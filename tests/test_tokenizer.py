"""The extended tokenizer on any text at all: nothing of the base changes, nothing is lost, the fast twin agrees."""

import unicodedata
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shisa.base import base_tokenizer, encode_fast, other_ids, pad_pieces, prove, save_spm_tokenizer, unreachable
from shisa.config import ShisaError
from shisa.pieces import (
    JAPANESE,
    MASS,
    NORMAL,
    allowed,
    append_pieces,
    learn,
    new_characters,
    spans_of,
    spm_processor,
    spm_proto,
    strip_padding,
    weigh,
)
from shisa.sample import documents
from shisa.text import texts_by_domain
from shisa.tokenizer import (
    WordList,
    add_words,
    extend,
    in_vocabulary_order,
    model_words,
    open_base,
    without_scaffolding,
    word_lists,
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


def make(folder: Path, texts: dict[str, list[str]], **options) -> Path:
    base_tokenizer(folder / "base")
    extended = extend(open_base(folder / "base"), texts, 32_000 + NEW, **options)
    (folder / "spm.model").write_bytes(extended.SerializeToString(deterministic=True))
    save_spm_tokenizer(folder / "spm.model", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def texts():
    rows = [
        {"id": d["id"], "text": d["ja"], "source": "sample", "meta": '{"kind": "%s"}' % d["kind"]} for d in documents()
    ]
    return texts_by_domain(pl.DataFrame(rows), cap=100_000, seed=0)


@pytest.fixture(scope="session")
def made(tmp_path_factory, texts):
    return make(tmp_path_factory.mktemp("first"), texts)


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


def test_rebuilt_elsewhere_it_has_the_same_bytes(made, texts, tmp_path):
    again = make(tmp_path / "another folder", {name: texts[name][::-1] for name in reversed(texts)})
    files = sorted(p.name for p in (made / "tokenizer").iterdir())
    assert "tokenizer.json" in files and files == sorted(p.name for p in (again / "tokenizer").iterdir())
    for name in files:
        assert (made / "tokenizer" / name).read_bytes() == (again / "tokenizer" / name).read_bytes(), name


def test_no_path_in_the_model(made, tmp_path_factory):
    data = (made / "tokenizer" / "tokenizer.model").read_bytes()
    assert str(made).encode() not in data and b"/mnt/" not in data


def test_a_padded_base_gives_the_same_extension(base):
    padded = type(base)()
    padded.CopyFrom(base)
    pad_pieces(padded)
    assert strip_padding(padded).pieces == strip_padding(base).pieces
    one, two = (append_pieces(proto, ["漢字", "です。"]) for proto in (base, padded))
    assert list(one.pieces) == list(two.pieces)


def test_characters_come_before_merges(made, texts, base):
    added = [p.piece for p in spm_proto(made / "tokenizer" / "tokenizer.model").pieces[32_000:] if p.type == NORMAL]
    spans = [spans_of(rows) for rows in texts.values()]
    singles = new_characters(spans, {p.piece for p in base.pieces}, 1)
    assert added[: len(singles)] == singles and all(len(piece) > 1 for piece in added[len(singles) :])


@pytest.mark.parametrize("options", [{"method": "appended"}, {"prune": True}, {"characters": "kana+jis1"}, {"max_length": 3}])
def test_every_option_gives_a_safe_tokenizer(made, texts, base, tmp_path, options):
    few = dict(list(texts.items())[:4])
    size = 32_000 + (3_400 if "characters" in options else 500)
    model = tmp_path / "spm.model"
    model.write_bytes(extend(base, few, size, **options).SerializeToString())
    save_spm_tokenizer(model, tmp_path / "tokenizer")
    lines = [line for rows in texts.values() for text in rows for line in text.split("\n")][:500]
    english = [line for d in documents() for line in d["en"].split("\n")][:500]
    proof = prove(base, tmp_path / "tokenizer", lines, english, heldout=lines[:5])
    assert proof["holds"] and 0 < proof["heldout"]["pieces never used"] <= size - 32_000
    if options.get("max_length"):
        assert max(len(piece.piece) for piece in spm_proto(model).pieces[32_000:size]) <= 3


def test_what_cannot_be_extended_is_one_clear_line(base, texts, tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(text for rows in texts.values() for text in rows), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "unigram"), vocab_size=2500, model_type="unigram",
        hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for path, line in (
        (tmp_path / "unigram.model", "unigram model"),
        (tmp_path / "bytes", "byte-level"),
        (tmp_path / "empty", "no tokenizer"),
        (tmp_path / "text.txt", "is no SentencePiece model"),
    ):
        with pytest.raises(ShisaError, match=line) as caught:
            open_base(path)
        assert "\n" not in str(caught.value)
    for rows, size, line in (
        ([], 33_000, "no Japanese"),
        (["plain English", ""], 33_000, "no Japanese"),
        (["日本語です。"], 31_000, "not above the base's 32,000"),
        (["日本語です。"], 32_000, "not above the base's 32,000"),
    ):
        with pytest.raises(ShisaError, match=line) as caught:
            extend(base, rows, size)
        assert "\n" not in str(caught.value)
    with pytest.raises(ShisaError, match="unknown word list 'kotoba'"):
        word_lists({"kotoba": 1.0})


def toy_base(pieces):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = proto.trainer_spec.BPE, True
    proto.normalizer_spec.name, proto.normalizer_spec.remove_extra_whitespaces = "identity", False
    proto.pieces.add(piece="<unk>", type=2)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=6)
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank, type=NORMAL)
    return proto


def joined(run, goal):
    """The tokens of a run with all neighbours joined, from left to right, that make a string of `goal`."""
    out = []
    for token in run:
        if out and out[-1] + token in goal:
            out[-1] += token
        else:
            out.append(token)
    return out


@given(
    st.dictionaries(st.text("あい漢、`", min_size=1, max_size=12), st.integers(1, 10**6), min_size=1, max_size=12),
    st.booleans(), st.integers(2, 6),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_every_merge_is_the_most_frequent_string_that_neighbours_make(weights, apart, max_length):
    whole = toy_base(["あい", "あ", "い", "、", "`"])  # 漢 has no piece
    learnt = learn(weights, whole, 8, apart=apart, max_length=max_length)
    assert learnt == learn(weights, whole, 8, apart=apart, max_length=max_length)
    known = set() if apart else {"あい"}
    runs = [(joined(run, known), weight) for span, weight in weights.items() for run in span.split("漢") if run]
    for piece in [*learnt, None]:
        counts = {}
        for run, weight in runs:
            for left, right in zip(run, run[1:]):
                if len(left + right) <= max_length and JAPANESE.search(left + right):
                    counts[left + right] = counts.get(left + right, 0) + weight
        if piece is None:
            assert len(learnt) == 8 or not counts
        else:
            assert counts[piece] == max(counts.values())
            known.add(piece)
            runs = [(joined(run, {piece}), weight) for run, weight in runs]
            again = [joined(run, known) for run, _ in runs]
            if again != [run for run, _ in runs]:  # neighbours that a known piece joins at once: in which order is not told
                return


def test_encoding_makes_the_merges_that_were_counted():
    weights = {"使います。": 40, "使いません。": 30, "▁使う": 20, "います。": 50, "ませんません": 7}
    characters = sorted({character for span in weights for character in span})
    whole = toy_base(characters)
    for apart in (True, False):
        learnt = learn(weights, whole, 6, apart=apart)
        model = spm_processor(append_pieces(whole, learnt), dummy_prefix=False)
        assert sum(map(len, model.encode([span.replace("▁", " ") for span in weights]))) < 14
        assert not unreachable(append_pieces(whole, learnt), len(whole.pieces))
    with pytest.raises(ShisaError, match="do not spell the text"):
        learn({"使う": 1}, toy_base(["使う", "使"]), 3)
    assert learn({"使": 1}, whole, 3) == [] == learn({}, whole, 3)


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(TEXTS, max_size=4), min_size=1), st.floats(0, 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_spans_are_what_a_piece_may_hold_and_their_weights_add_up(texts, balance):
    spans = {name: spans_of(rows) for name, rows in texts.items()}
    assert all(allowed(span) for found in spans.values() for span in found)
    for name, rows in texts.items():
        japanese = sum(len("".join(JAPANESE.findall(text))) for text in rows)
        assert sum(len("".join(JAPANESE.findall(span))) * count for span, count in spans[name].items()) <= japanese
    weights = weigh(spans, balance)
    mass = sum(len(span) * weight for span, weight in weights.items())
    assert not any(spans.values()) and not weights or abs(mass - MASS) < 1e-3 * MASS
    assert list(weights.items()) == list(weigh(dict(reversed(spans.items())), balance).items())


def test_words_from_outside_are_learnt_and_named(base, texts, tmp_path):
    words = WordList("schools", "this test", "CC0-1.0", {"国語日本書会": 5.0, "日記国": 1.0}, share=0.2)
    plain, extended = (spm_processor(extend(base, texts, 34_400, words=each)) for each in ([], [words]))
    assert len(extended.encode("国語日本書会")) <= 2 < len(plain.encode("国語日本書会"))
    assert words.facts() == {"name": "schools", "source": "this test", "licence": "CC0-1.0", "share": 0.2, "words": 2}
    (tmp_path / "spm.model").write_bytes(extended.serialized_model_proto())
    ranked = model_words(tmp_path / "spm.model", 0.1, "itself", "here", "MIT").weights
    assert list(ranked.values()) == sorted(ranked.values(), reverse=True) and all(map(allowed, ranked))
    heavier = add_words(weigh({"a": spans_of(["雨です。"])}, 1.0), [words])
    assert heavier["国語日本書会"] > heavier["日記国"] > 0


def test_scaffolding_goes_and_what_others_need_stays(base):
    pieces = [*"螺鈿蒔絵", "螺鈿", "蒔絵", "鈿蒔", "螺鈿蒔", "螺鈿蒔絵"]
    weights = {"螺鈿蒔絵": 1000, "螺鈿": 10, "蒔絵": 10}
    kept = without_scaffolding(base, pieces, weights)
    assert "螺鈿蒔絵" in kept and "鈿蒔" not in kept and set("螺鈿蒔絵") <= set(kept)
    assert not unreachable(append_pieces(base, kept), 32_000)


def test_shisas_own_way_changes_english(made, old):
    twin = in_vocabulary_order(made / "tokenizer")
    lines = [line for d in documents() for line in d["en"].split("\n")]
    found = [row.ids for row in twin.encode_batch(lines, add_special_tokens=False)]
    assert sum(a != b for a, b in zip(found, old.encode(lines))) > 0


def test_another_environment_is_asked(made, fast):
    import sys

    lines = ["今日は雨です。", "plain </s> text"]
    assert other_ids(sys.executable, made / "tokenizer", lines) == encode_fast(fast, lines)
    with pytest.raises(ShisaError, match="could not load"):
        other_ids(sys.executable, made, lines)


@pytest.mark.parametrize("piece", ["", "▁", "Rustの", "10円", "１月", "“あ”", "―", "……", "〜", "あ-い", "–", "no", "()", "㉑日"])
def test_what_may_not_be_added(piece):
    assert not allowed(piece)


@pytest.mark.parametrize("piece", ["漢", "です。", "▁日本", "カー", "々", "𠮷", "」と", "三日", "`を", ")は▁"])
def test_what_may_be_added(piece):
    assert allowed(piece)
    assert unicodedata.category(piece[-1]) != "Nd"


def test_too_many_pieces_for_the_text_is_one_clear_line(base):
    with pytest.raises(ShisaError, match="lower new_pieces"):
        extend(base, ["短い文です。", "もう一つ。"] * 3, 82_000)


def test_the_proof_finds_a_piece_that_changes_english(made, base, tmp_path):
    wrong = append_pieces(base, ["漢字を", "▁educationof", "ationof"])
    pad_pieces(wrong)
    (tmp_path / "spm.model").write_bytes(wrong.SerializeToString())
    save_spm_tokenizer(tmp_path / "spm.model", tmp_path / "tokenizer")
    with pytest.raises(ShisaError, match="not safe.*not allowed"):
        prove(base, tmp_path / "tokenizer", ["漢字を書く"], ["the nationof people"])


def test_domains_give_whole_documents_up_to_a_cap():
    rows = [
        {"id": f"{s}{i}", "text": "あ" * 100, "source": s, "meta": "{}"}
        for s, n in (("a", 50), ("b", 3))
        for i in range(n)
    ]
    found = texts_by_domain(pl.DataFrame(rows), cap=450, seed=1)
    assert {name: len(texts) for name, texts in found.items()} == {"a": 5, "b": 3}
    assert found == texts_by_domain(pl.DataFrame(rows[::-1]), cap=450, seed=1)


def test_files_of_text_become_a_proved_folder_in_one_command(tmp_path):
    from typer.testing import CliRunner

    from shisa.cli import app

    (tmp_path / "novel.txt").write_text("\n".join(line for d in documents() for line in d["ja"].split("\n")), encoding="utf-8")
    (tmp_path / "old.txt").write_bytes("新しい文字\n".encode() + "古い文字".encode("cp932"))
    (tmp_path / "empty.jsonl").write_text('{"text": "plain English"}\n\n', encoding="utf-8")
    (tmp_path / "torn.jsonl").write_text('{"text": "日本', encoding="utf-8")

    def call(*texts, pieces="33000", out="new"):
        names = [str(tmp_path / name) for name in texts]
        return CliRunner().invoke(app, ["extend", *names, "--out", str(tmp_path / out), "--pieces", pieces])

    good = call("novel.txt", "empty.jsonl")
    assert good.exit_code == 0 and "33,024 pieces" in good.output and "     0  unreachable new pieces" in good.output
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    before = sorted(p.name for p in tmp_path.iterdir())
    for texts, options, line in (
        (["novel.txt"], {}, "stands already"),
        (["old.txt"], {"out": "other"}, "old.txt:2: no UTF-8"),
        (["torn.jsonl"], {"out": "other"}, "torn.jsonl:1: not a JSON object"),
        (["empty.jsonl"], {"out": "other"}, "no Japanese"),
        (["novel.txt"], {"out": "other", "pieces": "31000"}, "not above the base's 32,000"),
        (["novel.txt"], {"out": "other", "pieces": "90000"}, "supports"),
        (["gone.txt"], {"out": "other"}, "gone.txt: cannot be read"),
    ):
        bad = call(*texts, **options)
        assert bad.exit_code == 2 and line in bad.output and bad.output.strip().count("\n") == 0, bad.output
    assert sorted(p.name for p in tmp_path.iterdir()) == before
