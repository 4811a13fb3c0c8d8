"""What bfloat16 costs on the CPU of this machine."""

import torch


def slow_bfloat16() -> str:
    """Why autocast to bfloat16 makes a training on this CPU slower instead of faster; "" where it does not.

    oneDNN computes in bfloat16 with instructions for it (avx512_bf16, amx_bf16; on ARM bf16), emulates them with AVX-512,
    and leaves convolutions to a plain loop without. Ratios are of a training step of a toy with ResNet-18 on one thread
    (docs/performance.md).
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions and no AVX-512: autocast to bf16 is 10 to 50 times slower than float32"
    if torch.cpu._is_avx512_supported() and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "this CPU emulates bfloat16 with AVX-512: autocast to bf16 is about twice as slow as float32"
    return ""
