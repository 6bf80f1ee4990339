"""Prompt limits: what the text encoders read of a prompt, and what they cut."""

import copy
import threading
from collections.abc import Mapping
from typing import Any


class PromptLimits:
    """Has tokenizers of its own, and one thread at a time: a tokenizer that two threads share fails with "Already
    borrowed", or encodes for the one with the other's truncation."""

    def __init__(self, tokenizers: tuple[Any, ...]) -> None:
        self._tokenizers = copy.deepcopy(tokenizers)
        self._lock = threading.Lock()

    def warnings(self, texts: Mapping[str, str]) -> list[str]:
        """A sentence for each named text that is longer than the encoders read."""
        with self._lock:
            return [warning for name, text in texts.items() if (warning := self._warning(name, text))]

    def _warning(self, name: str, text: str) -> str | None:
        for tokenizer in self._tokenizers:
            count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
            limit = tokenizer.model_max_length
            if count > limit:
                return f"{name}: the text encoders read {limit} tokens and cut the other {count - limit}"
        return None
