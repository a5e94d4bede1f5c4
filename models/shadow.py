"""What q and k would be if RoPE were the identity: a method's own statements, replayed on shadow names.

The value of `query_states` without RoPE lives in `query_states__pre`. From the first rotary statement
on, every statement that q or k depend on is written a second time, on shadow names, just before the
original and under `if __sniffer_tap__.wants_pre`:

    if __sniffer_tap__.wants_pre:
        query__pre, key__pre = (query, key)                       # RoPE, as the identity
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    if __sniffer_tap__.wants_pre:
        query__pre = self.q_norm(query__pre)
    query = self.q_norm(query)

The rule to keep is simple: a name is *shadowed* at a point if its shadow holds its RoPE-free value on
every path to that point. Where a branch did not touch a name that the other branch rotated (a NoPE
layer), the shadow is set to the name itself at the branch's end. Cache updates are left out: without a
cache they do not run, and they must never run twice. A dictionary through which layers share keys gets
a shadow entry beside each true one. What cannot be replayed soundly leaves the pre kinds out by name.
"""

from __future__ import annotations

import ast
import copy
import re
from dataclasses import dataclass, field

from .anchors import Anchor, calls_in, last_name

ROTARY = re.compile(r"apply_.*(rotary|rope)|apply_rope")
GUARD = "__sniffer_tap__.wants_pre"
COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


class NotReplayableError(Exception):
    """The statements between RoPE and attention cannot be repeated soundly; the text says why."""


@dataclass(frozen=True)
class Replay:
    """Where the shadow statements go, and which names are shadowed at each anchor."""

    before: dict[int, list[ast.stmt]]
    at_end: dict[tuple[int, str], list[ast.stmt]]
    shadowed: dict[int, frozenset[str]]


def pre_name(name: str) -> str:
    return f"{name}__pre"


def is_rotary(call: ast.Call) -> bool:
    return ROTARY.search(last_name(call.func)) is not None


def mentions_rotary(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Call) and is_rotary(inner) for inner in ast.walk(node))


def replay(method: ast.FunctionDef, anchors: list[Anchor]) -> Replay:
    """Plans the shadow statements of one method.

    Raises:
        NotReplayableError: RoPE is applied inside a loop, in place, or in another way we do not understand.
    """
    containers = _shared_containers(method)
    tracer = _Tracer(anchors, containers)
    tracer.block(method.body, _State(frozenset(), frozenset(_parameters(method))))
    if containers - tracer.stored:
        tracer = _Tracer(anchors, containers & tracer.stored)
        tracer.block(method.body, _State(frozenset(), frozenset(_parameters(method))))
    return tracer.pruned()


@dataclass(frozen=True)
class _State:
    """What is known at one point: names with a shadow, and names that surely have a value."""

    shadowed: frozenset[str]
    bound: frozenset[str]


@dataclass
class _Shadow:
    """One shadow statement with what it reads and writes, so that useless ones can be dropped."""

    statement: ast.stmt
    reads: frozenset[str]
    writes: frozenset[str]


@dataclass
class _Tracer:
    anchors: list[Anchor]
    containers: frozenset[str]
    before: dict[int, list[_Shadow]] = field(default_factory=dict)
    at_end: dict[tuple[int, str], list[_Shadow]] = field(default_factory=dict)
    shadowed: dict[int, frozenset[str]] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()

    def block(self, statements: list[ast.stmt], state: _State) -> _State | None:
        """Follows a block; None where every path leaves the method or has met its anchor."""
        for statement in statements:
            here = [anchor for anchor in self.anchors if anchor.statement is statement]
            if here:
                self.shadowed[id(statement)] = state.shadowed
                return None
            if isinstance(statement, (ast.Return, ast.Raise)):
                return None
            if isinstance(statement, ast.If):
                after = self._branches(statement, state)
                if after is None:
                    return None
                state = after
            elif isinstance(statement, ast.With):
                inner = self.block(statement.body, state)
                if inner is None:
                    return None
                state = inner
            elif hasattr(statement, "body"):
                state = self._opaque(statement, state)
            else:
                state = self._simple(statement, state)
        return state

    def _branches(self, statement: ast.If, state: _State) -> _State | None:
        ends = {"body": self.block(statement.body, state), "orelse": self.block(statement.orelse, state)}
        open_ends = {name: end for name, end in ends.items() if end is not None}
        if not open_ends:
            return None
        union = frozenset().union(*(end.shadowed for end in open_ends.values()))
        bound = frozenset.intersection(*(end.bound for end in open_ends.values()))
        for name, end in open_ends.items():
            missing = sorted((union - end.shadowed) & end.bound)
            self.at_end[id(statement), name] = [_equal_to_itself(n, statement.lineno) for n in missing]
        return _State(union, bound)

    def _opaque(self, statement: ast.stmt, state: _State) -> _State:
        """Loops, try and nested functions: fine as long as they do not touch what RoPE touched."""
        if isinstance(statement, (ast.For, ast.While, ast.Try)):
            if mentions_rotary(statement) or _names(statement, ast.Store) & state.shadowed:
                raise NotReplayableError(f"line {statement.lineno}: RoPE inside a {type(statement).__name__} block")
            if any(anchor.statement in ast.walk(statement) for anchor in self.anchors):
                for anchor in self.anchors:
                    if anchor.statement in ast.walk(statement):
                        self.shadowed[id(anchor.statement)] = state.shadowed
        return state

    def _simple(self, statement: ast.stmt, state: _State) -> _State:
        original, statement = statement, _without_in_place(statement)
        written = _names(statement, ast.Store)
        bound = state.bound | written
        if _updates_cache(statement):
            return _State(state.shadowed, bound)
        rotary = [call for call in calls_in(statement) if is_rotary(call)]
        loads = self._loads_shared(statement)
        touched = _names(statement, ast.Load) & state.shadowed
        if not rotary and not touched and not loads:
            return _State(state.shadowed - written, bound)
        if isinstance(statement, ast.Expr):
            self._refuse_in_place(statement)
            return _State(state.shadowed, bound)
        shadow = self._shadow_of(statement, state, rotary)
        if shadow is None:
            return _State(state.shadowed - written, bound)
        self.before.setdefault(id(original), []).append(shadow)
        return _State(state.shadowed | written, bound)

    def _refuse_in_place(self, statement: ast.Expr) -> None:
        for call in calls_in(statement):
            if last_name(call.func).endswith("_") and not last_name(call.func).startswith("_"):
                raise NotReplayableError(f"line {statement.lineno}: q or k change in place after RoPE")

    def _shadow_of(self, statement: ast.stmt, state: _State, rotary: list[ast.Call]) -> _Shadow | None:
        twin = copy.deepcopy(statement)
        if not isinstance(twin, ast.Assign):
            return None
        target = twin.targets[0]
        if isinstance(target, ast.Subscript):
            return self._shadow_store(twin, target, state)
        if not all(isinstance(node, (ast.Name, ast.Tuple, ast.List)) for t in twin.targets for node in _leaves(t)):
            if rotary:
                raise NotReplayableError(f"line {statement.lineno}: RoPE is written into a part of a tensor")
            return None
        renamed = _Rename(state.shadowed, self.containers, identity_width=_width(target))
        names = [element.id for element in _elements(target) if isinstance(element, ast.Name)]
        twin.value = renamed.apply(twin.value, names)
        reads = frozenset(_names(twin.value, ast.Load)) | frozenset(f"{c}[]" for c in renamed.containers_read)
        writes = frozenset(_names(twin, ast.Store))
        for node in ast.walk(twin):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                node.id = pre_name(node.id)
        return _Shadow(_guarded(twin, statement.lineno), reads, frozenset(pre_name(name) for name in writes))

    def _shadow_store(self, twin: ast.Assign, target: ast.Subscript, state: _State) -> _Shadow | None:
        container = target.value.id if isinstance(target.value, ast.Name) else ""
        if container in self.containers and container not in state.shadowed:
            self.stored |= {container}
            target.slice = _shadow_key(target.slice)
            twin.value = _Rename(state.shadowed, frozenset(), 1).apply(twin.value, [])
            reads = frozenset(_names(twin.value, ast.Load))
            return _Shadow(_guarded(twin, twin.lineno), reads, frozenset({f"{container}[]"}))
        if container and (container in state.shadowed or mentions_rotary(twin)):
            raise NotReplayableError(f"line {twin.lineno}: q or k are written in part after RoPE")
        return None

    def _loads_shared(self, statement: ast.stmt) -> bool:
        return any(_is_shared_load(node, self.containers) for node in ast.walk(statement))

    def pruned(self) -> Replay:
        """Keeps the shadow statements that some anchor's q or k depend on."""
        every = [s for group in (*self.before.values(), *self.at_end.values()) for s in group]
        needed = {pre_name(n) for a in self.anchors for n in _names(a.q, ast.Load) | _names(a.k, ast.Load)}
        grown = True
        while grown:
            more = {name for s in every if s.writes & needed for name in s.reads}
            grown = not more <= needed
            needed |= more
        keep = {place: [s.statement for s in group if s.writes & needed] for place, group in self.before.items()}
        ends = {place: [s.statement for s in group if s.writes & needed] for place, group in self.at_end.items()}
        return Replay(keep, ends, self.shadowed)


class _Rename(ast.NodeTransformer):
    """Reads shadows instead of names, and takes RoPE for the identity."""

    def __init__(self, shadowed: frozenset[str], containers: frozenset[str], identity_width: int) -> None:
        self.shadowed, self.containers, self.width = shadowed, containers, identity_width
        self.targets: list[str] = []
        self.containers_read: set[str] = set()

    def apply(self, value: ast.expr, targets: list[str]) -> ast.expr:
        self.targets = targets
        if isinstance(value, ast.Call) and is_rotary(value):
            value = self._identity(value, self.width)
        return self.visit(value)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A rotary call inside a larger expression returns one tensor: its first argument."""
        return self.visit(self._identity(node, 1)) if is_rotary(node) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        renamed = isinstance(node.ctx, ast.Load) and node.id in self.shadowed
        return ast.Name(pre_name(node.id), node.ctx) if renamed else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if _is_shared_load(node, self.containers):
            self.containers_read.add(ast.unparse(node.value))
            return ast.Subscript(node.value, _shadow_key(node.slice), ast.Load())
        return self.generic_visit(node)

    def _identity(self, call: ast.Call, width: int) -> ast.expr:
        """What the call would return without rotating: the arguments that its targets are named after,
        else its first ones."""
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        by_name = {value.id: value for value in values if isinstance(value, ast.Name)}
        if self.targets and len(self.targets) == width and all(t in by_name for t in self.targets):
            chosen: list[ast.expr] = [by_name[target] for target in self.targets]
        else:
            chosen = values[:width]
        if len(chosen) < width:
            raise NotReplayableError(f"line {call.lineno}: RoPE returns more than it is given")
        return chosen[0] if width == 1 else ast.Tuple(chosen, ast.Load())


def _parameters(method: ast.FunctionDef) -> set[str]:
    arguments = method.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return {argument.arg for argument in [*named, *starred]}


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    if context is ast.Store:
        inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
        found -= {name for c in inner for g in c.generators for name in _names(g.target, ast.Store)}
    return found


def _elements(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]


def _leaves(target: ast.expr) -> list[ast.expr]:
    return [leaf for e in _elements(target) for leaf in ([e] if e is target else _leaves(e))]


def _width(target: ast.expr) -> int:
    return len(_elements(target))


def _updates_cache(statement: ast.stmt) -> bool:
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "update" for call in calls_in(statement))


def _shared_containers(method: ast.FunctionDef) -> frozenset[str]:
    """Parameters that are dictionaries which the method writes entries into, such as shared_kv_states."""
    stores = {
        node.value.id
        for node in ast.walk(method)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
        if not isinstance(node.slice, (ast.Slice, ast.Tuple))
    }
    return frozenset(stores & _parameters(method))


def _is_shared_load(node: ast.AST, containers: frozenset[str]) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in containers
    )


def _shadow_key(key: ast.expr) -> ast.expr:
    return ast.Tuple([ast.Constant("__sniffer_pre__"), key], ast.Load())


def _without_in_place(statement: ast.stmt) -> ast.stmt:
    """`q *= s` as `q = q * s`, since a shadow may share its memory with the true tensor."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        left = ast.Name(statement.target.id, ast.Load())
        return ast.copy_location(
            ast.Assign([statement.target], ast.BinOp(left, statement.op, statement.value)), statement
        )
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.copy_location(ast.Assign([statement.target], statement.value), statement)
    return statement


def _equal_to_itself(name: str, line: int) -> _Shadow:
    assign = ast.parse(f"{pre_name(name)} = {name}").body[0]
    return _Shadow(_guarded(assign, line), frozenset({name}), frozenset({pre_name(name)}))


def _guarded(statement: ast.stmt, line: int) -> ast.stmt:
    guard = ast.parse(f"if {GUARD}:\n    pass").body[0]
    assert isinstance(guard, ast.If)
    guard.body = [statement]
    return place(guard, line)


def place(node: ast.stmt, line: int) -> ast.stmt:
    """Gives a statement and all its parts a one-line span, so that upstream line numbers stay right."""
    for inner in ast.walk(node):
        if "lineno" in inner._attributes:
            inner.lineno = inner.end_lineno = line  # type: ignore[attr-defined]
            inner.col_offset = inner.end_col_offset = 0  # type: ignore[attr-defined]
    return node
