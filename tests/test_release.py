"""A toy random model goes through benchmark, release and ask; what must be refused is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from shisa import evalsets, jaster, release, report
from shisa.config import ShisaError, file_sha256
from shisa.stage import Artifact, Work

CONTEXT = 2048


def make_model(folder: Path, seed: int = 0, extended: bool = True) -> None:
    """A random Mistral with a SentencePiece-like tokenizer of 320 pieces: bytes, letters, padding rows.

    Not extended, it has no pad token, as Mistral's has none, and is dearer: 答 and え are three bytes each.
    """
    import torch
    from shisa.chat_format import install_template
    from shisa.models import quiet, save_model
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    quiet()
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *"INSTinst[]/", *("答え" if extended else "")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    extras = [f"<|extra_{number}|>" for number in range(320 - len(vocabulary))]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *extras)])
    tokenizer = install_template(
        PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=extras[0] if extended else None
        )
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            sliding_window=None,
            tie_word_embeddings=False,
        )
    )
    save_model(model, tokenizer, folder)


def seal(folder: Path, metrics: dict | None = None, licences: list | None = None, made_from: str = "") -> Artifact:
    """Give a folder the manifest of a finished stage."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    manifest = {
        "stage": folder.name,
        "fingerprint": "0",
        "identity": {"inputs": {name: "0" for name in made_from.split()}},
        "files": files,
        "metrics": metrics or {},
        "licences": licences or [],
        "counts": {},
        "config": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Artifact(folder)


def new_work(root: Path, stage: str) -> Work:
    work = Work(root / stage, root / ".work" / stage, root / ".work" / "status.json", stage)
    work.path.mkdir(parents=True)
    work.scratch.mkdir(parents=True)
    return work


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with toy 10, 14, 21, 31, 51, 61, and 70 and 80 made from them by the real stages."""
    root = tmp_path_factory.mktemp("toy")
    seal(
        root / "10_sources",
        licences=[
            {"source": "sample", "licence": "Apache-2.0", "documents": 3},
            {"source": "wiki|leads", "licence": "CC BY-SA 4.0", "documents": 2},
        ],
    )
    seal(root / "14_split", {"leak_share": 0.004, "removed_by_decontamination": 7}, made_from="10_sources")
    seal(root / "99_other", licences=[{"source": "unrelated", "licence": "secret"}])
    make_model(root / "20_base" / "model", seed=9, extended=False)
    bits = {"base": {"ja": 7.9, "en": 2.5}, "trained": {"ja": 2.7, "en": 2.55}}
    inputs = {"20_base": seal(root / "20_base"), "21_tokenizer": seal(root / "21_tokenizer", {"new_pieces": 1234})}
    for seed, (name, metrics) in enumerate(
        {
            "31_pretrain": {"bits_per_byte": bits},
            "51_sft": {"stop_share": 0.95, "family": {"sft": 0.8, "control": 0.1}},
            "61_dpo": {"accuracy": 0.7, "margin": 0.2},
        }.items()
    ):
        make_model(root / name / "model", seed)
        inputs[name] = seal(root / name, metrics, made_from="14_split 51_sft")
    few = {
        name: (
            [i for i in evalsets.bundled_items() if i.dataset == name][:2],
            [i for i in evalsets.bundled_items("train") if i.dataset == name][:4],
        )
        for name in ("sample_mc", "sample_nli", "sample_qa", "sample_rc")
    }
    work = new_work(root, "70_jaster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaster, "collect", lambda config: few)
        metrics = jaster.run(jaster.config("tiny").change(context=0), inputs, work)
    inputs["70_jaster"] = seal(root / "70_jaster", metrics)
    config = release.Config(title="toy", shard="60KB", max_new_tokens=12)
    work = new_work(root, "80_release")
    metrics = release.run(config, inputs, work)
    seal(root / "80_release", metrics, work.licences)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def told(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `load_elsewhere` repeat what the fresh process said in `toy_run`: starting one takes seconds."""
    tokenizer = report.load_chat(toy_run / "61_dpo" / "model")[1]
    metrics = Artifact(toy_run / "80_release").metrics
    answers = [{"reply": row["reply"], "bos": 1, "text": "x", "plain": "x"} for row in metrics["replies"]]
    sizes = {"parameters": 1, "vocabulary": len(tokenizer), "tokenizer": len(tokenizer), "suppressed": 1}
    monkeypatch.setattr(release, "load_elsewhere", lambda *_: {"told": answers, **sizes})


# ---- the benchmark stage ---------------------------------------------------------------------------------------------


def test_benchmark_records_score_to_the_table(toy_run: Path) -> None:
    artifact = Artifact(toy_run / "70_jaster")
    table = artifact.table("scores.parquet")
    assert table.columns == ["model", "key", "score", "random", "majority", "n", "standard_error", "at_chance"]
    for model in jaster.MODELS:
        scores = jaster.score_file(artifact.file(f"records/{model}.json"))
        rows = table.filter(pl.col("model") == model)
        assert dict(zip(rows["key"], rows["score"], strict=True)) == pytest.approx(scores)
    records = json.loads(artifact.file("records/dpo.json").read_text(encoding="utf-8"))
    for rows in records.values():
        assert [sorted(row) for row in rows] == [["gold", "input", "pred", "prompt", "reply"]] * 2
        assert all(
            "{input}" in row["prompt"] and "\n" not in row["pred"] and "<|extra" not in row["pred"] for row in rows
        )


def test_shots_fit_the_context(toy_run: Path) -> None:
    from shisa.models import load_tokenizer

    artifact = Artifact(toy_run / "70_jaster")
    tokenizers = [load_tokenizer(toy_run / stage / "model") for stage in ("20_base", "61_dpo")]
    records = json.loads(artifact.file("records/sft.json").read_text(encoding="utf-8"))
    for dataset, shots in artifact.metrics["shots"].items():
        prompt = records[dataset][0]["prompt"]
        assert prompt.count("### 入力：") == shots + 1 <= 5
        for tokenizer in tokenizers:
            texts = [evalsets.fill_prompt(prompt, row["input"]) for row in records[dataset]]
            assert max(jaster.prompt_tokens(tokenizer, text) for text in texts) <= CONTEXT - 4


def test_the_dearest_tokenizer_decides_how_many_examples_all_get(toy_run: Path) -> None:
    from shisa.models import load_tokenizer

    dear, cheap = (load_tokenizer(toy_run / stage / "model") for stage in ("20_base", "61_dpo"))
    items, shots = (
        [i for i in evalsets.bundled_items(split) if i.dataset == "sample_qa"][:4] for split in ("test", "train")
    )
    whole = evalsets.few_shot_prompt(items[0].instruction, shots)
    room = max(jaster.prompt_tokens(cheap, evalsets.fill_prompt(whole, item.input)) for item in items)
    assert jaster.fit_shots([cheap], items, shots, room)[3] == 4
    assert jaster.fit_shots([dear, cheap], items, shots, room) == jaster.fit_shots([dear], items, shots, room)
    assert jaster.fit_shots([dear], items, shots, room)[3] < 4


def test_prompts_that_do_not_fit_are_counted(toy_run: Path, tmp_path: Path) -> None:
    from shisa.models import load_tokenizer

    tokenizer = load_tokenizer(toy_run / "61_dpo" / "model")
    work = new_work(tmp_path, "70_jaster")
    sizes = [
        jaster.prompt_tokens(tokenizer, evalsets.fill_prompt(evalsets.few_shot_prompt(i.instruction, []), i.input))
        for i in evalsets.bundled_items()
        if i.dataset == "sample_rc"
    ]
    config = jaster.config("tiny")
    room = sorted(sizes)[10]
    asked, shots, too_long = jaster.choose_prompts(config, [tokenizer], room + config.max_new_tokens["RC"], work)
    lost = sum(size > room for size in sizes)
    assert shots["sample_rc"] == 0 and too_long["sample_rc"] == lost > 0 and len(asked["sample_rc"][1]) == 20 - lost
    assert work.counts["dropped"]["longer than the context"] == sum(too_long.values()) == len(work._rejects)
    with pytest.raises(ShisaError, match="no prompt fits"):
        jaster.choose_prompts(config, [tokenizer], 30, new_work(tmp_path / "b", "70_jaster"))


def test_plot_draws(toy_run: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    figure = jaster.plot(Artifact(toy_run / "70_jaster"))
    assert len(figure.axes) == 1 and len(figure.axes[0].patches) == 20


# ---- the release -----------------------------------------------------------------------------------------------------


def test_release_is_complete_and_checked(toy_run: Path) -> None:
    artifact = Artifact(toy_run / "80_release")
    folder = artifact.folder("release")
    assert all(artifact.metrics["checks"].values()) and len(artifact.metrics["checks"]) == 8
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 1 and (folder / "model.safetensors.index.json").is_file()
    told = json.loads((folder / "generation_config.json").read_text())
    from shisa.models import load_tokenizer, padding_ids

    assert told["suppress_tokens"] == padding_ids(load_tokenizer(folder)) and told["eos_token_id"] == 2
    assert "generation" not in (folder / "chat_template.jinja").read_text().replace("add_generation_prompt", "")
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_release_is_the_same_wherever_it_is_made(toy_run: Path, tmp_path: Path) -> None:
    release.assemble(toy_run / "61_dpo" / "model", tmp_path / "again", "60KB")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (toy_run / "80_release" / "release" / path.name).read_bytes(), path.name


def test_card_says_what_was_measured(toy_run: Path) -> None:
    import yaml

    text = (toy_run / "80_release" / "release" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["language"] == ["ja", "en"] and head["license"] == "other" and "base_model" not in head
    for shown in (
        "1,234 pieces",
        "| adapted to Japanese | 2.700 | 2.550 |",
        "at chance",
        "wiki\\|leads",
        "CC BY-SA 4.0",
        "Share-alike: CC BY-SA 4.0. What is adapted",
        "removed by decontamination: 7",
        "0.004",
        "not a useful assistant",
        "do not compare",
    ):
        assert shown in text, shown
    assert "unrelated" not in text  # a stage that the model was not made from
    assert str(toy_run) not in text
    named = release.front_matter(
        "x", "mistralai/Mistral-7B-v0.1", [{"source": "allenai/MADLAD-400", "licence": "Apache-2.0"}]
    )
    head = yaml.safe_load(named.split("---\n")[1])
    assert head["base_model"] == "mistralai/Mistral-7B-v0.1" and head["datasets"] == ["allenai/MADLAD-400"]
    assert head["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("licences", "tag"),
    [
        (["Apache-2.0", "MIT", "CC0-1.0"], "apache-2.0"),
        (["MIT AND CC-BY-4.0"], "other"),
        (["MIT or Apache-2.0"], "apache-2.0"),
        (["CC-BY-SA-4.0"], "other"),
        (["BSD-3-Clause", "unknown"], "other"),
        ([], "other"),
        (["apache 2.0"], "apache-2.0"),
    ],
)
def test_licence_of_the_weights(licences: list[str], tag: str) -> None:
    assert release.licence_of(licences) == tag


def test_a_dirty_release_is_refused(toy_run: Path, told: None, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_run / "80_release" / "release", tmp_path / "copy")
    (folder / "notes.json").write_text('{"from": "/home/somebody/runs"}')
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    assert [line.partition(":")[0] for line in release.unclean(folder)] == ["notes.json", "optimizer.pt"]
    with pytest.raises(ShisaError, match="no pickle"):
        release.check_release(folder, toy_run / "61_dpo" / "model", 12)


def test_a_broken_release_is_one_line(toy_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_run / "80_release" / "release", tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ShisaError, match="does not load") as error:
        release.load_elsewhere(folder, release.PROMPTS[:1], 4)
    assert "\n" not in str(error.value)


def test_another_models_weights_are_noticed(toy_run: Path, told: None) -> None:
    with pytest.raises(ShisaError, match="greedy replies equal"):
        release.check_release(toy_run / "80_release" / "release", toy_run / "31_pretrain" / "model", 12)


def test_push_needs_a_token_and_never_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ShisaError, match="HF_TOKEN"):
        release.push_to_hub(tmp_path, "someone/toy")
    import huggingface_hub

    class Refusing:
        """A Hub client that fails and repeats the token in its error."""

        def __init__(self, token: str):
            self.token = token

        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError(f"401 for {self.token}\nmore")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(ShisaError) as error:
        release.push_to_hub(tmp_path, "someone/toy")
    assert "hf_secret" not in str(error.value) and "\n" not in str(error.value)


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_ask_streams_the_releases_reply(toy_run: Path) -> None:
    prompt = release.PROMPTS[0][0]["content"]
    pieces = list(report.ask(prompt, out=toy_run, max_new_tokens=12))
    assert "".join(pieces).strip() == Artifact(toy_run / "80_release").metrics["replies"][0]["reply"]
    assert report.model_folder(out=toy_run) == toy_run / "80_release" / "release"


def test_ask_refuses_in_one_line(toy_run: Path, tmp_path: Path) -> None:
    for arguments in (
        {"prompt": "長い" * CONTEXT, "out": toy_run},
        {"prompt": " ", "out": toy_run},
        {"prompt": "a", "out": tmp_path},
        {"prompt": "a", "profile": "huge"},
    ):
        with pytest.raises(ShisaError) as error:
            next(report.ask(**arguments))
        assert "\n" not in str(error.value)


def test_ask_falls_back_to_the_dpo_model(toy_run: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_run / "61_dpo", tmp_path / "61_dpo")
    assert report.model_folder(out=tmp_path) == tmp_path / "61_dpo" / "model"


def test_chat_remembers_and_forgets(toy_run: Path) -> None:
    from shisa.infer import prompt_ids

    lines, shown = iter(["一つ目" * 90, "二つ目" * 90, "三つ目" * 90, "長い" * CONTEXT, ""]), []
    told = report.chat(out=toy_run, max_new_tokens=4, read=lambda _: next(lines), write=shown.append)
    assert [message["role"] for message in told] == ["user", "assistant"] * 2
    # three lines of 810 byte tokens, 2,048 positions: the first is forgotten
    assert told[0]["content"] == "二つ目" * 90 and "forgotten: the oldest 1 exchanges" in "".join(shown)
    assert "shorten the prompt" in "".join(shown)  # the line that was too long was refused, and nothing was lost by it
    _, tokenizer = report.load_chat(report.model_folder(out=toy_run))
    assert len(prompt_ids(tokenizer, told[:-1])) < CONTEXT


def test_serve_command() -> None:
    assert "127.0.0.1" in report.serve_command("x") and report.serve_command("x", "vllm").startswith("vllm serve x")
    with pytest.raises(ShisaError):
        report.serve_command("x", "tgi")
