"""Scorers, readers and the benchmark stage: definitions, bounds, the recorded runs."""

import difflib
import json
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa import evalsets, jaster, sample
from shisa.config import ShisaError

TEXT = st.text(max_size=40)
JAPANESE = st.text(alphabet="東京都大阪の太子 聖徳、。ーａＡb_é9", max_size=30)


def data() -> Path:
    """The local data folder, or a skip."""
    folder = sample.data_folder()
    if folder is None or not (folder / "jaster").is_dir():
        pytest.skip("no local data folder")
    return folder


# ---- token_sort_ratio ------------------------------------------------------------------------------------------------


@given(JAPANESE | TEXT, JAPANESE | TEXT)
def test_ratio_is_symmetric_and_bounded(first: str, second: str) -> None:
    value = jaster.token_sort_ratio(first, second)
    assert value == jaster.token_sort_ratio(second, first)
    assert isinstance(value, int) and 0 <= value <= 100
    assert 0 <= jaster.token_sort_ratio(first, second, "difflib") <= 100


@given(TEXT)
def test_ratio_of_a_text_with_itself(text: str) -> None:
    for backend in jaster.BACKENDS:
        assert jaster.token_sort_ratio(text, text, backend) == 100


def indel(first: str, second: str) -> int:
    """Insertions and deletions between two texts, by the textbook recurrence."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(above[j - 1] if a == b else 1 + min(above[j], row[-1]))
    return row[-1]


def reference(first: str, second: str, backend: str) -> int:
    """fuzzywuzzy 0.18.0 token_sort_ratio, written out from its source."""

    def process(text: str) -> str:
        import re

        text = "".join(c for c in text if not 128 <= ord(c) <= 255)
        text = re.compile(r"(?ui)\W").sub(" ", text).lower().strip()
        return " ".join(sorted(text.split())).strip()

    a, b = process(first), process(second)
    if a == b:
        return 100
    if len(a) == 0 or len(b) == 0:
        return 0
    if backend == "difflib":
        return int(round(100 * difflib.SequenceMatcher(None, a, b).ratio()))
    total = len(a) + len(b)
    return int(round(100 * ((total - indel(a, b)) / total)))


@given(JAPANESE | TEXT, JAPANESE | TEXT, st.sampled_from(jaster.BACKENDS))
def test_ratio_is_fuzzywuzzys(first: str, second: str, backend: str) -> None:
    assert jaster.token_sort_ratio(first, second, backend) == reference(first, second, backend)


@pytest.mark.parametrize(
    ("pred", "gold", "indel_value", "difflib_value"),
    [
        ("", "", 100, 100),
        ("", "東京", 0, 0),
        ("！？", "", 100, 100),
        ("é", "", 100, 100),
        ("東京", "東京都", 80, 80),
        ("b a", "a b", 100, 100),
        ("Tokyo", "tokyo", 100, 100),
        ("Ａ", "a", 0, 0),
        ("ab_c", "ab c", 75, 75),
        ("東京、大阪", "大阪,東京", 100, 100),
        ("あ" + "の" * 299, "の" * 299, 100, 0),  # difflib's autojunk
        ("abcdefgh", "abcdefghabcdefgh"[:9], 94, 94),
        ("a" + "b" * 7, "a" + "c" * 7, 12, 12),  # 12.5 rounds to even
        ("cab", "abcab", 75, 75),
        ("bcbac", "aacbc", 60, 40),  # the two ratios disagree
    ],
)
def test_ratio_edge_cases(pred: str, gold: str, indel_value: int, difflib_value: int) -> None:
    assert jaster.token_sort_ratio(pred, gold) == indel_value == reference(pred, gold, "indel")
    assert jaster.token_sort_ratio(pred, gold, "difflib") == difflib_value == reference(pred, gold, "difflib")


# ---- similarity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.5", 3.5),
        ("類似度は3です。", 3.0),
        ("-1", 1.0),
        ("", -2.0),
        ("1.2.3", -2.0),
        (".", -2.0),
        ("3．5", 35.0),
        ("1e5", 15.0),
        ("５", -2.0),
    ],
)
def test_number_in(text: str, value: float) -> None:
    assert jaster.number_in(text) == value


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), max_size=30), st.booleans())
def test_correlation(pairs: list[tuple[int, int]], by_rank: bool) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    value = jaster.correlation(first, second, by_rank)
    assert -1 <= value <= 1 and math.isclose(value, jaster.correlation(second, first, by_rank), abs_tol=1e-12)
    if len(set(first)) < 2 or len(set(second)) < 2:
        assert value == 0
    else:
        assert math.isclose(jaster.correlation(first, [-a for a in first], by_rank), -1)


def test_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = [1.0, 2.0, 2.0, 5.0, -2.0, 0.5], [0.0, 3.0, 2.0, 4.0, 4.0, 0.0]
    assert math.isclose(jaster.correlation(first, second), stats.pearsonr(first, second).statistic)
    assert math.isclose(jaster.correlation(first, second, by_rank=True), stats.spearmanr(first, second).statistic)


# ---- a run -----------------------------------------------------------------------------------------------------------


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": "", "input": "", "pred": pred, "gold": gold} for pred, gold in pairs]


FULL = {
    "jcommonsenseqa": rows(("1", "1"), ("2", "1")),
    "jamp": rows(("neutral", "neutral")),
    "janli": rows(("x", "entailment")),
    "jnli": rows((" neutral", "neutral")),
    "jsem": rows(("yes", "yes")),
    "jsick": rows(("neutral", "neutral")),
    "jemhopqa": rows(("東京", "東京")),
    "niilc": rows(("", "東京")),
    "jsquad": rows(("東京", "東京都")),
    "jsts": rows(("0", "0.0"), ("5", "4.0"), ("?", "2")),
}


def test_categories_and_keys() -> None:
    scores = jaster.score_run(FULL)
    assert scores["MC"] == 0.5 and scores["NLI"] == 3 / 5 and scores["QA"] == 0.5 and scores["RC"] == 0.8
    assert math.isclose(scores["AVR"], (0.5 + 0.6 + 0.5 + 0.8) / 4)
    assert list(scores)[:5] == ["AVR", "MC", "NLI", "QA", "RC"]
    assert {"jamp_exact_match", "niilc_char_f1", "jsts_pearson", "jsts_spearman"} <= scores.keys() and len(scores) == 16


def test_nothing_is_normalised() -> None:
    assert jaster.score_run({"jnli": rows((" neutral", "neutral"), ("Neutral", "neutral"))})["NLI"] == 0


def test_missing_datasets_leave_their_categories_out() -> None:
    assert jaster.score_run({"niilc": FULL["niilc"]}).keys() == {"AVR", "QA", "niilc_char_f1"}
    assert jaster.score_run({"jsts": FULL["jsts"]}).keys() == {"jsts_pearson", "jsts_spearman"}


def test_sample_sets_take_their_tasks_metric() -> None:
    scores = jaster.score_run({"sample_mc": rows(("1", "1")), "sample_qa": rows(("東京", "東京都"))})
    assert scores == {"AVR": 0.9, "MC": 1.0, "QA": 0.8, "sample_mc_exact_match": 1.0, "sample_qa_char_f1": 0.8}
    mixed = jaster.score_run({"sample_nli": rows(("a", "a")), "jnli": rows(("a", "b"))})
    assert mixed["NLI"] == 0 and mixed["sample_nli_exact_match"] == 1


@given(
    st.dictionaries(
        st.sampled_from(sorted(jaster.TASKS)),
        st.lists(st.tuples(JAPANESE, JAPANESE), min_size=1, max_size=5),
        min_size=1,
    )
)
@settings(max_examples=50)
def test_scores_are_bounded(made: dict[str, list[tuple[str, str]]]) -> None:
    records = {name: rows(*pairs) for name, pairs in made.items()}
    for key, value in jaster.score_run(records).items():
        assert (-1 if key.startswith("jsts") else 0) <= value <= 1
    perfect = {name: rows(*[(gold, gold) for _, gold in pairs]) for name, pairs in made.items() if name != "jsts"}
    assert not perfect or set(jaster.score_run(perfect).values()) == {1.0}


@pytest.mark.parametrize(
    "records",
    [
        {},
        [],
        {"jnli": []},
        {"jnli": [{"pred": "a"}]},
        {"jnli": ["a"]},
        {"jnli": [{"pred": 1, "gold": "1"}]},
        {"hellaswag": rows(("a", "a"))},
        {"sample_xyz": rows(("a", "a"))},
    ],
)
def test_bad_records_are_one_line(records: object) -> None:
    with pytest.raises(ShisaError) as error:
        jaster.score_run(records)
    assert "\n" not in str(error.value)
    with pytest.raises(ShisaError, match="back end"):
        jaster.score_run(FULL, "levenshtein")


def test_score_file(tmp_path: Path) -> None:
    import zstandard

    plain, packed = tmp_path / "a.json", tmp_path / "a.json.zst"
    plain.write_text(json.dumps(FULL, ensure_ascii=False), encoding="utf-8")
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    assert jaster.score_file(plain) == jaster.score_file(str(packed)) == jaster.score_run(FULL)
    (tmp_path / "torn.json").write_text(plain.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "torn.json.zst").write_bytes(packed.read_bytes()[:-30])
    (tmp_path / "not.json.zst").write_bytes(b"{}")
    for name in ("torn.json", "latin.json", "torn.json.zst", "not.json.zst", "absent.json", "absent.json.zst", "."):
        with pytest.raises(ShisaError) as error:
            jaster.score_file(tmp_path / name)
        assert "\n" not in str(error.value)


RECORDED = {  # which of fuzzywuzzy's back ends was installed when the run was recorded
    "augmxnt_mistral-7b-ja-v0.1": "difflib",
    "shisa-7b-v1-2e-6": "indel",
    "shisa-mega-dpo-7b-v1.1": "indel",
    "stabilityai_japanese-stablelm-instruct-gamma-7b.0": "difflib",
    "stabilityai_japanese-stablelm-instruct-gamma-7b.1": "indel",
    "youri-7b-instruction": "difflib",
}


@pytest.mark.shared
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_score_exactly(name: str) -> None:
    folder = data() / "jaster_logs" / name
    recorded = json.loads((folder / "score_eval.json").read_text())
    line = [float(value) for value in recorded.pop("csv_line").split(",")]
    scores = jaster.score_file(folder / "output_eval.json.zst", RECORDED[name])
    assert scores.keys() == recorded.keys() and list(scores.values()) == pytest.approx(line, abs=5.1e-5)
    for key, value in recorded.items():
        assert scores[key] == pytest.approx(float(value), abs=5.1e-5), key
    assert jaster.backend_of(folder) == RECORDED[name]


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_constant_and_random_answers_are_at_chance() -> None:
    gold = ["neutral"] * 8 + ["entailment"] * 6 + ["contradiction"] * 6
    table = {row["key"]: row for row in jaster.score_table({"jnli": rows(*[("neutral", g) for g in gold])})}
    assert table["NLI"]["random"] == 1 / 3 and table["NLI"]["majority"] == table["NLI"]["score"] == 0.4
    assert table["NLI"]["at_chance"] and table["AVR"]["n"] == 20
    best = {row["key"]: row for row in jaster.score_table({"jnli": rows(*[(g, g) for g in gold])})}
    assert not best["NLI"]["at_chance"] and best["NLI"]["standard_error"] > 0


def test_baselines_of_open_answers() -> None:
    random, majority = jaster.baselines("niilc", ["東京", "東京", "大阪"])
    assert random == pytest.approx(1 / 3) and majority == pytest.approx(2 / 3)
    assert jaster.baselines("jsts", ["1", "2"]) == (0, 0) and jaster.baselines("niilc", ["東京"]) == (0.0, 1.0)
    assert jaster.baselines("janli", ["entailment"])[0] == 0.5 and jaster.baselines("jcommonsenseqa", ["1"])[0] == 0.2


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_prompts() -> None:
    shots = evalsets.bundled_items("train")[:2]
    prompt = evalsets.few_shot_prompt(shots[0].instruction, shots)
    assert prompt.startswith("以下はタスクを説明する指示と") and prompt.endswith("### 入力：\n{input}\n### 回答：\n")
    odd = "質問：{input} と {x} の意味は？"
    assert evalsets.fill_prompt(prompt, odd) == prompt[: -len("{input}\n### 回答：\n")] + odd + "\n### 回答：\n"


def test_draw_is_seeded() -> None:
    items = evalsets.bundled_items()
    assert evalsets.draw(items, 7, 1) == evalsets.draw(items, 7, 1) != evalsets.draw(items, 7, 2)
    assert evalsets.draw(items, 10**6, 1) == items


def test_evaluation_texts_hold_every_bundled_field() -> None:
    texts = {row["text"] for row in evalsets.evaluation_texts(None)}
    for item in evalsets.bundled_items("test") + evalsets.bundled_items("train"):
        assert any(text in item.input for text in texts)
        assert not any(text.startswith(("質問：", "文章：", "選択肢：")) for text in texts)


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    for call in (
        lambda: evalsets.load_dataset("jnli", tmp_path),
        lambda: evalsets.load_dataset("mmlu", tmp_path),
        lambda: evalsets.mtbench_questions("fr", tmp_path),
        lambda: evalsets.mtbench_questions("en", tmp_path),
    ):
        with pytest.raises(ShisaError) as error:
            call()
        assert "\n" not in str(error.value)
    (tmp_path / "jaster" / "jemhopqa" / "corpus").mkdir(parents=True)
    (tmp_path / "jaster" / "jemhopqa" / "corpus" / "dev.json").write_text('[{"qid": "1"')
    with pytest.raises(ShisaError, match="jemhopqa"):
        evalsets.load_dataset("jemhopqa", tmp_path)


@pytest.mark.shared
def test_readers_give_what_the_recorded_runs_asked() -> None:
    folder = data()
    log = json.loads(evalsets.read_bytes(folder / "jaster_logs" / "shisa-mega-dpo-7b-v1.1" / "output_eval.json"))
    for name in evalsets.DATASETS:
        items = evalsets.load_dataset(name, folder)
        # jsem has no split of its own: a few of the recorded items fall into our tenth of examples
        known = items + evalsets.load_dataset(name, folder, "train")
        pairs = {
            (item.input, unicodedata.normalize("NFKC", item.output)) for item in (known if name == "jsem" else items)
        }
        assert all((row["input"], row["gold"]) in pairs for row in log[name]), name
        prompt = log[name][0]["prompt"].replace("<s>", "")
        assert prompt.startswith(evalsets.few_shot_prompt(items[0].instruction, []).partition("### 入力")[0]), name
        assert prompt.endswith("### 入力：\n{input}\n### 回答：\n") and prompt.count("### 回答：") == 5
    assert len(evalsets.mtbench_questions("ja_stability", folder)) == 80


@pytest.mark.shared
def test_evaluation_texts_cover_test_and_train() -> None:
    rows_found = evalsets.evaluation_texts(data())
    prefixes = {"/".join(row["id"].split("/")[:2]) for row in rows_found}
    assert {f"{name}/{split}" for name in evalsets.DATASETS for split in ("test", "train")} <= prefixes
    assert "mtbench/en" in prefixes and len({row["text"] for row in rows_found}) == len(rows_found)
