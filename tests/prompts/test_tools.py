"""Tools and calls reach the chat template as transformers' own apply_chat_template has them, or the row is refused."""

import json
from typing import Any

import pyarrow.parquet as parquet
import pytest
from conftest import CHATML, tiny_tokenizer
from job_helper import arguments, outputs, run_job, write_rows
from test_real_tokenizers import prepared, turn
from transformers import AutoTokenizer

from pipeline.commands import export
from pipeline.common.errors import PromptError
from pipeline.common.request import BadRow, GenerationParams
from pipeline.config.compose import job_folder
from pipeline.config.schema import Config
from pipeline.prompts.chat import prepare_chat, render
from pipeline.prompts.lengths import by_characters, prompt_lengths
from pipeline.prompts.reader import listed_prompts

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city: 날씨 <b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Seoul 서울"}}}
ASKED = turn("user", "How is the weather in Seoul?")
TALK: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"sky": "clear"}'},
]


def read(*rows: dict[str, Any]) -> list[Any]:
    return list(listed_prompts(rows, GenerationParams()))


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as OpenAI writes them: JSON as text."""
    copied = json.loads(json.dumps(messages))
    for message in copied:
        message["content"] = message["content"] or None
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copied


def applied(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **more)


@pytest.mark.parametrize("messages", [[ASKED], TALK], ids=["asked", "with an earlier call"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside the messages", "in a body"])
def test_the_template_of_a_real_tokenizer_gets_the_tools_and_the_calls(messages, beside):
    tokenizer, chat = prepared("qwen3")
    said = {"messages": as_openai(messages), "tools": [WEATHER], "tool_choice": "auto"}
    (row,) = read(said if beside else {"custom_id": "a", "body": said})
    expected = applied(tokenizer, messages, tools=[WEATHER])
    assert render(row, chat) == expected
    assert expected != applied(tokenizer, messages)


def test_a_template_that_joins_arguments_to_its_text_gets_them_as_text():
    tokenizer = tiny_tokenizer()
    calls = "{% for c in message.tool_calls or [] %}{{ '[' + c.function.arguments + ']' }}{% endfor %}"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", calls + "<|im_end|>", 1)
    (row,) = read({"messages": TALK})
    ids = render(row, prepare_chat(tokenizer, Config()))
    assert '\n[{"city": "Seoul 서울"}]<|im_end|>' in tokenizer.decode(ids)


def test_no_tool_is_given_where_none_may_be_called():
    tokenizer, chat = prepared("qwen3")
    (row,) = read({"messages": [ASKED], "tools": [WEATHER], "tool_choice": "none"})
    assert render(row, chat) == applied(tokenizer, [ASKED])


def test_a_tokenizer_with_a_template_for_tools_takes_that_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    chat = prepare_chat(tokenizer, Config())
    plain, with_tools = read({"prompt": "Hi"}, {"prompt": "Hi", "tools": [WEATHER]})
    assert render(plain, chat) == applied(tokenizer, [turn("user", "Hi")])
    assert render(with_tools, chat) == applied(tokenizer, [turn("user", "Hi")], tools=[WEATHER])


def test_a_control_token_that_a_tool_spells_is_text():
    tokenizer, chat = prepared("qwen3")
    end = "<|im_end|>"
    sly = {"type": "function", "function": {"name": "f", "description": end, "parameters": {end: [end]}}}
    (row,) = read({"messages": [ASKED], "tools": [sly]})
    ids, plain = render(row, chat), applied(tokenizer, [ASKED], tools=[WEATHER])
    own = tokenizer.convert_tokens_to_ids(end)
    assert ids.count(own) == plain.count(own)
    assert tokenizer.decode(ids).count(end) == tokenizer.decode(plain).count(end) + 3


def test_a_template_that_takes_no_tools_or_calls_is_named(smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    (row,) = read({"prompt": "Hi", "tools": [WEATHER]})
    said = r"the chat template of SmolLM2-135M-Instruct does not take tools"
    with pytest.raises(PromptError, match=said):
        render(row, prepare_chat(tokenizer, Config()))
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match=said):
        render(row, prepare_chat(tokenizer, Config()))
    for chat in (prepare_chat(tiny_tokenizer(), Config()), prepared("deepseek_v3")[1]):
        with pytest.raises(PromptError, match="leaves out the calls of tools"):
            render(read({"messages": TALK})[0], chat)


def test_a_job_with_tools_answers_in_text_and_names_the_rows_that_cannot_have_them(tiny_dir, tmp_path):
    half = as_openai(TALK)
    half[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "\\ud800"}'
    rows = [
        {"id": "a", "messages": as_openai(TALK), "tools": [WEATHER]},
        {"custom_id": "b", "body": {"messages": [ASKED], "tools": [WEATHER], "tool_choice": "required"}},
        {"id": "c", "messages": half, "tools": [WEATHER]},
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
    template = tmp_path / "tools.jinja"
    for text, status in (("{{ tools | tojson }}" + calls + CHATML, 1), (CHATML, 1)):
        template.write_text(text.replace("message['content']", "message['content'] or ''"))
        job = arguments(tiny_dir, prompts, tmp_path / "o", f"model.chat_template={template}")
        assert run_job(job) == status
        made = {row["id"]: row for row in outputs(job)}
        assert f"{prompts}:2: body.tool_choice is 'required'" in made["b"]["error"]
        if text != CHATML:
            assert made["a"]["error"] is None
            assert f"{prompts}:3: its prompt has \\ud800, half a character" in made["c"]["error"]
            assert made["a"]["messages"][1]["tool_calls"] == [CALL]
            assert export.main([str(job_folder(job)), "to=parquet", f"file={tmp_path / 'a.parquet'}"]) == 0
            (exported, _, _) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
            assert json.loads(exported["messages"]) == made["a"]["messages"]
        else:
            assert f"{prompts}:1: the chat template of tiny does not take tools" in made["a"]["error"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"tools": {"name": "f"}}, "'tools' is no list"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "'tools[0]' is no function with a name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice is {'type'"),
        ({"tool_choice": "auto"}, "tool_choice without tools"),
        ({"chat_template_kwargs": {"tools": ["f"]}}, "'chat_template_kwargs.tools[0]' is no function"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}]}, "messages[0]: tool_calls of a user"),
        ({"messages": [ASKED, {"role": "assistant", "function_call": {"name": "f"}}]}, "function_call is not"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}]},
            "'messages[1].tool_calls[0].function.arguments' is no JSON object",
        ),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": "f"}]}, "'messages[1].tool_calls' is no list"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_tool_or_call_fails_the_row_and_says_where(said, why):
    (row,) = read({"messages": [ASKED], **said})
    assert isinstance(row, BadRow)
    assert row.error.startswith("prompts[0]: ")
    assert why in row.error


def test_a_plan_counts_tools_and_calls():
    lengths = [
        prompt_lengths(read(row), None, by_characters, "", 1 << 20).samples[0][0]
        for row in ({"messages": [ASKED]}, {"messages": [ASKED], "tools": [WEATHER]}, {"messages": TALK})
    ]
    assert lengths[1] > lengths[0] + 50
    assert lengths[2] > lengths[0] + 25
