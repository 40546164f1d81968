"""
`qtuning plan`: what a run needs and how long it takes, counted on a machine without a GPU.

The model is built in shapes from its `config.json`, and TRL's own trainer runs its training step, the scoring forward
and the optimizer's step on PyTorch's fake tensors, which take the path of CUDA. A ledger counts the bytes that are
alive and the operations.

| module | what it holds |
|---|---|
| `ledger` | bytes alive, their peak, operations: of fake tensors or of real ones |
| `cuda` | fake CPU tensors take the path that CUDA would take |
| `model` | a model of a few layers in shapes, plain or 4-bit, and its config |
| `trainer` | TRL's trainer around a model in shapes |
| `counting` | peaks and operations of one setting, from two and three layers or from all |
| `lengths` | how long the rows of the recipe's data are |
| `split` | survivors in micro-batches with and without checkpointing |
| `timing` | time of a step in operations |
| `plan` | a recipe's plan: peaks, cards, relative time, steps |
| `fit` | the fastest settings that fit a card |
| `text`, `recipes` | the plan in words; the table in `recipes/README.md` |
"""
