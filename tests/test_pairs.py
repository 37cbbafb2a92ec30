"""Preference pairs: what separates two sides, scored sets, the strong model, the model's own answers, what is left out and why."""
import dataclasses
import json
import shutil
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from chat_toys import mistral_tokenizer, toy_model
from hypothesis import given
from hypothesis import strategies as st
from shisa import pairs, sides
from shisa.chat_format import install_template
from shisa.config import ShisaError, file_sha256
from shisa.evalsets import evaluation_texts
from shisa.sample import conversations
from shisa.stage import Artifact, Work
from shisa.store import AnswerStore
from shisa.validate import Reason

# two sides


@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_and_length_ratio(one, other):
    assert sides.similarity(one, other) == sides.similarity(other, one) and 0 <= sides.similarity(one, other) <= 1
    assert sides.similarity(one, one) == 1 and sides.length_ratio(one, other) == sides.length_ratio(other, one) >= 1


@pytest.mark.parametrize(("text", "stopped", "reason"), [
    (" \n", True, "empty"), ("はい", False, "unfinished"), ("海は 広い。", True, "near"), ("海は広い。\n", True, "equal"),
    ("うみ", True, "length gap"), ("山は高い。", True, None), ("山" * 16, True, "length gap"), ("山" * 15, True, None)])
def test_refusals(text, stopped, reason):
    assert sides.refusal("海は広い。", text, stopped, 0.15, 3.0 if text != "うみ" else 2.0) == reason
    assert sides.refusal("海は広い。", "山" * 900, True, 0.2) is None


@pytest.mark.parametrize(("prompt", "wanted"), [
    ("りんごは何の仲間ですか。", "ja"), ("What kind of fruit is it?", "en"), ("「海」を英訳してください。", None), ("Say it in Japanese.", None),
    ("Translate: the sea", None), ("次の英語を直してください。", None), ("`print(x)` は何をしますか。", "ja"), ("日本の首都はどこですか。", "ja"),
    ("What is the capital of Japan?", "en"), ("12 + 30 = ?", "en")])
def test_wanted_language(prompt, wanted):
    assert sides.wanted_language([{"role": "user", "content": prompt}]) == wanted


def test_language_of_either_side():
    row = {"prompt": [{"role": "user", "content": "りんごは何ですか。"}], "origin": "written"}
    faults = {text: pairs.chosen_fault({**row, "chosen": [{"content": text}]}) for text in
              ("果物です。", "It is a fruit that grows on trees.", "果物です。 It is a fruit that grows on trees.", " ", "申し訳ありませんが、お答えできません。")}
    assert [fault.partition(":")[0] for fault in faults.values()] == ["", "chosen", "chosen", "chosen", ""]
    asked = {"prompt": [{"role": "user", "content": "「りんごは果物です」を英訳してください。"}], "origin": "stronger"}
    faults = [pairs.chosen_fault({**asked, "chosen": [{"content": text}]}) for text in ("Apples are fruit.", "Apples are fruit. " * 60)]
    assert faults[0] == "" and faults[1].startswith("chosen: ")
    assert sides.in_other_language("It is a fruit that grows on trees.", "ja") and sides.in_other_language("果物の仲間です。", "en")
    assert not sides.in_other_language("It is a fruit that grows on trees.", None) and not sides.in_other_language("果物です。", "ja")
    config = pairs.PairsConfig()
    known = [pairs.sample_fault({**row, "id": str(number), "chosen": [{"content": "果物の仲間です。甘いです。"}]}, "It is a fruit.", True, config)
             for number in range(400)]
    assert set(known) == {None, "other language"} and 0.15 < known.count(None) / 400 < 0.35


# scored sets

FOUR = [{"model": name, "response": f"answer {name}", "score": score} for name, score in (("a", 9.0), ("b", 8.5), ("c", 5.0), ("d", 2.0))]


@given(st.lists(st.one_of(st.none(), st.floats(1, 10)), min_size=1, max_size=5), st.floats(0.1, 9), st.sampled_from(["lowest", "random"]), st.text(max_size=5))
def test_scored_pairs_keep_their_margin(scores, margin, which, id):
    answers = sorted(({"model": "m", "response": "r", "score": score} for score in scores), key=lambda each: -(each["score"] or 0))
    found, known = sides.scored_pair({"id": id, "completions": answers}, margin, which), [score for score in scores if score is not None]
    assert (found is None) == (not known or max(known) - min(known) < margin and not min(known) <= max(known) - margin)
    if found:
        assert found[0]["score"] == max(known) and found[1]["score"] <= max(known) - margin
        assert which == "random" or found[1]["score"] == min(known)


def completion(model, response, score, fine):
    return {"model": model, "response": response, "overall_score": score, "annotations": {"helpfulness": {"Rating": str(fine)}}}


@pytest.fixture(scope="module")
def scored_file(tmp_path_factory):
    """Forty records in UltraFeedback's form: most with a margin, some without, one whose 10 is a 1, one of TruthfulQA, one broken."""
    good, fair, poor = "A tide is the slow rise and fall of the sea.", "It is when the sea moves up and down, I believe.", "Water goes away, who knows."
    rows = [{"source": "evol_instruct", "instruction": f"Explain tides to a child, way number {number}.",
             "completions": [completion("small", f"{poor} {number}", 3.0, 2), completion("large", f"{good} {number}", 9.5, 5)]} for number in range(30)]
    rows += [{"source": "flan", "instruction": f"Explain waves, way number {number}.",
              "completions": [completion("one", good, 9.0, 4.5), completion("two", fair, 8.8, 4.4)]} for number in range(5)]
    rows += [{"source": "flan", "instruction": "Explain the trap.", "completions": [completion("trap", poor, 10, 1), completion("right", good, 9.0, 5)]}]
    rows += [{"source": "truthful_qa", "instruction": "Do seas end?", "completions": rows[0]["completions"]}]
    path = tmp_path_factory.mktemp("scored") / "ultrafeedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n", encoding="utf-8")
    (path.parent / "SOURCE.txt").write_text("Licence: MIT\n")
    return path


def fates_in(folder: Path) -> pairs.Fates:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    for name in ("scratch", ".work"):
        (folder / name).mkdir(exist_ok=True)
    return pairs.Fates(Work(folder / "out", folder / "scratch", folder / ".work" / "status.json", "60_pairs"), 0)


NO_TRANSLATIONS = pl.DataFrame(schema={"id": pl.String, "messages": pairs.TALK})


def test_a_scored_set_gives_pairs_and_reasons(scored_file, tmp_path):
    config, fates = pairs.PairsConfig(scored=str(scored_file), pairs_scored=100), fates_in(tmp_path)
    rows = pairs.read_scored(config, NO_TRANSLATIONS, fates)
    assert {reason: count for (_, reason), count in fates.dropped.items() if count and "small" in reason} == {"small margin": 5}
    assert len(rows) == 31 and fates.total == 38 == len(rows) + fates.dropped.total()
    assert all(row["score_chosen"] - row["score_rejected"] >= 1 and row["licence"] == "MIT" for row in rows)
    trap = next(row for row in rows if row["prompt"][0]["content"] == "Explain the trap.")
    assert (trap["chosen_model"], trap["rejected_model"], trap["score_rejected"]) == ("right", "trap", 1.0)


def test_translated_items_stand_against_the_model_in_japanese(scored_file, tmp_path):
    config, fates = pairs.PairsConfig(scored=str(scored_file), from_scored=100, least_score=9.2), fates_in(tmp_path)
    plain = pairs.read_scored(config, NO_TRANSLATIONS, fates)
    assert len(plain) == 30 and not any(row.get("rejected") for row in plain) and fates.dropped["ultrafeedback", "low score"] == 6
    talk = [{"role": "user", "content": "潮とは何ですか。"}, {"role": "assistant", "content": "海の水が満ち引きすることです。"}]
    known = pl.DataFrame([{"id": plain[0]["id"], "messages": talk}], schema={"id": pl.String, "messages": pairs.TALK})
    translated = pairs.read_scored(config, known, fates_in(tmp_path / "b"))
    assert translated[0]["prompt"] == talk[:1] and translated[0]["chosen"] == talk[1:] and translated[1:] == plain[1:]


def test_the_binarized_form_gives_the_same_pair(tmp_path):
    said = [{"role": "user", "content": "Explain tides."}]
    row = {"prompt": "Explain tides.", "prompt_id": "x", "score_chosen": 8.5, "score_rejected": 4.0,
           "chosen": [*said, {"role": "assistant", "content": "The sea rises and falls."}], "rejected": [*said, {"role": "assistant", "content": "No idea."}]}
    (tmp_path / "SOURCE.txt").write_text("Licence: MIT\n")
    (tmp_path / "ultrafeedback_binarized.jsonl").write_text(json.dumps(row) + "\n")
    config = pairs.PairsConfig(scored=str(tmp_path / "ultrafeedback_binarized.jsonl"), pairs_scored=1)
    [pair] = pairs.read_scored(config, NO_TRANSLATIONS, fates_in(tmp_path / "w"))
    assert (pair["score_chosen"], pair["score_rejected"]) == (8.5, 4.0) and pair["prompt"] == said
    assert pair["chosen"][0]["content"] == "The sea rises and falls." and pair["rejected"][0]["content"] == "No idea."


# the model's own answers


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A toy model that ends most answers within a few tokens."""
    import torch
    from shisa.models import save_model

    folder = tmp_path_factory.mktemp("own")
    tokenizer = install_template(mistral_tokenizer(folder))
    model = toy_model(folder, tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 40
    save_model(model, tokenizer, folder)
    return folder


DRAW = sides.Drawing(temperatures=(0.4, 1.2), samples=3, max_new_tokens=6, batch_size=4, seed=3)
PROMPTS = [(f"p{number}", [{"role": "user", "content": f"{number}番の質問です。"}]) for number in range(10)]


@pytest.fixture(scope="module")
def whole(own_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, sides.draw(own_model, PROMPTS, folder, DRAW)


def same_batches(one: Path, other: Path) -> bool:
    """Whether two folders hold the same batches, nine of them."""
    names = [sorted(path.name for path in folder.glob("*-*.parquet")) for folder in (one, other)]
    return names[0] == names[1] and len(names[0]) == 9 and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def test_draws_go_on_from_the_last_batch_with_the_same_bytes(own_model, whole, tmp_path, monkeypatch):
    folder, drawn = whole
    assert drawn.height == 30 and drawn["temperature"].to_list() == [0.4, 1.2, 0.4] * 10 and drawn["number"].to_list() == [0, 1, 2] * 10
    assert drawn.filter(pl.col("number") == 0)["text"].to_list() != drawn.filter(pl.col("number") == 2)["text"].to_list()
    real, calls = sides.write_shard, []

    def killed(frame, path):
        calls.append(path)
        if len(calls) == 6:  # the prompts, four batches, and no fifth
            raise KeyboardInterrupt
        real(frame, path)

    monkeypatch.setattr(sides, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        sides.draw(own_model, PROMPTS, tmp_path / "b", DRAW)
    again = sides.draw(own_model, PROMPTS, tmp_path / "b", DRAW)
    assert len(calls) == 6 + 6 and again.equals(drawn) and same_batches(folder, tmp_path / "b")  # the prompts and five batches
    assert not sides.draw(own_model, PROMPTS, tmp_path / "c", dataclasses.replace(DRAW, seed=4)).equals(drawn)


def test_two_processes_draw_the_same_bytes(own_model, whole, tmp_path):
    folder, drawn = whole
    assert sides.draw(own_model, PROMPTS, tmp_path / "two", DRAW, processes=2).equals(drawn) and same_batches(folder, tmp_path / "two")


def test_a_set_alone_needs_no_model(inputs, scored_file, tmp_path):
    config = pairs.PairsConfig(from_sample=False, from_training=0, from_stronger=0, scored=str(scored_file), pairs_scored=30, longest_ratio=0)
    metrics = pairs.run(config, inputs, fates_in(tmp_path).work)
    assert metrics["by_origin"] == {"set": metrics["pairs"] + metrics["heldout"]} and metrics["samples"] == [] and metrics["models"] == []


def test_the_nearest_in_length_is_taken():
    row = {"id": "a", "prompt": [{"role": "user", "content": "りんごは何ですか。"}], "chosen": [{"content": "果物の仲間です。"}]}
    drawn = [{"text": text, "stopped": stopped} for text, stopped in (("", True), ("車。", True), ("楽器の仲間だ。", True), ("果物の", False))]
    config = pairs.PairsConfig(near=0.99)
    assert pairs.take_sample(row, drawn, config) == (drawn[2], None)
    assert pairs.take_sample(row, drawn, config.change(pick="first"))[0] == drawn[1]
    assert pairs.take_sample(row, [drawn[3], drawn[0]], config) == (drawn[3], "unfinished")


# the stage


def artifact(root: Path, name: str, tables: dict[str, pl.DataFrame]) -> Artifact:
    """A finished stage's folder with these tables, beside what stands there."""
    for table, frame in tables.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        frame.write_parquet(root / name / table)
    files = {path.relative_to(root / name).as_posix(): {"sha256": file_sha256(path)} for path in (root / name).rglob("*") if path.is_file()}
    (root / name / "manifest.json").write_text(json.dumps({"stage": name, "files": files, "fingerprint": "f" * 64, "metrics": {}, "counts": {}, "licences": []}))
    return Artifact(root / name)


@pytest.fixture(scope="module")
def inputs(own_model, tmp_path_factory):
    """Artifacts of 41, 43 and 51: some of the sample's conversations, and one row for each reason to leave a prompt out."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(own_model, root / "51_sft" / "model")
    chats = [(chat["id"], chat["messages_ja"]) for chat in conversations() if len(chat["messages_ja"]) == 2][:40]
    held = chats.pop()
    talks = dict(chats) | {"again": chats[0][1], "held": held[1], "long": [{"role": "user", "content": "長い質問です。" * 60}, chats[0][1][1]],
                           "item": [{"role": "user", "content": max(evaluation_texts(None), key=lambda each: len(each["text"]))["text"]}, chats[0][1][1]]}
    rows = [{"id": id, "source": "sample", "licence": "Apache-2.0", "kind": "advice", "messages": messages} for id, messages in talks.items()]
    schema = {**dict.fromkeys(("id", "source", "licence", "kind"), pl.String), "messages": pairs.TALK}
    heldout = pl.DataFrame([{**rows[0], "id": "h", "messages": held[1]}], schema=schema)
    return {"41_translate": artifact(root, "41_translate", {"conversations.parquet": NO_TRANSLATIONS}), "51_sft": artifact(root, "51_sft", {}),
            "43_sft_data": artifact(root, "43_sft_data", {"train.parquet": pl.DataFrame(rows, schema=schema), "heldout.parquet": heldout})}


def config_for(scored_file: Path) -> pairs.PairsConfig:
    return pairs.PairsConfig(from_training=30, from_stronger=30, scored=str(scored_file), pairs_scored=20, longest_ratio=0, max_new_tokens=6,
                             batch_size=16, samples=2, temperatures=(0.5, 1.0), other_language=1.0)


@pytest.fixture(scope="module")
def made(inputs, scored_file, tmp_path_factory):
    fates = fates_in(tmp_path_factory.mktemp("made"))
    metrics = pairs.run(config_for(scored_file), inputs, fates.work)
    fates.work.finish_rejects()
    return fates.work, metrics


def test_the_stage_balances_and_says_where_every_row_is_from(made, inputs):
    work, metrics = made
    frame = pl.concat([pl.read_parquet(work.path / name) for name in ("pairs.parquet", "heldout.parquet")])
    assert work.counts["in"] == metrics["prompts"] == frame.height + sum(metrics["dropped"].values())
    assert {"contaminated", "duplicate", "held out", "too long"} <= {*metrics["dropped"]}
    assert frame.columns == list(pairs.SCHEMA) and frame["id"].n_unique() == frame.height
    assert {*frame["origin"]} == {"written", "reference", "stronger", "set"}
    own = frame.filter(pl.col("origin") != "set")
    assert own["rejected_model"].unique().to_list() == ["51_sft " + "f" * 12] and own["temperature"].is_in([0.5, 1.0]).all()
    assert frame.filter(pl.col("origin") == "stronger")["chosen_model"].unique().to_list() == [pairs.BUNDLED_STRONGER]
    of_set = frame.filter(pl.col("origin") == "set")
    assert of_set["temperature"].is_null().all() and (of_set["score_chosen"] > of_set["score_rejected"]).all() and {*of_set["licence"]} == {"MIT"}
    assert all(len(row["chosen"][0]["content"]) == row["characters_chosen"] and row["rejected"][0]["content"].strip() for row in frame.to_dicts())
    rejects = pl.read_parquet(work.path / "rejects.parquet")
    assert rejects.height == sum(metrics["dropped"].values()) and {*rejects["reason"]} == {*metrics["dropped"]}
    assert sum(sum(found.values()) for found in metrics["by_source"].values()) == metrics["prompts"]
    assert sum(each["records"] for each in work.licences) == frame.height


def test_metrics_tell_the_gaps(made, inputs, scored_file):
    metrics = made[1]
    assert metrics["models"][0]["answers"] == sum(metrics["strong_attempts"].values()) > 0 and metrics["models"][0]["usd"] == 0
    [row] = pairs.bill(config_for(scored_file), inputs["51_sft"].path.parent).rows
    assert (row["requests"], row["answered"], row["usd"]) == (13, 0, 0)  # 43 conversations, 30 of them with their own replies
    assert metrics["strong_attempts"]["accepted"] >= 10
    for side in ("chosen", "rejected"):
        leaks = metrics["leaks"][side]
        assert leaks["low"] <= leaks["rate"] <= leaks["high"] and 0 <= metrics["japanese_share"][side] <= 1
    assert metrics["leaks"]["chosen"]["leaking"] == 0 and metrics["leaks"]["rejected"]["leaking"] > 0
    quantiles = [metrics["length_gap"]["characters"][name] for name in ("5%", "25%", "50%", "75%", "95%")]
    assert quantiles == sorted(quantiles)


def test_going_on_gives_the_same_bytes_and_asks_nothing_again(made, inputs, scored_file, tmp_path):
    work, metrics = made
    fates = fates_in(tmp_path)
    shutil.copytree(work.scratch, fates.work.scratch, dirs_exist_ok=True)
    shutil.copytree(work.status.parent.parent / "store", tmp_path / "store")
    for path in sorted((fates.work.scratch / "drawn").glob("*-*.parquet"))[-3:]:
        path.unlink()
    with closing(AnswerStore.of(fates.work)) as store:
        before = store.totals()
    again = pairs.run(config_for(scored_file), inputs, fates.work)
    with closing(AnswerStore.of(fates.work)) as store:
        assert store.totals() == before and before["answers"] > 0
    assert again == metrics
    for name in ("pairs.parquet", "heldout.parquet"):
        assert (fates.work.path / name).read_bytes() == (work.path / name).read_bytes()


def test_a_strong_model_that_only_fails_leaves_its_prompts_out(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "check_reply", lambda *_, **__: [Reason("refused")])
    config = pairs.PairsConfig(from_sample=False, from_training=20, from_stronger=5, longest_ratio=0, max_new_tokens=6, samples=1,
                               other_language=1.0, heldout_share=0.4)
    fates = fates_in(tmp_path)
    metrics = pairs.run(config, inputs, fates.work)
    assert metrics["samples"][0]["samples"] == metrics["prompts"] - sum(count for reason, count in metrics["dropped"].items() if reason in
                                                                      ("contaminated", "duplicate", "held out", "too long"))
    assert metrics["dropped"]["chosen: refused"] == sum(metrics["strong_attempts"].values()) / 2 > 0 and "stronger" not in metrics["by_origin"]


def test_too_few_pairs_is_one_line(inputs, tmp_path):
    config = pairs.PairsConfig(from_sample=False, from_training=3, from_stronger=0, max_new_tokens=6, near=0.01)
    with pytest.raises(ShisaError, match="too few; add prompts"):
        pairs.run(config, inputs, fates_in(tmp_path).work)


def test_settings_of_every_profile():
    for profile in ("tiny", "small", "h100", "a100x16"):
        assert pairs.config(profile).samples >= 2
    large = pairs.config("a100x16")
    assert large.answerer == "openai" and large.scored and large.pairs_scored and large.evaluation == "all" and large.longest_ratio <= 5
