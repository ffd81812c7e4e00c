"""A rectangle's verbs, one by one, against plain lists of every row's keys and values."""

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.limits import CPU
from pipeline.engine.rectangles.passes import RectangleDecode, rectangle_prefill
from pipeline.engine.rectangles.rectangle import Rectangle, allocate, regroup, write
from pipeline.engine.scheduler import Sample

KV_HEADS, HEADS, SIZE = 2, 6, 4
WINDOWS = (None, 5, None, 40)  # of each layer


@dataclass
class Dense:
    """What every row holds: for each layer its keys and values, [tokens, H_kv, D]."""

    rows: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def row(self, tokens: int) -> Sample:
        sample = Sample(Request(f"{len(self.rows)}", (0,) * tokens, GenerationParams()), 0)
        self.samples.append(sample)  # keeps its id() its own
        self.rows[id(sample)] = [(random_kv(tokens), random_kv(tokens)) for _ in WINDOWS]
        return sample

    def rectangle(self, *lengths: int) -> Rectangle:
        """Rows of these lengths, written as a prefill writes them."""
        rows = [self.row(n) for n in lengths]
        rectangle = allocate(rows, lengths, WINDOWS)
        places = [(r, start + i) for r, start in enumerate(rectangle.starts) for i in range(lengths[r])]
        index, columns = torch.tensor(places).T
        for layer in range(len(WINDOWS)):
            keys, values = (torch.cat([self.rows[id(s)][layer][i] for s in rows]) for i in (0, 1))
            write(rectangle, layer, keys, values, index, columns)
        return rectangle

    def attention(self, sample: Sample, layer: int, query: Tensor) -> Tensor:
        """One query [H, D] after the row's last token, over what its window lets it see: [H, D]."""
        window = WINDOWS[layer]
        seen = slice(None) if window is None else slice(-window, None)
        keys, values = (t[seen].repeat_interleave(HEADS // KV_HEADS, 1) for t in self.rows[id(sample)][layer])
        weights = torch.einsum("hd,nhd->hn", query, keys).mul(SIZE**-0.5).softmax(-1)
        return torch.einsum("hn,nhd->hd", weights, values)


def random_kv(tokens: int) -> Tensor:
    return torch.randn(tokens, KV_HEADS, SIZE)


@pytest.fixture
def dense() -> Dense:
    torch.manual_seed(0)
    return Dense()


def check(rectangle: Rectangle, dense: Dense) -> None:
    """Every row holds its own keys and values, in the columns that a later token may see."""
    for layer, window in enumerate(WINDOWS):
        first = rectangle.first_columns.get(window, 0)
        for stored, which in ((rectangle.keys[layer], 0), (rectangle.values[layer], 1)):
            assert stored.is_contiguous()
            assert stored.shape[1:] == (KV_HEADS, rectangle.width - first, SIZE)
            for row, (sample, start) in enumerate(zip(rectangle.rows, rectangle.starts, strict=True)):
                expected = dense.rows[id(sample)][layer][which]
                assert rectangle.head - start == len(expected)
                kept = min(len(expected), rectangle.head - first)
                assert window is None or kept >= min(len(expected), window - 1)
                own = stored[row, :, rectangle.head - first - kept : rectangle.head - first]
                assert torch.equal(own.transpose(0, 1), expected[len(expected) - kept :])
                assert stored[row].isfinite().all(), "padding is multiplied by 0, and must not be NaN"


def step(rectangles: list[Rectangle], dense: Dense) -> None:
    """Feed every row one token, and compare every layer's attention with the dense one."""
    samples = [s for r in rectangles for s in r.rows]
    batch = RectangleDecode(rectangles)
    for layer in range(len(WINDOWS)):
        query = torch.randn(len(samples), HEADS, SIZE)
        key, value = random_kv(len(samples)), random_kv(len(samples))
        for row, sample in enumerate(samples):
            old_keys, old_values = dense.rows[id(sample)][layer]
            dense.rows[id(sample)][layer] = (
                torch.cat([old_keys, key[row : row + 1]]),
                torch.cat([old_values, value[row : row + 1]]),
            )
        out = batch.attend(layer, query, key, value, SIZE**-0.5)
        expected = torch.stack([dense.attention(s, layer, query[i]) for i, s in enumerate(samples)])
        torch.testing.assert_close(out, expected)
    for rectangle in rectangles:
        rectangle.head += 1


def test_write_right_aligns_the_rows(dense):
    rectangle = dense.rectangle(3, 9, 1)
    assert (rectangle.starts, rectangle.head, rectangle.width) == ([6, 0, 8], 9, 9 + CPU.chunk)
    check(rectangle, dense)
    assert rectangle.nbytes == 2 * len(WINDOWS) * 3 * KV_HEADS * (9 + CPU.chunk) * SIZE * 4


def test_write_in_parts_is_write_at_once(dense):
    rectangle = dense.rectangle(7)
    parts = allocate(rectangle.rows, [7], WINDOWS)
    for layer in range(len(WINDOWS)):
        keys, values = dense.rows[id(rectangle.rows[0])][layer]
        for part in (slice(0, 4), slice(4, 7)):
            columns = torch.arange(7)[part]
            write(parts, layer, keys[part], values[part], torch.zeros_like(columns), columns)
    check(parts, dense)


@pytest.mark.parametrize("order", [[0], [4], [2, 0], [3, 3], [4, 3, 2, 1], [0, 0, 0, 0]])
def test_retire_leaves_the_other_rows_as_they_are(dense, order):
    rectangle = dense.rectangle(3, 9, 1, 5, 7)
    step([rectangle], dense)
    for row in order:
        gone = rectangle.rows[row]
        rectangle.retire(row)
        assert gone not in rectangle.rows
        check(rectangle, dense)
    assert len(rectangle.rows) == len(rectangle.starts) == 5 - len(order)
    step([rectangle], dense)


def test_repeat_makes_as_many_rows_as_asked_in_order(dense):
    rectangle = dense.rectangle(4, 2)
    copies = [[rectangle.rows[0]], [rectangle.rows[1], dense.row(2), dense.row(2)]]
    for copy in copies[1][1:]:
        dense.rows[id(copy)] = dense.rows[id(rectangle.rows[1])]
    rectangle.repeat(copies)
    assert rectangle.rows == [s for c in copies for s in c]
    assert rectangle.starts == [0, 2, 2, 2]
    check(rectangle, dense)


@pytest.mark.parametrize("window", [*sorted({w for w in WINDOWS if w}), None], ids=str)
@pytest.mark.parametrize("retire_at", [None, 2, 6])
def test_bias_kept_up_step_by_step_is_the_bias_made_anew(dense, window, retire_at):
    rectangle = dense.rectangle(3, 9, 1)
    keys = rectangle.keys[0]
    for number in range(CPU.chunk):
        if number == retire_at:
            rectangle.retire(0)
        bias = rectangle.bias(window, keys)
        assert bias.shape == (len(rectangle.rows), KV_HEADS, rectangle.width)
        for row, start in enumerate(rectangle.starts):
            first = max(start, rectangle.head - window + 1) if window else start
            expected = torch.full((rectangle.width,), -math.inf)
            expected[first : rectangle.head + 1] = 0
            assert torch.equal(bias[row], expected.expand(KV_HEADS, -1))
        rectangle.head += 1
    assert rectangle.full


def test_regroup_copies_merges_and_splits(dense):
    one, two = dense.rectangle(3, 9, 1), dense.rectangle(20, 17)
    a, b, c, d, e = (*one.rows, *two.rows)
    new = regroup([one, two], [[d, b], [a, e, c]])
    assert [{id(s) for s in r.rows} for r in new] == [{id(d), id(b)}, {id(a), id(e), id(c)}]
    assert [(r.head, r.width) for r in new] == [(20, 20 + CPU.chunk), (17, 17 + CPU.chunk)]
    assert all(min(r.starts) == 0 for r in new)
    for rectangle in new:
        check(rectangle, dense)
    assert one.nbytes == two.nbytes == 0, "the old layers are freed"


def test_regroup_trims_what_is_padding_for_every_row(dense):
    rectangle = dense.rectangle(60, 9, 4)
    rectangle.retire(0)
    (new,) = regroup([rectangle], [rectangle.rows])
    assert (new.head, new.width, sorted(new.starts)) == (9, 9 + CPU.chunk, [0, 5])
    check(new, dense)


def test_regroup_gives_a_full_rectangle_room_to_grow(dense):
    rectangle = dense.rectangle(3, 9)
    for _ in range(CPU.chunk):
        step([rectangle], dense)
    assert rectangle.full
    (new,) = regroup([rectangle], [rectangle.rows])
    assert not new.full
    assert new.width == 9 + 2 * CPU.chunk
    check(new, dense)
    step([new], dense)


def test_regroup_keeps_of_a_sliding_window_only_what_can_be_seen(dense):
    rectangle = dense.rectangle(100, 30)
    (new,) = regroup([rectangle], [rectangle.rows])
    assert new.first_columns == {5: 96, 40: 61}
    assert [k.shape[2] for k in new.keys] == [100 + CPU.chunk, 4 + CPU.chunk, 100 + CPU.chunk, 39 + CPU.chunk]
    check(new, dense)
    step([new], dense)
    (again,) = regroup([new], [new.rows])  # from a rectangle that has been cut already
    assert again.first_columns == {5: 97, 40: 62}
    check(again, dense)
    step([again], dense)


def test_a_row_keeps_its_attention_through_every_verb(dense):
    """Thirty rounds of steps, retirements, new rectangles and random regroupings."""
    draw = random.Random(1)
    rectangles = [dense.rectangle(3, 9, 1)]
    for _ in range(30):
        rectangles.append(dense.rectangle(*(draw.randrange(1, 60) for _ in range(draw.randrange(1, 4)))))
        for rectangle in rectangles:
            if len(rectangle.rows) > 1 and draw.random() < 0.5:
                rectangle.retire(draw.randrange(len(rectangle.rows)))
        rows = [s for r in rectangles for s in r.rows]
        draw.shuffle(rows)
        cut = draw.randrange(len(rows))
        rectangles = regroup(rectangles, [part for part in (rows[:cut], rows[cut:]) if part])
        for _ in range(draw.randrange(1, 6)):
            step(rectangles, dense)
        for rectangle in rectangles:
            check(rectangle, dense)
        if len(rows) > 12:
            for rectangle in rectangles:
                while len(rectangle.rows) > 3:
                    rectangle.retire(0)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("prefix_tokens", [0, 6])
def test_prefill_attends_as_each_row_alone(dense, chunk, prefix_tokens):
    lengths = (9, 21, 10)
    rows = [dense.row(n) for n in lengths]
    shared = dense.rectangle(prefix_tokens) if prefix_tokens else None
    if shared:
        for sample in rows:
            for layer, pair in enumerate(dense.rows[id(shared.rows[0])]):
                dense.rows[id(sample)][layer] = tuple(  # type: ignore[assignment]
                    torch.cat([head, own[prefix_tokens:]])
                    for head, own in zip(pair, dense.rows[id(sample)][layer], strict=True)
                )
    rectangle = allocate(rows, lengths, WINDOWS)
    seen = 0
    for first in range(prefix_tokens, rectangle.head, chunk):
        batch = rectangle_prefill(rectangle, first, min(first + chunk, rectangle.head), shared)
        places = [
            (row, column - rectangle.starts[row])
            for row, column in zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)
        ]
        assert batch.positions == [position for _, position in places]
        seen += len(places)
        for layer in range(len(WINDOWS)):
            query = torch.randn(len(places), HEADS, SIZE)
            key, value = (
                torch.stack([dense.rows[id(rows[r])][layer][i][p] for r, p in places])
                if places
                else torch.empty(0, KV_HEADS, SIZE)
                for i in (0, 1)
            )
            out = batch.attend(layer, query, key, value, SIZE**-0.5)
            for token, (row, position) in enumerate(places):
                upto = Dense(
                    {
                        id(rows[row]): [
                            (k[: position + 1], v[: position + 1]) for k, v in dense.rows[id(rows[row])]
                        ]
                    }
                )
                torch.testing.assert_close(out[token], upto.attention(rows[row], layer, query[token]))
    assert seen == sum(lengths) - prefix_tokens * len(lengths)
    check(rectangle, dense)


HALF = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # and what rounding a weight and a result may change


def rectangle_in(dtype: torch.dtype, dense: Dense, scale: float, *lengths: int) -> Rectangle:
    """A rectangle in half precision of large keys; dense holds the same numbers."""
    rectangle = dense.rectangle(*lengths)
    for layer in range(len(WINDOWS)):
        rectangle.keys[layer] = (rectangle.keys[layer] * scale).to(dtype)
        rectangle.values[layer] = rectangle.values[layer].to(dtype)
    for sample in rectangle.rows:
        pairs = dense.rows[id(sample)]
        pairs[:] = [((k * scale).to(dtype).float(), v.to(dtype).float()) for k, v in pairs]
    return rectangle


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 5.0, 300.0])
def test_decode_keeps_scores_of_half_precision_in_float32(dense, dtype, scale):
    """Scores of about 5 × 5, which bfloat16 would round by an eighth; of 300 × 300, too large for float16."""
    rectangles = [rectangle_in(dtype, dense, scale, *lengths) for lengths in ((3, 61, 40), (130,))]
    samples = [s for r in rectangles for s in r.rows]
    for rectangle in rectangles:
        rectangle.head -= 1  # the last column is written anew, with what it holds
    batch = RectangleDecode(rectangles)
    for layer in range(len(WINDOWS)):
        query = (torch.randn(len(samples), HEADS, SIZE) * scale).to(dtype)
        key, value = (torch.stack([dense.rows[id(s)][layer][i][-1] for s in samples]) for i in (0, 1))
        out = batch.attend(layer, query, key.to(dtype), value.to(dtype), SIZE**-0.5)
        expected = torch.stack([dense.attention(s, layer, query[i].float()) for i, s in enumerate(samples)])
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=4 * HALF[dtype])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 5.0, 300.0])
@pytest.mark.parametrize("length", [40, 1100])
def test_prefill_keeps_scores_of_half_precision_in_float32(dense, dtype, scale, length):
    rectangle = rectangle_in(dtype, dense, scale, length, length - 20)
    batch = rectangle_prefill(rectangle, length - 1, length, None)
    for layer in range(len(WINDOWS)):
        query = (torch.randn(2, HEADS, SIZE) * scale).to(dtype)
        key, value = (torch.stack([dense.rows[id(s)][layer][i][-1] for s in rectangle.rows]) for i in (0, 1))
        out = batch.attend(layer, query, key.to(dtype), value.to(dtype), SIZE**-0.5)
        expected = [dense.attention(s, layer, query[i].float()) for i, s in enumerate(rectangle.rows)]
        torch.testing.assert_close(out.float(), torch.stack(expected), rtol=0, atol=4 * HALF[dtype])
