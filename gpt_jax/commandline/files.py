"""The packaged presets, and how they and your own config files are read: as data, never run."""

import ast
import difflib
import math
import operator
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError

PRESETS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))}
ALLOWED = "only assignments of numbers, strings and arithmetic on them are read from a config file"
LONGEST_FILE, LONGEST_VALUE = 100_000, 10_000  # characters

# `+a` is an error for text, which these could repeat or format until the memory is full, and
# math.pow, in floats, overflows at once where integers would be computed for ever.
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: lambda a, b: +a * +b,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: lambda a, b: +a % +b,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "min": min,
    "max": max,
    "round": lambda number, digits=None: round(float(number), digits),
    "time.time": time.time,
    "time.strftime": time.strftime,
}


def suggest(name: str, names: Iterable[str]) -> str:
    """Return a name that is not known, quoted, with the known one that it may have meant."""
    close = difflib.get_close_matches(name[:60], list(names), 1)
    return f"{name[:60]!r}" + (f", did you mean {close[0]!r}?" if close else "")


def read_config(name: str, names: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the values that a config file assigns, each with its place (`file:line`).

    `name` is a path, or the base name of a preset; `names` are what its expressions may refer to.
    Names that start with an underscore are left out. UserError for whatever is not an assignment.
    """
    preset = os.path.basename(name).removesuffix(".py")
    path = str(PRESETS[preset]) if preset in PRESETS and not os.path.isfile(name) else name
    if not os.path.exists(path):
        known, file = ", ".join(PRESETS), "" if name == preset else f"no file {name!a:.80}; "
        known = f"{file}presets: {known}"
        raise UserError(f"no config file or preset {suggest(preset, PRESETS)} ({known})")
    names, found = dict(names), {}
    place = shown = path if path.isprintable() else ascii(path)
    if os.path.isdir(path):
        raise UserError(
            f"{shown} is a folder, no config file: a run's is named by --out_dir={shown}"
        )
    try:
        for node in parse_file(path).body:
            place = f"{shown}:{node.lineno}"
            for target, value in assignments(node):
                names[target] = evaluate(value, names)
                if not target.startswith("_"):
                    found[target] = names[target], place
    except SyntaxError as error:
        raise UserError(f"{shown}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise UserError(f"{place}: {ALLOWED} ({error}); nothing was executed") from None
    return found


def parse_file(path: str) -> ast.Module:
    """Return the syntax tree of a config file."""
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(LONGEST_FILE + 1)
    if len(text) > LONGEST_FILE:
        raise ValueError(f"this is longer than {LONGEST_FILE} characters")
    return ast.parse(text, filename=path)


def assignments(node: ast.stmt) -> list[tuple[str, ast.expr]]:
    """Return what a statement assigns: each name with the expression of its value."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import(names=[ast.alias("time", None)]):
            return []
        case ast.Expr():
            raise ValueError(f"found {source(node.value)}")
        case ast.Assign():
            targets, value = node.targets, node.value
        case ast.AnnAssign(value=ast.expr() as value):
            targets = [node.target]
        case ast.AugAssign(target=ast.Name(id=name)):
            targets, value = [node.target], ast.BinOp(ast.Name(name), node.op, node.value)
        case _:
            raise ValueError(f"found {source(node)}")
    if not all(isinstance(target, ast.Name) for target in targets):
        raise ValueError(f"found {source(node)}")
    return [(target.id, value) for target in targets if isinstance(target, ast.Name)]


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of arithmetic on literals and names."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            value = node.value
        case ast.Name() if node.id in names:
            value = names[node.id]
        case ast.BinOp() if type(node.op) in OPERATORS:
            left, right = evaluate(node.left, names), evaluate(node.right, names)
            value = OPERATORS[type(node.op)](left, right)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            value = OPERATORS[type(node.op)](evaluate(node.operand, names))
        case ast.Compare(ops=[op], comparators=[right]) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate(node.left, names), evaluate(right, names))
        case ast.IfExp():
            value = evaluate(node.body if evaluate(node.test, names) else node.orelse, names)
        case ast.Call(keywords=[]) if ast.unparse(node.func) in FUNCTIONS:
            arguments = [evaluate(argument, names) for argument in node.args]
            value = FUNCTIONS[ast.unparse(node.func)](*arguments)
        case ast.JoinedStr():
            value = "".join(str(evaluate(part, names)) for part in node.values)
        case ast.FormattedValue(conversion=-1, format_spec=None):
            value = evaluate(node.value, names)
        case _:
            raise ValueError(f"found {source(node)}")
    if len(str(value)) > LONGEST_VALUE:  # of integers, str itself refuses the longest
        raise ValueError(f"a value is longer than {LONGEST_VALUE} characters")
    return value


def source(node: ast.AST) -> str:
    """Return how a complaint names a piece of a config file."""
    if isinstance(node, ast.Call):
        return f"a call of {ast.unparse(node.func)!r:.60}"
    return f"{ast.unparse(node).splitlines()[0]!r:.60}"
