"""Quantization and Hadamard arithmetic: `reference` is the truth each kernel is held against."""
