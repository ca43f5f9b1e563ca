"""The short convolution: causal, exact at every cut, the same in rows and packed."""

import pytest
import torch

from titans.nn import Rows, ShortConv


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 4])
def test_it_is_a_causal_depthwise_convolution(width):
    conv = ShortConv(6, width).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, tail = conv(x, conv.initial_tail(2))
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    expected = torch.nn.functional.conv1d(padded, conv.weight[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(tail, x[:, 9 - (width - 1) :])


@torch.no_grad()
def test_packed_rows_and_cuts_change_nothing():
    """Rows shorter than the kernel, empty ones, and tails that still hold tokens of an earlier piece."""
    conv = ShortConv(6, 4).double()
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    whole, end = conv(x, conv.initial_tail(3))
    tail, done, parts = conv.initial_tail(3), [0, 0, 0], [[], [], []]
    for lengths in ([2, 0, 8], [1, 5, 0], [5, 3, 0]):
        rows = Rows(lengths, x.device)
        stream = torch.cat([x[row, done[row] : done[row] + length] for row, length in enumerate(lengths)])[
            None
        ]
        y, tail = conv(stream, tail, rows)
        for row, piece in enumerate(y[0].split(lengths)):
            parts[row].append(piece)
            done[row] += lengths[row]
    for row in range(3):
        torch.testing.assert_close(torch.cat(parts[row]), whole[row], rtol=0, atol=1e-12)
    assert torch.equal(tail, end)


def test_rows_pad_and_pack_are_inverse():
    rows = Rows([2, 0, 3], torch.device("cpu"))
    stream = torch.randn(1, 5, 4)
    padded = rows.pad(stream)
    assert padded.shape == (3, 3, 4)
    assert not padded[1].any()
    assert not padded[0, 2:].any()
    assert torch.equal(rows.pack(padded), stream)
    assert rows.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert rows.cu_seqlens.dtype == torch.int32
