"""Chats → text, by the tokenizer's chat template: what transformers' `apply_chat_template` would render of a row.

A template gets a row's `tools` and `documents`, and whatever else of the row it reads. The arguments of tool calls are
mappings for it, as transformers documents them, also where the row has JSON text as OpenAI's interface does; a template
that cannot take mappings, or prints them in Python's spelling, gets JSON text.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from compressor.data.lines import from_json
from compressor.data.sources import Chat, Messages
from compressor.errors import CalibrationError


def choose_template(tokenizer: Any, name: str | None, title: str, *, has_tools: bool = False) -> str:
    """The tokenizer's template of that name; without one its only one, or as transformers chooses: `tool_use` for chats
    with tools, or else `default`. Raises CalibrationError, naming the source `title`, where there is none.
    """
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise CalibrationError(
            f"source {title!r} holds chats, but the tokenizer has no chat template; take a chat model's, or give text."
        )
    if isinstance(known, str):
        if name is None:
            return known
        raise CalibrationError(
            f"source {title!r}: there is no chat template {name!r}, but one without a name; leave `template` out."
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
    given = _given(chat)
    template = choose_template(tokenizer, name, title, has_tools="tools" in given)
    return [key for key in ("tools", "documents") if given.get(key) and key not in _names_read(template)]


def render(tokenizer: Any, chat: Chat, name: str | None, title: str) -> str:
    """The chat as text. Raises CalibrationError where there is no template of that `name`, or it refuses the chat."""
    template, values = template_and_values(tokenizer, tokenizer, chat, name, title)

    def rendered(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **values))

    try:
        text = _in_the_form_it_takes(rendered, chat.messages)
    except Exception as error:  # templates raise what they like
        said = str(error).encode(errors="backslashreplace").decode()
        odd = [one for one in _arguments(chat.messages, _as_mapping) if not isinstance(one, Mapping)]
        hint = f". The arguments of a tool call are no JSON object: {str(odd[0])[:80]!r}" if odd else ""
        raise CalibrationError(
            f"source {title!r}: {chat.where}: the tokenizer's chat template refuses a chat that begins with "
            f"{str(chat.messages)[:80]!r}: {said}{hint}"
        ) from error
    if has_images(chat.messages):
        raise CalibrationError(
            f"source {title!r}: {chat.where}: the chat has an image, and its text alone would be read: say `images: "
            f"true`, and the model's processor reads both."
        )
    return text


def has_images(messages: Messages) -> bool:
    """Whether a part of a chat is an image."""
    parts = (part for message in messages for part in message.get("content") or ())
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def template_and_values(
    owner: Any, tokenizer: Any, chat: Chat, name: str | None, title: str
) -> tuple[str, dict[str, Any]]:
    """The `owner`'s template of that `name`, and what it reads of a row beside the messages."""
    given = _given(chat)
    template = choose_template(owner, name, title, has_tools="tools" in given)
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, *_GLOBALS, *tokenizer.special_tokens_map}
    names = _names_read(template) - (own - {"tools", "documents"})
    return template, {key: one for key, one in given.items() if key in names}


def _given(chat: Chat) -> dict[str, Any]:
    """What a template may read of a row beside the messages; tools and documents also where they are JSON text."""
    own = from_json(chat.others.get("chat_template_kwargs") or {})
    if not isinstance(own, Mapping):
        raise CalibrationError(
            f"{chat.where}: expected a mapping under 'chat_template_kwargs', found {str(own)[:80]!r}."
        )
    given = {**chat.others, **own}
    given |= {key: from_json(given[key]) for key in ("tools", "documents") if key in given}
    return {
        key: one for key, one in given.items() if key not in ("tools", "documents") or one not in (None, "", "null")
    }


def _in_the_form_it_takes(rendered: Callable[[Messages], str], messages: Messages) -> str:
    """As the template takes them: contents as lists of parts or as text, arguments as mappings or as JSON text. Of what
    it takes the first that loses no part and prints nothing in Python's spelling, or else the best.
    """
    has_parts = any(isinstance(message.get("content"), list) for message in messages)
    contents = [_as_it_is, _joined] if has_parts else [_as_it_is]
    forms = [_as_mapping, _as_text] if _arguments(messages, _as_mapping) else [_as_mapping]
    found: list[tuple[int, str]] = []
    errors: list[Exception] = []
    for content, form in itertools.product(contents, forms):
        try:
            changed = [_with_arguments(content(message), form) for message in messages]
            text = rendered(changed)
        except Exception as error:
            errors.append(error)
            continue
        found.append((_misprints(text, changed), text))
        if not found[-1][0]:
            return text
    if errors:
        raise errors[0]
    return min(found)[1]


def _misprints(text: str, messages: Messages) -> int:
    """How many arguments and contents a template has printed in Python's spelling, and parts of contents left out."""
    contents = [message.get("content") for message in messages]
    said = "\n".join(one for one in contents if isinstance(one, str))
    lists = [one for one in contents if isinstance(one, list)]
    values = [str(one) for one in [*lists, *_arguments(messages, _as_it_is)] if one and not isinstance(one, str)]
    parts = [part.get("text") or "" for one in lists for part in one if isinstance(part, Mapping)]
    return sum(one in text and one not in said for one in values) + sum(one.strip() not in text for one in parts)


def _as_it_is(value: Any) -> Any:
    return value


def _joined(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text; as transformers' templates do it, parts follow each other without a blank."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    others = [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
    if others:
        raise ValueError(f"it takes no parts, and one of them is no text: {str(others[0])[:80]!r}")
    return {**message, "content": "".join(part["text"] for part in content)}


_GLOBALS = frozenset(
    ["messages", "range", "lipsum", "dict", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"]
)
"""What every template has; a row's column of such a name is not meant."""


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


def _with_arguments(message: Mapping[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with its tool calls' arguments in another form."""
    changed = dict(message)
    if message.get("tool_calls"):
        calls = from_json(message["tool_calls"])
        changed["tool_calls"] = [_call_with(call, form) for call in calls] if isinstance(calls, list) else calls
    if message.get("function_call"):
        changed["function_call"] = _call_with(from_json(message["function_call"]), form)
    return changed


def _call_with(call: Any, form: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with(call["function"], form)}
    return {**call, "arguments": form(call.get("arguments"))}


def _arguments(messages: Messages, form: Callable[[Any], Any]) -> list[Any]:
    """The arguments of all tool calls, in a form."""
    found: list[Any] = []
    for message in messages:
        _with_arguments(message, lambda one: found.append(form(one)))
    return found


def _as_mapping(arguments: Any) -> Any:
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return {}
    mapping = from_json(arguments)
    return mapping if isinstance(mapping, Mapping) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
