"""An expression as it would be if RoPE were the identity: shadows in place of names, no rotation.

With q and k shadowed, the right side of

    query, key = apply_rotary_pos_emb(query, key, cos, sin)    becomes    (query__pre, key__pre)
    query = self.q_norm(query)                                 becomes    self.q_norm(query__pre)
    key = torch.cat([k_nope, apply_rope(k_rot, freqs)], -1)    becomes    torch.cat([k_nope, k_rot__pre], -1)
    k, v = shared_kv_states[layer]                             becomes    shared_kv_states["__sniffer_pre__", layer]
"""

from __future__ import annotations

import ast

from .syntax import elements, is_rotary, reads_container


class NotReplayableError(Exception):
    """The statements between RoPE and attention cannot be repeated soundly; the text says why."""


def pre_name(name: str) -> str:
    """The shadow of a name: where its value without RoPE lives."""
    return f"{name}__pre"


def shadow_key(key: ast.expr) -> ast.expr:
    """Under which a shared dictionary keeps the shadow of the entry at `key`: beside it, where no one else looks."""
    return ast.Tuple([ast.Constant("__sniffer_pre__"), key], ast.Load())


class Identity(ast.NodeTransformer):
    """Rewrites one right side.

    Args:
        shadowed: the names that have a shadow here.
        containers: dictionaries in which layers share keys.
        target: what the value is assigned to, which tells how many tensors RoPE returns, and which.

    `containers_read` are those it turned out to read.
    """

    def __init__(self, shadowed: frozenset[str], containers: frozenset[str], target: ast.expr | None = None) -> None:
        self.shadowed, self.containers = shadowed, containers
        self.targets = [] if target is None else elements(target)
        self.containers_read: set[str] = set()

    def of(self, value: ast.expr) -> ast.expr:
        if isinstance(value, ast.Call) and is_rotary(value):
            value = self._unturned(value, max(1, len(self.targets)))
        return self.visit(value)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A rotary call inside a larger expression returns one tensor: its first argument."""
        return self.visit(self._unturned(node, 1)) if is_rotary(node) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        has_shadow = isinstance(node.ctx, ast.Load) and node.id in self.shadowed
        return ast.Name(pre_name(node.id), node.ctx) if has_shadow else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if reads_container(node, self.containers):
            self.containers_read.add(ast.unparse(node.value))
            return ast.Subscript(node.value, shadow_key(node.slice), ast.Load())
        return self.generic_visit(node)

    def _unturned(self, call: ast.Call, width: int) -> ast.expr:
        """What a rotary call that returns `width` tensors would return without rotating.

        q, k = apply_rotary(cos, sin, q, k) gives back the arguments that its targets are named after; where names
        differ, as in q_rot, k_rot = apply_rotary(q, k, cos, sin), it is the first ones.
        """
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        by_name = {value.id: value for value in values if isinstance(value, ast.Name)}
        names = [target.id for target in self.targets if isinstance(target, ast.Name)]
        if names and len(names) == width and all(name in by_name for name in names):
            chosen: list[ast.expr] = [by_name[name] for name in names]
        else:
            chosen = values[:width]
        if len(chosen) < width:
            raise NotReplayableError(f"line {call.lineno}: RoPE returns more than it is given")
        return chosen[0] if width == 1 else ast.Tuple(chosen, ast.Load())
