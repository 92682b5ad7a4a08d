"""Whether the Hugging Face hub can be reached: asked once, and quickly. Its libraries go on trying for minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 5.0
"""How long the hub has for its first answer."""
_SECONDS_KNOWN = 60.0

_answers: dict[str, tuple[float, str | None]] = {}
"""Endpoint → when it was asked, and why it cannot be reached."""


@contextmanager
def not_waited_for() -> Iterator[str | None]:
    """Within the context nothing is asked of a hub that cannot be reached: libraries take their caches, or fail at
    once. Yields why, None where it answers. Asked once a minute, for `SECONDS`; never with HF_HUB_OFFLINE.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set"
        return
    problem = _problem(constants.ENDPOINT, SECONDS)
    if problem is None:
        yield None
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def _problem(endpoint: str, seconds: float) -> str | None:
    asked, problem = _answers.get(endpoint, (float("-inf"), None))
    if time.monotonic() - asked > _SECONDS_KNOWN:
        problem = _asked(endpoint, seconds)
        _answers[endpoint] = (time.monotonic(), problem)
    return problem


def _asked(endpoint: str, seconds: float) -> str | None:
    """Ask in a thread of its own: no limit holds for all that a request does, such as looking up a name."""
    from huggingface_hub.utils import get_session

    answer: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=2 * seconds)
            answer.append(None)
        except Exception as error:  # a network fails in many ways
            answer.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        return f"{endpoint} does not answer within {seconds:g} s"
    return f"{endpoint}: {answer[0]}" if answer[0] else None
