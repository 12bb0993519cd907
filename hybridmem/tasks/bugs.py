"""Single bugs in functions, made by changing an operator, comparison, constant or condition in the syntax tree.

return a + b   →   return a - b
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitAnd,),
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
CONDITIONS: dict[type[ast.boolop], type[ast.boolop]] = {ast.And: ast.Or, ast.Or: ast.And}
KINDS = ("operator", "comparison", "constant", "condition")


class Bug(NamedTuple):
    """A function with a bug."""

    kind: str
    source: str


def bugs_of(source: str) -> list[Bug]:
    """Return all variants of a function with one bug of these kinds; each differs from the source in one line."""
    right = source.splitlines()
    found: dict[str, Bug] = {}
    for kind, buggy in _changed(ast.parse(source)):
        lines = buggy.splitlines()
        if len(lines) == len(right) and sum(a != b for a, b in zip(lines, right, strict=True)) == 1:
            found.setdefault(buggy, Bug(kind, buggy))
    return list(found.values())


def _changed(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the kind of each possible bug and the tree's source with it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            for operator in OPERATORS.get(type(node.op), ()):
                yield "operator", _with(tree, node, "op", operator())
        elif isinstance(node, ast.Compare):
            for place, comparison in enumerate(node.ops):
                for other in COMPARISONS[type(comparison)]:
                    ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                    yield "comparison", _with(tree, node, "ops", ops)
        elif isinstance(node, ast.BoolOp):
            yield "condition", _with(tree, node, "op", CONDITIONS[type(node.op)]())
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            yield "condition", _with(tree, node, "test", _opposite(node.test))
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield "constant", _with(tree, node, "value", not node.value)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            for value in {node.value + 1, abs(node.value - 1)}:
                yield "constant", _with(tree, node, "value", value)


def _with(tree: ast.Module, node: ast.AST, field: str, value: object) -> str:
    before = getattr(node, field)
    setattr(node, field, value)
    changed = ast.unparse(tree)
    setattr(node, field, before)
    return changed


def _opposite(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(ast.Not(), test)
