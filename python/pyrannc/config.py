"""Configuration: what a user can set without touching the training script.

Items come from `rannc_conf.toml`, in the folder that `RANNC_CONF_DIR` names or else in
`~/.pyrannc`, and from environment variables `RANNC_<ITEM>`, which win. Nothing is read before
`Config.load` is called. A value that is not allowed is an error that names the item, where it was
set, what was found and what is needed; so is a name that does not exist. Items of the original
RaNNC that are gone are named in a warning and change nothing.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyrannc._dropped_items import DROPPED_ITEMS
from pyrannc.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "rannc_conf.toml"
PREFIX = "RANNC_"
CONF_DIR_VARIABLE = "RANNC_CONF_DIR"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Allowed:
    """Which values an item takes: `accepts` checks one, `parse` makes one from a text."""

    needed: str
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any]


def _item(default: _Value, meaning: str, allowed: _Allowed) -> _Value:
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(minimum: int) -> _Allowed:
    return _Allowed(
        f"a whole number of at least {minimum}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        int,
    )


def _number(needed: str, holds: Callable[[float], bool]) -> _Allowed:
    return _Allowed(needed, lambda value: _is_number(value) and holds(value), float)


def _one_of(*names: str) -> _Allowed:
    needed = "one of " + ", ".join(f"`{name}`" for name in names)
    return _Allowed(needed, lambda value: value in names, str)


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_BOOLEAN = _Allowed(
    "true or false (in a variable also 1, 0, yes, no)",
    lambda value: isinstance(value, bool),
    lambda text: _WORDS[text.lower()],
)
_PATH = _Allowed("a path", lambda value: isinstance(value, str) and value != "", str)
_NOT_NEGATIVE = _number("a finite number of at least 0", lambda x: 0 <= x < float("inf"))
_POSITIVE = _number("a finite number above 0", lambda x: 0 < x < float("inf"))
_FRACTION = _number("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1)


@dataclass(frozen=True)
class Config:
    """All items with their values; `given` says where those that somebody set came from."""

    partition_num: int = _item(0, "number of stages; 0: RaNNC decides", _whole(0))
    replica_num: int = _item(0, "replicas of every stage; 0: RaNNC decides", _whole(0))
    pipeline_num: int = _item(0, "number of microbatches; 0: RaNNC decides", _whole(0))
    min_pipeline: int = _item(1, "fewest microbatches to consider", _whole(1))
    max_pipeline: int = _item(512, "most microbatches to consider", _whole(1))
    max_partition_num: int = _item(
        32, "most blocks that the planner makes stages of; more is finer and slower", _whole(1)
    )
    schedule: str = _item(
        "auto", "order of forward and backward passes", _one_of("auto", "fill_drain", "1f1b")
    )
    recompute: bool = _item(
        True, "let the planner save memory by computing values again in the backward", _BOOLEAN
    )
    sharding: str = _item(
        "none",
        "the most that the replicas of a stage may divide where memory is short: optimizer state, "
        "also gradients, also parameters",
        _one_of("none", "optimizer", "gradients", "parameters"),
    )
    mem_limit_gb: float = _item(
        0, "use at most this many GiB of each device; 0: all of its memory", _NOT_NEGATIVE
    )
    mem_margin: float = _item(0.1, "part of the memory to leave free", _FRACTION)
    opt_param_factor: float = _item(
        0, "bytes of optimizer state for each parameter byte; 0: ask the optimizer", _NOT_NEGATIVE
    )
    measure: bool = _item(
        True, "time the operators; false: estimate them from their sizes", _BOOLEAN
    )
    profile_cache_dir: str = _item(
        "~/.cache/pyrannc", "folder that keeps measured times; `off`: keep none", _PATH
    )
    planner_inputs_dir: str = _item(
        "off",
        "folder to write what the planner was given: graph, cluster, profile; `off`: nowhere",
        _PATH,
    )
    timeout_s: float = _item(600, "seconds to wait for another rank before giving up", _POSITIVE)
    save_deployment: bool = _item(False, "write the plan to `deployment_file`", _BOOLEAN)
    load_deployment: bool = _item(False, "read the plan from `deployment_file`", _BOOLEAN)
    deployment_file: str = _item("rannc_deployment.json", "where the plan is kept", _PATH)
    show_config_items: bool = _item(False, "print the items that were set, on rank 0", _BOOLEAN)
    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Checks every value, wherever it came from."""
        for name in ITEMS:
            _check(name, getattr(self, name), self.given.get(name, "an argument of `Config`"))
        if self.min_pipeline > self.max_pipeline:
            found = f"`min_pipeline` is {self.min_pipeline} but `max_pipeline` is only"
            raise ConfigurationError(
                f"{found} {self.max_pipeline}: no number of microbatches is in between",
                f"set {PREFIX}MAX_PIPELINE={self.min_pipeline} or lower `min_pipeline`",
            )

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Reads the configuration file and the environment variables.

        Args:
            environ: Used in place of the process's environment.

        Raises:
            ConfigurationError: A file or variable that is not valid.
        """
        environ = os.environ if environ is None else environ
        settings = _from_file(environ) | _from_variables(environ)
        given = {name: source for name, (_, source) in settings.items()}
        for name, (value, source) in settings.items():
            _check(name, value, source)
        return cls(**{name: value for name, (value, _) in settings.items()}, given=given)

    @property
    def timeout(self) -> timedelta:
        """`timeout_s` as a duration."""
        return timedelta(seconds=self.timeout_s)

    def profile_cache_path(self) -> Path | None:
        """The folder for measured times; none when they are not kept."""
        if self.profile_cache_dir == "off":
            return None
        return Path(self.profile_cache_dir).expanduser()

    def report(self) -> str:
        """The items that were set, one a line, with their source."""
        if not self.given:
            return "configuration: every item has its default value"
        lines = [f"  {name} = {getattr(self, name)!r}  ({self.given[name]})" for name in self.given]
        return "\n".join(["configuration:", *lines])


_FIELDS = {item.name: item for item in fields(Config) if item.name != "given"}
ITEMS: tuple[str, ...] = tuple(_FIELDS)
"""The names of all items, in the order of the documentation."""

_Settings = dict[str, tuple[Any, str]]


def _check(name: str, value: Any, source: str) -> None:
    allowed: _Allowed = _FIELDS[name].metadata["allowed"]
    if not allowed.accepts(value):
        message = f"`{name}` from {source} is {value!r}, needed {allowed.needed}"
        raise ConfigurationError(message)


def _from_file(environ: Mapping[str, str]) -> _Settings:
    path = _file_path(environ)
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read the configuration file {path}: {error}"
        raise ConfigurationError(message) from error
    except tomllib.TOMLDecodeError as error:
        message = f"the configuration file {path} is not valid TOML: {error}"
        raise ConfigurationError(message) from error
    return {name: (table[name], str(path)) for name in table if _exists(name, name, str(path))}


def _file_path(environ: Mapping[str, str]) -> Path | None:
    folder = environ.get(CONF_DIR_VARIABLE)
    if not folder:
        home = environ.get("HOME")
        path = (Path(home) if home else Path.home()) / ".pyrannc" / FILE_NAME
        return path if path.is_file() else None
    path = Path(folder).expanduser() / FILE_NAME
    if not path.is_file():
        problem = f"has no {FILE_NAME}" if path.parent.is_dir() else "is not a folder"
        hint = f"create {path}, or unset {CONF_DIR_VARIABLE}"
        raise ConfigurationError(f"{CONF_DIR_VARIABLE} is {folder!r}, which {problem}", hint)
    return path


def _from_variables(environ: Mapping[str, str]) -> _Settings:
    settings: _Settings = {}
    for variable in sorted(environ):
        text = environ[variable].strip()
        if not variable.startswith(PREFIX) or variable == CONF_DIR_VARIABLE or not text:
            continue
        name = variable[len(PREFIX) :].lower()
        source = f"the variable {variable}"
        if _exists(name, variable, "the environment"):
            settings[name] = (_parse(name, text, source), source)
    return settings


def _parse(name: str, text: str, source: str) -> Any:
    allowed: _Allowed = _FIELDS[name].metadata["allowed"]
    try:
        return allowed.parse(text)
    except (ValueError, KeyError):
        message = f"`{name}` from {source} is {text!r}, needed {allowed.needed}"
        raise ConfigurationError(message) from None


def _exists(name: str, spelled: str, source: str) -> bool:
    """Whether there is such an item; warns of one that is gone, raises for one that never was."""
    if name in _FIELDS:
        return True
    if name in DROPPED_ITEMS:
        message = f"`{spelled}` in {source} has no effect any more: {DROPPED_ITEMS[name]}"
        warnings.warn(message, stacklevel=5)
        return False
    near = difflib.get_close_matches(name, ITEMS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"the items are {', '.join(ITEMS)}"
    message = f"there is no configuration item `{spelled}` (found in {source})"
    raise ConfigurationError(message, hint)
