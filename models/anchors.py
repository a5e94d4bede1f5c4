"""Where attention is called in a modelling file, and with which q, k and v.

An *anchor* is the call to which q, k and v go in their last form, so it lies after RoPE, q/k-norms,
temperature scaling and the concatenations of MLA. Four shapes of call cover transformers:

    interface   attention_interface(self, q, k, v, ...)        nearly every family
    sdpa        torch.nn.functional.scaled_dot_product_attention(q, k, v, ...)
    helper      self._attn(q, k, v, ...)                       a method of the class computes the scores
    score       torch.matmul(q, k.transpose(-1, -2)), also `@`, bmm, baddbmm, before a softmax

Nothing here knows a family by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

QUERY_LIKE = re.compile(r"(^|_)(q|query|queries)(_|$)")
KEY_LIKE = re.compile(r"(^|_)(k|key|keys|kv)(_|$)")
VALUE_LIKE = re.compile(r"(^|_)(v|value|values|kv)(_|$)")

MATMULS = {"matmul": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2)}
"""Where the two factors stand among the arguments of `torch.<name>(...)`."""


@dataclass(frozen=True)
class Anchor:
    """One attention call.

    `q`, `k`, `v` are nodes of the tree, so that they can be replaced in place. `k_is_transposed`: the
    key comes as (..., dim, seq). `may_be_flat`: batch and heads may be merged into one axis. `scaling`
    and `sliding_window` are the call's keywords, where it has them and they are free of side effects. `call` is the
    call itself where it goes to a function that attends; None where it goes to a method, or to products.
    """

    kind: str
    statement: ast.stmt
    q: ast.expr
    k: ast.expr
    v: ast.expr
    k_is_transposed: bool = False
    may_be_flat: bool = False
    scaling: ast.expr | None = None
    sliding_window: ast.expr | None = None
    call: ast.Call | None = None


@dataclass(frozen=True)
class Scores:
    """A method's score product `q @ k^T` and the v that its weights are then applied to."""

    statement: ast.stmt
    q: ast.expr
    k: ast.expr
    v: ast.expr
    k_is_transposed: bool


def find_anchors(cls: ast.ClassDef, method: ast.FunctionDef) -> list[Anchor]:
    """All attention calls of one method, in source order."""
    statements = list(simple_statements(method))
    names, helping = _interface_names(method), _helpers(cls)
    interface = [a for s in statements for a in _interface_anchors(s, names)]
    helpers = [a for s in statements for a in _helper_anchors(s, helping)]
    if interface:
        return _in_order(interface + helpers)
    sdpa = [a for s in statements for a in _sdpa_anchors(s)]
    scored = [] if method.name in _called_methods(cls) else _score_anchors(method)
    return _in_order(sdpa + helpers + scored)


def computes_attention(cls: ast.ClassDef) -> bool:
    """Whether a class looks as if it computed softmax attention, anchor or not."""
    for method in methods(cls):
        text = ast.unparse(method)
        if "attention_interface(" in text or "scaled_dot_product_attention(" in text:
            return True
        products = [n for n in ast.walk(method) if _factors(n) or _is_einsum(n)]
        if "softmax" in text.lower() and len(products) >= 2:
            return True
    return False


def methods(cls: ast.ClassDef) -> list[ast.FunctionDef]:
    """The plain methods of a class that take `self`."""
    found = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    return [method for method in found if method.args.args and method.args.args[0].arg == "self"]


def simple_statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that hold no other statements, in source order; not those of nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(child, ast.stmt) and not hasattr(child, "body"):
            yield child
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from simple_statements(child)


def calls_in(node: ast.AST) -> Iterator[ast.Call]:
    """Calls that run exactly once with the statement: those in a comprehension or lambda are left out."""
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.Lambda)):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_in(child)


def last_name(function: ast.expr) -> str:
    """`apply` of `a.b.apply`; empty for anything that has no name."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _in_order(anchors: list[Anchor]) -> list[Anchor]:
    return sorted(anchors, key=lambda anchor: (anchor.statement.lineno, anchor.statement.col_offset))


def _interface_names(method: ast.FunctionDef) -> set[str]:
    """Local names that hold the attention function, from `x = ALL_ATTENTION_FUNCTIONS...`."""
    names = {"attention_interface"}
    for node in ast.walk(method):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _interface_anchors(statement: ast.stmt, names: set[str]) -> Iterator[Anchor]:
    for call in calls_in(statement):
        if not (isinstance(call.func, ast.Name) and call.func.id in names):
            continue
        operands = _operands(call, first=1)
        if operands is not None:
            q, k, v = operands
            scaling, window = _pure_keyword(call, "scaling"), _pure_keyword(call, "sliding_window")
            yield Anchor("interface", statement, q, k, v, scaling=scaling, sliding_window=window, call=call)


def _sdpa_anchors(statement: ast.stmt) -> Iterator[Anchor]:
    for call in calls_in(statement):
        operands = _operands(call, first=0) if last_name(call.func) == "scaled_dot_product_attention" else None
        if operands is not None:
            q, k, v = operands
            scale = _pure_keyword(call, "scale")
            yield Anchor("sdpa", statement, q, k, v, may_be_flat=True, scaling=scale, call=call)


def _operands(call: ast.Call, first: int) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """The q, k and v of a call, positional from `first` on, or the keywords query, key and value."""
    positional = call.args[first : first + 3]
    if any(isinstance(argument, ast.Starred) for argument in call.args[: first + 3]):
        return None
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    found = [*positional, *(named.get(name) for name in ("query", "key", "value")[len(positional) :])]
    q, k, v = found
    return None if q is None or k is None or v is None else (q, k, v)


def _pure_keyword(call: ast.Call, name: str) -> ast.expr | None:
    """A keyword's value if evaluating it twice is harmless."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    if value is None:
        return None
    inner = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    pure = all(ast.unparse(node.func) in ("getattr", "math.sqrt", "float", "int") for node in inner)
    return value if pure else None


def _factors(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """The two factors of a matrix product, in any spelling."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return node.left, node.right
    if not isinstance(node, ast.Call) or last_name(node.func) not in MATMULS:
        return None
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    if "batch1" in named and "batch2" in named:
        return named["batch1"], named["batch2"]
    first, second = MATMULS[last_name(node.func)]
    if len(node.args) > second:
        return node.args[first], node.args[second]
    return None


def _is_einsum(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and last_name(node.func) == "einsum"


def _untransposed(factor: ast.expr) -> tuple[ast.expr, bool]:
    """The key behind `k.transpose(-1, -2)`, and whether the factor itself is still (..., dim, seq)."""
    match factor:
        case ast.Call(func=ast.Attribute(value=key, attr="transpose" | "swapaxes")):
            return key, False
        case ast.Attribute(value=key, attr="mT" | "T"):
            return key, False
    return factor, True


def _scores(method: ast.FunctionDef) -> list[Scores]:
    """Score products of a method that a softmax and a product with v follow."""
    if "softmax" not in ast.unparse(method).lower():
        return []
    products = [
        (statement, *factors)
        for statement in simple_statements(method)
        for node in _as_evaluated(statement)
        if (factors := _factors(node)) is not None
    ]
    found = []
    for index, (statement, left, right) in enumerate(products):
        k, transposed = _untransposed(right)
        if not (_is_like(left, QUERY_LIKE) and _is_like(k, KEY_LIKE)):
            continue
        values = [v for _, _, v in products[index + 1 :] if _is_like(v, VALUE_LIKE)]
        if values:
            found.append(Scores(statement, left, k, values[0], transposed))
    return found


def _as_evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, what a node is computed from before the node itself."""
    for child in ast.iter_child_nodes(node):
        yield from _as_evaluated(child)
    yield node


def _is_like(node: ast.expr, words: re.Pattern[str]) -> bool:
    return isinstance(node, ast.Name) and words.search(node.id) is not None


def _score_anchors(method: ast.FunctionDef) -> list[Anchor]:
    return [
        Anchor("score", s.statement, s.q, s.k, s.v, k_is_transposed=s.k_is_transposed, may_be_flat=True)
        for s in _scores(method)
    ]


def _called_methods(cls: ast.ClassDef) -> set[str]:
    """Names of the class's own methods that its methods call on self."""
    return {
        node.func.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self.")
        if isinstance(node.func, ast.Attribute)
    }


def _helpers(cls: ast.ClassDef) -> dict[str, tuple[tuple[int, int, int], bool]]:
    """Methods that compute the scores from their own parameters: the places of q, k, v, and k's form."""
    found = {}
    for method in methods(cls):
        parameters = [argument.arg for argument in method.args.args[1:]]
        scores = _scores(method)
        if method.name == "forward" or not scores:
            continue
        names = [ast.unparse(node) for node in (scores[0].q, scores[0].k, scores[0].v)]
        if all(name in parameters for name in names):
            q, k, v = (parameters.index(name) for name in names)
            found[method.name] = ((q, k, v), scores[0].k_is_transposed)
    return found


def _helper_anchors(statement: ast.stmt, helpers: dict[str, tuple[tuple[int, int, int], bool]]) -> Iterator[Anchor]:
    for call in calls_in(statement):
        if not (isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self"):
            continue
        if call.func.attr in helpers:
            places, transposed = helpers[call.func.attr]
            if max(places) < len(call.args):
                q, k, v = (call.args[place] for place in places)
                yield Anchor("helper", statement, q, k, v, k_is_transposed=transposed, may_be_flat=True)
