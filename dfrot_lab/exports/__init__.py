"""Exports: rotated models in the formats of other engines, each checked after it is written."""
