"""Prompt files: what a row may be, what is said of a bad one, and that none is ever lost."""

import gzip
import json
import sys
import tracemalloc
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.request import BadRow, GenerationParams, PromptRow
from pipeline.prompts import lines as prompt_lines
from pipeline.prompts.reader import find_prompts, read_prompts
from pipeline.prompts.shape import Shape

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PARAMS = GenerationParams()
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path):
    """Read rows from bytes, text, or objects (one a line)."""

    def read(*lines, name="p.jsonl", **options):
        path = tmp_path / name
        encoded = [
            line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
            for line in lines
        ]
        data = b"\n".join(encoded)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return list(read_prompts(path, PARAMS, **options))

    return read


def user(content):
    return {"role": "user", "content": content}


# ---- finding the file


def test_a_name_in_jobs_is_found_with_and_without_its_ending(tmp_path):
    (tmp_path / "packed.jsonl.gz").touch()
    assert find_prompts("jokes.jsonl", JOBS) == find_prompts("jokes", JOBS) == str(JOBS / "jokes.jsonl")
    assert find_prompts("packed", tmp_path) == str(tmp_path / "packed.jsonl.gz")


def test_a_path_wins_over_a_name_in_jobs(tmp_path, monkeypatch):
    (tmp_path / "jokes.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert find_prompts("jokes.jsonl", JOBS) == "jokes.jsonl"
    assert find_prompts("-", JOBS) == "-"


@pytest.mark.parametrize("name", ["joke.jsonl", "jokess"])
def test_an_unknown_name_says_where_it_looked_and_what_is_near(name):
    with pytest.raises(PromptError, match=r"Did you mean jokes\.jsonl\?") as error:
        find_prompts(name, JOBS)
    assert str(JOBS) in str(error.value)


@pytest.mark.parametrize("name", ["", "/", "x" * 5000, "no\0where", "/no/such/folder/file.jsonl"])
def test_a_name_that_cannot_be_a_file_is_a_prompt_error(name):
    with pytest.raises(PromptError):
        find_prompts(name, JOBS)


# ---- good rows


def test_the_three_row_forms_are_told_apart_line_by_line(read):
    prompt, messages, openai = read(
        {"prompt": "a", "topic": "x"},
        {"id": "m", "system": "Be brief.", "messages": [user("b")]},
        {"custom_id": "o", "url": "/v1", "body": {"messages": [user("c")], "max_tokens": 5, "model": "gpt"}},
    )
    assert (prompt.id, prompt.prompt, prompt.messages) == ("row-0", "a", None)
    assert prompt.metadata == {"topic": "x"}
    assert (messages.id, messages.messages, messages.system) == ("m", [user("b")], "Be brief.")
    assert (openai.id, openai.messages, openai.params.max_new_tokens) == ("o", [user("c")], 5)
    assert openai.metadata == {"url": "/v1", "body": {"model": "gpt"}}


def test_a_row_overrides_the_jobs_parameters_and_leaves_the_others(tmp_path):
    path = tmp_path / "p.jsonl"
    own = {"max_new_tokens": 7, "temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0.1}
    own |= {"repetition_penalty": 1.2, "stop": "END", "seed": -1, "n": None}
    path.write_text(json.dumps({"prompt": "a", "generation": own}) + '\n{"prompt": "b"}')
    job = GenerationParams(n=2, ignore_eos=True)
    first, second = read_prompts(path, job)
    assert first.params == GenerationParams(7, 1.0, 0.5, 3, 0.1, 1.2, ["END"], n=2, seed=-1, ignore_eos=True)
    assert second.params is job


def test_a_batch_body_gives_its_own_parameters(read):
    body = {"messages": [user("a")], "max_completion_tokens": 9, "max_tokens": None, "temperature": 0.5}
    body |= {"top_p": 0.9, "stop": ["x"], "seed": 4, "n": 3}
    (row,) = read({"custom_id": "a", "body": body})
    assert row.params == GenerationParams(9, 0.5, 0.9, stop=["x"], seed=4, n=3)


def test_text_parts_are_joined_and_developer_is_system(read):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (row,) = read({"messages": [{"role": "developer", "content": "s"}, user(parts)]})
    assert row.messages == [{"role": "system", "content": "s"}, user("a b")]


def test_a_named_prompt_field_is_the_prompt_whatever_else_the_row_has(read):
    (row,) = read({"question": "q", "prompt": "p", "messages": 1}, shape=Shape("question"))
    assert (row.prompt, row.metadata) == ("q", {"prompt": "p", "messages": 1})


def test_bom_crlf_and_blank_lines_are_accepted_and_lines_are_counted_as_an_editor_does(read):
    rows = read(b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b" \t\r", b'{"prompt": "b"}\r', b"")
    assert [(row.prompt, row.index, row.source.rpartition(":")[2]) for row in rows] == [
        ("a", 0, "1"),
        ("b", 1, "4"),
    ]


def test_gzip_and_standard_input_read_as_the_plain_file_does(read, monkeypatch):
    plain = read({"prompt": "é"}, {"prompt": "b"})
    assert [r.prompt for r in read({"prompt": "é"}, {"prompt": "b"}, name="p.jsonl.gz")] == ["é", "b"]
    stdin = TextIOWrapper(BytesIO('{"prompt": "é"}\n{"prompt": "b"}'.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    piped = list(read_prompts("-", PARAMS))
    assert [r.prompt for r in piped] == [r.prompt for r in plain]
    assert piped[1].source == "<stdin>:2"
    assert not stdin.closed


# ---- ids, limits, shards


def test_generated_ids_never_meet_given_ones(read):
    rows = read({"id": "row-1", "prompt": "a"}, {"prompt": "b"}, {"id": "row-2", "prompt": "c"}, b"{", b"[")
    rows += read({"prompt": "a"}, {"id": "row-0", "prompt": "b"}, {"id": "row-0-2", "prompt": "c"})
    assert [row.id for row in rows] == [
        "row-1",
        "row-1-2",
        "row-2",
        "row-3",
        "row-4",
        "row-0-3",
        "row-0",
        "row-0-2",
    ]
    assert [type(row) for row in rows[5:]] == [PromptRow, PromptRow, PromptRow], "a user's own id wins"


def test_generated_ids_of_an_earlier_job_may_come_back_in_any_order(read):
    rows = read(*({"id": f"row-{i}", "prompt": "a"} for i in (3, 1, 0, 2)))
    assert [row.id for row in rows] == ["row-3", "row-1", "row-0", "row-2"]


def test_a_number_and_its_text_are_one_id(read):
    first, second = read({"id": 7, "prompt": "a"}, {"id": "7", "prompt": "b"})
    assert (first.id, type(second)) == ("7", BadRow)


def test_shards_are_the_whole_file_each_row_once_and_unchanged(read):
    lines = [{"prompt": str(i)} if i % 3 else {"id": "same", "prompt": "x"} for i in range(11)] + [b"bad"]
    whole = read(*lines)
    shards = [read(*lines, shard=f"{i}/4") for i in range(4)]
    assert [row.index % 4 for row in shards[1]] == [1, 1, 1]
    assert sorted((row for shard in shards for row in shard), key=lambda row: row.index) == whole
    assert read(*lines, limit=5) == whole[:5]
    assert read(*lines, limit=5, shard="1/4") == [whole[1]]


@pytest.mark.parametrize("shard", ["", "4/4", "1", "-1/4", "a/b", "0/0", "1/4 ", "\u0660/4", "1/99999999999"])
def test_a_shard_that_is_none_is_a_config_error(shard):
    with pytest.raises(ConfigError, match="shard="):
        read_prompts(JOBS / "jokes.jsonl", PARAMS, shard=shard)


def test_a_limit_below_one_is_a_config_error():
    with pytest.raises(ConfigError, match="limit=0"):
        read_prompts(JOBS / "jokes.jsonl", PARAMS, limit=0)


# ---- bad rows

BAD_ROWS = {  # line of jobs/bad_rows.jsonl: the row's id, and what is said
    2: ("row-1", "not JSON (Expecting ',' delimiter, column 53)"),
    3: ("row-2", "is a list, not an object"),
    4: ("row-3", "is text, not an object"),
    5: ("bad-no-prompt", "no 'prompt' or 'messages'; this row has ['text']"),
    6: ("bad-prompt-number", "'prompt' is a whole number, not text"),
    7: ("bad-prompt-empty", "'prompt' is empty"),
    8: ("bad-both", "has both 'prompt' and 'messages'"),
    10: ("bad-messages-empty", "'messages' is empty"),
    11: ("bad-messages-type", "'messages' is text"),
    12: ("bad-role", "unknown role 'usr'. Did you mean user?"),
    13: ("bad-content-missing", "'messages[0].content' is null"),
    14: ("bad-content-empty", "messages[0].content is empty"),
    15: ("bad-content-image", "Only text parts can be run"),
    16: ("bad-tool-calls", "'messages[1].tool_calls[0]' is no call of a function"),
    17: ("bad-two-systems", "has both 'system' and a system message"),
    18: ("bad-system-type", "'system' is a whole number"),
    22: ("row-19", "repeats the id 'good-crlf'"),
    23: ("row-20", "'id' is true or false"),
    24: ("row-21", "'id' is empty"),
    25: ("bad-generation-type", "'generation' is a list"),
    26: ("bad-generation-key", "unknown key 'temprature'. Did you mean temperature?"),
    27: ("bad-temperature-negative", "temperature=-1.0: must be between 0"),
    28: ("bad-temperature-text", 'generation.temperature is "0.5". Write a number'),
    29: ("row-26", "NaN is not a JSON value"),
    30: ("row-27", "the number '1e999' is too large"),
    31: ("bad-tokens-zero", "max_new_tokens=0: must be at least 1"),
    32: ("bad-tokens-huge", "must be at least 1 and below 2**31"),
    33: ("bad-tokens-bool", "generation.max_new_tokens is true"),
    34: ("bad-tokens-fraction", "generation.max_new_tokens is 1.5. Write a whole number"),
    35: ("bad-stop", "generation.stop is not a list of texts"),
    36: ("bad-stop-empty", "stop=['']: must be a list of non-empty strings"),
    38: ("row-35", "not UTF-8 at byte 34"),
    39: ("row-36", "holds NUL bytes"),
    40: ("row-37", "\\ud83d is half a character"),
    41: ("row-38", "a number has thousands of digits"),
    42: ("row-39", "is nested deeper than 64 levels"),
    43: ("bad-body", "'body' is text, not an object"),
    44: ("bad-body-messages", "'body' has no 'messages', only ['input']"),
    45: ("bad-body-tokens", "max_new_tokens=-5"),
}


def test_every_kind_of_bad_row_is_named_and_the_good_ones_among_them_are_kept():
    path = JOBS / "bad_rows.jsonl"
    rows = list(read_prompts(path, PARAMS))
    bad = {int(row.source.rpartition(":")[2]): row for row in rows if isinstance(row, BadRow)}
    assert {line: row.id for line, row in bad.items()} == {
        line: row_id for line, (row_id, _) in BAD_ROWS.items()
    }
    for line, (_, said) in BAD_ROWS.items():
        assert bad[line].error.startswith(f"{path}:{line}: ")
        assert said in bad[line].error
    good = [row.id for row in rows if isinstance(row, PromptRow)]
    assert good == ["good-bom", "good-control-tokens", "good-crlf", "good-overrides", "good-body", "row-44"]


@pytest.mark.parametrize("name", ["jokes", "multilingual", "openai_batch"])
def test_the_shipped_files_hold_good_rows_only(name):
    rows = list(read_prompts(JOBS / f"{name}.jsonl", PARAMS))
    assert [row for row in rows if isinstance(row, BadRow)] == []
    assert len(rows) == (6 if name == "openai_batch" else 8)


def test_the_first_joke_is_for_data_scientists():
    assert (
        next(read_prompts(JOBS / "jokes.jsonl", PARAMS)).prompt == "Tell a joke for a room of Data Scientists"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "generation": {"seed": 2**63}}, "seed="),
        ({"prompt": "a", "generation": {"top_k": 2**31}}, "top_k="),
        ({"prompt": "a", "generation": {"temperature": 10**400}}, "is too large"),
        ({"prompt": "a", "generation": {"best_of": 5}}, "unknown key 'best_of'"),
        ({"prompt": "a", "generation": 0}, "'generation' is a whole number"),
        ({"id": 1.5, "prompt": "a"}, "'id' is a number"),
        ({"messages": ["Hello"]}, "'messages[0]' is text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role ['user']"),
        ({"prompt": "\x1b[2J", "messages": []}, "has both"),
        ({"\x1b[2J": 1}, "this row has ['\\x1b[2J']"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "a", "\\udc00": 1}', "\\udc00 is half a character"),
        (b"\xff\xfe{\x00", "holds NUL bytes"),
        (b'{"prompt": "a", "x": -Infinity}', "-Infinity is not a JSON value"),
        (b"[" * 100_000, "is nested deeper"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "is nested deeper"),
    ],
)
def test_a_bad_line_says_what_is_wrong(read, line, said):
    good, bad, also_good = read({"prompt": "a"}, line, {"prompt": "b"})
    assert isinstance(good, PromptRow)
    assert isinstance(also_good, PromptRow)
    assert isinstance(bad, BadRow)
    assert said in bad.error
    assert "\x1b" not in bad.error


def test_an_escaped_pair_of_surrogates_is_one_character(read):
    (row,) = read(b'{"prompt": "\\ud83d\\ude00"}')
    assert row.prompt == "😀"


def test_a_wide_row_is_not_a_deep_one(read):
    (row,) = read({"prompt": "a", "tags": [{"x": [i]} for i in range(100)]})
    assert len(row.metadata["tags"]) == 100


def test_a_long_error_is_cut(read):
    (bad,) = read({"prompt": "a", "generation": {"x" * 10**6: 1, "stop": ["y" * 10**6, ""]}})
    assert len(bad.error) < 600


# ---- files as a whole


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_a_prompt_error(tmp_path, data):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(PromptError, match="holds no rows"):
        list(read_prompts(path, PARAMS))


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "."])
def test_a_file_that_cannot_be_opened_is_a_prompt_error(tmp_path, name):
    with pytest.raises(PromptError, match="cannot be read"):
        list(read_prompts(tmp_path / name, PARAMS))


def test_a_torn_gzip_file_keeps_what_could_be_read_and_says_where_it_breaks_off(tmp_path):
    lines = "".join(
        json.dumps({"prompt": f"{i:x}" * 50, "noise": hash((i, "x"))}) + "\n" for i in range(5000)
    )
    packed = gzip.compress(lines.encode())
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    *good, bad = read_prompts(path, PARAMS)
    assert len(good) > 1000
    assert [row.prompt for row in good] == [f"{i:x}" * 50 for i in range(len(good))]
    assert (bad.index, bad.id) == (len(good), f"row-{len(good)}")
    assert f"{path}:{len(good) + 1}: the gzip data breaks off here" in bad.error


def test_a_file_that_is_not_gzip_at_all_is_a_prompt_error(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(b'{"prompt": "a"}')
    with pytest.raises(PromptError, match="not a whole gzip file"):
        list(read_prompts(path, PARAMS))


def test_a_line_at_the_limit_is_read_and_one_above_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_lines, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "p.jsonl"
    fits = b'{"prompt": "' + b"x" * 986 + b'"}'
    path.write_bytes(b"\n".join([fits, fits + b" ", b"y" * 5000, b'{"prompt": "a"}', fits + b" "]))
    rows = list(read_prompts(path, PARAMS))
    assert [type(row) for row in rows] == [PromptRow, BadRow, BadRow, PromptRow, BadRow]
    assert "the line is 5001 bytes long; the limit is 1000" in rows[2].error
    path.write_bytes(fits)
    assert [type(row) for row in read_prompts(path, PARAMS)] == [PromptRow]


def test_a_line_of_100_mb_is_never_held_whole(tmp_path):
    path = tmp_path / "p.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}\n{"prompt": "b"}')
    tracemalloc.start()
    first, long, last = read_prompts(path, PARAMS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.prompt, last.prompt, last.index) == ("a", "b", 2)
    assert "the line is 100000015 bytes long" in long.error
    assert peak_bytes < 40 * 1024**2


# ---- nothing raises, nothing is lost


def check_lines(read, data):
    """Every line that is not blank gives one row, in order, with an id of its own, that can be written."""
    blank_free = [
        n for n, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1) if line.strip()
    ]
    if not blank_free:
        with pytest.raises(PromptError):
            read(data)
        return
    rows = read(data)
    assert [int(row.source.rpartition(":")[2]) for row in rows] == blank_free
    assert [row.index for row in rows] == list(range(len(rows)))
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        if isinstance(row, BadRow):
            assert row.error.startswith(f"{row.source}: ")
            row.error.encode()
        else:
            assert (row.prompt is None) != (row.messages is None)
            json.dumps([row.id, row.prompt, row.messages, row.metadata], ensure_ascii=False).encode()


@FUZZ
@given(st.lists(st.binary(max_size=40) | st.text(max_size=40).map(str.encode)).map(b"\n".join))
@example(b"\xef\xbb\xbf\n\n{}")
def test_any_bytes_give_one_row_a_line(read, data):
    check_lines(read, data)


FIELDS = ["id", "custom_id", "prompt", "messages", "system", "generation", "body", "role", "content", "type"]
FIELDS += [
    "text",
    "max_tokens",
    "max_new_tokens",
    "temperature",
    "stop",
    "seed",
    "n",
    "top_k",
    "row-0",
    "user",
]
WORDS = st.sampled_from([*FIELDS, "row-1", "row-2", "system", "assistant"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
SCALARS |= st.sampled_from([10**400, -(10**30), "\ud800", "\x00", "\u2028"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4)
        | st.fixed_dictionaries({"role": WORDS, "content": inner})
        | st.fixed_dictionaries({"type": st.just("text"), "text": inner})
    ),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": WORDS, "content": st.text(max_size=5)}), max_size=3)
ROWS = st.dictionaries(WORDS, VALUES, max_size=5) | VALUES
ROWS |= st.fixed_dictionaries({"prompt": st.text(max_size=5)}, optional={"id": SCALARS, "generation": VALUES})
ROWS |= st.fixed_dictionaries({"messages": MESSAGES}, optional={"id": SCALARS, "system": SCALARS})
ROWS |= st.fixed_dictionaries({"body": st.fixed_dictionaries({"messages": MESSAGES}), "custom_id": SCALARS})


@FUZZ
@given(st.lists(ROWS, min_size=1, max_size=6))
def test_any_json_rows_give_one_row_a_line(read, rows):
    check_lines(read, "\n".join(json.dumps(row) for row in rows).encode())
