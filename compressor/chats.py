"""Chats → text, by the tokenizer's chat template: what transformers' `apply_chat_template` would render of a row.

A template gets a row's `tools` and `documents`, and whatever else of the row it reads. The arguments of tool calls are
mappings for it, as transformers documents them, also where the row has JSON text as OpenAI's interface does; a template
that cannot take mappings, or prints them in Python's spelling, gets JSON text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from compressor.errors import CalibrationError
from compressor.sources import Chat, Messages


def choose_template(tokenizer: Any, name: str | None, title: str, *, has_tools: bool = False) -> str:
    """The tokenizer's template of that name; without one its only one, or as transformers chooses: `tool_use` for chats
    with tools, or else `default`. Raises CalibrationError, naming the source `title`, where there is none.
    """
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise CalibrationError(
            f"source {title!r} holds chats, but the tokenizer has no chat template to render them with. Take the "
            f"tokenizer of a chat model, or give the text itself."
        )
    if isinstance(known, str):
        if name is None:
            return known
        raise CalibrationError(
            f"source {title!r}: there is no chat template {name!r}; the tokenizer has one, without a name. Leave "
            f"`template` out."
        )
    names = [name] if name else [*(["tool_use"] if has_tools else []), "default"]
    chosen = next((one for one in names if one in known), None)
    if chosen is None:
        what = (
            f"there is no chat template {name!r}" if name else "none of the tokenizer's chat templates is the default"
        )
        raise CalibrationError(f"source {title!r}: {what}; it has {', '.join(sorted(known))}. Say `template:`.")
    return str(known[chosen])


def unread(tokenizer: Any, chat: Chat, name: str | None, title: str) -> list[str]:
    """Which of a chat's `tools` and `documents` its template does not read."""
    template = choose_template(tokenizer, name, title, has_tools="tools" in chat.others)
    return [key for key in ("tools", "documents") if chat.others.get(key) and key not in _names_read(template)]


def render(tokenizer: Any, chat: Chat, name: str | None, title: str) -> str:
    """The chat as text, by the template of that `name`. Raises CalibrationError where there is no such template, or it
    refuses the chat.
    """
    given = {**chat.others, **(chat.others.get("chat_template_kwargs") or {})}
    given |= {key: _from_json(given[key]) for key in ("tools", "documents") if key in given}
    template = choose_template(tokenizer, name, title, has_tools="tools" in given)
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, *_GLOBALS} - {"tools", "documents"}
    values = {key: one for key, one in given.items() if key in _names_read(template) and key not in own}

    def rendered(form: Callable[[Any], Any]) -> str:
        messages = [_with_arguments(message, form) for message in chat.messages]
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **values))

    try:
        return _with_the_form_it_takes(rendered, chat.messages)
    except Exception as error:  # templates raise what they like
        raise CalibrationError(
            f"source {title!r}: {chat.where}: the tokenizer's chat template refuses a chat that begins with "
            f"{str(chat.messages)[:80]!r}: {error}"
        ) from error


def _with_the_form_it_takes(rendered: Callable[[Callable[[Any], Any]], str], messages: Messages) -> str:
    arguments = [_as_mapping(one) for message in messages for one in _arguments(message)]
    if not arguments:
        return rendered(_as_mapping)
    try:
        text = rendered(_as_mapping)
    except Exception as error:
        try:
            return rendered(_as_text)
        except Exception:
            raise error from None
    said = str([message.get("content") for message in messages])
    printed = [str(one) for one in arguments if one and not isinstance(one, str)]
    return rendered(_as_text) if any(one in text and one not in said for one in printed) else text


_GLOBALS = frozenset(["range", "lipsum", "dict", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"])
"""What every template can call; a row's column of such a name is not meant."""


@lru_cache(maxsize=16)
def _names_read(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself; none of one that cannot be parsed."""
    import jinja2
    from jinja2 import meta

    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # transformers' own tag
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        return frozenset(meta.find_undeclared_variables(parsed))
    except jinja2.TemplateError:
        return frozenset()  # applying it will say what is wrong


def _from_json(value: Any) -> Any:
    """Lists and mappings that a data set keeps as JSON text, their elements included; anything else as it is."""
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return _from_json(json.loads(value))
    except ValueError:
        return value


def _with_arguments(message: Mapping[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with its tool calls' arguments in another form."""
    changed = dict(message)
    if message.get("tool_calls"):
        calls = _from_json(message["tool_calls"])
        changed["tool_calls"] = [_call_with(call, form) for call in calls] if isinstance(calls, list) else calls
    if message.get("function_call"):
        changed["function_call"] = _call_with(_from_json(message["function_call"]), form)
    return changed


def _call_with(call: Any, form: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call


def _arguments(message: Mapping[str, Any]) -> Iterator[Any]:
    found: list[Any] = []
    _with_arguments(message, found.append)
    yield from found


def _as_mapping(arguments: Any) -> Any:
    if arguments == "":
        return {}
    mapping = _from_json(arguments)
    return mapping if isinstance(mapping, Mapping) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
