"""Configuration: every source, every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyrannc._dropped_items import DROPPED_ITEMS
from pyrannc.config import ITEMS, Config
from pyrannc.errors import ConfigurationError


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rannc_conf.toml"
    path.write_text(text)
    return path


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Config.load(environ)
    return str(caught.value)


def test_defaults(home: dict[str, str]) -> None:
    config = Config.load(home)
    assert config == Config()
    assert (config.partition_num, config.max_pipeline, config.mem_margin) == (0, 512, 0.1)
    assert (config.schedule, config.load_deployment) == ("auto", False)
    assert config.report() == "configuration: every item has its default value"


def test_file_then_variables(home: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / ".pyrannc", 'partition_num = 2\nmem_limit_gb = 3\nschedule = "1f1b"\n')
    config = Config.load({**home, "RANNC_PARTITION_NUM": " 4 "})
    assert (config.partition_num, config.mem_limit_gb, config.schedule) == (4, 3, "1f1b")
    assert config.report().splitlines() == [
        "configuration:",
        "  partition_num = 4  (the variable RANNC_PARTITION_NUM)",
        f"  mem_limit_gb = 3  ({path})",
        f"  schedule = '1f1b'  ({path})",
    ]


def test_folder_from_the_environment(home: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / ".pyrannc", "partition_num = 2")
    write(tmp_path / "other", "replica_num = 2")
    config = Config.load({**home, "RANNC_CONF_DIR": str(tmp_path / "other")})
    assert (config.partition_num, config.replica_num) == (0, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("YES", True), ("1", True), ("False", False), ("no", False), ("0", False)],
)
def test_booleans_in_variables(text: str, value: bool) -> None:
    assert Config.load({"HOME": "/nowhere", "RANNC_SAVE_DEPLOYMENT": text}).save_deployment is value


def test_an_empty_variable_is_not_set() -> None:
    assert Config.load({"HOME": "/nowhere", "RANNC_PARTITION_NUM": ""}) == Config()


@pytest.mark.parametrize(
    ("variable", "text", "needed"),
    [
        ("RANNC_PARTITION_NUM", "-1", "a whole number of at least 0"),
        ("RANNC_PARTITION_NUM", "two", "a whole number of at least 0"),
        ("RANNC_PIPELINE_NUM", "2.0", "a whole number of at least 0"),
        ("RANNC_MAX_PIPELINE", "0", "a whole number of at least 1"),
        ("RANNC_MEM_LIMIT_GB", "nan", "a finite number of at least 0"),
        ("RANNC_MEM_MARGIN", "1", "a number from 0 up to, but not including, 1"),
        ("RANNC_TIMEOUT_S", "0", "a finite number above 0"),
        ("RANNC_SCHEDULE", "gpipe", "one of `auto`, `fill_drain`, `1f1b`"),
        ("RANNC_LOAD_DEPLOYMENT", "on", "true or false (in a variable also 1, 0, yes, no)"),
    ],
)
def test_bad_variable(home: dict[str, str], variable: str, text: str, needed: str) -> None:
    message = refusal({**home, variable: text})
    item = variable.removeprefix("RANNC_").lower()
    assert message.startswith(f"`{item}` from the variable {variable} is ")
    assert message.endswith(f"needed {needed}")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("partition_num = true", "True"),
        ("partition_num = 2.5", "2.5"),
        ('mem_limit_gb = "4"', "'4'"),
        ("save_deployment = 1", "1"),
        ('deployment_file = ""', "''"),
        ("partition_num = [2]", "[2]"),
    ],
)
def test_bad_value_in_the_file(home: dict[str, str], tmp_path: Path, line: str, found: str) -> None:
    path = write(tmp_path / ".pyrannc", line)
    item = line.split(" ")[0]
    assert refusal(home).startswith(f"`{item}` from {path} is {found}, needed ")


def test_unknown_names_are_errors(home: dict[str, str], tmp_path: Path) -> None:
    message = refusal({**home, "RANNC_PARTITION_NUMS": "2"})
    assert "there is no configuration item `RANNC_PARTITION_NUMS`" in message
    assert message.endswith("hint: did you mean `partition_num`?")
    path = write(tmp_path / ".pyrannc", "[profile]\nx = 1\n")
    assert f"there is no configuration item `profile` (found in {path})" in refusal(home)


def test_names_without_a_near_one_list_all(home: dict[str, str]) -> None:
    assert f"hint: the items are {', '.join(ITEMS)}" in refusal({**home, "RANNC_QQ": "1"})


def test_dropped_items_warn(home: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="`RANNC_DP_SEARCH_ALL` in the environment has no effect"):
        assert Config.load({**home, "RANNC_DP_SEARCH_ALL": "true"}) == Config()
    assert not set(DROPPED_ITEMS) & set(ITEMS)


def test_malformed_file_names_file_and_line(home: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / ".pyrannc", "partition_num = 2\nreplica_num = = 3\n")
    message = refusal(home)
    assert f"{path} is not valid TOML" in message
    assert "line 2" in message


def test_file_that_is_not_text(home: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / ".pyrannc", "").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the configuration file" in refusal(home)


def test_bad_folder(home: dict[str, str], tmp_path: Path) -> None:
    assert "which is not a folder" in refusal({**home, "RANNC_CONF_DIR": str(tmp_path / "no")})
    assert "which has no rannc_conf.toml" in refusal({**home, "RANNC_CONF_DIR": str(tmp_path)})


def test_range_of_microbatches(home: dict[str, str]) -> None:
    message = refusal({**home, "RANNC_MIN_PIPELINE": "8", "RANNC_MAX_PIPELINE": "4"})
    assert "`min_pipeline` is 8 but `max_pipeline` is only 4" in message


@pytest.mark.parametrize(
    "arguments", [{"partition_num": -1}, {"schedule": "1F1B"}, {"mem_margin": "0.1"}]
)
def test_arguments_are_checked_too(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="from an argument of `Config` is"):
        Config(**arguments)


def test_cache_folder() -> None:
    assert Config(profile_cache_dir="off").profile_cache_path() is None
    assert Config(profile_cache_dir="/a/b").profile_cache_path() == Path("/a/b")
