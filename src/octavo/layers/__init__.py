"""Layers that act on any module and know no family: frozen matrices, LoRA, the key/value cache."""
