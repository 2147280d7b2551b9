"""What a module's code says about chance, read from its source: which random calls, and what hangs on its mode."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

# Calls that a converted model has answered by dropkit, by the last part of their name.
ANSWERED = frozenset(
    {
        "alpha_dropout",
        "alpha_dropout_",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "dropout_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
        "feature_dropout",
        "feature_dropout_",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
    }
)
# Draws of plain random numbers: what becomes of them only the code's author knows.
DRAWS = frozenset(
    {
        "bernoulli",
        "bernoulli_",
        "exponential_",
        "gumbel_softmax",
        "multinomial",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "randperm",
        "rrelu",
        "uniform_",
    }
)
ENTRANCES = ("forward", "message", "edge_update", "update", "aggregate", "message_and_aggregate")
DEPTH = 4


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in a class.

    Attributes:
        answered: calls that dropkit answers.
        draws: plain draws, "torch.rand (in drop_path)".
        gated: whether a rate is handed on only in training: `rate if self.training else 0.0`.
        otherwise: other things that hang on the mode, as "line 12: if self.training: ...".
        unknown: names behind which a function may stand that was not read: attributes of the module, "" for others.
        readable: False where the source could not be had.
    """

    answered: tuple[str, ...]
    draws: tuple[str, ...]
    gated: bool
    otherwise: tuple[str, ...]
    unknown: tuple[str, ...]
    readable: bool

    @property
    def gated_by_mode(self) -> bool:
        """Whether the mode may be shown as training to the module's own code when a member is asked for."""
        return self.gated and not self.otherwise


_readings: dict[type[nn.Module], Reading] = {}


def read_class(cls: type[nn.Module]) -> Reading:
    """Read a class's forward and what it calls: its own methods, and functions of its package."""
    if cls not in _readings:
        _readings[cls] = _read(cls)
    return _readings[cls]


def _read(cls: type[nn.Module]) -> Reading:
    answered: dict[str, None] = {}
    draws: dict[str, None] = {}
    otherwise: dict[str, None] = {}
    unknown: dict[str, None] = {}
    gated, readable = False, True
    seen: set[Any] = set()
    waiting = [(getattr(cls, name, None), 0) for name in ENTRANCES]
    while waiting:
        function, depth = waiting.pop()
        function = inspect.unwrap(function) if callable(function) else None
        if not isinstance(function, FunctionType) or function in seen or _is_torch(function):
            continue
        seen.add(function)
        tree = _tree(function)
        if tree is None:
            readable = False
            continue
        own = next(iter(function.__code__.co_varnames[: function.__code__.co_argcount]), "self")
        safe: set[ast.AST] = set()
        for node in ast.walk(tree):
            if _hands_a_rate_on(node, own):
                gated = True
                safe.update(ast.walk(node.test))  # type: ignore[attr-defined]
            elif isinstance(node, ast.keyword) and node.arg == "training":
                safe.update(ast.walk(node.value))
            elif isinstance(node, ast.Call):
                name = "" if _is_of(node.func, own) else _last_name(node.func)  # self.dropout(x) is a module
                if name in ANSWERED and not _is_dropkit(function, node.func):
                    answered[name] = None
                    safe.update(part for argument in node.args for part in ast.walk(argument))
                elif name in DRAWS:
                    draws[f"{ast.unparse(node.func)} in {function.__qualname__}"] = None
                if (unread := _unread(cls, own, function, node.func)) is not None:
                    unknown[unread] = None
                if depth < DEPTH:
                    waiting += [(called, depth + 1) for called in _called(cls, own, function, node.func)]
        for node in ast.walk(tree):
            if _is_mode(node, own) and node not in safe:
                line = function.__code__.co_firstlineno + node.lineno - 1  # type: ignore[attr-defined]
                otherwise[f"{function.__qualname__}, line {line}"] = None
    return Reading(tuple(answered), tuple(draws), gated, tuple(otherwise), tuple(unknown), readable)


def _is_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in ("torch", "dropkit")


def _is_dropkit(function: FunctionType, node: ast.AST) -> bool:
    """Whether a dotted name, as dropkit.functional.dropout, is one of our own functions, which needs no answer."""
    if isinstance(node, ast.Name):
        found = function.__globals__.get(node.id)
    else:
        names = ast.unparse(node).split(".")
        found = function.__globals__.get(names[0])
        for name in names[1:]:
            found = getattr(found, name, None)
    return (getattr(found, "__module__", None) or "").partition(".")[0] == "dropkit"


def _tree(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_of(node: ast.AST, own: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own


def _is_mode(node: ast.AST, own: str) -> bool:
    """`self.training`, the module's own mode."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "training"
        and _is_of(node, own)
        and isinstance(node.ctx, ast.Load)
    )


def _hands_a_rate_on(node: ast.AST, own: str) -> bool:
    """`x if self.training else 0.0`, its mirror image, or an `if self.training:` around answered calls alone."""
    if isinstance(node, ast.IfExp):
        negated = isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
        test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
        zero = node.body if negated else node.orelse
        return _is_mode(test, own) and isinstance(zero, ast.Constant) and zero.value in (0, None)
    if not isinstance(node, ast.If) or (node.orelse and not isinstance(node.orelse[0], ast.If)):
        return False
    test = node.test
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    if not any(_is_mode(part, own) for part in parts):
        return False
    calls = [part for statement in node.body for part in ast.walk(statement) if isinstance(part, ast.Call)]
    names = [_last_name(call.func) for call in calls]
    of_self = [call for call in calls if ast.unparse(call.func).startswith(f"{own}.")]
    return (
        any(name in ANSWERED for name in names) and not of_self and not any(name in DRAWS for name in names)
    )


def _called(cls: type, own: str, function: FunctionType, node: ast.AST) -> Iterator[Any]:
    """Python functions that a call may mean: a method of the class, or a name of the function's module."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = node.value.id
        found = cls if owner == own else function.__globals__.get(owner)
        if found is not None:
            yield inspect.getattr_static(found, node.attr, None)
    elif isinstance(node, ast.Name):
        yield function.__globals__.get(node.id)


def _unread(cls: type, own: str, function: FunctionType, node: ast.AST) -> str | None:
    """The name behind which a call's function hides from reading: an attribute of the module, or "" for a local one."""
    if _is_of(node, own):
        assert isinstance(node, ast.Attribute)
        return None if hasattr(cls, node.attr) else node.attr
    if isinstance(node, ast.Name):
        return None if node.id in function.__globals__ or hasattr(builtins, node.id) else ""
    return None
