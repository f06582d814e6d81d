"""Recorded interfaces of libraries that cannot run here: a stand-in takes what the library publishes, and no more.

A table is JSON: callables -> name -> parameters, as Python writes them, `self` left out.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def signature_of(table: Mapping[str, Any], name: str) -> inspect.Signature:
    """The recorded parameters of a callable; a method's without `self`."""
    arguments = ast.parse(f"def f({table['callables'][name]['parameters']}): ...").body[0].args  # type: ignore[attr-defined]
    absent = [None] * (len(arguments.args) - len(arguments.defaults))
    pairs = [(each, value, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each, value in
             zip(arguments.args, [*absent, *arguments.defaults], strict=True)]  # fmt: skip
    pairs += [(each, value, inspect.Parameter.KEYWORD_ONLY) for each, value in
              zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]  # fmt: skip
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(each.arg, kind, default=empty if value is None else ast.literal_eval(value))
            for each, value, kind in pairs
        ]
    )


def published(table: Mapping[str, Any], name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method take what the recorded signature takes; what it does not imitate must have its default."""
    signature = signature_of(table, name)

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        imitated = set(inspect.signature(method).parameters)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            rest = {key: value for key, value in bound.arguments.items() if key not in imitated}
            defaults = {key: signature.parameters[key].default for key in rest}
            assert rest == defaults, f"{name}: the stand-in does not imitate {rest}"
            return method(self, **{key: value for key, value in bound.arguments.items() if key in imitated})

        return call

    return wrap
