"""pip's settings: the same values as pip's own configuration, for every file and variable that it reads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from octavo.errors import ModelError
from octavo.store.package_index.settings import DEFAULT_INDEX, Settings, configuration_files, read_settings


def test_without_settings_pips_defaults_apply() -> None:
    assert read_settings({"PIP_CONFIG_FILE": os.devnull}) == Settings(indexes=(DEFAULT_INDEX,))


def test_every_setting_is_read_from_the_environment() -> None:
    actual = read_settings(
        {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "https://a/simple",
            "PIP_EXTRA_INDEX_URL": "https://b https://c",
            "PIP_FIND_LINKS": "/d /e",
            "PIP_PROXY": "proxy:3128",
            "PIP_CERT": "/ca.pem",
            "PIP_CLIENT_CERT": "/own.pem",
            "PIP_TRUSTED_HOST": "a b:8080",
            "PIP_DEFAULT_TIMEOUT": "7",
            "UV_INDEX_URL": "https://uv",
        }
    )
    assert actual == Settings(
        ("https://a/simple", "https://b", "https://c"), ("/d", "/e"), "proxy:3128", "/ca.pem", "/own.pem",
        frozenset({"a", "b:8080"}), 7.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "indexes"),
    [
        ({"PIP_NO_INDEX": "1", "PIP_EXTRA_INDEX_URL": "https://b"}, ()),
        ({"PIP_NO_INDEX": "0"}, (DEFAULT_INDEX,)),
        ({"PIP_INDEX_URL": ""}, (DEFAULT_INDEX,)),
        ({"UV_INDEX_URL": "https://uv"}, ("https://uv",)),
        ({"UV_INDEX_URL": "https://uv", "UV_DEFAULT_INDEX": "https://new"}, ("https://new",)),
    ],
)
def test_the_settings_select_the_indexes(environ: dict[str, str], indexes: tuple[str, ...]) -> None:
    assert read_settings({"PIP_CONFIG_FILE": os.devnull, **environ}).indexes == indexes


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="the places of Linux")
def test_stronger_configuration_files_override_weaker_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    environ = {
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_DIRS": f"{tmp_path / 'strong'}:{tmp_path / 'weak'}",
        "PIP_CONFIG_FILE": str(tmp_path / "named.conf"),
    }
    user_file = tmp_path / "home" / ".config" / "pip" / "pip.conf"
    files = list(configuration_files(environ))
    assert files == [
        tmp_path / "weak" / "pip" / "pip.conf", tmp_path / "strong" / "pip" / "pip.conf", Path("/etc/pip.conf"),
        tmp_path / "home" / ".pip" / "pip.conf", user_file, Path(sys.prefix) / "pip.conf", tmp_path / "named.conf",
    ]  # fmt: skip
    for path in (files[0], files[3], user_file):
        path.parent.mkdir(parents=True)
        path.write_text(f"[global]\nindex_url = https://{path.parent.parent.name}/\n")
    assert read_settings(environ).indexes[:1] == ("https://.config/",)
    user_file.write_text(
        "[global]\n--index-url = https://a\ntimeout = x\n[install]\nextra-index-url =\n  https://b\n  https://c\n"
    )
    assert read_settings(environ).indexes == ("https://a", "https://b", "https://c")
    Path(environ["PIP_CONFIG_FILE"]).write_text("[install]\nindex-url = https://named/%(x)s\n[other]\ncert = x\n")
    assert read_settings(environ).indexes[0] == "https://named/%(x)s"
    assert read_settings(environ).cert != "x"
    assert read_settings({**environ, "PIP_INDEX_URL": "https://own"}).indexes[0] == "https://own"


def test_the_error_of_an_invalid_configuration_file_does_not_quote_it(tmp_path: Path) -> None:
    (path := tmp_path / "pip.conf").write_text("index-url = https://me:cret@host\n")
    with pytest.raises(ModelError) as caught:
        read_settings({"PIP_CONFIG_FILE": str(path)})
    assert str(path) in caught.value.message
    assert "cret" not in str(caught.value)
