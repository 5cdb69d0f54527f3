"""Files that are whole or not there, and the folder that caches share."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.safety.files import cache_folder, cache_home, write_whole


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("PREFOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_the_cache_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_home() == home / ".cache" / "prefopt"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert cache_home() == home / "elsewhere" / "prefopt"
    monkeypatch.setenv("PREFOPT_CACHE", "~/own")
    assert cache_home() == home / "own"


def test_what_an_earlier_release_kept_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = home / ".cache" / "prefopt" / "reference"
    old.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert cache_folder("reference") == old
    assert cache_folder("embeddings") == cache_home() / "embeddings"
    (cache_home() / "reference").mkdir(parents=True)
    assert cache_folder("reference") == cache_home() / "reference"
    monkeypatch.setenv("PREFOPT_CACHE", str(home / "own"))
    assert cache_folder("reference") == home / "own" / "reference"


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("before")

    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
