"""The fields of a config.json, each with a type and bounds: the file comes with a model and may say anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.bounded_json import JsonError, flag, integer, number, shown, text
from octavo.errors import ModelError

# Far above every published model, and low enough that a tensor of any two of these sizes has less than 2^63 bytes.
MAX_LAYERS = 1000
MAX_HEADS = 2**14
MAX_HEAD_SIZE = 2**13
MAX_WIDTH = 2**20
MAX_MLP_WIDTH = 2**23
MAX_TOKENS = 2**24
MAX_POSITIONS = 2**31
DEFAULT_CONTEXT = 2048  # the default of transformers for the families that octavo supports


class ConfigFields:
    """Reads typed fields; ModelError names the key, its value and what it must be. `where` names the object."""

    def __init__(self, source: Mapping[str, Any], where: str = "The model's config.json") -> None:
        self.source = source
        self.where = where

    def size(self, key: str, *, most: int, least: int = 1, default: int | None = None) -> int:
        """An integer from `least` to `most`; `default` for a key that is absent or null."""
        try:
            return integer(self.source, key, least=least, most=most, default=default)
        except JsonError as error:
            raise self.wrong(str(error)) from error

    def vocabulary(self, key: str = "vocab_size") -> int:
        """The number of tokens."""
        return self.size(key, most=MAX_TOKENS)

    def width(self, key: str = "hidden_size") -> int:
        """The width of the model."""
        return self.size(key, most=MAX_WIDTH)

    def mlp_width(self, key: str = "intermediate_size", *, default: int | None = None) -> int:
        """The width of the MLP."""
        return self.size(key, most=MAX_MLP_WIDTH, default=default)

    def layers(self, key: str = "num_hidden_layers") -> int:
        """The number of blocks."""
        return self.size(key, most=MAX_LAYERS)

    def heads(self, key: str = "num_attention_heads", *, default: int | None = None) -> int:
        """A number of heads."""
        return self.size(key, most=MAX_HEADS, default=default)

    def head_size(self, key: str = "head_dim", *, default: int) -> int:
        """The size of a head, or the number of its values that are rotated."""
        return self.size(key, most=MAX_HEAD_SIZE, default=default)

    def positions(self, key: str = "max_position_embeddings", *, default: int = DEFAULT_CONTEXT) -> int:
        """A number of positions, such as the context that the model was made for."""
        return self.size(key, most=MAX_POSITIONS, default=default)

    def epsilon(self, key: str, *, default: float) -> float:
        """The epsilon of a norm."""
        return self.number(key, least=0.0, most=1.0, default=default)

    def number(self, key: str, *, most: float, least: float, default: float | None = None) -> float:
        """A number from `least` to `most`; `default` for a key that is absent or null."""
        try:
            return float(number(self.source, key, least=least, most=most, default=default))
        except JsonError as error:
            raise self.wrong(str(error)) from error

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A truth value; `default` for a key that is absent or null."""
        try:
            return flag(self.source, key, default=default)
        except JsonError as error:
            raise self.wrong(str(error)) from error

    def text(self, key: str, *, default: str) -> str:
        """A string; `default` for a key that is absent or null."""
        try:
            return text(self.source, key, default=default)
        except JsonError as error:
            raise self.wrong(str(error)) from error

    def flags(self, key: str, *, default: list[bool]) -> list[bool]:
        """A list of truth values, each true, false, 1 or 0; `default` for a key that is absent or null."""
        value = self.source.get(key)
        if value is None:
            return default
        if not isinstance(value, list) or not all(isinstance(item, int) and item in (0, 1) for item in value):
            raise self.wrong(f"{key} is {shown(value)}; it must be a list of 0 and 1")
        return [bool(item) for item in value]

    def numbers(self, key: str, *, count: int, least: float, most: float) -> list[float]:
        """A list of `count` numbers from `least` to `most`."""
        value = self.source.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(f"{key} is {shown(value)}; it must be a list of {count} numbers")
        return [ConfigFields({key: item}, self.where).number(key, least=least, most=most) for item in value]

    def texts(self, key: str) -> list[str]:
        """A list of strings; [] for a key that is absent or null."""
        value = self.source.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(f"{key} is {shown(value)}; it must be a list of strings")
        return value

    def object(self, key: str) -> ConfigFields | None:
        """The fields of an object; None for a key that is absent, null or an empty object."""
        value = self.source.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(f"{key} is {shown(value)}; it must be an object")
        return ConfigFields(value, f"{self.where}, {key}")

    def wrong(self, message: str) -> ModelError:
        """The error of a field."""
        return ModelError(f"{self.where}: {message}.", hint="Is the file complete, and is it the model's own?")
