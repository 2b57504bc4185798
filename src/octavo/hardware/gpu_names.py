"""Recognizes a GPU of the table by its name: the driver's, or the one that a person types for `octavo plan --gpu`."""

from __future__ import annotations

import re
from difflib import get_close_matches

from octavo.hardware.gpus import GPUS, Peak

# Words of a name that people leave out.
_BRANDS = frozenset({"nvidia", "geforce", "tesla", "quadro", "rtx", "gtx"})
# Words for a different GPU with the same number: an RTX 3080 Ti is not an RTX 3080.
_VARIANTS = frozenset({
    "ti", "super", "d", "laptop", "mobile", "max", "maxq", "nvl", "mig", "ada", "blackwell", "cnx", "fhhl",
})  # fmt: skip
# The profile of a virtual GPU, which has a part of the memory and throughput: the 4Q of "GRID T4-4Q", the 2B4 of
# "GRID T4-2B4", the 10CME of "NVIDIA H100-1-10CME". Source: NVIDIA, Virtual GPU Software User Guide, "Virtual GPU
# Types". Or a number of GPUs: the 2x of "2x RTX 4090".
_NOT_ONE_GPU = re.compile(r"\d+[abcq]\d*|\d+cme|\d*x\d*")
_NUMBER_BEFORE = re.compile(r"\W*\d{1,3}\b(?!\s*gi?b)")  # "2 RTX 4090", but "80 GB A100" is one GPU
_SIZE = re.compile(r"(\d+)gb")
_SIZE_TOLERANCE = 0.02  # names have the size of the data sheet: 141GB for an H200
_LIKENESS = 0.8  # of two names, by difflib, between which there is a typing error


def peak(name: str) -> Peak | None:
    """The row of GPUS for a GPU name of the driver ("NVIDIA A100-SXM4-80GB"); None for an unknown GPU."""
    key = _key(name)
    return None if key is None else GPUS[key]


def gpu_named(name: str) -> str | None:
    """The key of GPUS that a person means: its name from the driver, or the key in any case, with or without blanks and
    brand. 4090, RTX4090 and "rtx 4090" are the RTX 4090; 1080Ti is the GTX 1080 Ti.

    None for an unknown name and for one of several GPUs: A100, Titan. RTX5000 is the Quadro RTX 5000 of 2018: the RTX
    5000 Ada is another GPU.
    """
    name = _in_gb(name)
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
        optional = of_key & _BRANDS if of_key & _BRANDS and any(map(_number, of_key)) else frozenset()
        if not surplus and not of_another and _matches(key, words | optional):
            return key
    return None


def _in_gb(name: str) -> str:
    """The name with a memory size as names of GPUs have it: 8GB for 8G, 8 GiB and 8192MiB."""
    name = re.sub(r"(?i)\b(\d+)\s*mi?b\b", lambda size: f"{round(int(size[1]) / 1024)}GB", name)
    return re.sub(r"(?i)\b(\d+)\s*(?:g|gib)\b", r"\1GB", name)


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
    """The keys of GPUS that an unknown name may be a wrong spelling of: RTX 4090 for "RXT 4090" and for "GTX 4090".

    They have the numbers and the variants of the name, so an RTX 5060 is not near to a GTX 1060, nor an RTX 4090 to an
    "RTX 4090 Laptop". A memory size ("RTX 4090 48GB") and a number of GPUs ("2x RTX 4090") are not compared. Empty if
    there is none.
    """
    counted = re.sub(r"^\W*\d{1,2}\s*x?\s+(?=\D)|\bx\d{1,2}$", "", name.lower())  # "2x RTX 4090": one of them is used
    words = _without_sizes(counted)
    if not _is_one_gpu(counted) or not any(map(_number, words)):
        return []
    variants, plain = words & _VARIANTS, words - _BRANDS
    keys = [key for key in GPUS if _without_sizes(key) & _VARIANTS == variants]
    same = [key for key in keys if _without_sizes(key) - _BRANDS == plain]
    if not same:
        joined, typed = {key: _joined(key) for key in keys}, _joined(counted)
        exact = [typed] if typed in joined.values() else []
        alike = exact or get_close_matches(typed, joined.values(), n=most, cutoff=_LIKENESS)
        same = [key for key in keys if joined[key] in alike and _numbers(joined[key]) == _numbers(typed)]
    return same[:most]


def _joined(name: str) -> str:
    """The letters and digits of a name without its maker: rtxa6000 for "NVIDIA RTX A 6000"."""
    return re.sub(r"^nvidia|geforce|tesla", "", "".join(re.findall(r"[a-z0-9]+", name.lower())))


def _numbers(joined: str) -> tuple[list[str], str]:
    """(the numbers of a name, the letters after the last one): these make another GPU, as the D of a 4090D."""
    return re.findall(r"\d+", joined), joined[len(joined.rstrip("abcdefghijklmnopqrstuvwxyz")) :]


def _without_sizes(name: str) -> frozenset[str]:
    """The words of a name but its memory size."""
    return frozenset(word for word in _words(name) if not _SIZE.fullmatch(word))


def _number(word: str) -> bool:
    """Whether a word of a name has the number of a GPU."""
    return any(character.isdigit() for character in word)


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
        r"(?<=quadro)(?=rtx)|(?<=titan)(?=rtx|xp|v)|(?<=[rg]tx)(?=a?\d)|(?<=\d)(?=ti|super)|(?<=\bti)(?=super)|(?<=\dti)(?=super)",
        " ",
        name.lower().replace("\u00d7", "x"),
    )
    joined = re.sub(r"\b(\d{1,3})\s*gi?b\b", r"\1gb", spaced)
    return frozenset(re.findall(r"[a-z0-9]+", joined))
