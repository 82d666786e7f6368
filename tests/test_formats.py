"""Four and eight bits with scales by the block: a table of exact values, and torchao's bits where it is installed."""

import importlib.util

import pytest
import torch

from distill.formats import BLOCKS, e2m1


def block(*values: float, size: int) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (size - len(values))]])


def test_the_four_bit_numbers_and_their_ties():
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1(torch.tensor(numbers)).tolist() == numbers
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4}  # to the even mantissa
    assert e2m1(torch.tensor(list(ties))).tolist() == list(ties.values())
    assert e2m1(-torch.tensor(list(ties))).tolist() == [-v for v in ties.values()]
    nearby = {0.26: 0.5, 0.74: 0.5, 1.26: 1.5, 2.51: 3, 4.99: 4, 5.01: 6, 7.9: 6, 100.0: 6}
    assert e2m1(torch.tensor(list(nearby))).tolist() == list(nearby.values())


@pytest.mark.parametrize(
    ("name", "values", "kept"),
    [
        # the largest is 10: scale 2 (8 is 4 * 2), so 10 / 2 = 5 is a tie and 4; 3.1 / 2 is 1.5
        ("mxfp4", (10.0, -3.1, 0.4), (8.0, -3.0, 0.0)),
        ("mxfp4", (7.9, 1.0), (6.0, 1.0)),  # scale 1, and 7.9 is above all numbers
        # 3e-5 is 1.97 * 2^-16, so the scale is 2^-18: 7.86 is above all numbers, -2.62 is nearest to -3
        ("mxfp4", (3e-5, -1e-5), (6 * 2**-18, -3 * 2**-18)),
        # 1.0: 256 is the largest power of two of E4M3, so the scale is 2^-8; 3 bits of mantissa
        ("mxfp8", (1.0, 0.34, -0.0171), (1.0, 88 / 256, -4.5 / 256)),
        ("mxfp8", (1.9, 500 / 256), (1.75, 1.75)),
        # one block alone: the tensor's scale is 6 / 2688, the block's 448, and 1 is 6 sixths of 1
        ("nvfp4", (6.0, 2.6, -0.2), (6.0, 3.0, -0.0)),
        ("nvfp4", (0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_a_block_by_hand(name, values, kept):
    form = BLOCKS[name]
    found = form.round_trip(block(*values, size=form.size))[0, : len(values)]
    torch.testing.assert_close(found, torch.tensor(kept), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_apart_ragged_ends_are_blocks_and_what_is_not_finite_shows(name):
    form = BLOCKS[name]
    torch.manual_seed(0)
    matrix = torch.randn(3, 2 * form.size + 5)
    kept = form.round_trip(matrix)
    assert kept.shape == matrix.shape and not torch.equal(kept, matrix)
    torch.testing.assert_close(form.round_trip(kept), kept)  # what is in the format stays
    if name != "nvfp4":  # its tensor scale joins the blocks
        torch.testing.assert_close(
            form.round_trip(matrix[:, : form.size]), kept[:, : form.size], rtol=0, atol=0
        )
    bad = matrix.clone()
    bad[1, 0], bad[2, form.size] = torch.inf, torch.nan
    lost = form.round_trip(bad).isnan()
    assert lost[1, : form.size].all() and lost[2, form.size : 2 * form.size].all()
    assert lost.sum() == 2 * form.size
    for value in (torch.inf, torch.nan):  # the others are what they are without that block
        bad, without = matrix.clone(), matrix.clone()
        bad[1, 0], without[1, : form.size] = value, 0
        found = form.round_trip(bad)
        assert found[1, : form.size].isnan().all()
        found[1, : form.size] = 0
        assert torch.equal(found, form.round_trip(without))
    assert form.bits == {"mxfp4": 4.25, "mxfp8": 8.25, "nvfp4": 4.5}[name]


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is an extra: pip install torchao"
)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_the_very_bits_of_torchaos_reference_casts(scale):
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    torch.manual_seed(1)
    matrix = torch.randn(64, 256) * scale * torch.logspace(-3, 1, 64)[:, None]
    matrix[32:] = matrix[32:].bfloat16().float()  # few digits: many ties
    for name, dtype in (("mxfp4", torch.float4_e2m1fn_x2), ("mxfp8", torch.float8_e4m3fn)):
        scales, data = to_mx(matrix, dtype, 32, ScaleCalculationMode.FLOOR)
        theirs = to_dtype(data, scales, dtype, 32, torch.float32)
        assert torch.equal(BLOCKS[name].round_trip(matrix), theirs)
    of_tensor = per_tensor_amax_to_scale(matrix.abs().amax())
    scales, data = nvfp4_quantize(matrix, 16, of_tensor)
    numbers = f4_unpacked_to_f32(unpack_uint4(data)).view(64, -1, 16)
    theirs = (numbers * (of_tensor * scales.float()).view(64, -1, 1)).view(64, 256)
    assert torch.equal(BLOCKS["nvfp4"].round_trip(matrix), theirs)
