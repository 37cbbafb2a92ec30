"""The mix: shares, exact and fast tokenising, packing in flat arrays, and the stage on shards; on small tokenizers and toys."""
import json
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shisa.base import AWKWARD, mistral_model_file, save_spm_tokenizer
from shisa.config import ShisaError
from shisa.mix import Encoder, budgets, config, pieces_to_draw, share_names, tables_of, translations
from shisa.packing import Packed, Pieces, best_fit_decreasing, check_packed, cut, draw, encode_texts, pack, spans
from shisa.pieces import append_pieces, spm_proto
from shisa.sample import documents, japanese
from shisa.stage import run_stage, write_shard

BOS, EOS = 1, 2
SCHEMA = ("id", "text", "source", "lang", "licence", "meta")
ROOT = Path(__file__).parent.parent


# ---- shares

def rows(*items: tuple[str, str, str, dict]) -> pl.DataFrame:
    """Documents (text, source, lang, meta) in the schema."""
    return pl.DataFrame([(f"d{at}", text, source, lang, "CC0-1.0", json.dumps(meta)) for at, (text, source, lang, meta) in enumerate(items)],
                        schema=list(SCHEMA), orient="row")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 10**10))
def test_budgets_add_up_and_keep_to_the_shares(weights, tokens):
    shares = {f"s{at}": weight / sum(weights) for at, weight in enumerate(weights)}
    found = budgets(tokens, shares)
    assert sum(found.values()) == tokens
    assert all(abs(found[name] - tokens * share) <= 1 for name, share in shares.items())


def test_every_document_belongs_to_the_first_share_that_fits():
    table = rows(("a", "stack/py", "en", {}), ("b", "web", "ja", {"kind": "code"}), ("c", "web", "en", {"kind": "code"}),
                 ("d", "web", "ja", {}), ("e", "web", "zh", {}), ("f", "stack/py", "ja", {"kind": "essay"}))
    assert share_names(table, ["ja", "en"], {}).to_list() == ["en", "ja", "en", "ja", None, "ja"]
    assert share_names(table, ["ja", "en", "code"], {}).to_list() == ["en", "code", "code", "ja", None, "ja"]
    assert share_names(table, ["ja", "en", "code"], {"code": ["stack/"]}).to_list() == ["code", "code", "code", "ja", None, "code"]
    both = share_names(table, ["ja", "en", "code", "code/ja"], {"code": ["stack/"]})
    assert both.to_list() == ["code", "code/ja", "code", "ja", None, "code/ja"]


def test_translations_are_two_documents_in_two_languages():
    table = pl.DataFrame({"row": list(range(11)), "lang": ["ja", "en", "ja", "ja", "en", "ja", "en", "ja", "ja", "en", "en"],
                          "pair": ["p", "p", "same", "same", "lone", "three", "three", "three", "", "", None]})
    found = translations(table, seed=0)
    assert [sorted(row) for row in found.rows()] == [[0, 1]]
    many = pl.DataFrame({"row": list(range(400)), "lang": ["ja", "en"] * 200, "pair": [f"p{at // 2}" for at in range(400)]})
    one = translations(many, seed=0)
    assert one.equals(translations(many.sample(fraction=1.0, shuffle=True, seed=3), seed=0))
    assert not one.equals(translations(many, seed=1))
    assert 60 < (one["first"] % 2 == 0).sum() < 140  # either language comes first


@pytest.mark.parametrize("changes, message", [
    ({"shares": {"ja": 0.8}}, "add up to 1, not 0.8"),
    ({"shares": {"ja": 1.2, "en": -0.2}}, "config field shares: every share must be above 0"),
    ({"shares": {}}, "above 0"),
    ({"shares": {"ja": 0.9, "math": 0.1}, "tokens": 100}, "'math' has nothing to draw from .documents: ja 2.; leave it out"),
    ({"shares": {"ja": 1.0}, "tokens": 1000}, "'ja' has 100 tokens, and 1,000 are wanted: 10.0 passes, over max_passes 4;"),
])
def test_a_mix_that_cannot_be_is_refused_in_one_line(changes, message):
    units = pl.DataFrame({"share": ["ja", "ja"], "documents": [1, 1], "file": [0, 0], "start": [0, 40], "size": [40, 60]})
    with pytest.raises(ShisaError, match=message) as refusal:
        pieces_to_draw(units, config("tiny").change(**changes))
    assert "\n" not in str(refusal.value)


@given(st.lists(st.integers(3, 400), min_size=1, max_size=30), st.lists(st.integers(3, 400), min_size=1, max_size=30), st.integers(1, 9))
def test_without_a_number_the_text_decides_how_large_the_mix_is(japanese, english, tenths):
    """As large as max_passes over the scarcer share make it, never larger, and no share is refused."""
    sizes = japanese + english
    units = pl.DataFrame({"share": ["ja"] * len(japanese) + ["en"] * len(english), "documents": 1, "file": 0, "start": 0, "size": sizes})
    own = config("h100").change(shares={"ja": tenths / 10, "en": 1 - tenths / 10})
    assert own.tokens == 0
    most = min(4 * sum(japanese) / (tenths / 10), 4 * sum(english) / (1 - tenths / 10))
    _, facts = pieces_to_draw(units, own)
    wanted = sum(fact["wanted"] for fact in facts.values())
    assert most - 4 <= wanted <= most and all(fact["wanted"] <= 4 * fact["there"] for fact in facts.values())


def test_profiles_keep_shisas_shares():
    assert config("a100x16").shares == {"ja": 0.9, "en": 0.1} and config("a100x16").length == 4096
    assert config("tiny").shares == {"ja": 0.8, "en": 0.2}


# ---- tokens

def extended(folder: Path) -> Path:
    """Mistral's tokenizer and 200 pieces more, some with a space inside, characters first."""
    proto = spm_proto(mistral_model_file())
    known = {piece.piece for piece in proto.pieces}
    text = "".join(item["ja"] for item in japanese())
    pieces = [*sorted(set(text)), *(text[at:at + size] for size in (2, 3, 4) for at in range(0, 600, 5))]
    pieces += ["の▁", "です▁(", "に▁、", "▁▁を返します。", "##▁概要", "━━", "━━━━"]
    proto = append_pieces(proto, [piece for piece in dict.fromkeys(pieces) if piece not in known and "\n" not in piece and " " not in piece])
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    save_spm_tokenizer(folder / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Encoder]:
    base = tmp_path_factory.mktemp("base")
    save_spm_tokenizer(mistral_model_file(), base)
    return {"base": Encoder(base), "extended": Encoder(extended(tmp_path_factory.mktemp("extended")))}


def same(encoder: Encoder, texts: list[str]) -> None:
    """The fast ids are those of transformers with `split_special_tokens`, document by document."""
    assert encoder.tables is not None
    tokens, sizes = encoder(pl.Series(texts, dtype=pl.String))
    assert tokens.dtype == np.int32 and sizes.sum() == len(tokens)
    found = [part.tolist() for part in np.split(tokens, np.cumsum(sizes)[:-1])] if texts else []
    assert found == [[BOS, *ids, EOS] for ids in encode_texts(encoder.tokenizer, texts)]


@pytest.mark.parametrize("name", ["base", "extended"])
def test_ids_are_those_of_the_tokenizer_on_the_whole_sample(encoders, name):
    texts = [item[lang] for item in documents() for lang in ("en", "ja")] + [item["ja"] for item in japanese()]
    same(encoders[name], [*texts, "".join(texts)])


@pytest.mark.parametrize("name", ["base", "extended"])
def test_ids_are_those_of_the_tokenizer_on_awkward_text(encoders, name):
    runs = [sign * count for sign in ("=", " ", "▁", "a", "の", "━", "\n", "𠮷", "é") for count in (1, 2, 3, 31, 32, 33, 5000)]
    same(encoders[name], [*AWKWARD, *runs, "a" + " " * 3000 + "b", "=-" * 2000, "abc" * 1500, "</s><s><unk><0x41>▁", "\ufeff\x00\u2028"])
    same(encoders[name], [])


PARTS = st.sampled_from([" ", "  ", "▁", "\n", "\t", "の", "です", "に", "、", "(", "##", "概要", "を返します。", "<s>", "</s>", "<0x0A>",
                         "<|extra_0|>", "the", " a", "12", "é", "𠮷", "👩‍👩‍👧", "\x00", "━", "ー"])


@given(st.lists(st.one_of(st.text(max_size=30), st.lists(PARTS, max_size=20).map("".join)), max_size=6))
@example(["の の  の", " の", "の "])
@settings(max_examples=250, deadline=None)
def test_ids_are_those_of_the_tokenizer_on_any_text(encoders, texts):
    for encoder in encoders.values():
        same(encoder, texts)


def test_a_stretch_seen_before_is_known_by_its_bytes(encoders):
    """Many stretches share a place in the table of known ones: none is taken for another, also across documents."""
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in random.integers(0, 26, size)) for size in random.integers(2, 9, 90_000)]
    same(encoders["base"], [" ".join(words), " ".join(reversed(words))])


def test_an_unknown_kind_of_tokenizer_and_a_wrong_id_are_left_to_tokenizers(encoders, monkeypatch):
    encoder, texts = encoders["extended"], pl.Series([item["ja"] for item in japanese()[:30]])
    state = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    for other in ({**state, "normalizer": None}, {**state, "pre_tokenizer": {"type": "Whitespace"}},
                  {**state, "model": {**state["model"], "byte_fallback": False}}, {**state, "model": {"type": "Unigram"}}):
        assert tables_of(other) is None
    tokens, sizes, facts = encoder.proved(texts, checked=10, seed=0)
    assert facts == {"checked": 10, "differ": 0, "slow": 0}
    broken = encoder.tables._replace(merged=np.roll(encoder.tables.merged, 1))
    monkeypatch.setattr(encoder, "tables", broken)
    again, _, facts = encoder.proved(texts, checked=10, seed=0)
    assert facts == {"checked": 10, "differ": 10, "slow": 30} and (again == tokens).all()
    monkeypatch.setattr(encoder, "tables", None)
    again, lengths, facts = encoder.proved(texts, checked=10, seed=0)
    assert facts == {"checked": 0, "differ": 0, "slow": 30} and (again == tokens).all() and (lengths == sizes).all()


# ---- packing

def simple_best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """Best fit decreasing as one would write it down: indices of pieces by sequence."""
    bins: list[list[int]] = []
    rooms: dict[int, list[int]] = {}  # free tokens -> sequences with just that room
    free: list[int] = []  # the keys of rooms, sorted
    for index in sorted(range(len(sizes)), key=lambda at: (-sizes[at], at)):
        at = bisect_left(free, sizes[index])
        if at == len(free):
            bins.append([])
            place, room = len(bins) - 1, length
        else:
            room = free[at]
            place = rooms[room].pop()
            if not rooms[room]:
                del rooms[room], free[at]
        bins[place].append(index)
        if left := room - sizes[index]:
            if left not in rooms:
                insort(free, left)
            rooms.setdefault(left, []).append(place)
    return bins


@given(st.integers(1, 300).flatmap(lambda length: st.tuples(st.just(length), st.lists(st.integers(1, length), max_size=200))))
@settings(max_examples=200, deadline=None)
def test_best_fit_is_the_simple_definition(case):
    length, sizes = case
    places = best_fit_decreasing(np.array(sizes, np.int64), length)
    bins = simple_best_fit(sizes, length)
    assert [places[members].tolist() for members in bins] == [[at] * len(members) for at, members in enumerate(bins)]
    assert len(places) == sum(map(len, bins)) and all(sum(sizes[i] for i in members) <= length for members in bins)


def test_a_piece_that_fits_no_sequence_is_refused():
    for sizes in ([3, 9], [0, 3]):
        with pytest.raises(ValueError, match="do not fit sequences of 8"):
            best_fit_decreasing(np.array(sizes), 8)


def document(size: int) -> np.ndarray:
    return np.array([BOS, *(3 + np.arange(size) % 20), EOS], dtype=np.int32)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=60), st.integers(2, 24), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_piece_stands_in_one_sequence_once(sizes, length, seed):
    texts = [document(size) for size in sizes]
    pieces = cut(texts, length)
    owners, starts, counts = spans(np.array([len(text) for text in texts]), length)
    assert (pieces.sizes == counts).all() and (pieces.documents == owners).all()
    frame = pack(pieces, length, 0, seed).frame
    assert frame["input_ids"].list.len().max() <= length
    packed = sorted(zip(frame["documents"].explode(), frame["lengths"].explode(), frame["ends"].explode(), strict=True))
    assert packed == sorted(zip(pieces.documents.tolist(), pieces.sizes.tolist(), pieces.ends.tolist(), strict=True))
    for number, text in enumerate(texts):  # what is cut is the document, and a BOS for each further piece
        mine = [text[start:start + count - 1] for owner, start, count in zip(owners, starts, counts, strict=True) if owner == number]
        assert np.concatenate([text[:1], *mine]).tolist() == text.tolist()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 3000), st.integers(0, 3))
def test_a_draw_reads_all_before_it_reads_any_again(sizes, budget, seed):
    chosen, turns = draw(np.array(sizes), budget, seed)
    taken = np.array(sizes)[chosen].sum()
    assert taken >= budget and (not len(chosen) or taken - sizes[chosen[-1]] < budget)
    for turn in range(int(turns.max(initial=0))):  # every pass but the last is whole
        assert sorted(chosen[turns == turn]) == list(range(len(sizes)))
    assert len(set(chosen[turns == turns.max(initial=0)])) == (turns == turns.max(initial=0)).sum()


@pytest.mark.parametrize("column, change, message", [
    ("input_ids", lambda ids: [9, *ids[1:]], "not BOS"),
    ("input_ids", lambda ids: [*ids[:-1], 9], "not BOS"),
    ("input_ids", lambda ids: [ids[0], EOS, *ids[2:]], "not BOS"),
    ("input_ids", lambda ids: [ids[0], BOS, *ids[2:]], "not BOS"),
    ("input_ids", lambda ids: [*ids, 9], "do not add up"),
    ("lengths", lambda sizes: [sizes[0] - 1, *sizes[1:]], "do not add up|not BOS"),
    ("lengths", lambda sizes: [sizes[0] + 1, *sizes[1:]], "do not add up|not BOS"),
    ("ends", lambda ends: [not ends[0], *ends[1:]], "not BOS"),
    ("documents", lambda numbers: [3, *numbers[1:]], "document 3: ends more than once"),
])
def test_the_proof_on_the_file_finds_every_kind_of_damage(tmp_path, column, change, message):
    packed = pack(cut([document(size) for size in (5, 4, 3, 2)], 10), 10, 0)
    packed.save(tmp_path / "packed.parquet")
    assert check_packed(Packed.load(tmp_path), BOS, EOS) == 4
    frame = pl.read_parquet(tmp_path / "packed.parquet")
    row = next(at for at in range(len(frame)) if 3 not in frame["documents"][at])
    values = frame[column].to_list()
    values[row] = change(values[row])
    frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype)).write_parquet(tmp_path / "packed.parquet")
    with pytest.raises(ValueError, match=message):
        check_packed(Packed.load(tmp_path), BOS, EOS)


def test_files_are_read_by_row_group_and_give_the_same_batches(tmp_path, monkeypatch):
    import shisa.packing

    monkeypatch.setattr(shisa.packing, "GROUP_TOKENS", 64)
    monkeypatch.setattr(shisa.packing, "CACHED_GROUPS", 2)
    pieces = cut([document(size % 17) for size in range(300)], 16)
    parts = [pieces.take(np.arange(0, 150)), pieces.take(np.arange(150, len(pieces.sizes)))]
    packed = [pack(part, 16, pad_id=7, seed=at) for at, part in enumerate(parts)]
    for number, part in enumerate(packed):
        part.save(tmp_path / f"packed-{number:05d}.parquet")
    loaded = Packed.load(tmp_path)
    assert loaded.frame.equals(pl.concat([part.frame for part in packed]))
    assert (loaded.length, loaded.pad_id, len(loaded)) == (16, 7, len(packed[0]) + len(packed[1]))
    assert loaded.padding_share == pytest.approx(1 - pieces.sizes.sum() / (16 * len(loaded)))
    assert loaded.cut_documents == sum(size % 17 > 14 for size in range(300)) and check_packed(loaded, BOS, EOS) == 300
    assert (loaded.count_ids(30) == np.bincount(pieces.tokens, minlength=30)).all()
    order = np.random.default_rng(0).permutation(len(loaded))
    whole = {name: np.concatenate([part.batch(np.arange(len(part)))[name] for part in packed]) for name in ("input_ids", "position_ids", "labels")}
    for name, value in loaded.batch(order).items():
        assert (value == whole[name][order]).all()
    assert loaded._read.cache_info().currsize == 2 < len(loaded._groups)  # and no more of it in memory


# ---- the stage

def split(folder: Path, shards: int) -> None:
    """A finished 14_split and 21_tokenizer under `folder`, whose training documents stand in some shards."""
    items = [(item[lang], f"sample/{item['kind']}", lang, {"kind": item["kind"], "pair": item["id"]}) for item in documents() for lang in ("en", "ja")]
    items += [(item["ja"], f"sample/{item['kind']}", "ja", {"kind": item["kind"]}) for item in japanese()]
    table = rows(*items, ("", "empty", "ja", {}), ("无关", "web", "zh", {}))
    parts = {"14_split": folder / "14_split", "21_tokenizer": folder / "21_tokenizer"}
    for part in parts.values():
        part.mkdir(parents=True)
    for number in range(shards):
        write_shard(table[number::shards], parts["14_split"] / f"train-{number:05d}.parquet")
    (parts["21_tokenizer"] / "tokenizer").mkdir()
    extended(parts["21_tokenizer"] / "tokenizer")
    from shisa.config import file_sha256

    for name, part in parts.items():
        files = {str(path.relative_to(part)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                 for path in sorted(part.rglob("*")) if path.is_file()}
        manifest = {"stage": name, "fingerprint": name, "files": files, "metrics": {}, "counts": {}, "identity": {}, "module_sha256": ""}
        (part / "manifest.json").write_text(json.dumps(manifest))


CHANGES = {"shares": {"ja": 0.5, "parallel": 0.4, "code/ja": 0.02, "zh": 0.08}, "tokens": 90_000, "length": 512, "block_tokens": 20_000,
           "max_passes": 2_000.0}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The stage on five shards with four kinds of share, in this process."""
    folder = tmp_path_factory.mktemp("mix")
    split(folder, 5)
    return run_stage("30_mix", "tiny", folder, config=config("tiny").change(**CHANGES))


def test_the_stage_reports_what_was_wanted_and_drawn(mixed):
    metrics = mixed.metrics
    assert metrics["wanted"] == {"ja": 45_000, "parallel": 36_000, "code/ja": 1_800, "zh": 7_200}
    for name, wanted in metrics["wanted"].items():
        assert wanted <= metrics["tokens"][name] < wanted + 512
        assert metrics["passes"][name] == pytest.approx(metrics["tokens"][name] / metrics["there"][name], abs=1e-3)
    assert sum(metrics["share"].values()) == pytest.approx(1)
    assert metrics["documents"] == {"parallel": 320, "code/ja": 6, "zh": 1, "ja": 191}
    assert metrics["encoder"]["differ"] == metrics["encoder"]["slow"] == 0 and metrics["encoder"]["checked"] > 300
    counts = mixed.counts
    assert counts["in"] == 2 * len(documents()) + len(japanese()) + 2 == counts["kept"] + sum(counts["dropped"].values())
    assert len(mixed.shards("packed")) > 3 and metrics["sequences"] == len(Packed.load(mixed.path)) == sum(metrics["fill"])
    assert {row["licence"] for row in mixed.manifest["licences"]} == {"CC0-1.0"}


def test_a_pair_is_read_as_one_document_with_the_ids_of_the_joined_text(mixed):
    encoder = Encoder(mixed.path.parent / "21_tokenizer" / "tokenizer")
    packed = Packed.load(mixed.path).frame
    pieces = set()
    for ids, sizes in packed.select("input_ids", "lengths").iter_rows():
        pieces |= {tuple(ids[stop - size:stop]) for stop, size in zip(np.cumsum(sizes), sizes, strict=True)}

    def read(text: str) -> bool:
        """Whether all that the text is cut into stands in the file."""
        whole = cut([np.array([BOS, *encode_texts(encoder.tokenizer, [text])[0], EOS], np.int32)], 512)
        return {tuple(part.tolist()) for part in np.split(whole.tokens, np.cumsum(whole.sizes)[:-1])} <= pieces

    order = [(read(f"{item['en']}\n\n{item['ja']}"), read(f"{item['ja']}\n\n{item['en']}")) for item in documents()]
    assert (True, True) not in order and min(order.count((True, False)), order.count((False, True))) > 3
    assert not any(read(item["en"]) for item in documents())  # only in pairs


@pytest.mark.parametrize("placement", [{"workers": 2}, {"workers": 1}])
def test_workers_do_not_change_a_byte(mixed, tmp_path, placement):
    for name in ("14_split", "21_tokenizer"):
        os.symlink(mixed.path.parent / name, tmp_path / name)
    again = run_stage("30_mix", "tiny", tmp_path, config=config("tiny").change(**CHANGES, **placement))
    assert again.manifest["files"] == mixed.manifest["files"] and again.metrics == mixed.metrics


def test_another_seed_gives_another_order(mixed, tmp_path):
    for name in ("14_split", "21_tokenizer"):
        os.symlink(mixed.path.parent / name, tmp_path / name)
    other = run_stage("30_mix", "tiny", tmp_path, config=config("tiny").change(**CHANGES, seed=1))
    assert other.manifest["files"] != mixed.manifest["files"] and other.metrics["tokens"].keys() == mixed.metrics["tokens"].keys()


def test_killed_at_any_moment_it_ends_in_the_same_bytes(mixed, tmp_path):
    for name in ("14_split", "21_tokenizer"):
        os.symlink(mixed.path.parent / name, tmp_path / name)
    program = (f"from shisa.stage import run_stage; from shisa.mix import config; "
               f"run_stage('30_mix', 'tiny', {str(tmp_path)!r}, config=config('tiny').change(**{CHANGES!r}))")
    work = tmp_path / ".work"
    for wanted in ("tokenise/00001.json", "pack/00000.json", "pack/00002.json"):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit and not list(work.glob(f"*/scratch/{wanted}")):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    again = run_stage("30_mix", "tiny", tmp_path, config=config("tiny").change(**CHANGES))
    assert again.manifest["files"] == mixed.manifest["files"] and again.metrics == mixed.metrics


# ---- on real text

@pytest.mark.shared
def test_on_the_shared_corpus_it_is_exact_twice_as_fast_and_hardly_pads(data_folder):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from curation_tokens import measure

    found = measure(data_folder)
    assert found["tokenise_differ"] == 0 and found["tokenise_ratio"] >= 2
    assert found["pack_cut"] == 0 and found["pack_padding"] < 0.01 < found["chunk_cut"]
