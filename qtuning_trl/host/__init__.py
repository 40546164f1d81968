"""
What is leant on in TRL, transformers and PEFT beyond their documented hooks, wrapped in one place.

`QTuningSFTTrainer` overrides public methods (`train`, `get_train_dataloader`, `get_batch_samples`, `training_step`,
`log`, `create_model_card`) and three private ones (`_prepare_dataset`, `_save_checkpoint`, `_init_training_state`). The
private names in here hold for trl 1.16 with transformers 5.18 to 5.24; `tests/test_host_contract.py` says in plain
words which one changed when they no longer do.
"""
