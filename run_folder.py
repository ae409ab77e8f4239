"""What stands in the folder of a run: whether something was written there, and by which command."""

import json
from pathlib import Path
from typing import Any

TRAINING, EVALUATION, AUDIT = "training", "evaluation", "audit"


def read_config(save_dir: str | Path) -> dict[str, Any]:
    """Returns the contents of `config.json` in a folder; an empty dict where there is none.

    Raises ValueError when the file was not written by this program.
    """
    path = Path(save_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config["settings"], dict):
            return config
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError):
        pass
    raise ValueError(f"{path} was not written by this program; choose another folder")


def kind_of_run(config: dict[str, Any]) -> str | None:
    """Returns TRAINING, EVALUATION or AUDIT for what `read_config` gives; None for an empty dict.

    Files written before `kind` was recorded are told apart by what they hold.
    """
    if not config:
        return None
    return config.get("kind") or (TRAINING if "runs" in config else EVALUATION)
