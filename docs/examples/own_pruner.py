"""
For those who want to try a selection of their own: a sample pruner in ten lines, and a run with it on the demo's data.

    python docs/examples/own_pruner.py

A recipe can name it as well: `sample_pruner: own_pruner:middle`, with this folder on the PYTHONPATH.
"""

from torch import Tensor

from qtuning_trl import QTuningSFTConfig, QTuningSFTTrainer, demo
from qtuning_trl.pruners import Pool, register_sample_pruner


@register_sample_pruner("middle", needs=("scores",))
def middle(pool: Pool) -> Tensor:
    """The samples whose loss is nearest to the pool's median: neither known by heart nor out of reach."""
    assert pool.perplexity is not None  # since it needs scores
    loss = pool.perplexity.log()
    return pool.keep_highest(-(loss - loss.median()).abs())


def main(output_dir: str = "runs/own_pruner", max_steps: int = 10) -> QTuningSFTTrainer:
    args = QTuningSFTConfig(
        output_dir, sample_pruner="middle", budget="25x50", group_column="kind", max_steps=max_steps, max_length=128,
        per_device_train_batch_size=64, save_strategy="no", use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = QTuningSFTTrainer(demo.base_model_path(), args, train_dataset=demo.load_demo_dataset()["train"])
    trainer.train()
    for kind, counts in trainer.summary()["groups"].items():
        print(f"{kind}: kept {counts['kept']} of {counts['candidates']}")
    return trainer


if __name__ == "__main__":
    main()
