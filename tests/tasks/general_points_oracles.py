"""Independent, slow implementations that the tests compare the package with."""

from __future__ import annotations

import ast
from fractions import Fraction
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

# The five ways to bracket four numbers.
_SHAPES = [
    lambda a, b, c, d, x, y, z: (z, (y, (x, a, b), c), d),
    lambda a, b, c, d, x, y, z: (z, (x, a, (y, b, c)), d),
    lambda a, b, c, d, x, y, z: (y, (x, a, b), (z, c, d)),
    lambda a, b, c, d, x, y, z: (x, a, (z, (y, b, c), d)),
    lambda a, b, c, d, x, y, z: (x, a, (y, b, (z, c, d))),
]


def tree_value(tree: Any) -> Fraction | None:
    """Exact value of nested (operation, left, right) tuples; None when something is divided by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = tree_value(tree[1]), tree_value(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    return OPERATIONS[tree[0]](left, right)


def brute_force(values: Sequence[int], target: int) -> Iterator[Any]:
    """All trees over four numbers that give ``target``: permutations x operators x bracketings."""
    for numbers in set(permutations(values)):
        for operations in product("+-*/", repeat=3):
            for shape in _SHAPES:
                tree = shape(*numbers, *operations)
                if tree_value(tree) == target:
                    yield tree


def canonical(tree: Any) -> str:
    """Text that is the same for trees that differ in the order of the operands of + and * only."""
    if isinstance(tree, int):
        return str(tree)
    parts = [canonical(tree[1]), canonical(tree[2])]
    if tree[0] in "+*":
        parts.sort()
    return f"({parts[0]}{tree[0]}{parts[1]})"


def parsed(text: str) -> Any:
    """Python's own parse of a formula of whole numbers, as nested tuples; raises SyntaxError on anything else."""

    def convert(node: ast.AST) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
            return _NODES[type(node.op)], convert(node.left), convert(node.right)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise SyntaxError(text)

    return convert(ast.parse(text, mode="eval").body)


def leaves(tree: Any) -> list[int]:
    """The numbers of a tree."""
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])
