"""Preference tuning on a toy model: what the reference says, losses, lengths, the distance to it, adapters."""
import dataclasses
import shutil

import polars as pl
import pytest
import torch
from chat_toys import mistral_tokenizer, same_weights, small_talks, toy_model
from shisa import dpo
from shisa.chat_format import install_template
from shisa.models import load_model, padding_ids

SETTINGS = dpo.DpoSettings(learning_rate=1e-3, epochs=3, batch_size=4, micro_batch=4, beta=0.1, warmup_share=0.1,
                           checkpoint_every=2, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return install_template(mistral_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("start")
    toy_model(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def rows(tokenizer, start):
    pairs = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": [{"role": "assistant", "content": "知りません。"}]}
             for talk in small_talks(8)]
    found = dpo.pair_rows(tokenizer, pairs, 256)
    assert len(found) == 8 and all(row["chosen_ids"][-1] == tokenizer.eos_token_id for row in found)
    return [{**row, **sums} for row, sums in zip(found, dpo.reference_sums(load_model(start), found))]


def test_dpo_raises_the_margin(start, tokenizer, rows, tmp_path):
    before, after = (load_model(start) for _ in range(2))
    _, steps = dpo.tune(after, tokenizer, rows, SETTINGS, tmp_path)
    assert steps["margin"][0] == pytest.approx(0, abs=1e-4) and steps["margin"][-1] > 0
    answers = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    held = dpo.compare(dpo.token_scores(before, answers), dpo.token_scores(after, answers), 0.1)
    assert held["reward_accuracy"] > 0.9 and held["reward_margin"] > 0
    assert held["reward_margin"] == pytest.approx(held["reward_chosen"] - held["reward_rejected"], abs=1e-5)
    gaps = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    assert held["length_gap"] == pytest.approx(sum(gaps) / 8) and steps["length_gap"][:2].mean() == pytest.approx(sum(gaps) / 8)
    assert held["log_ratio_chosen"] > 0 > held["log_ratio_rejected"]
    assert torch.equal(*(m.get_output_embeddings().weight[padding_ids(tokenizer)] for m in (before, after)))


@pytest.mark.parametrize("tail_weight", [1.0, 0.5])
def test_precomputed_equals_computed_along(start, tokenizer, rows, tmp_path, tail_weight):
    """The same losses and margins as with the reference model in memory, LD-DPO's weights included."""
    settings = dataclasses.replace(SETTINGS, epochs=2, tail_weight=tail_weight)
    trainer, ours = dpo.tune(load_model(start), tokenizer, rows, settings, tmp_path / "a")
    assert trainer.ref_model is None
    _, theirs = dpo.tune(load_model(start), tokenizer, rows, settings, tmp_path / "b", reference=load_model(start))
    for name in ("loss", "margin", "gradient_norm"):
        assert ours[name].to_list() == pytest.approx(theirs[name].to_list(), abs=1e-4), name


def by_hand(loss, chosen, rejected, lengths, beta):
    """A pair's loss from the log-ratios of its answers, as the papers write it."""
    delta, norm = chosen - rejected, chosen / lengths[0] - rejected / lengths[1]
    log_sigmoid = torch.nn.functional.logsigmoid
    return {"sigmoid": -log_sigmoid(beta * delta), "sigmoid_norm": -log_sigmoid(beta * norm), "ipo": (norm - 1 / (2 * beta)) ** 2,
            "hinge": torch.relu(1 - beta * delta),
            "robust": (-0.9 * log_sigmoid(beta * delta) + 0.1 * log_sigmoid(-beta * delta)) / 0.8}[loss]


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"])
def test_losses_are_those_of_the_papers(start, tokenizer, rows, tmp_path, loss):
    """At a model that is not the reference, on one batch."""
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=8, micro_batch=8, loss=loss, learning_rate=0.0,
                                   label_smoothing=0.1 if loss == "robust" else 0.0)
    shifted = [{**row, "chosen": row["chosen"] - 0.7 * at, "rejected": row["rejected"] + 0.3 * at} for at, row in enumerate(rows)]
    _, steps = dpo.tune(load_model(start), tokenizer, shifted, settings, tmp_path)
    wanted = [by_hand(loss, torch.tensor(0.7 * at), torch.tensor(-0.3 * at), (len(row["chosen_ids"]), len(row["rejected_ids"])), 0.1)
              for at, row in enumerate(rows)]
    assert steps["loss"][0] == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-3)


def test_divergence_is_zero_to_oneself_and_grows(start, tokenizer, rows):
    """Kullback–Leibler per token: 0 for equal models; as computed by hand for others."""
    model, other = load_model(start), load_model(start)
    sequences = [(row["prompt_ids"], row["chosen_ids"]) for row in rows[:3]]
    assert dpo.divergence(model, model, sequences) == pytest.approx((0, 0), abs=1e-6)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(3)
        total = 0.0
        for prompt, answer in sequences:
            logits = [m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for m in (other, model)]
            total += torch.nn.functional.kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), reduction="sum", log_target=True).item()
    kl, error = dpo.divergence(other, model, sequences)
    assert kl == pytest.approx(total / sum(len(answer) for _, answer in sequences), rel=1e-4) and 0 < error < kl


def test_jobs_of_the_reference_and_of_adapters(start, tokenizer, rows, tmp_path):
    """The reference's job keeps the sums; a job with adapters leaves a plain model, and the same one after going on."""
    known = pl.DataFrame(rows)
    known.write_parquet(tmp_path / "rows.parquet")
    settings = dataclasses.asdict(dataclasses.replace(SETTINGS, lora_rank=4, learning_rate=1e-2))
    job = {"model": str(start), "rows": str(tmp_path / "rows.parquet"), "out": str(tmp_path), "done": "reference.parquet",
           "checkpoints": str(tmp_path / "c"), "settings": settings}
    dpo.main(job)
    part = pl.read_parquet(tmp_path / "part-000.parquet")
    assert part["row"].to_list() == list(range(8)) and part["chosen"].to_list() == pytest.approx(known["chosen"].to_list(), abs=1e-4)
    dpo.main({**job, "done": "steps.parquet"})
    shutil.copytree(tmp_path / "c", tmp_path / "again" / "c")
    shutil.rmtree(tmp_path / "again" / "c" / "step-000006")
    dpo.main({**job, "done": "steps.parquet", "out": str(tmp_path / "again"), "checkpoints": str(tmp_path / "again" / "c")})
    assert same_weights(tmp_path / "model", tmp_path / "again" / "model")
    changed = [name for (name, old), (_, new) in zip(load_model(start).named_parameters(), load_model(tmp_path / "model").named_parameters())
               if not torch.equal(old, new)]
    assert changed and all("proj" in name for name in changed)
