"""Failures of a configured run as messages: what went wrong, and the nearest name that exists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_hetero._conf import conf_dir
from lightning_hetero.errors import HeteroError

_BAD_KEY = re.compile(r"Could not override '([\w./@-]+)'")
_BAD_ARGUMENT = re.compile(r"call to target '([\w.]+)'.*unexpected keyword argument '(\w+)'", re.DOTALL)
_NO_KEY = re.compile(r"[Kk]ey '(\w+)[\w.]*' (?:is not in struct|not found)")
_PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/joblib")
_WHERE = "HYDRA_FULL_ERROR=1 shows where it happened."


def explain(error: BaseException, argv: Sequence[str], command: str) -> str:
    """Say what went wrong in words for the person at the command line.

    Args:
        error: What ended the run.
        argv: The arguments of the command.
        command: Its name, which is that of its configuration.

    Returns:
        One or more lines, without a traceback.
    """
    ours = next((cause for cause in causes(error) if isinstance(cause, HeteroError)), None)
    if ours is not None:
        return str(ours)
    text = str(error)
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    if isinstance(error, MissingConfigException):
        if error.missing_cfg_file in _PLUGINS:
            return f"{text}\nIt is part of a plugin: pip install 'lightning-hetero[sweeps]'"
        return text + _line(near(Path(error.missing_cfg_file or "").stem, error.options or ()))
    if isinstance(error, InstantiationException):
        return f"{text}{_line(_near_argument(text))}\n{_WHERE}"
    return text + _taken_away(text, argv) + _line(_near_key(text, argv, command))


def not_begun(error: OSError | ValueError, argv: Sequence[str]) -> str:
    """The same for what Python refuses Hydra before a job begins: a group that is null, a folder that cannot be."""
    if isinstance(error, OSError):
        return (
            f"the folder of the run cannot be made: {error}; choose another with hydra.run.dir=... or "
            "hydra.sweep.dir=..."
        )
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    null = next((word for word in argv if word.partition("=")[0] in groups and word.endswith("=null")), None)
    if null is None:
        return f"{error}\n{_WHERE}"
    return f"{null} is no file of the group {null.partition('=')[0]!r}; leave it out to keep the default"


def near(word: str, words: Iterable[str]) -> str:
    """A hint to append to a message, " Did you mean 'even'?"; empty if no word is alike."""
    matches = get_close_matches(word, [*words], n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def causes(error: BaseException | None) -> Iterable[BaseException]:
    """The error, then what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _taken_away(text: str, argv: Sequence[str]) -> str:
    """A line of its own for a key that the arguments delete, as in `~data`."""
    match = _NO_KEY.search(text)
    word = match and next((word for word in argv if word.partition("=")[0] == f"~{match[1]}"), None)
    return f"\n{word} takes it away; leave that out" if word else ""


def _line(hint: str) -> str:
    """The hint on a line of its own, for messages of several lines."""
    return hint and f"\n{hint.strip()}"


def _near_argument(text: str) -> str:
    """Hint for a misspelt argument of a target."""
    match = _BAD_ARGUMENT.search(text)
    if match is None:
        return ""
    target, argument = match.groups()
    return near(argument, inspect.signature(get_object(target)).parameters)


def _near_key(text: str, argv: Sequence[str], command: str) -> str:
    """Hint for a misspelt key or group."""
    match = _BAD_KEY.search(text)
    if match is None:
        return ""
    key = match[1]
    parent, _, name = key.rpartition(".")
    others = [word for word in argv if "=" in word and not word.lstrip("+~").startswith(f"{key}=")]
    config = _composed(others, command)
    siblings = OmegaConf.select(config, parent) if parent else config
    words = [*map(str, siblings)] if isinstance(siblings, DictConfig) else []
    if not parent:
        words += [path.name for path in conf_dir().iterdir() if path.is_dir()]
    hint = near(name, words)
    return hint.replace("'", f"'{parent}.", 1) if parent else hint


def _composed(overrides: Sequence[str], command: str) -> DictConfig:
    """The configuration without the word that was wrong, or else as it is when nothing is overridden."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return compose(command, [*overrides])
        except (HydraException, OmegaConfBaseException):
            return compose(command)
