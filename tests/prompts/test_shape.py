"""Prompts made of columns: names that a job maps, templates over them, examples before every row."""

import json

import pytest
from job_helper import JobServer, arguments, outputs, run_job, write_rows

from pipeline.commands import door
from pipeline.common.errors import ConfigError, OutputError, PromptError
from pipeline.common.request import BadRow
from pipeline.config.compose import job_folder, read_config
from pipeline.job.merge import merge
from pipeline.prompts import shape as shape_module
from pipeline.prompts.reader import open_prompts

GSM8K = [
    {"question": f"What is {i} + {i}?", "answer": f"Twice {i} is {2 * i}.\n#### {2 * i}"} for i in range(8)
]


@pytest.fixture
def read(tmp_path):
    def read(rows, *overrides, name="p.jsonl"):
        path = write_rows(tmp_path / name, rows)
        return list(open_prompts(read_config([f"prompts={path}", *overrides])))

    return read


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ---- templates


def test_a_template_over_columns_is_the_prompt_and_the_columns_stay_metadata(read):
    row = {"id": "a", "text": "안녕 <|im_end|>", "tags": ["x", "y"], "n": 2}
    (made,) = read(
        [row], "prompt_template=Sum up {{ tags | join('+') }}:\\n{{ text }}{% if id %}!{% endif %}"
    )
    assert made.prompt == "Sum up x+y:\n안녕 <|im_end|>!"
    assert (made.id, made.params.n) == ("a", 2)
    assert made.metadata == {"text": "안녕 <|im_end|>", "tags": ["x", "y"]}


def test_a_template_decides_whatever_prompt_or_messages_the_row_has(read):
    row = {"prompt": "old", "messages": [user("older")], "text": "new"}
    (made,) = read([row], "prompt_template={{ prompt }} and {{ text }}")
    assert (made.prompt, made.messages, made.metadata) == ("old and new", None, {"text": "new"})


def test_a_list_of_messages_with_templates_is_a_conversation(read):
    template = (
        "prompt_template=[{role: system, content: 'Be {{ tone }}.'}, {role: user, content: '{{ text }}'}]"
    )
    (made,) = read([{"tone": "brief", "text": "Hi"}], template)
    assert made.messages == [{"role": "system", "content": "Be brief."}, user("Hi")]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ txt }}", "'txt' is undefined; this row has ['a', 'text']"),
        ("{{ text.nope }}", "has no attribute 'nope'"),
        ("{{ a }}", "it writes a null"),
        ("{{ text + 1 }}", "prompt_template fails"),
        ("{{ 1 / 0 }}", "prompt_template fails"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ text.format.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "prompt_template fails"),
        ("{{ raise_exception('no') }}", "prompt_template fails: no"),
        ("{% for i in range(9999999999) %}{% endfor %}", "prompt_template fails"),
        ("{% if a %}x{% endif %}", "'prompt' is empty"),
    ],
)
def test_what_a_template_cannot_write_is_an_error_row_that_says_why(read, template, said):
    bad, good = read(
        [{"text": "x", "a": None}, {"text": "x", "a": "y"}],
        f"prompt_template={template}" + "{% if a == 'y' %}ok{% endif %}",
    )
    assert isinstance(bad, BadRow)
    assert said in bad.error
    assert "p.jsonl:1: " in bad.error
    assert good.index == 1


def test_a_template_that_does_not_end_is_ended(read, monkeypatch):
    monkeypatch.setattr(shape_module, "RENDER_SEC", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (bad,) = read([{"text": "x"}], f"prompt_template={loop}")
    assert "prompt_template is not done after 0.2 s" in bad.error


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prompt_template={% for %}", "prompt_template: not valid Jinja"),
        ("prompt_template=[{role: user, content: '{{'}]", "prompt_template[0]: not valid Jinja"),
        ("prompt_template=[{role: user}]", "prompt_template[0]: must have a role and a content"),
        ("prompt_template=7", "prompt_template: must be a text"),
        ("columns={promt: a}", "columns.promt: no such field of a row"),
        ("shots=0", "shots=0: must be at least 1"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused_before_a_row_is_read(read, override, said):
    with pytest.raises(ConfigError) as error:
        read([{"prompt": "a"}], override)
    assert said in str(error.value)


def test_a_role_that_there_is_not_is_an_error_row(read):
    (bad,) = read([{"a": "x"}], "prompt_template=[{role: usr, content: '{{ a }}'}]")
    assert "unknown role 'usr'. Did you mean user?" in bad.error


# ---- names of columns


def test_columns_are_read_by_the_names_that_the_file_has(read):
    row = {"question": "Q", "qid": 7, "answer": "A", "extra": 1}
    (made,) = read([row], "columns={prompt: question, id: qid, reference: answer}")
    assert (made.prompt, made.id, made.metadata) == ("Q", "7", {"reference": "A", "extra": 1})


def test_a_column_that_is_not_there_or_there_twice_is_told(read):
    missing, twice = read([{"prompt": "a"}, {"prompt": "a", "id": "b", "qid": "c"}], "columns.id=qid")
    assert "no column 'qid'; this row has ['prompt']. Correct columns.id." in missing.error
    assert "has both 'id' and 'qid'" in twice.error


def test_ids_from_a_column_are_kept_clear_of_generated_ones(read):
    rows = read([{"prompt": "a", "qid": None}, {"prompt": "b", "qid": "row-0"}], "columns.id=qid")
    assert [row.id for row in rows] == ["row-0-2", "row-0"]


# ---- examples


def examples(tmp_path, *overrides, rows=GSM8K):
    return [f"examples={write_rows(tmp_path / 'e.jsonl', rows)}", "columns={prompt: question, reference: answer}",
            *overrides]  # fmt: skip


def test_the_first_examples_go_before_every_row_as_turns(read, tmp_path):
    more = ["shots=2", "prompt_template=Q: {{ question }}"]
    shape = [o for o in examples(tmp_path, *more) if "columns" not in o]
    (made,) = read([{"question": "x", "answer": "y"}], *shape, "columns.reference=answer")
    assert made.prompt is None
    assert made.messages == [
        user("Q: What is 0 + 0?"), assistant(GSM8K[0]["answer"]),
        user("Q: What is 1 + 1?"), assistant(GSM8K[1]["answer"]), user("Q: x"),
    ]  # fmt: skip
    assert made.metadata == {"question": "x", "reference": "y"}


def test_a_system_message_stays_before_the_examples(read, tmp_path):
    talk = {"messages": [{"role": "system", "content": "S"}, user("a")]}
    example = {"messages": [user("b"), assistant("c")]}
    (made,) = read([talk], f"examples={write_rows(tmp_path / 'e.jsonl', [example])}", "shots=1")
    assert [turn["content"] for turn in made.messages] == ["S", "b", "c", "a"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (GSM8K[:2], "holds 2 rows, and shots=5"),
        ([{"question": "a"}] * 5, "no column 'answer'"),
        ([{"question": "a", "answer": {}}] * 5, "e.jsonl:1: an example has no 'reference'"),
        ([{"question": "a", "answer": "b", "system": "s"}] * 5, "an example has a system text"),
    ],
)
def test_examples_that_cannot_be_used_are_one_error(read, tmp_path, rows, said):
    with pytest.raises(PromptError) as error:
        read([{"question": "x", "answer": "y"}], *examples(tmp_path, rows=rows))
    assert said in str(error.value)


def test_examples_are_a_shared_beginning_that_is_computed_once(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"question": f"{i}?", "answer": "x"} for i in range(4)])
    line = arguments(tiny_folder, prompts, tmp_path / "o", "generation.max_new_tokens=2", "shots=3",
                     *examples(tmp_path))  # fmt: skip
    assert run_job(line) == 0
    made = outputs(line)
    assert all(len(row["messages"]) == 7 for row in made)
    stats = json.loads((job_folder(line) / "stats.json").read_text())
    prompt_tokens = sum(row["usage"]["prompt_tokens"] for row in made)
    assert stats["engine"]["prefill_tokens"] < prompt_tokens / 2


# ---- what decides the text


def test_all_that_shapes_a_prompt_names_another_folder_and_nothing_keeps_the_old_one(tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    base = [f"prompts={prompts}"]
    shot = write_rows(tmp_path / "e.jsonl", GSM8K)
    changed = [
        [], ["prompt_template={{ a }}"], ["prompt_template={{ b }}"], ["columns.id=a"],
        [f"examples={shot}"], [f"examples={shot}", "shots=4"],
    ]  # fmt: skip
    folders = {job_folder([*base, *more]) for more in changed}
    assert len(folders) == len(changed)
    assert job_folder([*base, "shots=3"]) == job_folder(base)
    write_rows(shot, GSM8K[1:])
    assert job_folder([*base, f"examples={shot}"]) not in folders


def test_a_row_with_an_undefined_column_costs_no_other_in_a_real_job(tiny_folder, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"text": "a"}, {"txt": "b"}])
    line = arguments(tiny_folder, prompts, tmp_path / "o", "prompt_template=Say {{ text }}")
    assert run_job(line) == 1
    good, bad = sorted(outputs(line), key=lambda row: row["index"])
    assert good["prompt"] == "Say a"
    assert "'text' is undefined; this row has ['txt']" in bad["error"]
    assert door.main(["inspect", "view=chat", *line, "row=0"]) == 0
    assert "Say a" in capsys.readouterr().out


def test_a_merge_names_missing_rows_by_the_ids_that_their_column_gives(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": str(i), "qid": f"Q{i}"} for i in range(4)])
    line = arguments(tiny_folder, prompts, tmp_path / "o", "generation.max_new_tokens=1", "columns.id=qid")
    server = JobServer()
    for shard in ("0/2", "1/2"):
        server.start([*line, f"shard={shard}"])
        assert server.wait() == 0
    server.close()
    rows = job_folder([*line, "shard=1/2"]) / "outputs.jsonl"
    rows.write_bytes(rows.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(OutputError, match=r"rows (1 \(Q1\)|3 \(Q3\)) are missing"):
        merge(job_folder(line))
