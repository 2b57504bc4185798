"""Layers that act on any module and know no family: frozen matrices, low-rank pairs, the key/value cache."""
