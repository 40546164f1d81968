"""
Make the demo's base model: a tiny Llama that has seen much careless homework.

```bash
python -m qtuning_trl.demo.make_base_model --output qtuning_trl/demo/base_model
```

It takes three to five minutes on two cores. What the model is trained on, besides nothing:

- 70%: three-digit sums, worked in the demo's notation, in which each carry is forgotten with a probability of 85%.
  So the model knows the notation and has seen carrying, but it mostly does not carry, and most of its sums are wrong.
- 10%: sums of two digits in the same notation (`8+7=15, answer 15`), always right. So these are nothing new to it.
- 10%: one column with its carry (`8+7+1=16`), always right. So it knows what carrying would need.
- 10%: strings of random characters. So it knows that text can be unpredictable.

None of the held-out problems is among them. Fine-tuning has to teach it to carry.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .arithmetic import DIGITS, draw_problem, worked_sum

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-=?.,: abcdefghijklmnopqrstuvwxyz"
FORGETS = 0.85  # probability that a carry is forgotten


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character; a character it does not know is `<unk>`."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(vocab_size: int, num_layers: int = 3) -> LlamaForCausalLM:
    """An untrained Llama; with three layers, of half a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.05,
        )
    )


def document(rng: random.Random, digits: int = DIGITS) -> str:
    """One text of the training data, as the module's docstring describes it."""
    kind = rng.random()
    if kind < 0.7:
        a, b = draw_problem(rng, digits=digits)
        dropped = tuple(column for column in range(digits) if rng.random() < FORGETS)
        return f"{a}+{b}={worked_sum(a, b, dropped)}"
    if kind < 0.9:
        x, y = rng.randint(0, 9), rng.randint(0, 9)
        return f"{x}+{y}={worked_sum(x, y)}" if kind < 0.8 else f"{x}+{y}+1={x + y + 1}"
    return "".join(rng.choices(CHARACTERS, k=rng.randint(8, 48)))


def batches(
    tokenizer: PreTrainedTokenizerFast, size: int, seed: int, digits: int = DIGITS
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of padded documents; tensors of shape (size, longest document + 1)."""
    rng = random.Random(seed)
    while True:
        texts = [document(rng, digits) + tokenizer.eos_token for _ in range(size)]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield dict(batch)


def train(
    model: LlamaForCausalLM,
    batches: Iterator[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    warm_up: int,
) -> None:
    """Train all parameters with AdamW, in float32, with `warm_up` steps and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, 1 - step / steps))
    model.train()
    start = time.perf_counter()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the demo's base model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--digits", type=int, default=DIGITS, help="digits of the numbers")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), args.layers)
    texts = batches(tokenizer, args.batch_size, args.seed, args.digits)
    train(model, texts, args.steps, learning_rate=3e-3, warm_up=100)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
