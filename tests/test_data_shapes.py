"""Foreign files (tests/data), trained on by the real command: what is labelled, and what is refused in one sentence."""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtuning_trl import cli
from qtuning_trl.conversations import tools_as_json, without_nulls
from qtuning_trl.data import map_columns
from qtuning_trl.dry_run import marked
from qtuning_trl.scripts import sft
from qtuning_trl.scripts.plan import make_planner
from qtuning_trl.step.sample import answer_lengths, split_documents

DATA = Path(__file__).parent / "data"
RECIPES = Path(__file__).parents[1] / "recipes"
WITH_TOOLS = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"tools": WITH_TOOLS, "smollm2": SMOLLM2, "base": None, "own": "{% for m in messages %}[{{ m.role }}] "
             "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"}  # fmt: skip


@pytest.fixture(scope="session")
def byte_models(tmp_path_factory) -> dict[str, str]:
    """A tiny model with a tokenizer that writes any text, by the kind of its chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model, paths = LlamaForCausalLM(config), {}
    for name, template in TEMPLATES.items():
        path = tmp_path_factory.mktemp("bytes") / name
        tokenizer.chat_template = template
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths[name] = str(path)
    return paths


@pytest.fixture
def command(byte_models, tmp_path, monkeypatch):
    """The options of a run; `command("sharegpt.jsonl", "tools", as_messages=True)`."""
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)

    def options(data: str, model: str, **changes) -> list[str]:
        given = {
            "model_name_or_path": byte_models[model], "dataset_name": DATA / data, "output_dir": tmp_path / "run",
            "use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no",
            "per_device_train_batch_size": 2, "max_length": 2048, "disable_tqdm": True, **changes,
        }  # fmt: skip
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]

    return options


@pytest.fixture
def samples(command):
    """The samples that a dry run shows, with what is labelled between marks, by the real command's trainer."""

    def run(data: str, model: str, **changes) -> list[str]:
        trainer = sft.build_trainer(*sft.parse(command(data, model, **changes)).dataclasses)
        trainer.end()
        return [marked(split_documents(row)[0], trainer._tokenizer) for row in trainer.train_dataset]

    return run


@pytest.fixture
def refusal(command, capsys):
    """The one sentence that a command ends with."""

    def run(data: str, model: str, **changes) -> str:
        with pytest.raises(SystemExit) as end:
            sft.run(command(data, model, **changes))
        assert end.value.code == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        (line,) = [line for line in printed.splitlines() if "error:" in line]
        return line

    return run


def labelled(text: str) -> list[str]:
    return re.findall("⟦(.*?)⟧", text, flags=re.DOTALL)


def test_openais_tool_calls_are_written_by_the_chat_template_and_labelled(samples):
    first, second, third = samples("openai_tools.jsonl", "tools", assistant_only_loss=True)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert [text.strip() for text in labelled(first)] == [call, "Yes, lightly.<|im_end|>"]
    assert "Use the tools." in first
    assert '"name": "get_weather", "description": "The weather in a city."' in first
    assert "light rain" in first
    assert '{"name": "convert", "arguments": {"amount": 5, "into": "km"}}' in labelled(second)[0]
    assert "null" not in first + second, "no keys of other calls and tools"
    assert "convert" not in first
    assert "tool" not in third


def test_sharegpts_tool_calls_system_and_tools_columns_are_written_too(samples):
    first, second = samples("sharegpt_tools.json", "tools")
    assert [text.strip() for text in labelled(first)] == [
        '<tool_call>\n{"name": "find_book", "arguments": {"title": "Emma"}}\n</tool_call><|im_end|>',
        "Jane Austen did.<|im_end|>",
    ]
    assert first.startswith("<|im_start|>system\nYou know books.")
    assert '{"type": "function", "function": {"name": "find_book"' in first
    assert '{"author": "Jane Austen"}' in first
    assert "You know books" not in second
    assert "find_book" not in second


@pytest.mark.parametrize("data", ["openai_tools.jsonl", "sharegpt_tools.json"])
def test_a_template_that_writes_no_tools_is_refused(refusal, data):
    line = refusal(data, "smollm2")
    assert re.search(
        r"holds (tool calls|the descriptions of tools|the answers of tools), which the chat template", line
    )
    assert "use a model whose template does, set `chat_template_path` to one that does, or remove these rows." in line


@pytest.mark.parametrize(
    ("system", "why"), [("", ""), ("{{ raise_exception('No system turns here.') }}", " (No system turns here)")]
)
def test_a_template_that_leaves_out_or_refuses_system_turns_is_refused(refusal, tmp_path, system, why):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% elif m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    line = refusal("sharegpt.jsonl", "smollm2", chat_template_path=tmp_path / "chat.jinja")
    assert f"`train_dataset` holds system turns, which the chat template of '{tmp_path}/chat.jinja' does not" in line
    assert f"write down{why}: use a model" in line


def test_sharegpt_is_recognized_without_a_recipe_and_the_answers_are_labelled(samples):
    first, second, _ = samples("sharegpt.jsonl", "tools")
    assert first == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n"
        "<|im_start|>assistant⟦\nThe Loire.<|im_end|>\n⟧<|im_start|>user\nAnd then?<|im_end|>\n"
        "<|im_start|>assistant⟦\nNothing more.<|im_end|>\n⟧"
    )
    assert "Answer briefly" not in second


def test_an_instruct_model_keeps_its_own_template_with_the_conversations_recipe(samples, byte_models, tmp_path):
    recipe = RECIPES / "data" / "local_conversations.yaml"
    (first, *_) = samples("sharegpt.jsonl", "smollm2", config=recipe)
    assert first == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n"
        "<|im_start|>assistant\n⟦The Loire.<|im_end|>⟧\n<|im_start|>user\nAnd then?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Nothing more.<|im_end|>⟧\n"
    )
    (plain, *_) = samples("sharegpt.jsonl", "base", config=recipe)
    assert plain == (
        "Answer briefly.\n\n### Instruction:\nName a river.\n\n### Response:\n⟦The Loire.<|im_end|>⟧\n\n"
        "### Instruction:\nAnd then?\n\n### Response:\n⟦Nothing more.<|im_end|>⟧"
    )


def test_a_template_without_markers_is_refused_with_the_three_ways_out(refusal):
    line = refusal("sharegpt.jsonl", "own")
    assert "`assistant_only_loss` is true and the chat template of" in line
    assert "{% generation %}" in line
    assert "set `assistant_only_loss` to false" in line


@pytest.mark.parametrize("model", ["smollm2", "base", "tools"])
def test_the_saved_tokenizer_has_the_template_that_was_trained(command, model, tmp_path):
    recipe = RECIPES / "data" / "local_conversations.yaml"
    trainer = sft.main(*sft.parse(command("sharegpt.jsonl", model, config=recipe)).dataclasses)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    rows = map_columns(load_dataset("json", data_files=str(DATA / "sharegpt.jsonl"), split="train"), None, None,
                       "conversations")  # fmt: skip
    trained = [trainer._tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert [saved.apply_chat_template(row["messages"], tokenize=False) for row in rows] == trained


def test_the_packages_marked_template_is_the_recipes():
    shipped = Path(sft.__file__).parents[1] / "marked_templates" / "smollm2.jinja"
    assert shipped.read_text() == (RECIPES / "smollm2_chat_template.jinja").read_text()


def test_alpacas_columns_become_messages_with_system_and_history(samples):
    first, second, third = samples("alpaca.json", "smollm2", as_messages=True)
    assert first.endswith(
        "<|im_start|>user\nTurn into the past tense.\nShe sings.<|im_end|>\n<|im_start|>assistant\n"
        "⟦She sang.<|im_end|>\n⟧"
    )
    assert "user\nName three colours.<|im_end|>" in second
    assert labelled(third) == ["长江是亚洲最长的河流。<|im_end|>\n"]
    with_history, _ = samples("alpaca_history.json", "smollm2", as_messages=True)
    assert with_history == (
        "<|im_start|>system\nYou teach geography.<|im_end|>\n<|im_start|>user\n"
        "What is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
        "<|im_start|>user\nAnd of Spain?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Madrid.<|im_end|>\n⟧"
    )
    by_recipe, _ = samples("alpaca_history.json", "smollm2", config=RECIPES / "data/local_instruction_messages.yaml")
    assert by_recipe == with_history


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("alpaca_history.json", {"as_messages": True}),
        ("sharegpt.jsonl", {}),
        ("alpaca.json", {"config": RECIPES / "data/local_instruction.yaml"}),
    ],
)
def test_a_plan_measures_the_rows_that_are_trained_on(command, data, options):
    """With the chat template, and conversations that no option names."""
    argv = command(data, "smollm2", **options)
    lengths = make_planner(argv).lengths
    rows = sft.build_trainer(*sft.parse(argv).dataclasses).train_dataset
    assert lengths.source == "all rows measured"
    assert lengths.tokens.tolist() == [len(row["input_ids"]) for row in rows]
    assert lengths.labelled.tolist() == [sum(answer_lengths(split_documents(row))) for row in rows]


@pytest.mark.parametrize(
    ("data", "options", "messages"),
    [
        ("alpaca.json", {}, ["the columns instruction, input, output, which are Alpaca's: set `as_messages` to true",
                             "give `--config data/local_instruction`"]),
        ("gaps.jsonl", {}, ["the columns question, answer, which are a question and its answer",
                            "give `--config data/local_question_answer`"]),
        ("squad.jsonl", {}, ["the columns id, title, context, question, answers, none of which TRL trains on",
                             "`messages_column`", "`data/local_conversations` (conversations)"]),
        ("squad.jsonl", {"as_messages": True}, ["`as_messages` is true and the columns are id, title", "question and"]),
        ("preferences.json", {}, ["the columns 'chosen' and 'rejected', which are preferences (DPO)", "DPOTrainer"]),
        ("thumbs.jsonl", {}, ["the column 'label' of true and false, which are preferences (KTO)", "KTOTrainer"]),
        ("alpaca_history.json", {"config": RECIPES / "data/local_instruction.yaml"},
         ["the column 'system', filled in 1 of its rows, which no template names: set `as_messages` to true"]),
        ("alpaca_history.json", {"prompt_template": "{system}{instruction}", "completion_template": "{output}"},
         ["the column 'history', filled in 1 of its rows"]),
        ("sharegpt.jsonl", {"messages_column": "id"}, ["`messages_column` names the column 'id', which holds text"]),
        ("sharegpt.jsonl", {"messages_column": "conversations", "as_messages": True}, ["give only one of the two"]),
        ("sharegpt.jsonl", {"fallback_chat_template": "no.jinja"}, ["`fallback_chat_template` is 'no.jinja': no such"]),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_one_sentence(refusal, data, options, messages):
    line = refusal(data, "smollm2", **options)
    for message in messages:
        assert message in line


def test_null_undoes_what_a_recipe_says(command):
    recipe = RECIPES / "data" / "local_instruction.yaml"
    undone = {"chat_template_path": "null", "prompt_template": "null", "completion_template": "none"}
    script_args, args, *_ = sft.parse(command("alpaca.json", "smollm2", config=recipe, **undone)).dataclasses
    assert args.chat_template_path is script_args.prompt_template is script_args.completion_template is None


def test_what_arrow_adds_and_what_is_no_json():
    assert without_nulls([{"a": {"x": 1, "y": None}, "b": None}]) == [{"a": {"x": 1}}]
    assert tools_as_json([]) is tools_as_json("") is tools_as_json(None) is None
    assert json.loads(str(tools_as_json('[{"name": "f"}]'))) == [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(ValueError, match="`tools` holds 'f, g', which is no JSON"):
        tools_as_json("f, g")
    broken = Dataset.from_list([{"conversations": [{"from": "function_call", "value": "{broken"}]}])
    with pytest.raises(ValueError, match=r"'\{broken' as a tool call, which is no JSON"):
        map_columns(broken, messages_column="conversations")


@pytest.mark.parametrize("gap", [[], None])
@pytest.mark.parametrize("model", ["smollm2", "base"])
def test_a_first_conversation_without_turns_is_left_out_as_any_other(samples, tmp_path, gap, model):
    lines = (DATA / "sharegpt.jsonl").read_text().splitlines()
    (tmp_path / "gap.jsonl").write_text("\n".join([json.dumps({**json.loads(lines[0]), "conversations": gap}), *lines]))
    for options in ({"config": RECIPES / "data/local_conversations.yaml"}, {"messages_column": "conversations"}):
        given = {"assistant_only_loss": True, "fallback_chat_template": RECIPES / "chat_template.jinja", **options}
        assert samples(str(tmp_path / "gap.jsonl"), model, **given) == samples("sharegpt.jsonl", model, **given)


def test_a_text_is_trained_on_or_a_prompt_with_its_completion_with_its_end_in_either_case(samples, tmp_path):
    """TRL would put the end token of a prompt's completion onto a text beside it."""
    rows = [
        {"text": "one two three", "prompt": "one", "completion": " two"},
        {"text": "a b", "prompt": "a", "completion": " c"},
    ]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert samples(str(tmp_path / "both.jsonl"), "base") == ["one⟦ two<|im_end|>⟧", "a⟦ c<|im_end|>⟧"]
    for row in rows:
        del row["completion"]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = samples(str(tmp_path / "text.jsonl"), "base")
    assert [text.replace("⟦", "").replace("⟧", "") for text in shown] == ["one two three<|im_end|>", "a b<|im_end|>"]
