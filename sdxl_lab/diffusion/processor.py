"""What the processor can do, as torch finds it: the one place of the rules that depend on it."""

import torch

# What torch's kernels for convolutions and matrix products ask of an x86 processor.
NEEDED = {"bfloat16": "AVX-512", "float16": "AVX-512 FP16"}


def capability() -> str:
    """The vector instructions that torch's kernels use here, such as AVX2 or AVX512."""
    return torch.backends.cpu.get_cpu_capability()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has this processor's kernels for numbers of `dtype`. Without them torch computes with them one by
    one: with AVX2 only, a convolution in bfloat16 takes more than ten times as long as one in float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
