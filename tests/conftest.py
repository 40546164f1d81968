"""Shared stand-ins: a tiny tokenizer, a tiny Llama, and small datasets; everything is made here, nothing is loaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "true")  # TRL sends no telemetry then

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtuning_trl import pruners

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789+-*/=:.,?!"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ? ' }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def save_tokenizer(path) -> None:
    """A tokenizer with one token a character."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> str:
    """The tokenizer, saved, so that it is loaded as a user's would be."""
    path = tmp_path_factory.mktemp("tiny") / "tokenizer"
    save_tokenizer(path)
    return str(path)


@pytest.fixture
def tokenizer(tokenizer_dir) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,  # bitsandbytes packs 64 weights to a block
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # predictions that differ from uniform, so that scores differ
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


@pytest.fixture(scope="session")
def model_dir(tokenizer_dir, tmp_path_factory) -> str:
    """A tiny Llama saved with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama().save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(path)
    return str(path)


def random_words(generator: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return "".join(WORDS[int(i)] for i in torch.randint(4, len(WORDS), (length,), generator=generator))


def prompt_completion_rows(rows: int, seed: int = 0) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt": random_words(generator, 2, 8),
            "completion": random_words(generator, 3, 16),
            "source": "even" if index % 2 == 0 else "odd",
        }
        for index in range(rows)
    ]


@pytest.fixture(scope="session")
def prompt_completion() -> Dataset:
    return Dataset.from_list(prompt_completion_rows(40))


@pytest.fixture
def own_pruners():
    """Leaves the tables of pruners as they were."""
    tables = pruners._SAMPLE_PRUNERS, pruners._TOKEN_PRUNERS
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)
