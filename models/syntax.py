"""Small questions about syntax trees, which models/shadow.py and models/derive.py ask."""

from __future__ import annotations

import ast
import re

from .anchors import calls_in, last_name

ROTARY = re.compile(r"apply_.*(rotary|rope)|apply_rope")
COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


def is_rotary(call: ast.Call) -> bool:
    """Whether a call turns q and k by RoPE, by its name: apply_rotary_pos_emb, apply_multimodal_rotary_pos_emb, ..."""
    return ROTARY.search(last_name(call.func)) is not None


def mentions_rotary(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Call) and is_rotary(inner) for inner in ast.walk(node))


def parameters(method: ast.FunctionDef) -> set[str]:
    arguments = method.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return {argument.arg for argument in [*named, *starred]}


def loaded(node: ast.AST) -> set[str]:
    """The names that are read under a node."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stored(node: ast.AST) -> set[str]:
    """The names that are given a value under a node: of `[f(x) for x in q]` not x, which is the comprehension's own."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
    return found - {name for c in inner for g in c.generators for name in stored(g.target)}


def elements(target: ast.expr) -> list[ast.expr]:
    """What an assignment fills: q and k of `q, k = ...`, else the target alone."""
    return list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]


def leaves(target: ast.expr) -> list[ast.expr]:
    """As `elements`, down to the last: a, b and c of `a, (b, c) = ...`."""
    return [leaf for e in elements(target) for leaf in ([e] if e is target else leaves(e))]


def updates_cache(statement: ast.stmt) -> bool:
    """Whether a statement writes into the KV cache: `k, v = past_key_values.update(k, v, self.layer_idx)`."""
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "update" for call in calls_in(statement))


def shared_containers(method: ast.FunctionDef) -> frozenset[str]:
    """Parameters that are dictionaries which the method writes entries into, such as shared_kv_states.

    `shared_kv_states[self.layer_idx] = k, v` is such an entry; `out[:, 0] = k` writes a part of a tensor.
    """
    written = {
        node.value.id
        for node in ast.walk(method)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
        if not isinstance(node.slice, (ast.Slice, ast.Tuple))
    }
    return frozenset(written & parameters(method))


def reads_container(node: ast.AST, containers: frozenset[str]) -> bool:
    """Whether a node is `shared_kv_states[...]`, read."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in containers
    )


def without_in_place(statement: ast.stmt) -> ast.stmt:
    """`q *= s` as `q = q * s`, since a shadow may share its memory with the true tensor; `q: Tensor = x` as `q = x`."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        left = ast.Name(statement.target.id, ast.Load())
        product = ast.BinOp(left, statement.op, statement.value)
        return ast.copy_location(ast.Assign([statement.target], product), statement)
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.copy_location(ast.Assign([statement.target], statement.value), statement)
    return statement


def place(node: ast.stmt, line: int) -> ast.stmt:
    """Gives a statement and all its parts a one-line span, so that upstream line numbers stay right."""
    for inner in ast.walk(node):
        if "lineno" in inner._attributes:
            inner.lineno = inner.end_lineno = line  # type: ignore[attr-defined]
            inner.col_offset = inner.end_col_offset = 0  # type: ignore[attr-defined]
    return node
