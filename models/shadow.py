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
cache they do not run, and they must never run twice; what else they return has the shadow that it was
before. A dictionary through which layers share keys gets
a shadow entry beside each true one. What cannot be replayed soundly leaves the pre kinds out by name.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from .anchors import Anchor, calls_in, last_name
from .identity import Identity, NotReplayableError, pre_name, shadow_key
from .syntax import (
    is_rotary,
    leaves,
    loaded,
    mentions_rotary,
    parameters,
    place,
    reads_container,
    shared_containers,
    stored,
    updates_cache,
    without_in_place,
)

GUARD = "__sniffer_tap__.wants_pre"


@dataclass(frozen=True)
class Replay:
    """Where the shadow statements go, and which names are shadowed at each anchor.

    `before` maps a statement's id to what goes before it; `at_end` an `if` and one of its branches ("body", "orelse")
    to what goes at the branch's end; `shadowed` an anchor's statement to names.
    """

    before: dict[int, list[ast.stmt]]
    at_end: dict[tuple[int, str], list[ast.stmt]]
    shadowed: dict[int, frozenset[str]]


def replay(method: ast.FunctionDef, anchors: list[Anchor]) -> Replay:
    """Plans the shadow statements of one method.

    Raises:
        NotReplayableError: RoPE is applied inside a loop, in place, or in another way we do not understand.
    """
    containers = shared_containers(method)
    tracer = _traced(method, anchors, containers)
    # A dictionary that no rotated key ever went into is like any other: with it left out, nothing reads a shadow entry
    # that nobody has written.
    if containers - tracer.stored:
        tracer = _traced(method, anchors, containers & tracer.stored)
    return tracer.pruned()


def _traced(method: ast.FunctionDef, anchors: list[Anchor], containers: frozenset[str]) -> _Tracer:
    tracer = _Tracer(anchors, containers)
    tracer.block(method.body, _State(frozenset(), frozenset(parameters(method))))
    return tracer


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
    """Follows a method from statement to statement, with the state before each, and writes shadows as it goes.

    `stored` are the containers into which it wrote a shadow entry.
    """

    anchors: list[Anchor]
    containers: frozenset[str]
    before: dict[int, list[_Shadow]] = field(default_factory=dict)
    at_end: dict[tuple[int, str], list[_Shadow]] = field(default_factory=dict)
    shadowed: dict[int, frozenset[str]] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()

    def block(self, statements: list[ast.stmt], state: _State) -> _State | None:
        """Follows a block; None where every path leaves the method or has met its anchor."""
        for statement in statements:
            # The tap shows what is shadowed here; what comes after attention does not matter to q and k.
            if any(anchor.statement is statement for anchor in self.anchors):
                self.shadowed[id(statement)] = state.shadowed
                return None
            if isinstance(statement, (ast.Return, ast.Raise)):
                return None
            after = self._statement(statement, state)
            if after is None:
                return None
            state = after
        return state

    def _statement(self, statement: ast.stmt, state: _State) -> _State | None:
        if isinstance(statement, ast.If):
            return self._branches(statement, state)
        if isinstance(statement, ast.With):
            # with torch.autocast(...):        runs once, in order: as if its body stood here
            return self.block(statement.body, state)
        if hasattr(statement, "body"):
            return self._opaque(statement, state)
        return self._simple(statement, state)

    def _branches(self, statement: ast.If, state: _State) -> _State | None:
        # if self.use_rope:                        shadowed at its end: query
        #     query = apply_rope(query, freqs)
        # else:                                    shadowed at its end: nothing, so `query__pre = query` goes there
        #     query = query * scale
        # attend(query)                            query is shadowed here, whichever way one came
        ends = {"body": self.block(statement.body, state), "orelse": self.block(statement.orelse, state)}
        open_ends = {name: end for name, end in ends.items() if end is not None}
        if not open_ends:
            return None
        union = frozenset().union(*(end.shadowed for end in open_ends.values()))
        bound = frozenset.intersection(*(end.bound for end in open_ends.values()))
        for name, end in open_ends.items():
            # A name without a value in this branch would raise NameError: no path reads it afterwards either.
            missing = sorted((union - end.shadowed) & end.bound)
            self.at_end[id(statement), name] = [_equal_to_itself(n, statement.lineno) for n in missing]
        return _State(union, bound)

    def _opaque(self, statement: ast.stmt, state: _State) -> _State:
        """Loops, try and nested functions: fine as long as they do not touch what RoPE touched."""
        # for head in range(n):                    a shadow of each pass would be needed: refused. A loop over chunks
        #     q[head] = apply_rope(q[head])        of attention, after RoPE, is fine, and may hold the anchor.
        if isinstance(statement, (ast.For, ast.While, ast.Try)):
            if mentions_rotary(statement) or stored(statement) & state.shadowed:
                raise NotReplayableError(f"line {statement.lineno}: RoPE inside a {type(statement).__name__} block")
            inside = set(ast.walk(statement))
            for anchor in self.anchors:
                if anchor.statement in inside:
                    self.shadowed[id(anchor.statement)] = state.shadowed
        return state

    def _simple(self, statement: ast.stmt, state: _State) -> _State:
        original, statement = statement, without_in_place(statement)
        written = stored(statement)
        bound = state.bound | written
        # key, value = past_key_values.update(key, value, self.layer_idx): key keeps its shadow, which is of the tokens
        # of this forward. Where a key is made of several parts later on, the others have to be of these tokens too.
        if updates_cache(statement):
            beside = sorted((written & state.bound) - state.shadowed) if written & state.shadowed else []
            self.before.setdefault(id(original), []).extend(_equal_to_itself(n, statement.lineno) for n in beside)
            return _State(state.shadowed.union(beside), bound)
        rotary = any(is_rotary(call) for call in calls_in(statement))
        shares = any(reads_container(node, self.containers) for node in ast.walk(statement))
        # query = self.q_proj(hidden): nothing that RoPE touched. If query had a shadow, that was of an older value.
        if not rotary and not shares and not loaded(statement) & state.shadowed:
            return _State(state.shadowed - written, bound)
        # A call for its effect, such as logger.warning(f"{query.dtype}"), has no value to shadow.
        if isinstance(statement, ast.Expr):
            self._refuse_in_place(statement)
            return _State(state.shadowed, bound)
        shadow = self._shadow_of(statement, state)
        if shadow is None:
            return _State(state.shadowed - written, bound)
        self.before.setdefault(id(original), []).append(shadow)
        return _State(state.shadowed | written, bound)

    def _refuse_in_place(self, statement: ast.Expr) -> None:
        # query.mul_(scale): the shadow would go without it, or get it twice where both share their memory.
        for call in calls_in(statement):
            if last_name(call.func).endswith("_") and not last_name(call.func).startswith("_"):
                raise NotReplayableError(f"line {statement.lineno}: q or k change in place after RoPE")

    def _shadow_of(self, statement: ast.stmt, state: _State) -> _Shadow | None:
        """The statement on shadow names; None where there is nothing to shadow."""
        twin = copy.deepcopy(statement)
        if not isinstance(twin, ast.Assign):  # assert, del, ...
            return None
        target = twin.targets[0]
        if isinstance(target, ast.Subscript):
            return self._shadow_store(twin, target, state)
        # self.last_query = query: an attribute gets no shadow. But self.q = apply_rope(q) would hide a rotation.
        if not all(isinstance(node, (ast.Name, ast.Tuple, ast.List)) for t in twin.targets for node in leaves(t)):
            if mentions_rotary(statement):
                raise NotReplayableError(f"line {statement.lineno}: RoPE is written into a part of a tensor")
            return None
        identity = Identity(state.shadowed, self.containers, target)
        twin.value = identity.of(twin.value)
        reads = frozenset(loaded(twin.value)) | frozenset(f"{c}[]" for c in identity.containers_read)
        writes = frozenset(pre_name(name) for name in stored(twin))
        for node in ast.walk(twin):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                node.id = pre_name(node.id)
        return _Shadow(_guarded(twin, statement.lineno), reads, writes)

    def _shadow_store(self, twin: ast.Assign, target: ast.Subscript, state: _State) -> _Shadow | None:
        container = target.value.id if isinstance(target.value, ast.Name) else ""
        # shared_kv_states[i] = key, value        before it: shared_kv_states["__sniffer_pre__", i] = key__pre, value
        if container in self.containers and container not in state.shadowed:
            self.stored |= {container}
            target.slice = shadow_key(target.slice)
            twin.value = Identity(state.shadowed, frozenset()).of(twin.value)
            reads = frozenset(loaded(twin.value))
            return _Shadow(_guarded(twin, twin.lineno), reads, frozenset({f"{container}[]"}))
        # query[..., :rope_dim] = apply_rope(query[..., :rope_dim]): a shadow of the rest would be lost.
        if container and (container in state.shadowed or mentions_rotary(twin)):
            raise NotReplayableError(f"line {twin.lineno}: q or k are written in part after RoPE")
        return None

    def pruned(self) -> Replay:
        """Keeps the shadow statements that some anchor's q or k depend on.

        Of `cos__pre = cos * 2`, which nothing that is tapped reads, no trace is left: from the anchors back, what a
        needed statement reads is needed too, until nothing more comes in.
        """
        every = [s for group in (*self.before.values(), *self.at_end.values()) for s in group]
        needed = {pre_name(n) for a in self.anchors for n in loaded(a.q) | loaded(a.k)}
        grown = True
        while grown:
            more = {name for s in every if s.writes & needed for name in s.reads}
            grown = not more <= needed
            needed |= more
        keep = {place: [s.statement for s in group if s.writes & needed] for place, group in self.before.items()}
        ends = {place: [s.statement for s in group if s.writes & needed] for place, group in self.at_end.items()}
        return Replay(keep, ends, self.shadowed)


def _equal_to_itself(name: str, line: int) -> _Shadow:
    assign = ast.parse(f"{pre_name(name)} = {name}").body[0]
    return _Shadow(_guarded(assign, line), frozenset({name}), frozenset({pre_name(name)}))


def _guarded(statement: ast.stmt, line: int) -> ast.stmt:
    """if __sniffer_tap__.wants_pre: statement"""
    guard = ast.parse(f"if {GUARD}:\n    pass").body[0]
    assert isinstance(guard, ast.If)
    guard.body = [statement]
    return place(guard, line)
