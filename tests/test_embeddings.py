"""New rows: base rows keep their bits, padding is zero and masked, a file gets what a model gets, nothing half-done stays."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shisa.base import base_tokenizer, new_model, pad_pieces, save_spm_tokenizer
from shisa.config import ShisaError, file_sha256
from shisa.embeddings import (
    EMBED,
    HEAD,
    INPUT_METHODS,
    OUTPUT_METHODS,
    Extension,
    association,
    constant_direction,
    english_gate,
    focus_rows,
    log_shares,
    mean_rows,
    resize_and_init,
    resize_checkpoint,
    sparsemax,
    static_vectors,
    vocabulary_layers,
)
from shisa.models import load_model, load_tokenizer, mask_padding, padding_ids, read_header, save_model
from shisa.packing import cut, encode_documents, encode_texts, pack
from shisa.pieces import append_pieces, spm_processor, spm_proto
from shisa.sample import documents
from shisa.train import TrainSettings, train_lm

BASE, NEW, WIDTH = 32_000, ["日本", "日本語", "です。", "▁これ", "東京都"], 8
PAIRS = [(first, "mean") for first in INPUT_METHODS] + [("mean", second) for second in OUTPUT_METHODS[1:]]
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vocabulary(folder: Path, proto) -> object:
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    save_spm_tokenizer(folder / "tokenizer.model", folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Mistral's tokenizer, and one with five Japanese pieces more and padding up to a multiple of 64."""
    folder = tmp_path_factory.mktemp("tokenizers")
    base_tokenizer(folder / "base")
    extended = append_pieces(spm_proto(folder / "base" / "tokenizer.model"), NEW)
    pad_pieces(extended)
    return load_tokenizer(folder / "base"), vocabulary(folder / "extended", extended)


@pytest.fixture(scope="module")
def texts():
    return [text for row in documents() for text in (row["ja"], row["en"])]


def toy(tied: bool = False, seed: int = 0):
    model = new_model(BASE, WIDTH, 1, 2, 64, seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizers):
    """A base on disk in several files, the two matrices of the vocabulary apart."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    toy().save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder as type, shape and bytes, whatever file it lies in."""
    found = {}
    for path in folder.glob("*.safetensors"):
        table, start = read_header(path)
        data = path.read_bytes()
        for name, entry in table.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


# ---- pieces


def test_pieces_are_cut_as_sentencepiece_cuts_them_in_mid_line(tokenizers):
    base, extended = tokenizers
    extension = Extension(base, extended)
    spm = spm_processor(spm_proto(Path(base.name_or_path) / "tokenizer.model"), dummy_prefix=False)
    assert (extension.first, extension.size) == (BASE, len(extended)) and extension.size % 64 == 0
    assert [extended.convert_ids_to_tokens(index) for index in extension.ids] == NEW
    assert extension.groups == spm.encode([piece.replace("▁", " ") for piece in NEW])


def test_a_padded_base_gives_its_padding_up(tmp_path, tokenizers):
    base, extended = tokenizers
    padded = spm_proto(Path(base.name_or_path) / "tokenizer.model")
    pad_pieces(padded)
    extension = Extension(vocabulary(tmp_path / "padded", padded), extended)
    assert extension.first == BASE and len(extension.ids) == len(NEW)


def test_a_tokenizer_that_moves_ids_is_refused(tmp_path, tokenizers):
    base, extended = tokenizers
    with pytest.raises(ShisaError, match=r"id 32000 was '日本' and is 'missing'"):
        resize_and_init(toy(), extended, base)
    moved = spm_proto(Path(base.name_or_path) / "tokenizer.model")
    moved.pieces[700].piece, moved.pieces[701].piece = moved.pieces[701].piece, moved.pieces[700].piece
    with pytest.raises(ShisaError, match="id 700 was .*21_tokenizer"):
        Extension(base, vocabulary(tmp_path / "moved", moved))
    with pytest.raises(ShisaError, match="the model has 100 input rows, the base tokenizer 32000 pieces"):
        resize_and_init(new_model(100, WIDTH, 1, 2, 64, 0), base, extended)


# ---- rows


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_base_rows_keep_their_bits_and_padding_is_zero_and_masked(pair, tokenizers, texts):
    base, extended = tokenizers
    model, before = toy(), [layer.weight.data.clone() for layer in vocabulary_layers(toy()).values()]
    assert resize_and_init(model, base, extended, input_method=pair[0], output_method=pair[1], texts=texts) is model
    assert model.config.vocab_size == len(extended)
    for layer, old in zip(vocabulary_layers(model).values(), before, strict=True):
        assert torch.equal(layer.weight[:BASE], old)
        assert layer.weight[BASE : BASE + len(NEW)].any(1).all()
        assert not layer.weight[BASE + len(NEW) :].any()
    padding = padding_ids(extended)
    assert len(padding) == len(extended) - BASE - len(NEW) > 0
    logits = model.eval()(torch.tensor([[1, 5, BASE]])).logits
    assert logits.softmax(-1)[..., padding].max() == 0
    torch.manual_seed(0)
    drawn = model.generate(torch.tensor([[1, 5]]), do_sample=True, temperature=50.0, max_new_tokens=20, eos_token_id=None)
    assert not set(drawn[0].tolist()) & set(padding)


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(0, 2**31 - 1),
)
@FEW
def test_mean_rows_are_means(groups, seed):
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([weight[group].mean(0) for group in groups])
    assert torch.allclose(mean_rows(weight, groups), expected, atol=1e-6)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
@FEW
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores):
    scores = torch.tensor(scores)
    weights = sparsemax(scores).double()
    assert (weights >= 0).all() and torch.allclose(weights.sum(1), torch.ones(len(scores), dtype=torch.float64), atol=1e-5)
    # optimality: score − weight is one constant where there is a weight, and the score is below it elsewhere
    rest = scores.double() - weights
    limit = torch.where(weights > 0, rest, -torch.inf).amax(1, keepdim=True)
    assert torch.allclose(torch.where(weights > 0, rest, limit), limit.expand_as(rest), atol=1e-5)
    assert (scores <= limit + 1e-5)[weights == 0].all()


def test_focus_gives_alike_pieces_alike_rows_and_the_same_bits_again():
    rng = np.random.default_rng(0)
    one, other = [0, 1, 2], [3, 4, 5]  # two subjects; of the new pieces, 6 belongs to the one and 7 to the other
    lines = [rng.choice(subject, 8).tolist() for subject in ([*one, 6], [*other, 7]) for _ in range(100)]
    vectors = static_vectors(*association(lines, 8))
    again = static_vectors(*association(lines, 8))
    assert all(np.array_equal(*pair) for pair in zip(vectors, again, strict=True))
    weight, made = torch.eye(6), torch.zeros(2, 6)
    focus_rows(made, weight, 6, vectors)
    assert torch.allclose(made.sum(1), torch.ones(2), atol=1e-5)
    assert made[0, one].sum() > 0.99 and made[1, other].sum() > 0.99


def test_rare_pieces_have_no_vector_and_stay_as_they_were(tokenizers):
    with pytest.raises(ShisaError, match="no token occurs 10 times in 1 texts; give more texts"):
        association([[1, 2, 3]], 5)
    known, matrix = association([[0, 1] * 12, [2, 0]], 4)
    assert known.tolist() == [0, 1] and matrix.shape == (2, 2)
    made = torch.full((2, 3), 7.0)
    focus_rows(made, torch.eye(2, 3), 2, (np.array([0, 1, 3]), np.float32([[1, 0], [0, 1], [1, 0]])))
    assert made.tolist() == [[7, 7, 7], [1, 0, 0]]
    with pytest.raises(ShisaError, match="give more texts"):
        resize_and_init(toy(), *tokenizers, "focus")


def test_random_rows_follow_their_seed_and_differ_at_the_two_ends(tokenizers):
    extension = {seed: Extension(*tokenizers, seed=seed) for seed in (0, 1)}
    weight = vocabulary_layers(toy())["input"].weight
    drawn = [extension[seed].rows("random", weight, end) for seed in (0, 1) for end in ("input", "output")]
    assert len({rows.numpy().tobytes() for rows in drawn}) == 4
    assert torch.equal(drawn[0], extension[0].rows("random", weight, "input"))


def test_first_share_lowers_the_first_subtoken_by_the_log_of_its_share(tokenizers, texts):
    extension, model = Extension(*tokenizers, texts), toy()
    shares = log_shares(extension)
    assert (shares <= 0).all() and shares[0] > shares[4]  # 日本 is a larger part of 日 than 東京都 of 東 in the sample
    weight = vocabulary_layers(model)["output"].weight.data
    rows = extension.rows("first_share", weight, "output", model)
    direction, _ = constant_direction(model, extension.base, texts[:: max(1, len(texts) // 120)])
    firsts = weight[[group[0] for group in extension.groups]]
    assert torch.allclose(rows[: len(NEW)], (firsts + torch.outer(torch.from_numpy(shares), direction)).float(), atol=1e-5)
    with pytest.raises(ShisaError, match="give texts of both languages"):
        resize_and_init(toy(), *tokenizers, output_method="first_share")


def test_a_direction_acts_as_a_bias(tokenizers, texts):
    model = toy()
    direction, error = constant_direction(model, tokenizers[0], texts[:20], tokens=32)
    states = []
    for ids in encode_texts(tokenizers[0], texts[:20]):
        with torch.no_grad():
            states.append(model.base_model(input_ids=torch.tensor([[1, *ids[:32]]])).last_hidden_state[0].double())
    left = ((torch.cat(states) @ direction - 1) ** 2).mean()
    assert float(left) == pytest.approx(error**2, rel=1e-6) and error < 1  # better than no direction at all


# ---- tied rows, and models that are not all here


def test_tied_rows_take_one_method_or_are_untied(tmp_path, tokenizers):
    with pytest.raises(ShisaError, match="ties its input and output rows: name one `method` for both, or untie=True"):
        resize_and_init(toy(tied=True), *tokenizers)
    tied = resize_and_init(toy(tied=True), *tokenizers, "mean")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and len(tied.lm_head.weight) == len(tokenizers[1])
    apart = resize_and_init(toy(tied=True), *tokenizers, untie=True)
    assert torch.equal(apart.model.embed_tokens.weight, tied.model.embed_tokens.weight)
    assert torch.equal(apart.lm_head.weight[:BASE], tied.lm_head.weight[:BASE])
    assert not torch.equal(apart.lm_head.weight, tied.lm_head.weight)
    for name, model in (("tied", tied), ("apart", apart)):
        save_model(model, tokenizers[1], tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")


def test_unknown_methods_and_biased_heads_are_refused(tokenizers):
    with pytest.raises(ShisaError, match="unknown method 'average' for input rows; choose one of mean, random, focus"):
        resize_and_init(toy(), *tokenizers, "average")
    with pytest.raises(ShisaError, match="unknown method 'least_used' for input rows"):
        resize_and_init(toy(), *tokenizers, "least_used")
    model = toy()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(BASE))
    with pytest.raises(ShisaError, match="an output layer without bias"):
        resize_and_init(model, *tokenizers)


@pytest.mark.parametrize("kind", ["ds_id", "device_mesh", "meta", "zero3"])
def test_a_model_that_is_not_all_here_is_refused_in_one_line(kind, tokenizers, monkeypatch):
    model = toy()
    if kind == "zero3":
        monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    elif kind == "meta":
        model = model.to("meta")
    else:
        setattr(model.lm_head.weight, kind, 1)
    wanted = "on the meta device" if kind == "meta" else "cut up among processes"
    with pytest.raises(ShisaError, match=f"is {wanted}.*resize_checkpoint") as caught:
        resize_and_init(model, *tokenizers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, refused", [(0.0199, False), (0.02, True), (-0.5, False), (0.3, True)])
def test_english_gate(change, refused):
    if refused:
        with pytest.raises(ShisaError, match="limit 2%.*output_rows=least_used"):
            english_gate(change)
    else:
        english_gate(change)


# ---- files


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1] != "first_share"], ids="-".join)
def test_a_file_gets_what_a_model_gets(pair, tmp_path, sharded, tokenizers, texts):
    chosen = {"input_method": pair[0], "output_method": pair[1], "texts": texts, "seed": 3}
    save_model(resize_and_init(load_model(sharded), *tokenizers, **chosen), tokenizers[1], tmp_path / "loaded")
    resize_checkpoint(sharded, tmp_path / "streamed", *tokenizers, **chosen)
    loaded, streamed = tensors(tmp_path / "loaded"), tensors(tmp_path / "streamed")
    assert loaded == streamed
    before = tensors(sharded)
    assert all(streamed[name] == before[name] for name in before if name not in (EMBED, HEAD))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert file_sha256(tmp_path / "loaded" / name) == file_sha256(tmp_path / "streamed" / name), name
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(streamed)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in streamed.values())
    assert all(name in read_header(tmp_path / "streamed" / file)[0] for name, file in index["weight_map"].items())
    model = load_model(tmp_path / "streamed")
    assert model.config.vocab_size == len(tokenizers[1])
    assert model(torch.tensor([[1, BASE]])).logits.softmax(-1)[..., padding_ids(tokenizers[1])].max() == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_file_of_half_precision_is_the_same_file(dtype, tmp_path, tokenizers, texts):
    toy().to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    model = resize_and_init(load_model(tmp_path / "base", dtype), *tokenizers, texts=texts)
    save_model(model, tokenizers[1], tmp_path / "loaded")
    resize_checkpoint(tmp_path / "base", tmp_path / "streamed", *tokenizers, texts=texts)
    names = sorted(path.name for path in (tmp_path / "loaded").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "streamed").iterdir())
    for name in names:
        assert (tmp_path / "loaded" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name


def test_tied_files_stay_tied_or_are_untied(tmp_path, tokenizers):
    toy(tied=True).save_pretrained(tmp_path / "base")
    assert HEAD not in tensors(tmp_path / "base")
    with pytest.raises(ShisaError, match="ties its input and output rows"):
        resize_checkpoint(tmp_path / "base", tmp_path / "x", *tokenizers)
    for name, options in (("tied", {"method": "mean"}), ("apart", {"untie": True})):
        resize_checkpoint(tmp_path / "base", tmp_path / name, *tokenizers, **options)
        model = resize_and_init(load_model(tmp_path / "base"), *tokenizers, **options)
        save_model(model, tokenizers[1], tmp_path / f"{name}-loaded")
        assert tensors(tmp_path / name) == tensors(tmp_path / f"{name}-loaded")
        loaded = load_model(tmp_path / name)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "tied")
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def damage(folder: Path, kind: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    if kind == "cut off":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif kind == "missing":
        shard.unlink()
    elif kind == "no table":
        shard.write_bytes(b"\xff" * 64)
    elif kind == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    elif kind == "moved":
        index = folder / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        table["weight_map"]["model.layers.7.x"] = shard.name
        index.write_text(json.dumps(table))
    elif kind == "pickle":
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    elif kind == "config":
        (folder / "config.json").unlink()
    else:  # quantised
        path = next(p for p in folder.glob("*.safetensors") if EMBED in read_header(p)[0])
        path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cut off", "missing, cut off, or no safetensors file"),
        ("missing", "missing, cut off, or no safetensors file"),
        ("no table", "missing, cut off, or no safetensors file"),
        ("index", "holds no weight_map"),
        ("moved", "lacks model.layers.7.x, which the index places there"),
        ("pickle", "pytorch_model.bin: pickled weights can run code and are not read"),
        ("config", "is not laid out as Llama and Mistral are"),
        ("quantised", "of type I32, not F32, F16, BF16"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(kind, message, tmp_path, sharded, tokenizers):
    shutil.copytree(sharded, tmp_path / "base")
    damage(tmp_path / "base", kind)
    with pytest.raises(ShisaError, match=message) as caught:
        resize_checkpoint(tmp_path / "base", tmp_path / "out", *tokenizers)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_streaming_refuses_what_needs_the_model_and_a_folder_that_stands(tmp_path, sharded, tokenizers):
    with pytest.raises(ShisaError, match="first_share needs hidden states: load the model and call resize_and_init"):
        resize_checkpoint(sharded, tmp_path / "out", *tokenizers, output_method="first_share")
    (tmp_path / "out").mkdir()
    with pytest.raises(ShisaError, match="stands already; name a new folder"):
        resize_checkpoint(sharded, tmp_path / "out", *tokenizers)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_error_in_the_middle_leaves_nothing_and_the_next_call_succeeds(tmp_path, sharded, tokenizers, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("shisa.embeddings.save_tokenizer", fail)
    with pytest.raises(OSError, match="no space left"):
        resize_checkpoint(sharded, tmp_path / "out", *tokenizers)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".out.half").mkdir()  # a killed process leaves this behind
    (tmp_path / ".out.half" / "model-99.safetensors").write_bytes(b"old")
    resize_checkpoint(sharded, tmp_path / "out", *tokenizers)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model-99.safetensors").exists()


MEASURE = """
import re, sys
from pathlib import Path
from shisa.embeddings import resize_checkpoint
from shisa.models import generation_config, load_tokenizer
source, target, base, extended, method = sys.argv[1:]
def kib(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
tokenizers = load_tokenizer(base), load_tokenizer(extended)
import torch, numpy, transformers.integrations
generation_config(tokenizers[1])
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
resize_checkpoint(source, target, *tokenizers, method)
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_holds_one_matrix_not_the_checkpoint(tmp_path, tokenizers):
    """Eight files of 24 MiB, rows of 256 numbers: what is added stays below one file and the two matrices."""
    from safetensors.torch import save_file

    source, (base, extended), width = tmp_path / "base", tokenizers, 256
    source.mkdir()
    where = {}
    for number in range(8):
        table = {f"model.layers.{number}.x": torch.randn(6, 1 << 20)}
        if number in (0, 7):
            table[EMBED if number == 0 else HEAD] = torch.randn(BASE, width, dtype=torch.float32)
        name = f"model-{number + 1:05d}-of-00008.safetensors"
        save_file(table, source / name, metadata={"format": "pt"})
        where |= dict.fromkeys(table, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (source / "config.json").write_text(json.dumps({"vocab_size": BASE, "tie_word_embeddings": False}))
    command = [sys.executable, "-c", MEASURE, source, tmp_path / "out", base.name_or_path, extended.name_or_path, "mean"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=True)
    largest, matrix = 6 * 4 << 20, len(extended) * width * 4
    assert int(done.stdout) < largest + 2 * matrix, done.stdout
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 8 * largest


# ---- new rows first


@pytest.fixture(scope="module")
def packed(tokenizers, texts):
    some = [text[:40] for text in texts if any(piece in text[:40] for piece in NEW)][:60]
    return pack(cut(encode_documents(tokenizers[1], some), 32), 32, pad_id=BASE + len(NEW))


PLAN = TrainSettings(
    steps=6, batch=4, micro_batch=2, learning_rate=1e-2, warmup=1, weight_decay=0.5, checkpoint_every=2, rows_from=BASE
)


@pytest.mark.parametrize("candidates", [0, 500])
@pytest.mark.parametrize("tied", [False, True])
def test_only_new_rows_move_and_all_else_keeps_its_bits(tied, candidates, tmp_path, tokenizers, packed):
    from dataclasses import replace

    model = resize_and_init(toy(tied), *tokenizers, "mean")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = train_lm(model, packed, replace(PLAN, candidates=candidates), tmp_path).state
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and moved <= {EMBED, HEAD} and (tied or len(moved) == 2)
    for name in moved:
        assert torch.equal(before[name][:BASE], after[name][:BASE])
        assert not after[name][BASE + len(NEW) :].any()
    assert all(parameter.requires_grad for parameter in model.parameters())
    later = train_lm(model, packed, replace(PLAN, rows_from=0, candidates=candidates), tmp_path / "later").state
    assert not torch.equal(later["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(later[EMBED][:BASE], before[EMBED][:BASE])


def test_new_rows_first_goes_on_from_its_checkpoint_to_the_same_bytes(tmp_path, tokenizers, packed):
    whole = train_lm(resize_and_init(toy(), *tokenizers, "mean"), packed, PLAN, tmp_path / "a")
    assert (tmp_path / "a" / "step-000004").is_dir()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = train_lm(resize_and_init(toy(), *tokenizers, "mean"), packed, PLAN, tmp_path / "b")
    assert whole.steps.equals(again.steps)
    assert all(torch.equal(whole.state[name], again.state[name]) for name in whole.state)


def test_phases_on_disk_and_in_two_processes_leave_base_rows_alone(tmp_path, tokenizers, packed, monkeypatch):
    """The stage's own path: new rows in two processes, then everything; the log counts on."""
    from shisa.launch import launch
    from shisa.pretrain import PretrainConfig, joined_steps, phases, train

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, tokenizer = resize_and_init(toy(), *tokenizers, "mean"), tokenizers[1]
    save_model(model, tokenizer, tmp_path / "start")
    packed.save(tmp_path / "packed.parquet")
    own = PretrainConfig(batch=4, micro_batch=2, rows_first_tokens=3 * 4 * 32, rows_first_rate=1e-2, checkpoint_every=2)
    plans, start, logs = phases(own, 4 * 5, 32, BASE), tmp_path / "start", []
    assert [(name, plan.steps) for name, plan in plans] == [("rows", 3), ("trained", 2)]
    for name, plan in plans:
        spec = {
            "model": str(start),
            "packed": str(tmp_path / "packed.parquet"),
            "settings": vars(plan),
            "checkpoints": str(tmp_path / f"checkpoints-{name}"),
            "output": str(tmp_path / name),
        }
        if name == "rows":
            (tmp_path / "rows.json").write_text(json.dumps(spec))
            launch("shisa.pretrain", tmp_path / "rows.json", processes=2, say=lambda text: None)
            alone = train_lm(load_model(start), packed, plan, tmp_path / "alone").state
        else:
            train(spec)
        start = tmp_path / name / "model"
        logs.append(pl.read_parquet(tmp_path / name / "steps.parquet"))
    rows, trained = load_model(tmp_path / "rows" / "model").state_dict(), load_model(start).state_dict()
    before = model.state_dict()
    assert {name for name in rows if not torch.equal(rows[name], before[name])} == {EMBED, HEAD}
    for name in (EMBED, HEAD):
        assert torch.equal(rows[name][:BASE], before[name][:BASE])
        assert torch.allclose(rows[name], alone[name], atol=1e-4)
    assert not torch.equal(trained["model.norm.weight"], before["model.norm.weight"])
    steps = joined_steps(logs)
    assert steps["step"].to_list() == [1, 2, 3, 4, 5] and steps["tokens"].is_sorted()
    assert steps["tokens"][-1] == logs[0]["tokens"][-1] + logs[1]["tokens"][-1]


def test_new_rows_first_is_refused_under_deepspeed(tokenizers):
    from types import SimpleNamespace

    from shisa.train import only_rows_from

    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()))
    with pytest.raises(ShisaError, match="rows_first_tokens to 0"), only_rows_from(toy(), 5, accelerator):
        pass


@given(
    sequences=st.integers(4, 4_000),
    batch=st.integers(1, 4),
    tokens=st.integers(0, 200_000),
    total=st.integers(1, 60),
)
@FEW
def test_phases_read_every_sequence_once(sequences, batch, tokens, total):
    from shisa.pretrain import PretrainConfig, phases

    own = PretrainConfig(batch=batch, rows_first_tokens=tokens)
    found = phases(own, sequences, 64, first=BASE)
    assert [name for name, _ in found] in (["trained"], ["rows", "trained"])
    assert sum(plan.steps for _, plan in found) == sequences // batch
    assert found[-1][1].rows_from == 0 and found[-1][1].skip == sum(plan.steps for _, plan in found[:-1])
    if len(found) == 2:
        rows = found[0][1]
        assert (rows.rows_from, rows.skip, rows.learning_rate) == (BASE, 0, own.rows_first_rate)
        assert rows.steps * batch * 64 <= tokens
    seen = [plan.rows(step, total) for _, plan in found for step in range(plan.steps)][: total // batch]
    whole = [found[0][1].rows(step, total) for step in range(total // batch)]
    assert all(np.array_equal(*pair) for pair in zip(seen, whole, strict=False))


def test_padding_named_by_a_generation_config_is_masked_again(tmp_path, tokenizers):
    model = resize_and_init(toy(), *tokenizers, "mean")
    save_model(model, tokenizers[1], tmp_path / "model")
    assert load_model(tmp_path / "model").generation_config.suppress_tokens == padding_ids(tokenizers[1])
    bare = mask_padding(toy(), [])  # nothing to mask: no hook
    assert not bare.lm_head._forward_hooks
