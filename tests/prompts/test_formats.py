"""Prompt files of every format: the same rows, told by file and line, and no harm from a hostile one."""

import csv
import gzip
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_helper import arguments, command, environment, outputs, run_job

from pipeline.commands import door
from pipeline.common.errors import PromptError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import BadRow, GenerationParams
from pipeline.prompts import lines as prompt_lines
from pipeline.prompts.count import count_prompts, prompts_sha256
from pipeline.prompts.reader import find_prompts, read_prompts
from pipeline.prompts.shape import Shape

PARAMS = GenerationParams()
FORMATS = (
    "p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz", "p.csv", "p.csv.gz", "p.tsv", "p.parquet", "p.arrow",
    "p.feather", "saved", "splits?split=test", "repository", "repository?split=test",
)  # fmt: skip
TABLES = tuple(name for name in FORMATS if "." not in name or name in ("p.parquet", "p.arrow", "p.feather"))


def rows_of(count):
    """Rows as people have them: quotes, line ends, brackets, other scripts, and an id and topic each."""
    return [
        {"id": f"q{i}", "prompt": f'Say "{i}", [{{\\ 안녕\nor é🙂 {"x" * (i % 7)}', "topic": f"a,{i % 3}"}
        for i in range(count)
    ]


def write(folder, name, rows):
    """Write rows in the format that a name says, as its own libraries do."""
    folder.mkdir(exist_ok=True)
    place = name.partition("?")[0]
    path, plain = folder / place, folder / place.removesuffix(".gz")
    table = pa.Table.from_pylist(rows)
    match plain.suffix or plain.name:
        case ".jsonl":
            plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            plain.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        case ".csv" | ".tsv" as suffix:
            with plain.open("w", newline="", encoding="utf-8") as file:
                out = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
                out.writeheader()
                out.writerows(rows)
        case ".parquet":
            parquet.write_table(table, plain, row_group_size=64)
        case ".feather":
            feather.write_feather(table, plain)
        case ".arrow":
            with pa.ipc.new_stream(plain, table.schema) as stream:
                stream.write_table(table, max_chunksize=50)
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(plain)
        case "splits":
            datasets.DatasetDict(
                {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows)}
            ).save_to_disk(plain)
        case "repository":
            (plain / "data").mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, plain / "data" / "test-00000-of-00001.parquet")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return str(folder / name)


def read(path, **options):
    return list(read_prompts(find_prompts(str(path)), PARAMS, **options))


def kept(rows):
    return [(row.index, row.id, row_key(row), row.metadata) for row in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_in_every_format_are_the_same_requests(tmp_path, name):
    rows = rows_of(200)
    first = read(write(tmp_path, "p.jsonl", rows))
    path = write(tmp_path / "other", name, rows)
    assert kept(read(path)) == kept(first)
    assert kept(read(path, shard="1/3", limit=100)) == kept(first[1:100:3])
    counted = count_prompts(path, PARAMS, limit=100, shards=3)
    assert counted.totals == (34, 33, 33)
    assert counted.sha256 == prompts_sha256(path)


@pytest.mark.parametrize(
    ("more", "columns"),
    [
        ({}, ()),
        ({"n": 3}, ()),
        ({"generation": {"n": 2}}, ()),
        ({"samples": 4}, (("n", "samples"),)),
        ({"settings": {"n": 5}}, (("generation", "settings"),)),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "p.arrow", "saved"])
def test_counting_any_format_agrees_with_reading_it(tmp_path, name, more, columns):
    rows = [*rows_of(20), {"id": "bad", "prompt": ""}, {"id": "q1", "prompt": "twice"}]
    path = write(tmp_path, name, [row | (more if i % 2 else {}) for i, row in enumerate(rows)])
    shape = Shape(columns=columns)
    expected = [0, 0, 0]
    for row in read(path, shape=shape):
        expected[row.index % 3] += 1 if isinstance(row, BadRow) else row.params.n
    assert list(count_prompts(path, PARAMS, shape=shape, limit=None, shards=3).totals) == expected


def test_counting_a_damaged_table_agrees_with_reading_it(tmp_path):
    path = Path(write(tmp_path, "p.parquet", rows_of(2000)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"x" * 400 + whole[len(whole) // 2 + 400 :])
    made = len(read(path))
    assert 0 < made < 2000
    assert count_prompts(str(path), PARAMS, limit=None, shards=1).totals == (made,)


def test_counting_a_table_takes_a_tenth_of_reading_it(tmp_path):
    path = write(tmp_path, "p.parquet", rows_of(20_000))
    started = time.process_time()
    count_prompts(path, PARAMS, limit=None, shards=1)
    counted = time.process_time()
    for _ in read_prompts(path, PARAMS):
        pass
    assert counted - started < 0.1 * (time.process_time() - counted)


@pytest.mark.parametrize("name", FORMATS)
def test_a_bad_row_of_any_format_is_told_by_its_line_or_its_number(tmp_path, name):
    rows = [{"id": "a", "prompt": "Hello\nyou"}, {"id": "b", "prompt": ""}, {"id": "c", "prompt": "Bye"}]
    path = write(tmp_path, name, rows)
    good, bad, last = read(path)
    line = {"csv": 4, "tsv": 4, "json": 6}.get(name.removesuffix(".gz").rpartition(".")[2], 2)
    where = f"{path}, row 2" if name in TABLES else f"{path}:{line}"
    assert bad == BadRow(1, "b", where, f"{where}: 'prompt' is empty. Write a prompt, or remove the row.")
    assert (good.id, last.id, last.index) == ("a", "c", 2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_without_an_id_gets_none_that_a_later_row_brings(tmp_path, name):
    path = write(tmp_path, name, [{"id": None, "prompt": "a"}, {"id": "row-0", "prompt": "b"}])
    assert [row.id for row in read(path)] == ["row-0-2", "row-0"]


def test_a_job_reads_any_format_goes_on_and_names_the_file(tiny_folder, tmp_path):
    rows = rows_of(6)
    written = {}
    for name in ("p.jsonl", "p.csv", "p.parquet", "saved"):
        path = write(tmp_path / "files", name, rows)
        line = arguments(tiny_folder, path, tmp_path / "outputs" / name, "generation.max_new_tokens=2")
        assert run_job([*line, "limit=3"]) == 0
        assert run_job(line) == 0
        written[name] = {row["id"]: row for row in outputs(line)}
        assert len(written[name]) == 6
    assert all(found == written["p.jsonl"] for found in written.values())


def test_an_edited_table_is_seen_and_only_its_new_row_is_run(tiny_folder, tmp_path, capsys):
    line = arguments(tiny_folder, write(tmp_path, "repository", rows_of(3)), tmp_path / "o")
    assert run_job(line) == 0
    assert run_job(line) == 0
    assert "Nothing to do" in capsys.readouterr().err
    write(tmp_path, "repository", rows_of(4))
    assert run_job(line) == 0
    assert "3 of 4 rows were done before" in capsys.readouterr().err


def test_shards_of_a_table_merge(tiny_folder, tmp_path):
    line = arguments(tiny_folder, write(tmp_path, "p.parquet", rows_of(5)), tmp_path / "o")
    for shard in ("0/2", "1/2"):
        assert run_job([*line, f"shard={shard}"]) == 0
    from pipeline.config.compose import job_folder
    from pipeline.job.merge import merge

    assert merge(job_folder(line)) == 5
    assert [row["id"] for row in outputs(line)] == [f"q{i}" for i in range(5)]


# ---- CSV


def test_cells_that_say_how_are_read_as_json_and_empty_ones_say_nothing(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "id,prompt,system,max_new_tokens,temperature,stop,generation,year\n"
        'a,Hello,Be brief.,7,0.5,"[""x""]","{""seed"": 3}",1969\n'
        ",Bye,,,,end,,\n"
    )
    first, second = read(path)
    assert (first.params.max_new_tokens, first.params.temperature, first.params.seed) == (7, 0.5, 3)
    assert (first.params.stop, second.params.stop) == (["x"], ["end"])
    assert (first.system, second.system, second.id) == ("Be brief.", None, "row-1")
    assert (first.metadata, second.metadata) == ({"year": "1969"}, {"year": ""})
    assert second.params.max_new_tokens == PARAMS.max_new_tokens


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("prompt,é\na,b\n".encode("latin-1"), "not UTF-8"),
        ("prompt,topic\na,b\n".encode("utf-16"), "not UTF-8"),
        ("prompt,topic\na,b\n".encode("utf-16-le"), "not UTF-8"),
        (b'"prompt,topic\na,b\n', "never closed"),
        (b"prompt,topic\n", "holds no rows"),
        (b"", "holds no rows"),
    ],
)
def test_a_csv_whose_columns_cannot_be_told_is_one_error(tmp_path, data, said):
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(PromptError, match=said) as error:
        read(tmp_path / "p.csv")
    assert "p.csv" in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"caf\xe9,a", "not UTF-8"),
        (b"a\x00b,a", "NUL bytes"),
        (b"a,b,c", "has 3 cells, and the first row names 2 columns"),
        (b"a", "has 1 cell,"),
    ],
)
def test_a_bad_row_of_a_csv_costs_no_other(tmp_path, row, said):
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt,topic\r\n\r\nx,y\r\n" + row + b"\r\nz,y\r\n")
    good, bad, last = read(tmp_path / "p.csv")
    assert (good.prompt, last.prompt, last.source) == ("x", "z", f"{tmp_path}/p.csv:5")
    assert said in bad.error
    assert bad.source == f"{tmp_path}/p.csv:4"


def test_a_quote_that_is_never_closed_is_told_where_it_opens_and_nothing_after_it_is_guessed(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\na\n"b\nc\nd\n')
    good, bad = read(tmp_path / "p.csv")
    assert good.prompt == "a"
    assert bad.source == f"{tmp_path}/p.csv:3"
    assert "a quote is opened here and never closed; what follows is not read" in bad.error


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.parquet", "saved"])
def test_a_cell_above_the_limit_is_a_bad_row(tmp_path, name, monkeypatch):
    path = write(tmp_path, name, [{"prompt": "a"}, {"prompt": "b" * 5000}, {"prompt": "c"}])
    monkeypatch.setattr(prompt_lines, "MAX_LINE_BYTES", 2000)
    found = read(path)
    assert [type(row).__name__ for row in found[:2]] == ["PromptRow", "BadRow"]
    assert "the limit is 2000" in found[1].error or "field limit" in found[1].error
    assert name == "p.csv" or found[2].prompt == "c"


@pytest.mark.parametrize("name", ["p.csv", "p.json"])
def test_a_cell_of_gigabytes_is_not_held(tmp_path, name):
    path = tmp_path / f"{name}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"prompt\n" if name == "p.csv" else b'[{"prompt": "a"}, {"prompt": "')
        for _ in range(96):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" if name == "p.csv" else b'"}]')
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found[-1], BadRow)
    assert peak < 80 << 20


# ---- JSON arrays


@given(
    rows=st.lists(
        st.dictionaries(st.text(), st.recursive(st.text() | st.none() | st.integers(), st.lists), max_size=3),
        min_size=1,
    ),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_an_array_is_cut_into_its_elements_wherever_a_chunk_ends(rows, indent, ascii_only, chunk):
    from io import BytesIO

    class Stream(BytesIO):
        def read(self, size=-1):
            return super().read(min(size, chunk))

        def readline(self, size=-1):
            return super().readline(chunk)

    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    stream = Stream(text.encode("utf-8", "surrogatepass"))
    found = [line for _, line in prompt_lines._json(stream)]
    assert [json.loads(line.decode("utf-8", "surrogatepass")) for line in found if line.strip()] == rows


@pytest.mark.parametrize(
    ("text", "good", "said"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', 1, "not closed"),
        ('[{"prompt": "a"}', 0, "not closed"),
        ('[{"prompt": "a"}] {"prompt": "b"}', 1, "more after the array's end"),
        ('[{"prompt": "a"}, 7, {"prompt": "b"}]', 2, "not an object"),
        ('[{"prompt": "a"}, {"prompt" "b"}]', 1, "not JSON"),
    ],
)
def test_a_damaged_array_gives_its_whole_rows_and_says_where_it_ends(tmp_path, text, good, said):
    (tmp_path / "p.json").write_text(text)
    found = read(tmp_path / "p.json")
    bad = [row for row in found if isinstance(row, BadRow)]
    assert len(found) - len(bad) == good
    assert said in bad[0].error
    assert f"{tmp_path}/p.json:1: " in bad[0].error


def test_json_lines_under_the_name_of_json_are_read_as_ever(tmp_path):
    (tmp_path / "p.json").write_text('\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row.source for row in read(tmp_path / "p.json")] == [f"{tmp_path}/p.json:{n}" for n in (2, 3)]


# ---- tables


@pytest.mark.parametrize("name", ["p.parquet", "p.feather", "p.arrow"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_table_is_one_error_or_its_whole_rows_and_an_error_row(tmp_path, name, share):
    path = write(tmp_path, name, rows_of(300))
    with open(path, "rb+") as file:  # noqa: PTH123
        file.truncate(int(share * file.seek(0, 2)))
    if name == "p.arrow" and share >= 0.5:
        *good, bad = read(path)
        assert good
        assert "later rows are lost" in bad.error
        return
    with pytest.raises(PromptError, match=f"p.{name[2:]}: not a whole {name[2:]} file"):
        read(path)


def test_a_table_damaged_in_the_middle_gives_the_rows_before(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [{"id": f"q{i}", "prompt": f"{i} " * 50} for i in range(4096)]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1024, compression="zstd")
    data = bytearray(path.read_bytes())
    middle = parquet.ParquetFile(path).metadata.row_group(2).column(1).data_page_offset + 40
    data[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(data)
    *good, bad = read(path)
    assert [row.id for row in good[:1024]] == [f"q{i}" for i in range(1024)]
    assert bad.source == f"{path}, row {len(good) + 1}"
    assert "later rows are lost" in bad.error


def test_cells_of_a_table_that_are_no_text_are_written_as_text_or_refused(tmp_path):
    import datetime
    import decimal

    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "day": [datetime.date(2026, 11, 27), None, None],
            "price": [decimal.Decimal("1.50"), None, None],
            "number": pa.array([1.5, float("nan"), None]),
            "image": pa.array([None, None, b"\xff\xd8"]),
            "tags": [["x"], [], None],
        }
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    first, second, third = read(tmp_path / "p.parquet")
    assert first.metadata == {"day": "2026-11-27", "price": "1.50", "number": 1.5, "tags": ["x"]}
    assert second.metadata == {"tags": []}
    assert "a cell holds 2 bytes, and no text" in third.error


def test_text_of_a_table_that_is_no_utf8_costs_no_other_row(tmp_path):
    texts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    good, bad, last = read(tmp_path / "p.parquet")
    assert (good.prompt, last.prompt) == ("a", "c")
    assert bad.source.endswith("p.parquet, row 2")


def test_columns_of_one_name_and_other_types_are_told(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    feather.write_feather(pa.table({"prompt": [1, 2]}), tmp_path / "numbers.feather")
    with pa.ipc.new_file(tmp_path / "twice.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(PromptError, match="two columns are called 'prompt'"):
        read(tmp_path / "twice.arrow")
    assert all("is a whole number, not text" in row.error for row in read(tmp_path / "numbers.feather"))


def test_a_file_that_is_no_table_is_one_error_and_no_traceback(tiny_folder, tmp_path, capsys):
    for name in ("a.parquet", "a.arrow", "a.feather"):
        (tmp_path / name).write_text("prompt\nHello\n")
        assert door.main(arguments(tiny_folder, tmp_path / name, tmp_path / "o")) == 3
        said = capsys.readouterr().err
        assert "Copy it again" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", [name for name in FORMATS if "?" not in name and name != "repository"])
def test_whatever_bytes_are_damaged_rows_are_read_or_one_error_is_told(tmp_path, name):
    path = write(tmp_path, name, rows_of(60))
    file = next(Path(path).glob("*.arrow")) if name == "saved" else Path(path)
    whole = file.read_bytes()
    for seed in range(40):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.choice([0, 255, 34, 10, draw.randrange(256)])
        file.unlink()  # and not written over: what Arrow has mapped is another file's then
        file.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            found = read(path)
        except PromptError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
        else:
            assert [row.index for row in found] == list(range(len(found)))


HOSTILE = {
    "torn.parquet": b"PAR1\0\0",
    "text.arrow": b"prompt\nHello\n",
    "empty.feather": b"",
    "twice.csv": b"prompt,prompt\na,b\n",
    "latin.csv": "größe\na\n".encode("latin-1"),
    "utf16.tsv": "prompt\ta\nb\tc\n".encode("utf-16"),
    "nul.csv": b"prompt\na\0b\n",
    "quote.csv": b'prompt\n"a\nb\n',
    "torn.json": b'[{"prompt": "a"}, {"pro',
    "torn.csv.gz": gzip.compress(b"prompt\na\n")[:-9],
    "deep.json": b"[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_told_at_the_door_without_a_traceback(tiny_folder, tmp_path, name, capsys):
    (tmp_path / name).write_bytes(HOSTILE[name])
    line = arguments(tiny_folder, tmp_path / name, tmp_path / "o")
    for arguments_ in (["submit", *line, "submit.dry_run=true"], ["plan", *line, "memory=8GB"]):
        assert door.main(arguments_) in (0, 1, 3)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        assert "mistake of ours" not in told.err


# ---- datasets


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    write(tmp_path, "splits", rows_of(2))
    with pytest.raises(PromptError, match=r"several splits: train, test\. Choose one, as \?split=train"):
        read(tmp_path / "splits")
    with pytest.raises(PromptError, match="cannot be read as a dataset"):
        read(f"{tmp_path / 'splits'}?split=tset")
    with pytest.raises(PromptError, match=r"no such key: spilt\. Did you mean split"):
        read(f"{tmp_path / 'splits'}?spilt=test")


def test_a_folder_without_data_is_no_prompt_file(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(PromptError, match="no such file"):
        find_prompts(str(tmp_path))


def test_a_dataset_of_the_hub_is_refused_offline_and_a_wrong_address_always(
    tiny_folder, tmp_path, monkeypatch
):
    line = arguments(tiny_folder, "hf://ORG/NAME?split=test&config=main", tmp_path / "o")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = command(line)
    assert done.returncode == 3
    assert "the hub does not say which commit this is" in done.stderr
    assert "&revision=COMMIT" in done.stderr
    assert "Traceback" not in done.stderr
    for wrong in ("hf://", "hf://a/b/c", "hf://a b"):
        with pytest.raises(PromptError, match="not the address of a dataset"):
            find_prompts(wrong)
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned = f"hf://ORG/NAME?split=train[:5%]&revision={commit}"
    assert find_prompts(pinned) == pinned
    assert find_prompts(f"hf://datasets/ORG/NAME?revision={commit}") == f"hf://ORG/NAME?revision={commit}"


def test_a_dataset_that_was_read_before_is_found_without_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refs = tmp_path / "datasets--ORG--NAME" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abc")
    assert find_prompts("hf://ORG/NAME?split=test") == "hf://ORG/NAME?split=test&revision=0123abc"
    with pytest.raises(PromptError, match="does not say which commit"):
        find_prompts("hf://ORG/NAME?revision=other")


@pytest.mark.parametrize(
    "text", [r'[{"prompt": "\\\\\"{"}, {"prompt": "b"}]', r'[{"prompt": "\\"}, {"prompt": "]\""}]']
)
def test_an_array_may_be_cut_at_any_byte(text):
    from io import BytesIO

    for first in range(1, len(text)):
        stream = BytesIO(text.encode()[first:])
        found = [line for _, line in prompt_lines._elements(stream, text.encode()[:first])]
        assert [json.loads(line) for line in found if line.strip()] == json.loads(text)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.json"])
def test_a_file_that_needs_no_table_imports_neither_pyarrow_nor_datasets(tmp_path, name):
    path = write(tmp_path, name, rows_of(2))
    code = (
        "import sys; from pipeline.prompts.reader import read_prompts; from pipeline.common.request import *; "
        f"assert len(list(read_prompts({path!r}, GenerationParams()))) == 2; "
        "sys.exit(str({'pyarrow', 'datasets', 'torch', 'transformers'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row_group_size", [2_000, 100_000])
def test_many_rows_of_parquet_are_read_in_bounded_memory(tmp_path, row_group_size):
    """What 110 MB take beyond 11 MB is less than half of that, whatever the size of a row group."""
    code = (
        "import sys; from pipeline.prompts.reader import read_prompts; from pipeline.common.request import *; "
        "n = sum(1 for _ in read_prompts(sys.argv[1], GenerationParams())); "
        "print(n, next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    peaks = []
    for count in (5_000, 50_000):
        path = tmp_path / f"{count}.parquet"
        texts = pa.array([f"Tell me joke number {i} " + f"{i * 7919} " * 320 for i in range(count)])
        table = pa.table({"prompt": texts})
        parquet.write_table(
            table, path, row_group_size=row_group_size, use_dictionary=False, compression=None
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        found, peak_kb = map(int, done.stdout.split())
        assert found == count
        peaks.append(peak_kb << 10)
    assert path.stat().st_size > 100 << 20
    assert peaks[1] - peaks[0] < 45 << 20
