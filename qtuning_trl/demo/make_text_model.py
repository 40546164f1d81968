"""
Make a small base model for a text data set of your own, where no hub can be reached.

```bash
python -m qtuning_trl.demo.make_text_model --data train.jsonl --column question --output runs/base
```

A byte-pair tokenizer and a Llama of about three million parameters, both trained on one column of the file: enough to
know the language of the text, so that `qtuning sft` can be tried on it. It is no substitute for a real base model.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from ..data import FORMATS
from .make_base_model import train

SPECIAL = ["<pad>", "<eos>"]
CONTEXT = 1024  # tokens


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer of at most `vocab_size` tokens; it knows every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT
    )


def make_model(vocab_size: int, hidden_size: int = 192, num_layers: int = 6) -> LlamaForCausalLM:
    """An untrained Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of random texts, cut to the context; tensors of shape (size, longest text + 1)."""
    while True:
        rows = [texts[int(i)] + tokenizer.eos_token for i in torch.randint(len(texts), (size,))]
        batch = tokenizer(rows, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield dict(batch)


def main() -> None:
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description="Make a small base model for a text data set of your own.")
    parser.add_argument("--data", type=Path, required=True, help=f"file of rows: {', '.join(FORMATS)}")
    parser.add_argument("--column", required=True, help="column that holds the text to train on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data.suffix not in FORMATS or not args.data.is_file():
        parser.error(f"`--data` is {str(args.data)!r}: give a file that exists and ends in {', '.join(FORMATS)}.")
    rows = load_dataset(FORMATS[args.data.suffix], data_files=str(args.data), split="train")
    if args.column not in rows.column_names:
        parser.error(f"`--column` is {args.column!r}: choose one of {', '.join(rows.column_names)}.")
    texts = list(rows[args.column])
    set_seed(args.seed)
    tokenizer = make_tokenizer(texts, args.vocab_size)
    model = make_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)
    train(model, batches(tokenizer, texts, args.batch_size), args.steps, learning_rate=2e-3, warm_up=50)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
