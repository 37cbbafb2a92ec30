"""Fine-tuning on a toy model: what is learnt, noise, packing, adapters, padding rows, the chain of jobs, going on after a kill."""
import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from chat_toys import lives, mistral_tokenizer, same_weights, small_talks, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st
from shisa import sft
from shisa.chat_format import encode_conversation, install_template
from shisa.config import ShisaError, file_sha256
from shisa.infer import complete, generate, stream
from shisa.models import MARK, broken, choose_checkpoint, last_checkpoint, load_model, padding_ids
from shisa.packing import IGNORE
from shisa.stage import Work
from shisa.tuning import Collator, guard_padding_rows, merge_adapters, order_rows, pack_units, trainer_arguments

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


def test_learnt_are_the_replies_whatever_people_type(tokenizer):
    """Token by token: several turns, a system message, and special tokens as a user types them."""
    talk = [{"role": "system", "content": "答えは</s>短く。"}, {"role": "user", "content": "<s>[INST] a </s>?"},
            {"role": "assistant", "content": "はい。"}, {"role": "user", "content": "</s></s>"}, {"role": "assistant", "content": "Yes </s> no"}]
    row, begin, end = sft.training_rows(tokenizer, [talk])[0], tokenizer.bos_token_id, tokenizer.eos_token_id
    assert row["input_ids"].count(begin) == row["input_ids"].count(end) == 2  # one for each turn of the template; none typed
    learnt, turns, inside = [], [], False
    for number, label in zip(row["input_ids"], row["labels"]):
        assert label in (IGNORE, number)
        if label != IGNORE:
            learnt.append(number)
            if number == end:
                turns.append(tokenizer.decode(learnt[:-1]).strip())
                learnt = []
        inside = label != IGNORE
    assert turns == ["はい。", "Yes </s> no"] and not learnt and inside
    assert [text.removesuffix("</s>").strip() for text in sft.learnt_texts(tokenizer, row)] == turns
    page = sft.coloured(tokenizer, row).data
    assert page.count("<span") == len(row["input_ids"]) and page.count("border-bottom") == sum(n != IGNORE for n in row["labels"])
    assert "<s>" not in page  # escaped


def test_loss_ignores_what_the_user_says(base, tokenizer, rows, tmp_path):
    """The CPU short cut computes TRL's loss, over assistant tokens alone, with the padding rows out of the softmax."""
    still = dataclasses.replace(SETTINGS, epochs=1, learning_rate=1e-9)
    trainer, _ = sft.finetune(load_model(base), tokenizer, rows, still, tmp_path)
    batch = trainer.data_collator([{"unit": [row]} for row in range(4)])
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
            still = model.eval().get_input_embeddings()(ids)  # in evaluation there is none
            model.train()
        assert torch.equal(still, layer.weight[ids])
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


def test_each_damaged_file_is_noticed(undisturbed, tmp_path):
    """Every file of TRL's newest checkpoint deleted, cut, or with one bit turned: the one before it is taken."""
    _, folder = undisturbed
    assert sorted(path.name for path in (folder / "checkpoints").glob("*-*")) == ["step-000004", "step-000006"]
    names = sorted(p.name for p in (folder / "checkpoints" / "step-000006").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "log.json", MARK} <= set(names)
    newest = shutil.copytree(folder / "checkpoints", tmp_path / "c") / "step-000006"
    for name in names:
        whole = (newest / name).read_bytes()
        turned = bytes([whole[0] ^ 1]) + whole[1:]
        for damaged in (None, whole[: len(whole) // 2], turned):
            (newest / name).unlink() if damaged is None else (newest / name).write_bytes(damaged)
            assert broken(newest).startswith(f"{name} is "), (name, damaged and len(damaged))
            (newest / name).write_bytes(whole)
    assert not broken(newest) and last_checkpoint(tmp_path / "c") == newest
    (newest / "scheduler.pt").unlink()
    assert last_checkpoint(tmp_path / "c").name == "step-000004"


def test_where_no_checkpoint_is_whole_nothing_is_trained(undisturbed, tmp_path):
    job, folder = undisturbed
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    for place in ("step-000004", "step-000006"):
        (tmp_path / "checkpoints" / place / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(ShisaError, match="no checkpoint is whole .step-000006: optimizer.pt is cut off or changed; step-000004: .*; delete the folder"):
        sft.main({**job, "out": str(tmp_path), "checkpoints": str(tmp_path / "checkpoints")})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "unmarked"])
def test_going_on_equals_an_undisturbed_run(undisturbed, tmp_path, capfd, damage):
    """From what a kill can leave, the newest whole checkpoint is used, or none: the bytes are the same."""
    job, folder = undisturbed
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(folder / "checkpoints", checkpoints)
    if damage == "gone":
        shutil.rmtree(checkpoints / "step-000006")
    elif damage == "cut":
        (checkpoints / "step-000006" / "optimizer.pt").write_bytes(b"half")
    else:  # as a kill inside the very first save leaves it: under TRL's name
        shutil.rmtree(checkpoints / "step-000004")
        (checkpoints / "step-000006" / MARK).unlink()
        (checkpoints / "step-000006").rename(checkpoints / "checkpoint-6")
    sft.main({**job, "out": str(tmp_path), "checkpoints": str(checkpoints)})
    assert ("optimizer.pt is cut off or changed; set aside, going on from step-000004" in capfd.readouterr().err) == (damage == "cut")
    assert same_weights(tmp_path / "model", folder / "model")
    assert (tmp_path / "steps.parquet").read_bytes() == (folder / "steps.parquet").read_bytes()


def life(folder: Path, told) -> bytes:
    """The fine-tuning that lives.py kills: a job as a stage describes it, a checkpoint after every step."""
    described = json.loads((folder.parent / "job.json").read_text())
    out = folder.with_name(f"{folder.name}-out")
    out.mkdir(exist_ok=True)
    sft.main({**described, "out": str(out), "checkpoints": str(folder)}, lambda *step: told())
    return (out / "model" / "model.safetensors").read_bytes()


def test_killed_inside_a_save_of_trl_gives_the_same_weights(undisturbed, tmp_path):
    job, folder = undisturbed
    settings = {**job["settings"], "checkpoint_every": 1, "epochs": 4}
    (tmp_path / "job.json").write_text(json.dumps({**job, "settings": settings}))
    assert lives("test_sft", tmp_path, kills=4) >= 1


def test_other_settings_are_refused(undisturbed, tmp_path):
    """A checkpoint made with other settings, rows or processes: one line that names them; nothing is trained."""
    job, folder = undisturbed
    changed = {**job, "out": str(tmp_path), "settings": {**job["settings"], "learning_rate": 2e-3}}
    with pytest.raises(ShisaError, match="learning_rate: 0.001 -> 0.002") as caught:
        sft.main(changed)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "model").exists()
    mark = json.loads((folder / "checkpoints" / "step-000006" / MARK).read_text())["made_from"]
    assert mark["processes"] == 1 and mark["rows"] == file_sha256(folder / "rows.parquet")
    with pytest.raises(ShisaError, match="processes: 1 -> 2"):
        choose_checkpoint(folder / "checkpoints", {**mark, "processes": 2}, print)


@settings(deadline=None)  # the packer is compiled at its first call
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_packed_units_are_fair(lengths, batch, epochs, seed):
    units = pack_units(lengths, 16, batch, epochs, seed)
    assert units == pack_units(lengths, 16, batch, epochs, seed) and len(units) % batch == 0
    assert all(sum(lengths[row] for row in unit) <= 16 for unit in units)
    seen = Counter(row for unit in pack_units(lengths, 16, 1, epochs, seed) for row in unit)
    assert seen == dict.fromkeys(range(len(lengths)), epochs)  # with batches of one nothing is left out


def test_packing_changes_no_loss_and_no_gradient(base, tokenizer, rows, tmp_path):
    """Conversations in one row learn what they learn apart: loss and gradients of the same rows, packed and padded."""
    still = dataclasses.replace(SETTINGS, epochs=1, learning_rate=1e-9, neftune_alpha=0.0, packing=200, batch_size=1, micro_batch=1)
    trainer, _ = sft.finetune(load_model(base), tokenizer, rows, still, tmp_path)
    found = {}
    for name, units, packed in (("packed", [[0, 1, 2], [3, 4]], True), ("apart", [[0], [1], [2], [3], [4]], False)):
        batch = Collator(rows, tokenizer.pad_token_id, packed)([{"unit": unit} for unit in units])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=10)
        loss.backward()
        found[name] = loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert found["packed"][0] == pytest.approx(found["apart"][0], abs=1e-5)
    assert found["packed"][1].keys() == found["apart"][1].keys()
    for name, gradient in found["apart"][1].items():
        assert torch.allclose(found["packed"][1][name], gradient, atol=1e-5), name


def test_adapters_learn_alone_resume_and_are_merged(undisturbed, base, tokenizer, rows, tmp_path):
    """LoRA: embeddings and output layer untouched; the merged folder answers as the adapters did; going on gives the same bytes."""
    job, _ = undisturbed
    settings = {**job["settings"], "lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
    jobs = [{**job, "settings": settings, "out": str(tmp_path / name), "checkpoints": str(tmp_path / name / "c")} for name in ("a", "b")]
    trainer, _ = sft.finetune(str(base), tokenizer, rows, sft.SftSettings(**settings), tmp_path / "a" / "c")
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    asked = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        adapted = trainer.model.eval()(asked).logits
        by_peft = trainer.model.merge_and_unload()(asked).logits
    shutil.rmtree(tmp_path / "a" / "c")
    sft.main(jobs[0])
    merged, before = load_model(tmp_path / "a" / "model"), load_model(base)
    with torch.no_grad():
        real = merged(asked).logits
    padding = set(padding_ids(tokenizer))
    keep = [i for i in range(real.shape[-1]) if i not in padding]
    assert torch.allclose(real[..., keep], adapted[..., keep], atol=1e-4) and torch.allclose(by_peft[..., keep], adapted[..., keep], atol=1e-4)
    assert not torch.allclose(real[..., keep], before(asked).logits[..., keep], atol=1e-3)
    assert set(merge_adapters(state, 4.0)) == set(merged.state_dict())
    for (name, old), (_, new) in zip(before.named_parameters(), merged.named_parameters()):
        assert torch.equal(old, new) != ("proj" in name), name
    shutil.copytree(tmp_path / "a" / "c", tmp_path / "b" / "c")
    shutil.rmtree(tmp_path / "b" / "c" / "step-000006")
    sft.main(jobs[1])
    assert same_weights(tmp_path / "a" / "model", tmp_path / "b" / "model")


def test_the_chain_of_jobs(base, tokenizer, tmp_path):
    """Each job starts from the last one's model and is not done twice; held-out loss is kept by language and job."""
    talks = small_talks(8) + [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]]
    table = pl.DataFrame({"source": ["a"] * 8 + ["b"], "messages": talks})
    config = sft.config("tiny").change(batch_size=4, micro_batch=4, family_repeats=1, control=False, steps=[
        {"name": "one", "epochs": 2, "learning_rate": 1e-2}, {"name": "two", "rows": "ja", "learning_rate": 1e-2}])
    rows = sft.training_rows(tokenizer, talks)
    held = {"ja": rows[:2], "en": rows[8:]}

    def chain(folder):
        work = Work(folder / "out", folder / "scratch", folder / "status.json", "51_sft")
        work.path.mkdir(parents=True, exist_ok=True)
        work.scratch.mkdir(exist_ok=True)
        return sft.run_steps(config, base, table, rows, held, work)

    last, facts = chain(tmp_path)
    assert [(fact["job"], fact["rows"], fact["steps"]) for fact in facts] == [("one", 9, 4), ("two", 8, 2)]
    assert facts[0]["after"] == facts[1]["before"] and facts[1]["after"]["ja"] < facts[0]["before"]["ja"]
    steps = pl.read_parquet(tmp_path / "out" / "steps.parquet")
    assert steps["job"].to_list() == ["one"] * 4 + ["two"] * 2 and steps["step"].to_list() == list(range(1, 7))
    first = tmp_path / "scratch" / "job-one" / "model" / "model.safetensors"
    stamp, weights = first.stat().st_mtime_ns, (last / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "scratch" / "job-two")
    assert chain(tmp_path)[1] == facts and first.stat().st_mtime_ns == stamp
    assert (last / "model.safetensors").read_bytes() == weights
    with pytest.raises(ShisaError, match="sources are a, b"):
        sft.chosen_rows(table, "c*")


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
