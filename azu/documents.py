"""Files that people hand to azu: read within a limit, parsed, and refused by their name."""

import json
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from azu.errors import ConfigurationError

# No honest one is larger; a longer one only costs whoever reads it.
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024


def read_yaml(path: Path | Traversable) -> Any:
    """Return what a YAML file says; raises ConfigurationError that names the file."""
    return _parsed(path, yaml.safe_load)


def read_json(path: Path | Traversable) -> Any:
    """Return what a JSON file says; raises ConfigurationError that names the file."""
    return _parsed(path, json.loads)


def _parsed(path: Path | Traversable, parse: Callable[[str], Any]) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes")
        return parse(content.decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        # Where the error is and not what stands there: the file may hold secrets.
        raise ConfigurationError(f"{path} is damaged: {_told(error)}") from error


def _told(error: ValueError | yaml.YAMLError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return "a value in it cannot be read"
