"""The Triton kernels' host functions, under the names and signatures of `reference`."""

from dfrot_kernels.attention import decode_attention
from dfrot_kernels.error import quantize_error, rotate_quantize_error
from dfrot_kernels.hadamard_tokens import hadamard_quantize
from dfrot_kernels.kv import dequantize_kv, quantize_kv
from dfrot_kernels.matmul import matmul
from dfrot_kernels.matmul_fp import matmul_fp
from dfrot_kernels.reference import KV, Tokens, Weight, pack, pack_weight, unpack
from dfrot_kernels.tokens import add_norm_quantize, quantize_int4

__all__ = [
    "KV",
    "Tokens",
    "Weight",
    "add_norm_quantize",
    "decode_attention",
    "dequantize_kv",
    "hadamard_quantize",
    "matmul",
    "matmul_fp",
    "pack",
    "pack_weight",
    "quantize_error",
    "quantize_int4",
    "quantize_kv",
    "rotate_quantize_error",
    "unpack",
]
