"""What the package logs, for tests that look."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Logged(logging.Handler):
    """The records of the package since the test began, as pytest's ``caplog`` has them.

    That looks at every logger of every library six times a test: a millisecond of each of
    thousands.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    def clear(self) -> None:
        self.records.clear()

    @contextmanager
    def at_level(self, level: int, name: str = "lowrank_optim") -> Iterator[None]:
        """Records of this level too, of a logger and those below it."""
        logger = logging.getLogger(name)
        before = logger.level
        logger.setLevel(level)
        try:
            yield
        finally:
            logger.setLevel(before)
