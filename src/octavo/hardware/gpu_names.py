"""Recognizes a GPU of the table by its name: the driver's, or the one that a person types for `octavo plan --gpu`."""

from __future__ import annotations

import re
from difflib import get_close_matches

from octavo.hardware.gpus import GPUS, Peak

# Words of a name that people leave out.
_BRANDS = frozenset({"nvidia", "geforce", "tesla", "quadro", "rtx", "gtx"})
# Words for a different GPU with the same number: an RTX 3080 Ti is not an RTX 3080.
_VARIANTS = frozenset({
    "ti", "super", "d", "laptop", "mobile", "max", "maxq", "nvl", "mig", "ada", "blackwell", "cnx",
})  # fmt: skip
# The profile of a virtual GPU, which has a part of the memory and throughput: the 4Q of "GRID T4-4Q", the 2B4 of
# "GRID T4-2B4", the 10CME of "NVIDIA H100-1-10CME". Source: NVIDIA, Virtual GPU Software User Guide, "Virtual GPU
# Types". Or a number of GPUs: the 2x of "2x RTX 4090".
_NOT_ONE_GPU = re.compile(r"\d+[abcq]\d*|\d+cme|\d*x\d*")
_NUMBER_BEFORE = re.compile(r"\W*\d{1,3}\b(?!\s*gi?b)")  # "2 RTX 4090", but "80 GB A100" is one GPU
_SIZE = re.compile(r"(\d+)gb")
_SIZE_TOLERANCE = 0.02  # names have the size of the data sheet: 141GB for an H200


def peak(name: str) -> Peak | None:
    """The row of GPUS for a GPU name of the driver ("NVIDIA A100-SXM4-80GB"); None for an unknown GPU."""
    key = _key(name)
    return None if key is None else GPUS[key]


def gpu_named(name: str) -> str | None:
    """The key of GPUS that a person means: its name from the driver, or the key in any case, with or without blanks and
    brand. 4090, RTX4090 and "rtx 4090" are the RTX 4090; 1080Ti is the GTX 1080 Ti.

    None for an unknown name and for one of several GPUs: A100. RTX5000 is the Quadro RTX 5000 of 2018: the RTX 5000 Ada
    is another GPU.
    """
    if (key := _key(name)) is not None:
        return key
    if not _is_one_gpu(name):
        return None
    words = _words(name)
    brands = words & _BRANDS
    for key in sorted(GPUS, key=lambda key: -len(_words(key))):  # the longest first, as for a driver's name
        of_key = _words(key)
        surplus = {word for word in words - of_key - _BRANDS if not _SIZE.fullmatch(word)}
        of_another = brands - of_key - {"nvidia", "geforce", "tesla"}
        if not surplus and not of_another and _matches(key, words | (of_key & _BRANDS)):
            return key
    return None


def gpus_with(name: str) -> list[str]:
    """The keys of GPUS that have all words of `name` but its brand: three for A100."""
    words = _words(name) - _BRANDS
    return [key for key in GPUS if words and words <= _words(key)]


def other_sizes(name: str) -> list[str]:
    """The keys of GPUs that have the name of `name` and another memory."""
    key = _key(name)
    if key is None:
        return []
    return [other for other in GPUS if re.fullmatch(rf"{key} \d+GB", other)]


def nearest(name: str, most: int = 4) -> list[str]:
    """The keys of GPUS that resemble an unknown name, the nearest first: RTX 3060 for 3060. Empty if none does."""
    words = _words(name)
    numbers = {word for word in words if re.search(r"\d", word) and not _SIZE.fullmatch(word)}
    similar = [key for key in GPUS if numbers & _words(key)]
    if similar:
        return sorted(similar, key=lambda key: len(words ^ _words(key)))[:most]
    keys = {key.lower(): key for key in GPUS}
    return [keys[match] for match in get_close_matches(name.lower(), keys, n=most)]


def _key(name: str) -> str | None:
    words = _words(name)
    if not _is_one_gpu(name):
        return None
    matches = [key for key in GPUS if _matches(key, words)]
    return max(matches, key=lambda key: len(_words(key)), default=None)


def _is_one_gpu(name: str) -> bool:
    """Whether a name is not that of a part of a GPU or of several GPUs."""
    is_one = _NUMBER_BEFORE.match(name.lower()) is None
    return is_one and not any(_NOT_ONE_GPU.fullmatch(word) for word in _words(name))


def _matches(key: str, words: frozenset[str]) -> bool:
    """Whether a name of these words is of the GPU `key`: all words of the key, no variant, and no other memory size."""
    of_key, memory = _words(key), GPUS[key].memory_gib
    if not of_key <= words or (words - of_key).intersection(_VARIANTS):
        return False
    sizes = [float(match[1]) for word in words if (match := _SIZE.fullmatch(word))]
    return all(memory is not None and abs(size - memory) <= _SIZE_TOLERANCE * memory for size in sizes)


def _words(name: str) -> frozenset[str]:
    """The words of a name in lower case: RTX4060Ti is RTX 4060 Ti, and 12 GB is 12GB."""
    spaced = re.sub(
        r"(?<=quadro)(?=rtx)|(?<=[rg]tx)(?=a?\d)|(?<=\d)(?=ti|super)|(?<=\bti)(?=super)|(?<=\dti)(?=super)",
        " ",
        name.lower().replace("\u00d7", "x"),
    )
    joined = re.sub(r"\b(\d{1,3})\s*gi?b\b", r"\1gb", spaced)
    return frozenset(re.findall(r"[a-z0-9]+", joined))
