"""Fine-tuning and preference tuning on a toy model: what is learnt, noise, padding rows, going on after a kill."""
import dataclasses
import math
import shutil
from collections import Counter

import polars as pl
import pytest
import torch
from chat_toys import mistral_tokenizer, same_weights, small_talks, toy_model
from hypothesis import given
from hypothesis import strategies as st
from shisa import dpo, sft
from shisa.chat_format import encode_conversation, install_template
from shisa.config import ShisaError
from shisa.infer import complete, generate, stream
from shisa.models import load_model, padding_ids
from shisa.packing import IGNORE
from shisa.tuning import guard_padding_rows, last_complete, order_rows, trainer_arguments

SETTINGS = sft.SftSettings(learning_rate=1e-3, epochs=2, batch_size=4, micro_batch=2, neftune_alpha=5.0,
                           warmup_share=0.1, checkpoint_every=2, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return install_template(mistral_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    toy_model(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def rows(tokenizer):
    return sft.training_rows(tokenizer, small_talks())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base, rows):
    """One whole fine-tuning job: its job description and its folder."""
    folder = tmp_path_factory.mktemp("sft")
    pl.DataFrame(rows).write_parquet(folder / "rows.parquet")
    job = {"model": str(base), "rows": str(folder / "rows.parquet"), "out": str(folder),
           "checkpoints": str(folder / "checkpoints"), "settings": dataclasses.asdict(SETTINGS)}
    sft.main(job)
    return job, folder


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_order_is_fair(lengths, batch, epochs, seed):
    order = order_rows(lengths, batch, epochs, seed)
    assert order == order_rows(lengths, batch, epochs, seed)
    assert len(order) == len(lengths) * epochs // batch * batch
    seen = Counter(order)
    assert max(seen.values(), default=0) <= epochs and sum(epochs - seen[row] for row in range(len(lengths))) < batch


def test_labels_are_the_assistants_tokens_alone(tokenizer, rows):
    for row, talk in zip(rows, small_talks()):
        ids, mask = encode_conversation(tokenizer, talk)
        assert row["input_ids"] == ids
        assert row["labels"] == [number if bit else IGNORE for number, bit in zip(ids, mask)]
        assert row["labels"][-1] == tokenizer.eos_token_id and row["labels"].count(tokenizer.eos_token_id) == 1


def test_loss_ignores_what_the_user_says(base, tokenizer, rows, tmp_path):
    """The CPU short cut computes TRL's loss, over assistant tokens alone, with the padding rows out of the softmax."""
    still = dataclasses.replace(SETTINGS, epochs=1, learning_rate=1e-9)
    trainer, _ = sft.finetune(load_model(base), tokenizer, rows, still, tmp_path)
    batch = trainer.data_collator(rows[:4])
    model = trainer.model.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(model, dict(batch)).item()
        theirs = super(sft.trainer_class(), trainer).compute_loss(model, dict(batch)).item()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        padding = set(padding_ids(tokenizer))
        shifted, known = batch["labels"][:, 1:], [i for i in range(logits.shape[-1]) if i not in padding]
        by_hand = -logits[..., known].log_softmax(-1)  # no padding rows at all; real ids come before them
        wanted = shifted != IGNORE
        expected = by_hand[wanted].gather(1, shifted[wanted][:, None]).mean().item()
    assert ours == pytest.approx(theirs, abs=1e-5) and ours == pytest.approx(expected, abs=1e-5)
    assert known == list(range(len(known)))


def test_neftune_noise_is_there_and_bounded(base, tokenizer, rows, tmp_path, monkeypatch):
    """While it trains, the embeddings carry noise of at most alpha/sqrt(length × width), and near that much."""
    seen = []
    plain = sft.trainer_class().compute_loss

    def probe(self, model, inputs, *args, **kwargs):
        layer, ids = model.get_input_embeddings(), inputs["input_ids"]
        with torch.no_grad():
            noise = (layer(ids) - layer.weight[ids]).abs()
        seen.append((noise.max().item(), 5.0 / math.sqrt(ids.shape[1] * layer.weight.shape[1])))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(sft.trainer_class(), "compute_loss", probe)
    trainer, _ = sft.finetune(load_model(base), tokenizer, rows, dataclasses.replace(SETTINGS, epochs=1), tmp_path)
    assert seen and all(0.9 * bound < found <= bound * 1.0001 for found, bound in seen)
    layer = trainer.model.train().get_input_embeddings()  # gone after training
    assert torch.equal(layer(torch.tensor([5])), layer.weight[torch.tensor([5])])


def test_padding_rows_are_neither_trained_nor_sampled(base, tokenizer, undisturbed):
    padding, (_, folder) = padding_ids(tokenizer), undisturbed
    before, after = load_model(base), load_model(folder / "model")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(before, name)().weight[padding], getattr(after, name)().weight[padding])
    assert not torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight)
    guarded = guard_padding_rows(after, padding)
    assert guarded(torch.tensor([[1, 5]])).logits.softmax(-1)[..., padding].sum() == 0
    assert "lm_head.bias" not in guarded.state_dict()


def test_job_leaves_a_chat_model(undisturbed, tokenizer):
    _, folder = undisturbed
    steps = pl.read_parquet(folder / "steps.parquet")
    assert steps["step"].to_list() == [1, 2, 3, 4, 5, 6] and steps["loss"][-1] < steps["loss"][0]
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "training_args.bin" not in names


@pytest.mark.parametrize("damage", ["none", "optimizer.pt", "rng_state.pth", "scheduler.pt", "unmarked"])
def test_going_on_equals_an_undisturbed_run(undisturbed, tmp_path, damage):
    """From each state that a kill can leave: the newest *complete* checkpoint is used; the bytes are the same."""
    job, folder = undisturbed
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(folder / "checkpoints", checkpoints)
    newest = checkpoints / "checkpoint-6"
    if damage == "none":
        shutil.rmtree(newest)
    else:
        (newest / ("complete.json" if damage == "unmarked" else damage)).unlink()
    assert last_complete(checkpoints).name == "checkpoint-4"
    sft.main({**job, "out": str(tmp_path), "checkpoints": str(checkpoints)})
    assert same_weights(tmp_path / "model", folder / "model")
    assert (tmp_path / "steps.parquet").read_bytes() == (folder / "steps.parquet").read_bytes()


def test_dpo_raises_the_margin(undisturbed, tokenizer, tmp_path):
    _, folder = undisturbed
    pairs = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": [{"role": "assistant", "content": "知りません。"}]}
             for talk in small_talks(8)]
    rows = dpo.pair_rows(tokenizer, pairs, 256)
    assert len(rows) == 8 and all(row["chosen_ids"][-1] == tokenizer.eos_token_id for row in rows)
    settings = dpo.DpoSettings(learning_rate=1e-3, epochs=3, batch_size=4, micro_batch=4, beta=0.1, warmup_share=0.1,
                               checkpoint_every=100, seed=0)
    before, after = (load_model(folder / "model") for _ in range(2))
    _, steps = dpo.tune(after, load_model(folder / "model"), tokenizer, rows, settings, tmp_path)
    assert steps["margin"][0] == pytest.approx(0, abs=1e-4) and steps["margin"][-1] > 0
    held = dpo.compare(before, after, rows, 0.1)
    assert held["reward_accuracy"] > 0.9 and held["reward_margin"] > 0
    assert torch.equal(*(m.get_output_embeddings().weight[padding_ids(tokenizer)] for m in (before, after)))


def test_control_keeps_prompts_and_deals_answers(tokenizer):
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "abc"[n % 3]}] for n in range(30)]
    mixed = sft.shuffle_answers(talks, 1)
    assert [talk[0] for talk in mixed] == [talk[0] for talk in talks] and mixed != talks
    assert Counter(talk[1]["content"] for talk in mixed) == Counter(talk[1]["content"] for talk in talks)


def test_generation(base, tokenizer):
    """Padding changes nothing, a seed gives the same text, padding rows never come, long prompts are refused."""
    model = load_model(base)
    asked = [[{"role": "user", "content": text}] for text in ("こんにちは", "長い質問です。" * 5, "Hi")]
    together = generate(model, tokenizer, asked, max_new_tokens=8)
    assert together == [generate(model, tokenizer, [each], max_new_tokens=8)[0] for each in asked]
    drawn = [complete(model, tokenizer, ["a", "日本"], 16, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not any("<|extra_" in reply.text for reply in drawn[0]) and all(reply.tokens <= 16 for reply in drawn[0])
    assert "".join(stream(model, tokenizer, asked[0], max_new_tokens=8)).strip() == together[0].text
    with pytest.raises(ShisaError, match="only 8 fit") as caught:
        generate(model, tokenizer, asked, max_new_tokens=248)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_stops_where_it_learnt_to(base, tokenizer, tmp_path):
    talk = [{"role": "user", "content": "はい?"}, {"role": "assistant", "content": "はい"}]
    rows = sft.training_rows(tokenizer, [talk] * 16)
    model = load_model(base)
    sft.finetune(model, tokenizer, rows, dataclasses.replace(SETTINGS, epochs=30, learning_rate=1e-2, neftune_alpha=0.0,
                                                             checkpoint_every=1000), tmp_path)
    reply = generate(model, tokenizer, [talk[:1]], max_new_tokens=20)[0]
    assert reply.stopped and reply.text == "はい" and reply.tokens < 20


def test_batch_must_divide():
    with pytest.raises(ShisaError, match="micro-batch"):
        trainer_arguments(dataclasses.replace(SETTINGS, batch_size=5), ".", 1)
