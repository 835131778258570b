# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Keeping a source's tokenizer what it is beside a config of another model type.

`AutoTokenizer` picks the class of a tokenizer by the model type as well as by its files, and classes rebuild what the
files say. So the tokenizers of source and result are loaded as a user loads them, and what they save is compared.
"""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoint import ConversionError, first_line
from .companions import write_json


TOKENIZER_CONFIG = "tokenizer_config.json"
# A folder with any of these files has a tokenizer.
_TOKENIZER_FILES = re.compile(
    r"tokeniz|vocab|merges|tekken|tiktoken|sentencepiece|spiece|spm|bpe|added_tokens|special_tokens|\.model$",
    re.IGNORECASE,
)
# Where a tokenizer was loaded from.
_PLACE_FIELDS = ("name_or_path", "is_local", "local_files_only", "gguf_file")

GENERIC = PreTrainedTokenizerFast.__name__
SAME = "Loads with the vocabulary, rules, special tokens and chat templates of the source's."
NONE = "The source has none."


def has_tokenizer(folder: Path) -> bool:
    return any(_TOKENIZER_FILES.search(path.name) for path in folder.iterdir())


def keep_tokenizer(
    load_source: Callable[[], PreTrainedTokenizerBase],
    load_result: Callable[[], PreTrainedTokenizerBase],
    result: Path,
) -> str:
    """Makes the tokenizer in `result`, whose files are the source's, load as the source's does.

    Returns:
        What was found, in a sentence.

    Raises:
        ConversionError: if no change of its files makes it load the same.
    """
    try:
        tokenizer = load_source()
        due = serialised(tokenizer)
    except Exception as error:  # the parsers of these files raise exceptions of any class
        return f"Came along unchecked, because the source's does not load here: {first_line(error)}"
    name = type(tokenizer).__name__
    mends = [
        (lambda: None, due, SAME),
        (lambda: _name_class(name, result), due, SAME),
        (lambda: tokenizer.save_pretrained(result), due, SAME),
    ]
    if _is_its_file(type(tokenizer)):
        mends.append((lambda: _name_class(GENERIC, result), _without_class(due), f"{SAME} The class is {GENERIC}."))
    reason = None
    for mend, expected, sentence in mends:
        try:
            mend()
            found = serialised(load_result())
        except Exception as error:  # as above
            reason = reason or f"it does not load ({first_line(error)})"
            continue
        if (found if expected is due else _without_class(found)) == expected:
            return sentence
        reason = reason or _first_difference(due, found)
    raise ConversionError(
        f"The source's tokenizer ({name}) does not load the same beside the result's config: {reason}; to convert "
        "without a tokenizer, take its files out of the source."
    )


def _is_its_file(tokenizer_class: type) -> bool:
    """Whether the class does nothing but set up what `tokenizer.json` holds, so that the generic class does the same."""
    if not issubclass(tokenizer_class, PreTrainedTokenizerFast):
        return False
    own = tokenizer_class.__mro__[: tokenizer_class.__mro__.index(PreTrainedTokenizerFast)]
    return not any(
        isinstance(value, FunctionType | property) and name != "__init__"
        for part in own
        for name, value in vars(part).items()
    )


def _without_class(state: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in state.get(TOKENIZER_CONFIG, {}).items() if name != "tokenizer_class"}
    return {**{name: value for name, value in state.items() if name != "class"}, TOKENIZER_CONFIG: fields}


def _name_class(name: str, folder: Path):
    """Names the class in the tokenizer's own config, where it comes before what the model type says."""
    path = folder / TOKENIZER_CONFIG
    fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**fields, "tokenizer_class": name})


def serialised(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides what a tokenizer does, in a form to be compared: its class and all that it saves."""
    state: dict[str, Any] = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__name__}",
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat template": tokenizer.chat_template,
    }
    for name in ("padding_side", "truncation_side", "model_max_length", "model_input_names", "add_bos_token"):
        state[name] = getattr(tokenizer, name, None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                state[name] = json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
    for name in _PLACE_FIELDS:
        state.get(TOKENIZER_CONFIG, {}).pop(name, None)
    return state


def _first_difference(due: Any, found: Any, where: str = "") -> str:
    """Where two serialised tokenizers differ first, with what is due and what was found."""
    if isinstance(due, dict) and isinstance(found, dict):
        for name in [*due, *(name for name in found if name not in due)]:
            if due.get(name) != found.get(name):
                return _first_difference(due.get(name), found.get(name), f"{where}/{name}" if where else str(name))
    return f"{where} is {found!r:.80} where {due!r:.80} is due"
