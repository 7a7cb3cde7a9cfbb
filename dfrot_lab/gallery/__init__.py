"""The gallery: results, figures and executed notebooks as one static site that asks no other host."""

from __future__ import annotations

from dfrot_lab.gallery.entries import GalleryError
from dfrot_lab.gallery.site import build

__all__ = ["GalleryError", "build"]
