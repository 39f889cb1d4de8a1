"""What the gateway has to know about a checkpoint, apart from its tokenizer. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelInfo:
    """The served model. Sampling defaults are the checkpoint's (generation_config.json) or neutral.

    `max_context` is the most tokens that prompt and answer have together; token ids run from 0 to `vocab_size` - 1;
    `created` is seconds since the Unix epoch.
    """

    name: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    created: int = 0

    @classmethod
    def from_dir(cls, path: str | Path, name: str, max_context: int, created: int = 0) -> ModelInfo:
        """Read config.json and, if it is there, generation_config.json of a checkpoint directory.

        Raises ValueError, naming the file, when config.json is missing, broken or without a vocabulary size.
        """
        config_file = Path(path) / "config.json"
        config = _read_json(config_file)
        text_config = config.get("text_config")
        if not isinstance(text_config, dict):
            text_config = config
        vocab_size = text_config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise ValueError(f"{config_file}: vocab_size is missing")
        generation_file = Path(path) / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
        eos_token_ids = [i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]
        return cls(
            name=name,
            max_context=max_context,
            vocab_size=vocab_size,
            eos_token_ids=tuple(eos_token_ids),
            temperature=_number(generation, "temperature", 1.0),
            top_p=_number(generation, "top_p", 1.0),
            top_k=int(_number(generation, "top_k", 0)),
            created=created,
        )


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: not found") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object")
    return found


def _number(values: dict[str, object], name: str, default: float) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else default
