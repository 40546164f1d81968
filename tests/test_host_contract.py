"""What Q-Tuning uses of TRL and transformers: when a test here fails, the host has changed in the way that it says."""

import inspect

import pytest
import torch
import transformers.trainer_jit_checkpoint
from conftest import tiny_llama
from datasets import Dataset
from test_trainer import make_trainer
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from qtuning_trl.host import checkpoints, head, loop


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Trainer.get_train_dataloader, ["self"]),
        (Trainer.get_batch_samples, ["self", "epoch_iterator", "num_batches", "device"]),
        (Trainer.training_step, ["self", "model", "inputs", "num_items_in_batch"]),
        (Trainer._save_checkpoint, ["self", "model", "trial"]),
        (SFTTrainer._save_checkpoint, ["self", "model", "trial"]),
        (Trainer._get_output_dir, ["self", "trial"]),
        (
            Trainer._init_training_state,
            [
                "self",
                "max_steps",
                "num_update_steps_per_epoch",
                "num_train_epochs",
                "resume_from_checkpoint",
                "trial",
            ],
        ),
        (Trainer._get_num_items_in_batch, ["self", "batch_samples", "device"]),
        (
            SFTTrainer._prepare_dataset,
            ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
        ),
        (SFTTrainer.log, ["self", "logs", "start_time"]),
        (SFTTrainer.create_model_card, ["self", "model_name", "dataset_name", "tags"]),
        (SFTTrainer._set_signature_columns_if_needed, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_hooks_have_the_signature_we_override_or_call(function, expected):
    assert parameters(function) == expected, (
        f"{function.__qualname__} takes {parameters(function)} now: adapt qtuning_trl/trainer.py or host/."
    )


def test_the_loop_advances_one_step_per_entry_of_get_batch_samples():
    source = inspect.getsource(Trainer._run_epoch)
    for line in (
        "batch_samples, num_items_in_batch = self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
        "for i, inputs in enumerate(batch_samples):",
        "do_sync_step = (step + 1) % self.args.gradient_accumulation_steps == 0 or (step + 1) == steps_in_epoch",
        "tr_loss_step = self.training_step(model, inputs, num_items_in_batch)",
        "i == len(batch_samples) - 1",
    ):
        assert line in source, (
            f"Trainer._run_epoch no longer holds `{line}`: check that placeholders still keep the count of steps "
            "(QTuningSFTTrainer.get_batch_samples)."
        )


def test_a_checkpoint_is_saved_where_and_in_the_order_that_we_mark_it():
    source = inspect.getsource(Trainer._save_checkpoint)
    lines = (
        'checkpoint_folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"',
        "self.save_model(output_dir, _internal_call=True)",
        "self.state.save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))",
        "rotate_checkpoints(",
    )
    places = [source.find(line) for line in lines]
    assert places == sorted(places) and places[0] > 0, (  # noqa: PT018
        "Trainer._save_checkpoint no longer saves the state last, and only then removes older checkpoints: adapt "
        "qtuning_trl/host/checkpoints.py."
    )
    assert transformers.trainer.rotate_checkpoints is transformers.trainer_utils.rotate_checkpoints
    assert f"{transformers.trainer_utils.PREFIX_CHECKPOINT_DIR}-12" == checkpoints.CHECKPOINT.match("checkpoint-12")[0]
    assert transformers.trainer.TRAINER_STATE_NAME == checkpoints.STATE_NAME
    assert checkpoints.MARK_NAME in inspect.getsource(transformers.trainer_jit_checkpoint), "our mark is transformers'"


def test_a_run_without_epochs_left_makes_no_step():
    """Why `_init_training_state` gives all epochs as done for a run that has made its steps."""
    assert "for epoch in range(epochs_trained, num_train_epochs):" in inspect.getsource(Trainer._inner_training_loop)


def test_the_train_loader_takes_its_collator_and_batch_size_where_we_set_them(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, SFTTrainer)
    collator = trainer.data_collator
    with loop.train_loader_of(trainer, list, 7):
        loader = trainer.get_train_dataloader()
    batch = next(iter(loader))
    assert isinstance(batch, list), "Trainer.get_train_dataloader no longer takes `self.data_collator` (host/loop.py)."
    assert len(batch) == 7, "Trainer.get_train_dataloader no longer takes `self._train_batch_size` (host/loop.py)."
    assert trainer.data_collator is collator
    assert trainer._train_batch_size == 4


def test_a_column_can_be_kept(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, SFTTrainer)
    loop.keep_column(trainer, "source")
    with loop.train_loader_of(trainer, list, 4):
        example = next(iter(trainer.get_train_dataloader()))[0]
    assert set(example) == {"input_ids", "labels", "source"}, (
        "Trainer no longer filters columns by `_signature_columns` (host.loop.keep_column)."
    )


def test_items_are_counted_on_the_shifted_labels(tmp_path, tokenizer, prompt_completion):
    trainer = make_trainer(tmp_path, tokenizer, prompt_completion, SFTTrainer)
    labels = torch.tensor([[5, 6, -100, 7], [-100, 8, 9, -100]])
    assert loop.count_items(trainer, [{"labels": labels}, {"labels": labels}], torch.device("cpu")) == 8


def test_the_fused_head_gives_log_probs_and_entropies_of_the_labelled_tokens():
    model = tiny_llama().eval()
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    labels = torch.tensor([[-100, -100, 6, 7, 8], [-100, 10, 11, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.double().log_softmax(-1)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        log_probs, entropy = head.per_token_values(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    where = [(0, 1, 6), (0, 2, 7), (0, 3, 8), (1, 0, 10), (1, 1, 11)]
    expected = torch.stack([logits[row, column, token] for row, column, token in where])
    rows = torch.stack([logits[row, column] for row, column, _ in where])
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(rows.exp() * rows).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_fused_head_gives_a_differentiable_zero_without_labels():
    model = tiny_llama()
    add_fused_lm_head(model)
    labels = torch.full((1, 3), -100)
    outputs = model(input_ids=torch.tensor([[4, 5, 6]]), labels=labels, fused_lm_head=True)
    outputs.log_probs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None, "a process without survivors could not join the backward pass"


def test_collators_mark_documents_as_we_read_them():
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert flat["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert flat["labels"].tolist() == [[-100, 5, 6, -100, 8]], "the first label of a document is scored now"
    padded = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_packing_records_the_documents_of_a_row(tmp_path, tokenizer):
    rows = [{"text": "abcdef"}, {"text": "abc"}, {"text": "abcde"}]
    options = {"packing": True, "max_length": 12}
    trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), SFTTrainer, **options)
    for row in trainer.train_dataset:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])


def test_exportable_callbacks_travel_in_the_checkpoint(tmp_path):
    class Counter(ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"count": 3}}

    state = TrainerState(stateful_callbacks=[Counter()])
    state.save_to_json(str(tmp_path / "state.json"))
    loaded = TrainerState.load_from_json(str(tmp_path / "state.json"))
    assert loaded.stateful_callbacks["Counter"]["attributes"] == {"count": 3}


def test_the_parser_ignores_unknown_recipe_keys_unless_told_otherwise(tmp_path):
    """Why `qtuning sft` refuses them itself: `trl sft` would train on everything."""
    path = tmp_path / "recipe.yaml"
    path.write_text("sampel_ratio: 0.5\noutput_dir: x\nuse_cpu: true\nbf16: false\n")
    parser = TrlParser((SFTConfig,))
    *_, unknown = parser.parse_args_and_config(["--config", str(path)], return_remaining_strings=True)
    assert unknown == ["--sampel_ratio", "0.5"]
