"""Nothing that a template or a row says is dropped in silence: it is done, refused, or shown as not done."""

import json
import time

import pytest
from job_helper import arguments, command, outputs, run_job, texts, write_rows
from test_chat import LLAMA, applied, byte_tokenizer, row, turn, user
from tokenizers import AddedToken

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.common.signals import TookTooLong, time_limit
from pipeline.config.compose import job_folder
from pipeline.config.schema import Config, GenerationConfig, ModelConfig
from pipeline.job.folder import JobFolder
from pipeline.prompts import template as template_module
from pipeline.prompts.answer import (
    FORMATS,
    decode_with,
    find_tags,
    opens_thinking,
    split_thinking,
    stop_token_ids,
)
from pipeline.prompts.chat import missing_end, prepare_chat, render
from pipeline.prompts.count import count_prompts
from pipeline.prompts.reader import read_prompts

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "[THINK]", "[/THINK]"]
    harmony = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
    return byte_tokenizer(CHAT, bos="<s>", eos="</s>", special=[*special, *harmony], added=["<added>"])


@pytest.fixture
def job(tiny_dir, tmp_path):
    def build(rows, *more):
        prompts = write_rows(tmp_path / "prompts.jsonl", rows)
        return arguments(tiny_dir, prompts, tmp_path / "outputs", *more)

    return build


def prepared(tokenizer, template=None, *, embeddings=None, goes_on=False, **model):
    config = Config(model=ModelConfig(chat_template=template, **model), continue_final_message=goes_on)
    return prepare_chat(tokenizer, config, embeddings)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# ---- prompts that the model cannot read


def test_a_prompt_of_no_tokens_is_an_error_row(tokenizer):
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    talk = [turn("assistant", "a")]
    with pytest.raises(PromptError, match=r"p\.jsonl:1: (its prompt has no tokens|the chat template fails)"):
        render(row(messages=talk), prepared(tokenizer, only_users, goes_on=True))
    with pytest.raises(PromptError, match=r"p\.jsonl:1: its prompt has no tokens"):
        render(row(messages=[turn("user", " ")]), prepared(tokenizer, "{{ messages[0].content | trim }}"))


def test_a_token_past_the_embedding_is_an_error_row_and_the_others_run(tiny_dir, tmp_path, job):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.add_tokens([AddedToken(f"<extra {i}>") for i in range(300)])
    tokenizer.save_pretrained(tiny_dir)
    line = job([{"id": "good", "prompt": "Hello"}, {"id": "bad", "prompt": "a <extra 299> b"}])
    assert run_job(line) == 1
    found = {row["id"]: row for row in outputs(line)}
    assert found["good"]["error"] is None
    assert "prompts.jsonl:2: holds '<extra 299>', token " in found["bad"]["error"]
    assert "the model knows 300 tokens" in found["bad"]["error"]


# ---- templates that leave the prompt out


PARTS = "{% for m in messages %}[{% for part in m.content %}{{ part.text }}{% endfor %}]{% endfor %}"


def test_a_template_that_wants_parts_is_given_parts(tokenizer):
    chat = prepared(tokenizer, PARTS)
    assert tokenizer.decode(render(row("Hello"), chat)) == "[Hello]"
    assert tokenizer.decode(render(row(messages=[turn("system", "s"), *user("u")]), chat)) == "[s][u]"


@pytest.mark.parametrize(
    "template", ["{{ instruction }}", "{{ 'Hello' }}", "{% for m in messages %}{{ m.text }}{% endfor %}"]
)
def test_a_template_that_never_writes_the_prompt_is_refused(tokenizer, template):
    with pytest.raises(PromptError, match=r"never writes a user's text.*model\.chat_template="):
        prepared(tokenizer, template)


def test_a_message_that_the_template_leaves_out_fails_its_row(tokenizer):
    chat = prepared(
        tokenizer, "{{ bos_token }}" + CHAT.replace("messages %}", "messages if m.role != 'tool' %}")
    )
    with pytest.raises(PromptError, match=r"p\.jsonl:1: .* leaves out the text of the last tool message"):
        render(row(messages=[*user("a"), turn("tool", "42")]), chat)


def test_a_template_that_loops_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(template_module, "RENDER_SEC", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(ConfigError, match="loops"):
        prepared(tokenizer, loop)
    chat = prepared(
        tokenizer, "{{ messages[0].content }}{% if 'loop' in messages[0].content %}" + loop + "{% endif %}"
    )
    with pytest.raises(PromptError, match=r"p\.jsonl:1: the chat template is not done after"):
        render(row("loop"), chat)
    assert tokenizer.decode(render(row("other"), chat)) == "other"
    assert time.monotonic() - started < 5


def test_a_time_limit_leaves_the_block_and_the_timer_as_they_were():
    def forever():
        with time_limit(0.05):
            while True:
                pass

    with pytest.raises(TookTooLong):
        forever()
    with time_limit(0.05):
        pass
    time.sleep(0.1)


# ---- ends


def test_a_stop_string_that_is_a_special_token_is_matched_by_its_id(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer, ["END", "<|im_end|>", "<added>", "\n"]) == {end}
    with pytest.raises(
        PromptError, match=r"'<\|im_end\|>\\n' holds the special token '<\|im_end\|>' and more"
    ):
        stop_token_ids(tokenizer, ["<|im_end|>\n"])


def test_a_job_stops_at_a_special_token(job):
    rows = [{"id": f"r{i}", "prompt": f"Tell joke number {i}."} for i in range(6)]
    hot = ["generation.temperature=50", "generation.n=4", "generation.ignore_eos=true", "token_ids=true"]
    line = job(rows, "generation.max_new_tokens=60", *hot)
    assert run_job(line) == 0
    special = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    made = {(each["id"], each["sample"]): each["token_ids"] for each in outputs(line)}
    hit = next(token for ids in made.values() for token in ids if token in special)
    stopped = [*line, f'generation.stop=["{special[hit]}"]']
    assert run_job(stopped) == 0
    for each in outputs(stopped):
        whole = made[each["id"], each["sample"]]
        assert each["token_ids"] == (whole[: whole.index(hit)] if hit in whole else whole)
        assert each["finish_reason"] == ("stop" if hit in whole else "length")


def test_an_end_of_turn_that_does_not_end_a_completion_is_named(tokenizer):
    chat = prepared(tokenizer)
    assert chat.turn_end == "<|im_end|>"
    assert missing_end(chat, frozenset({tokenizer.eos_token_id})) == "<|im_end|>"
    assert missing_end(chat, frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")})) is None


# ---- rows


@pytest.fixture
def read(tmp_path):
    def read(*rows, **options):
        return list(read_prompts(write_rows(tmp_path / "p.jsonl", list(rows)), GenerationParams(), **options))

    return read


def body(**more):
    return {"custom_id": "a", "body": {"messages": user("Hi"), **more}}


def test_what_the_engine_has_is_taken_from_a_body(read):
    settings = {"seed": 3, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "n": 2}
    kwargs = {"enable_thinking": False}
    (found,) = read(
        body(**settings, logprobs=True, top_logprobs=5, chat_template_kwargs=kwargs, model="m", user="u")
    )
    assert found.params == GenerationParams(**settings, logprobs=5)
    assert found.template_kwargs == kwargs
    assert found.metadata == {"body": {"model": "m", "user": "u"}}
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
    }
    neutral |= {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "stream": True,
        "tools": None,
    }
    (found,) = read(body(**neutral))
    assert found.params == GenerationParams()


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function"}]}, {"tool_choice": "auto"}, {"response_format": {"type": "yaml"}},
        {"logit_bias": {"5": 1}}, {"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"best_of": 2},
        {"reasoning_effort": "low"}, {"functions": [{}]}, {"temprature": 1}, {"echo": True}, {"top_logprobs": 3},
    ],
)  # fmt: skip
def test_what_would_change_the_answer_and_is_not_there_fails_the_row(read, asked):
    (found,) = read(body(**asked))
    assert isinstance(found, BadRow)
    assert next(iter(asked)) in found.error


@pytest.mark.parametrize(
    ("asked", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}, {"type": "null"}),
    ],
)
def test_a_response_format_means_its_schema(read, asked, schema):
    (in_body,) = read(body(response_format=asked))
    (beside,) = read({"prompt": "a", "response_format": asked})
    assert in_body.params.json_schema == beside.params.json_schema == schema
    assert in_body.constraint is not None
    assert not in_body.metadata.get("body")


@pytest.mark.parametrize(
    "asked", ["json_object", {"type": "json_schema"}, {"type": "json_schema", "schema": {}}, {}]
)
def test_a_response_format_without_a_meaning_fails_the_row(read, asked):
    (found,) = read(body(response_format=asked))
    assert isinstance(found, BadRow)
    assert "body.response_format is" in found.error


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        (
            {"json_schema": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}},
            "uniqueItems",
        ),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"json_schema": {"$ref": "http://example.org/a"}}, "http://example.org/a"),
        ({"json_schema": "no-such-file.json"}, "json_schema=no-such-file.json: no such file"),
        ({"json_schema": 7}, "generation.json_schema is 7"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": 7}, "generation.regex is 7"),
        ({"grammar": "start: other"}, "other"),
        ({"grammar": "no-such-file.lark"}, "grammar=no-such-file.lark: no such file"),
        ({"choice": []}, "a list of different texts"),
        ({"choice": ["a", "a"]}, "a list of different texts"),
        ({"choice": [True]}, "generation.choice is not a list of texts"),
        ({"choice": ["a"], "regex": "a"}, "regex and choice: one of them"),
        ({"choice": ["a"], "ignore_eos": True}, "choice and ignore_eos: one of them"),
    ],
    ids=str,
)
def test_a_constraint_that_cannot_be_kept_fails_its_row(read, generation, said):
    bad, good = read({"prompt": "a", "generation": generation}, {"prompt": "b"})
    assert isinstance(bad, BadRow)
    assert ":1: generation" in bad.error
    assert said in bad.error
    assert good.constraint is None


def test_a_column_that_is_called_like_a_constraint_is_metadata(read):
    (found,) = read({"prompt": "a", "choice": "B", "grammar": "bad", "regex": 3, "json_schema": None})
    assert found.params.constraints == []
    assert found.metadata == {"choice": "B", "grammar": "bad", "regex": 3, "json_schema": None}


def test_settings_beside_the_prompt_are_used_or_refused(read):
    first, second, third, fourth = read(
        {"prompt": "a", "temperature": 0.5, "max_tokens": 7, "logprobs": [1], "user": "u"},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "n": 2, "generation": {"n": 3}},
        {"messages": user("a"), "tools": [{"name": "f"}]},
    )
    assert (first.params.temperature, first.params.max_new_tokens) == (0.5, 7)
    assert first.metadata == {"logprobs": [1], "user": "u"}
    assert "temperature" in second.error
    assert "n is said twice" in third.error
    assert "'tools[0]' is no function with a name" in fourth.error


def test_what_else_a_message_says_reaches_the_template(tokenizer, read):
    talk = [{"role": "user", "content": "a", "name": "Ada", "refusal": None}]
    chat = prepared(tokenizer, "{{ messages[0].name }}: {{ messages[0].content }}")
    assert tokenizer.decode(render(read({"messages": talk})[0], chat)) == "Ada: a"
    (bad,) = read({"messages": [{"role": "user", "content": "a", "weight": 1}]})
    assert "messages[0].weight is a whole number" in bad.error


def test_a_users_id_wins_wherever_it_stands(read):
    rows = read(
        {"prompt": "a"}, {"id": "row-0", "prompt": "b"}, {"id": "row-3", "prompt": "c"}, {"prompt": "d"}
    )
    assert [r.id for r in rows] == ["row-0-2", "row-0", "row-3", "row-3-2"]
    assert all(isinstance(r, PromptRow) for r in rows)
    assert [r.id for r in read({"prompt": "a"}, {"id": "row-0", "prompt": "b"}, limit=1)] == ["row-0-2"]


# ---- the last word


def test_an_assistants_last_message_is_continued_where_that_is_asked_and_refused_else(tokenizer, read):
    talk = [*user("a"), turn("assistant", "Well, ")]
    with pytest.raises(PromptError, match="continue_final_message=true"):
        render(row(messages=talk), prepared(tokenizer))
    meant = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False, continue_final_message=True)
    assert render(row(messages=talk), prepared(tokenizer, goes_on=True)) == meant
    own, no, nothing, wrong = read(
        {"messages": talk, "continue_final_message": True},
        {"messages": talk, "continue_final_message": False},
        {"messages": [*user("a"), turn("assistant", "")], "continue_final_message": True},
        {"prompt": "a", "continue_final_message": True},
    )
    assert render(own, prepared(tokenizer)) == meant
    for bad in (no, nothing, wrong):
        with pytest.raises(PromptError):
            render(bad, prepared(tokenizer, goes_on=True))
    assert tokenizer.decode(meant).endswith("assistant\nWell, ")


# ---- thinking


@pytest.mark.parametrize("tags", FORMATS, ids=lambda tags: tags.open)
@pytest.mark.parametrize("by", ["template", "job"])
def test_every_format_of_thinking_is_parted(tokenizer, tags, by):
    if by == "template":
        assert find_tags(tokenizer, f"{{{{ x }}}} {tags.open} {tags.close}") == tags
    else:
        assert find_tags(tokenizer, "", [tags.open, tags.close]).open == tags.open
    made = ids_of(tokenizer, f"{tags.open}hmm{tags.close}{tags.heading}Yes.</s>")
    text = decode_with(tokenizer, made, tags)
    assert split_thinking(text, tags=tags) == ("hmm", "Yes.")
    assert split_thinking("Yes.", tags=tags) == (None, "Yes.")
    assert opens_thinking(tokenizer, ids_of(tokenizer, f"<|im_start|>assistant\n{tags.open}"), tags)


def test_an_answer_without_thinking_loses_its_heading_too(tokenizer):
    harmony = FORMATS[-1]
    made = ids_of(tokenizer, "<|channel|>final<|message|>Yes.")
    assert split_thinking(decode_with(tokenizer, made, harmony), tags=harmony) == (None, "Yes.")


def test_special_tokens_that_are_not_the_formats_are_dropped_as_ever(tokenizer):
    made = ids_of(tokenizer, "<think>hmm</think>Yes<|im_end|>")
    assert decode_with(tokenizer, made, FORMATS[0]) == "<think>hmm</think>Yes"


def test_thinking_tags_are_two_texts():
    with pytest.raises(ValueError, match="thinking_tags"):
        GenerationConfig(thinking_tags=["<a>"])


# ---- dates and arguments


@pytest.fixture
def llama():
    special = ["<|start_header_id|>", "<|end_header_id|>"]
    return byte_tokenizer(LLAMA, bos="<|begin_of_text|>", eos="<|eot_id|>", special=special)


def test_whether_a_template_writes_the_date_is_found_by_rendering(llama, tokenizer):
    assert prepared(llama).found.writes_date
    assert not prepared(llama, chat_template_kwargs={"date_string": "x"}).found.writes_date
    assert not prepared(tokenizer, CHAT + "{# strftime_now #}").found.writes_date


def test_a_template_reads_the_days_it_is_given(llama):
    ids = render(row("a"), prepared(llama, template_date="2024-07-06"))
    assert "Today Date: 06 Jul 2024\n" in llama.decode(ids)
    assert render(row("a"), prepared(llama)) == applied(llama, user("a"))
    other = "{{ messages[0].content }} {{ strftime_now('%-d.%-m.%Y %H:%M %A') }}"
    assert (
        llama.decode(render(row("a"), prepared(llama, other, template_date="2024-07-06")))
        == "a 6.7.2024 00:00 Saturday"
    )


def test_a_job_goes_on_with_the_day_when_it_began(job, tiny_dir, capsys):
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    line = job([{"id": "a", "prompt": "Hello"}], f'model.chat_template="{dated}"')
    assert run_job(line) == 0
    assert "The chat template writes the date" in capsys.readouterr().err
    folder = job_folder(line)
    with JobFolder(folder) as results:
        noted = json.loads(results.manifest.read_text())
        results.write_json(results.manifest, {**noted, "template_date": "2001-02-03"})
    job([{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "Hello"}])
    assert run_job(line) == 0
    assert json.loads((folder / "manifest.json").read_text())["template_date"] == "2001-02-03"
    assert job_folder([*line, "model.template_date=2024-07-06"]) != folder


@pytest.mark.parametrize("dated", [True, False])
def test_a_merge_says_that_shards_have_different_days(dated, job, capsys):
    template = "{{ messages[0].content }}" + ("{{ strftime_now('%Y-%m-%d') }}" if dated else "")
    line = job([{"prompt": "Hello"}, {"prompt": "Bye"}], f'model.chat_template="{template}"')
    for part in range(2):
        assert run_job([*line, f"shard={part}/2"]) == 0
    folder = job_folder(line)
    today = json.loads((folder / "shard-0-of-2" / "manifest.json").read_text())["template_date"]
    assert main(["merge", str(folder)]) == 0
    assert "different days" not in capsys.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["template_date"] == today
    with JobFolder(folder / "shard-1-of-2") as results:
        noted = json.loads(results.manifest.read_text())
        results.write_json(results.manifest, {**noted, "template_date": "2001-02-03"})
    assert main(["merge", str(folder)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (f"began on different days (2001-02-03, {today})" in said) == dated
    days = json.loads((folder / "manifest.json").read_text())["template_date"]
    assert days == (["2001-02-03", today] if dated else today)


def test_arguments_that_a_template_never_reads_are_named(llama, capsys):
    prepared(llama, chat_template_kwargs={"date_sting": "x"})
    said = " ".join(capsys.readouterr().err.split())
    assert "does not read model.chat_template_kwargs.date_sting. Did you mean date_string?" in said
    bad = PromptRow(0, "a", "p.jsonl:1", "a", None, None, GenerationParams(), {}, {"date_sting": "x"})
    with pytest.raises(
        PromptError, match=r"does not read chat_template_kwargs\.date_sting\. Did you mean date_string"
    ):
        render(bad, prepared(llama))
    good = PromptRow(0, "a", "p.jsonl:1", "a", None, None, GenerationParams(), {}, {"date_string": "now"})
    assert render(good, prepared(llama)) == applied(llama, user("a"), date_string="now")


# ---- files


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "question,topic\nHello,a\nBye,b\n", "columns.prompt=NAME"),
        ("a.txt", "Tell a joke.\nAnother.\n", "one JSON object a line"),
        ("a.jsonl", '[{"prompt": "a"}, {"prompt": "b"}]\n', "name ends in .json"),
        ("a.json", '["a", "b"]\n', "its elements are objects"),
        ("a.jsonl", '{"question": "a"}\n{"question": "b"}\n', "prompt_field="),
    ],
)
def test_a_file_of_which_no_row_can_run_loads_no_model(job, tmp_path, capsys, name, text, said):
    (tmp_path / name).write_text(text)
    line = [*job([{"prompt": "a"}]), f"prompts={tmp_path / name}"]
    assert main(line) == 1
    found = " ".join(capsys.readouterr().err.split())
    assert "Loading" not in found
    assert "no model was loaded" in found
    assert said in found
    assert f"{name}:{2 if name == 'a.csv' else 1}: " in found
    assert all(row["error"] for row in outputs(line))
    assert main(line) == 1
    assert "Nothing to do" in capsys.readouterr().err


def test_bad_rows_beside_good_ones_are_written_as_ever(job):
    line = job([{"id": "a", "prompt": "Hello"}, "{"])
    assert run_job(line) == 1
    assert len(texts(line)) == 2


def test_a_gzip_that_is_damaged_in_the_middle_is_told_and_its_good_rows_run(job, tmp_path):
    import gzip

    lines = "".join(f'{{"prompt": "{i} {hash((i, "x"))}"}}\n' for i in range(3000))
    packed = bytearray(gzip.compress(lines.encode()))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(packed)
    *good, bad = read_prompts(path, GenerationParams())
    assert good
    assert isinstance(bad, BadRow)
    with pytest.raises(PromptError, match="cannot be read to its end"):
        count_prompts(str(path), GenerationParams(), limit=None, shards=2)
    line = [*job([{"prompt": "a"}]), f"prompts={path}", "limit=2"]
    assert run_job(line) == 0
    done = command(["submit", *line, "submit.dry_run=true"])
    assert "Traceback" not in done.stderr
    assert "Copy it again" in done.stderr


def test_a_line_of_gigabytes_is_counted_without_being_held(tmp_path):
    import gzip
    import tracemalloc

    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"prompt": "a"}\n{"prompt": "')
        for _ in range(96):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"prompt": "b"}\n')
    tracemalloc.start()
    counted = count_prompts(str(path), GenerationParams(), limit=None, shards=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counted.totals == (3,)
    assert peak < 64 << 20
