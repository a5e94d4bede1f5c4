"""A tapped copy of a modelling file, derived from its source: text in, syntax tree out.

transformers' files change with every release, so we keep no edited copies of them. Instead the installed
source is read when it is imported, and one line is put before each attention call:

    if __sniffer_tap__.observer is not None:
        __sniffer_tap__.observe(self, query, key, value, query__pre, key__pre, scaling=..., ...)

What is handed over are the very objects that attention receives next, so a tapped model computes what the original
does, to the bit. The function of the call becomes `__sniffer_tap__.attending(function, self, __name__)`, which is that
function, so that a call can be shown when it is over. models/anchors.py finds the calls, models/shadow.py writes what
the pre kinds need, models/finder.py runs the result. Line numbers stay those of the upstream file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from .anchors import Anchor, calls_in, computes_attention, find_anchors, last_name, methods
from .identity import NotReplayableError, pre_name
from .shadow import Replay, replay
from .syntax import mentions_rotary, place

TAP_NAME = "__sniffer_tap__"
"""The name under which a derived module sees sniffer.tap.TAP; the loader binds it."""


@dataclass(frozen=True)
class DerivedTap:
    """One tap in a derived file. `pre_missing` says why there are no pre kinds; empty where there are."""

    class_name: str
    method: str
    line: int
    anchor: str
    pre_missing: str = ""

    @property
    def has_pre(self) -> bool:
        return not self.pre_missing


@dataclass(frozen=True)
class Untapped:
    """A class that looks like attention but that no rule matches."""

    class_name: str
    line: int
    reason: str


@dataclass(frozen=True)
class Derived:
    """A tapped module: its tree, its taps, and the attention classes that have none."""

    tree: ast.Module
    taps: tuple[DerivedTap, ...]
    untapped: tuple[Untapped, ...]


def derive(source: str, filename: str) -> Derived:
    """Puts a tap before each attention call of a modelling file.

    Args:
        source: the text of the file.
        filename: its path, for syntax errors and tracebacks.

    Raises:
        SyntaxError: the source is not Python.
    """
    tree = ast.parse(source, filename)
    taps: list[DerivedTap] = []
    untapped: list[Untapped] = []
    for cls in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        found = [tap for method in methods(cls) for tap in _tap_method(cls, method)]
        if not found and computes_attention(cls):
            untapped.append(Untapped(cls.name, cls.lineno, "no attention call that a rule matches"))
        taps += found
    ast.fix_missing_locations(tree)
    return Derived(tree, tuple(taps), tuple(untapped))


def observing_classes(source: str, filename: str) -> frozenset[str]:
    """The classes of a hand-edited copy that call the tap's `observe`."""
    classes = [node for node in ast.walk(ast.parse(source, filename)) if isinstance(node, ast.ClassDef)]
    return frozenset(c.name for c in classes for call in calls_in(c) if last_name(call.func) == "observe")


def _tap_method(cls: ast.ClassDef, method: ast.FunctionDef) -> list[DerivedTap]:
    anchors = _without_repeats(method, find_anchors(cls, method))
    if not anchors:
        return []
    plan, pre_missing = _plan(cls, method, anchors)
    bindings = {id(anchor.statement): _bind_operands(anchor) for anchor in anchors}
    taps = {id(anchor.statement): [*bindings[id(anchor.statement)], _tap(anchor, method, plan)] for anchor in anchors}
    for anchor in anchors:
        _show_call(anchor)
    _insert(method, plan, taps)
    return [DerivedTap(cls.name, method.name, a.statement.lineno, a.kind, pre_missing) for a in anchors]


def _plan(cls: ast.ClassDef, method: ast.FunctionDef, anchors: list[Anchor]) -> tuple[Replay | None, str]:
    """The shadow statements of a method, or why it has none although it should."""
    elsewhere = [other.name for other in methods(cls) if other is not method and mentions_rotary(other)]
    if not mentions_rotary(method):
        if elsewhere:
            return (
                None,
                f"line {method.lineno}: RoPE is applied in {', '.join(elsewhere)}, not in {method.name}",
            )
        return Replay({}, {}, {}), ""
    try:
        return replay(method, anchors), ""
    except NotReplayableError as reason:
        return None, str(reason)


def _without_repeats(method: ast.FunctionDef, anchors: list[Anchor]) -> list[Anchor]:
    """Leaves out a call that attends with the same q and k again, such as differential attention's second."""
    kept: list[Anchor] = []
    for block in _blocks(method):
        seen: set[tuple[str, str]] = set()
        for statement in block:
            for anchor in anchors:
                if anchor.statement is statement:
                    operands = (ast.unparse(anchor.q), ast.unparse(anchor.k))
                    if operands not in seen:
                        kept.append(anchor)
                    seen.add(operands)
            written = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            seen = {operands for operands in seen if not written & set(operands)}
    return kept


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements under a node."""
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _blocks(child)


def _bind_operands(anchor: Anchor) -> list[ast.stmt]:
    """Gives compound operands a name once, so that attention and the tap get the same object."""
    bindings: list[ast.stmt] = []
    for role in ("q", "k", "v"):
        operand: ast.expr = getattr(anchor, role)
        if not isinstance(operand, ast.Name):
            name = f"__sniffer_{role}__"
            bindings.append(_parsed(f"{name} = {ast.unparse(operand)}", anchor.statement.lineno))
            _Substitute(operand, ast.copy_location(ast.Name(name, ast.Load()), operand)).visit(anchor.statement)
            object.__setattr__(anchor, role, ast.Name(name, ast.Load()))
    return bindings


class _Substitute(ast.NodeTransformer):
    """Replaces one very node by another."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _tap(anchor: Anchor, method: ast.FunctionDef, plan: Replay | None) -> ast.stmt:
    """The inserted statement, on the line of the attention call."""
    shadowed = plan.shadowed.get(id(anchor.statement), frozenset()) if plan is not None else frozenset()
    q, k, v = (ast.unparse(node) for node in (anchor.q, anchor.k, anchor.v))
    q_pre, k_pre = (pre_name(name) if name in shadowed else name for name in (q, k))
    shown = [_layout(q, anchor, method), _layout(k, anchor, method, is_key=True), _layout(v, anchor, method)]
    if plan is not None:
        pre = [_layout(q_pre, anchor, method), _layout(k_pre, anchor, method, is_key=True)]
        shown += [f"{text} if {TAP_NAME}.wants_pre else None" for text in pre]
    for name in ("scaling", "sliding_window"):
        if getattr(anchor, name) is not None:
            shown.append(f"{name}={ast.unparse(getattr(anchor, name))}")
    call = f"{TAP_NAME}.observe(self, {', '.join(shown)})"
    return _parsed(f"if {TAP_NAME}.observer is not None:\n    {call}", anchor.statement.lineno)


def _show_call(anchor: Anchor) -> None:
    """The attention function is asked for at the tap, which may want to see the call."""
    if anchor.call is None:
        return
    statement = _parsed(f"{TAP_NAME}.attending(function, self, __name__)", anchor.statement.lineno)
    assert isinstance(statement, ast.Expr) and isinstance(shown := statement.value, ast.Call)
    shown.args[0] = anchor.call.func
    anchor.call.func = shown


def _layout(name: str, anchor: Anchor, method: ast.FunctionDef, is_key: bool = False) -> str:
    """An expression that shows a tensor as (batch, heads, seq, dim); a view where it is laid out otherwise."""
    text = f"{name}.transpose(-1, -2)" if is_key and anchor.k_is_transposed else name
    if not anchor.may_be_flat:
        return text
    batch = f"{method.args.args[1].arg}.shape[0]"
    return f"({text} if {name}.dim() != 3 else {text}.unflatten(0, ({batch}, -1)))"


def _parsed(text: str, line: int) -> ast.stmt:
    return place(ast.parse(text).body[0], line)


def _insert(method: ast.FunctionDef, plan: Replay | None, taps: dict[int, list[ast.stmt]]) -> None:
    before = plan.before if plan is not None else {}
    at_end = plan.at_end if plan is not None else {}
    for block in list(_blocks(method)):
        block[:] = [s for old in block for s in (*before.get(id(old), ()), *taps.get(id(old), ()), old)]
    for node in list(ast.walk(method)):
        if isinstance(node, ast.If):
            node.body += at_end.get((id(node), "body"), [])
            node.orelse += at_end.get((id(node), "orelse"), [])
