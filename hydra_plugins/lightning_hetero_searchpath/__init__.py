"""Makes the configuration group `hetero` visible in every Hydra application: `python train.py +hetero=auto`.

Hydra runs this module at the start of every application in the environment, and an exception here would
break them all, whether they know us or not. So nothing heavy is imported, and nothing may raise.

Only the group `hetero` is shown, from the folder beside this file. The groups of our own command line have
everyday names (`model`, `experiment`): in another application they would run in its `experiment=glob(*)`.
"""

# No `from __future__ import annotations`: Hydra runs this module before it enters it into sys.modules, where
# `dataclass` would look for the meaning of annotations that are strings, and fail.

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

PROVIDER = "lightning-hetero"
_log = logging.getLogger("lightning_hetero")


@dataclass
class HeteroConf:
    """Arguments of `lightning_hetero.HeteroStrategy` and their defaults, so that Hydra refuses a misspelt one.

    Where a word, a list and a mapping are all allowed the type is Any, for structured configs know no such
    unions; the strategy checks the value.
    """

    _target_: str = "lightning_hetero.HeteroStrategy"
    _convert_: str = "all"  # plain lists and dicts, not Hydra's own
    devices: Any = None
    placement: Any = None
    memory: Optional[Dict[str, Any]] = None  # noqa: UP006, UP045
    plan: Optional[str] = None  # noqa: UP045
    no_split: Optional[List[str]] = None  # noqa: UP006, UP045
    constraints: Optional[Dict[str, Any]] = None  # noqa: UP006, UP045
    objective: str = "step_time"
    micro_batches: Optional[int] = None  # noqa: UP045
    micro_batching: str = "forward"
    schedule: Optional[str] = None  # noqa: UP045
    rematerialize: Any = False
    activation_checkpointing: Any = None
    compile: Any = None
    batch_norm: str = "whole"
    profile: str = "auto"
    replan: str = "never"
    planning_limit_s: float = 10.0
    device_profile: Optional[str] = None  # noqa: UP045
    shares: Optional[List[float]] = None  # noqa: UP006, UP045
    hang_timeout_s: float = 600.0
    verbose: bool = True
    checkpoint_io: Any = None
    precision_plugin: Any = None


class LightningHeteroSearchPath(SearchPathPlugin):
    """Appends our folder to the end of the search path: files of the application always win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before it looks for configurations."""
        try:
            search_path.append(provider=PROVIDER, path=f"file://{Path(__file__).resolve().parent / 'conf'}")
        except Exception as error:
            _log.warning("this application will not know +hetero=...: %s", error)


def _introduce_ourselves() -> None:
    """Make `trainer.strategy=hetero` resolve by name, and offer `HeteroConf` to the files of the group."""
    try:
        import lightning_hetero  # noqa: F401  (installs the import hook that waits for Lightning)

        store = ConfigStore.instance()  # under a group name that no application uses
        store.store(group="lightning_hetero_schema", name="strategy", node={"strategy": HeteroConf}, provider=PROVIDER)
    except Exception as error:
        _log.warning("+hetero=... and strategy=hetero may fail in this application: %s", error)


_introduce_ourselves()
