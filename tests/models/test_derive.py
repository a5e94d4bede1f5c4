"""Derivation: what is inserted, what is left alone, and that the pre kinds are replayed soundly."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sniffer.models.derive import TAP_NAME, Derived, derive

from sniffer.tap import TAP, Attended, Seen, tap

FAMILIES = (
    "llama",
    "gemma3",
    "deepseek_v3",
    "gptj",
    "llama4",
    "gemma4",
    "falcon",
    "gpt2",
    "qwen3_next",
    "bloom",
)


def upstream(family: str) -> Path:
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "models" / family / f"modeling_{family}.py"
    if not path.is_file():
        pytest.skip(f"this transformers has no {family}")
    return path


class WithoutTaps(ast.NodeTransformer):
    """Takes every inserted statement out again."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if TAP_NAME in ast.unparse(node.test) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Call) and ast.unparse(node.func.func) == f"{TAP_NAME}.attending":
            node.func = node.func.args[0]
        return node


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_insertions_it_is_the_original_to_the_column(family: str):
    path = upstream(family)
    source = path.read_text(encoding="utf-8")
    derived = derive(source, str(path))
    assert derived.taps
    stripped = WithoutTaps().visit(derived.tree)
    assert ast.dump(stripped, include_attributes=True) == ast.dump(ast.parse(source), include_attributes=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tap_stands_on_the_line_of_its_attention_call(family: str):
    path = upstream(family)
    derived = derive(path.read_text(encoding="utf-8"), str(path))
    lines = [
        node.lineno
        for node in ast.walk(derived.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"{TAP_NAME}.observer is not None"
    ]
    assert sorted(lines) == sorted(one.line for one in derived.taps)
    compile(derived.tree, str(path), "exec")


def attention(body: str, extra: str = "") -> str:
    """A toy module whose forward takes q, k, v and a cache; rotary adds 100."""
    return (
        "class Toy:\n"
        "    use_rope = True\n"
        f"{textwrap.indent(textwrap.dedent(extra), '    ')}\n"
        "    def forward(self, q, k, v, cache=None, shared=None):\n"
        f"{textwrap.indent(textwrap.dedent(body), '        ')}\n"
        "        return attention_interface(self, q, k, v, scaling=self.scaling)\n"
        "    scaling = 0.5\n"
    )


def run(source: str, *arguments: Any, pre: bool = True, **attributes: Any) -> SimpleNamespace:
    """Executes a derived toy: what attention got, what the tap saw, and what was derived."""
    derived = derive(source, "toy.py")
    calls: list[tuple[Any, ...]] = []
    namespace: dict[str, Any] = {
        TAP_NAME: TAP,
        "attention_interface": lambda module, *operands, **_: calls.append(operands[:3]),
        "apply_rotary_pos_emb": lambda q, k: (q + 100, k + 100),
        "apply_rotary_one": lambda x: x + 100,
    }
    exec(compile(derived.tree, "toy.py", "exec"), namespace)
    toy = namespace["Toy"]()
    vars(toy).update(attributes)
    seen: list[Seen] = []
    with tap(seen.append, pre=pre):
        toy.forward(*arguments)
    return SimpleNamespace(calls=calls, seen=seen, derived=derived)


def test_the_tap_sees_the_objects_that_attention_gets():
    result = run(attention("q, k = apply_rotary_pos_emb(q, k)"), 1.5, 2.5, 3.5)
    (event,), ((q, k, v),) = result.seen, result.calls
    assert event.q is q and event.k is k and event.v is v and event.scaling == 0.5


def test_a_call_is_shown_once_it_is_over_and_is_the_very_call_otherwise():
    derived, calls = derive(attention("q, k = apply_rotary_pos_emb(q, k)"), "toy.py"), []
    interface = lambda module, *operands, **options: calls.append((module, operands, options)) or "returned"  # noqa: E731
    namespace = {TAP_NAME: TAP, "attention_interface": interface, "apply_rotary_pos_emb": lambda q, k: (q, k)}
    exec(compile(derived.tree, "toy.py", "exec"), namespace | {"__name__": "its.home"}, scope := {})
    toy, shown = scope["Toy"](), []
    assert TAP.attending(interface, toy, "its.home") is interface
    with tap(lambda seen: None):
        assert TAP.attending(interface, toy, "its.home") is interface
    with tap(lambda seen: None, attended=shown.append):
        assert toy.forward(1.0, 2.0, 3.0) == "returned"
    (one,) = shown
    assert one == Attended(toy, "its.home", interface, (toy, 1.0, 2.0, 3.0), {"scaling": 0.5}, "returned")
    assert calls == [(toy, (1.0, 2.0, 3.0), {"scaling": 0.5})]


def test_a_compound_operand_is_evaluated_once():
    source = attention("").replace("interface(self, q, k, v,", "interface(self, self.norm(q), k, v,")
    count: list[float] = []
    result = run(source, 1.5, 2.5, 3.5, norm=lambda q: count.append(q) or q * 2)
    assert len(count) == 1 and result.seen[0].q is result.calls[0][0] == 3.0


REPLAYS: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "plain": ("q, k = apply_rotary_pos_emb(q, k)", {}, 1, 2),
    "keywords": ("q, k = apply_rotary_pos_emb(q=q, k=k)", {}, 1, 2),
    "one by one": ("q = apply_rotary_one(q)\nk = apply_rotary_one(k)", {}, 1, 2),
    "scaled after": ("q, k = apply_rotary_pos_emb(q, k)\nq = q * 3", {}, 3, 2),
    "in place after": ("q, k = apply_rotary_pos_emb(q, k)\nq *= 3", {}, 3, 2),
    "annotated": ("q, k = apply_rotary_pos_emb(q, k)\nq: float = q * 3", {}, 3, 2),
    "through parts": ("a, b = apply_rotary_pos_emb(q, k)\nq = a + 5\nk = b", {}, 6, 2),
    "nested call": ("q = apply_rotary_one(q * 2) * 3", {}, 6, 2),
    "nope": (
        "if self.use_rope:\n    q, k = apply_rotary_pos_emb(q, k)\nq = q * 3",
        {"use_rope": False},
        3,
        2,
    ),
    "rope": ("if self.use_rope:\n    q, k = apply_rotary_pos_emb(q, k)\nq = q * 3", {}, 3, 2),
    "overwritten": ("q, k = apply_rotary_pos_emb(q, k)\nk = v", {}, 1, 3),
    "one branch binds": (
        "if self.use_rope:\n    part, k = apply_rotary_pos_emb(q, k)\n    q = part\nelse:\n    q = q + 7",
        {"use_rope": False},
        8,
        2,
    ),
    "tuple in tuple": ("q, k = apply_rotary_pos_emb(q, k)\n(q, _), k = (q, 0), k", {}, 1, 2),
    "no rotary": ("q = q * 3", {}, 3, 2),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_pre_is_what_attention_would_get_without_rotation(case: str):
    body, attributes, q_pre, k_pre = REPLAYS[case]
    result = run(attention(body), 1, 2, 3, **attributes)
    assert (result.seen[0].q_pre, result.seen[0].k_pre) == (q_pre, k_pre)
    assert (result.seen[0].q, result.seen[0].k) == result.calls[0][:2]


@pytest.mark.parametrize("case", REPLAYS)
def test_pre_costs_nothing_when_off(case: str):
    body, attributes, _, _ = REPLAYS[case]
    result = run(attention(body), 1, 2, 3, pre=False, **attributes)
    assert result.seen[0].q_pre is None and result.seen[0].k_pre is None


def test_the_cache_is_updated_once():
    class Cache:
        updates = 0

        def update(self, k: int, v: int) -> tuple[int, int]:
            self.updates += 1
            return k, v

    body = "q, k = apply_rotary_pos_emb(q, k)\nif cache is not None:\n    k, v = cache.update(k, v)"
    cache = Cache()
    result = run(attention(body), 1, 2, 3, cache)
    assert cache.updates == 1 and result.seen[0].k_pre == 2


def test_a_key_made_of_parts_from_a_cache_is_before_rope_of_the_parts_of_this_forward():
    class Cache:
        def update(self, latent: int, rotated: int) -> tuple[int, int]:
            return latent + 5000, rotated + 5000  # with those of earlier tokens

    body = """
        k = apply_rotary_one(k)
        if cache is not None:
            v, k = cache.update(v, k)
        k, v = v * 10 + k, v
    """
    for cache, k in ((Cache(), 5003 * 10 + 5102), (None, 3 * 10 + 102)):
        result = run(attention(body), 1, 2, 3, cache)
        assert (result.seen[0].k, result.seen[0].k_pre) == (k, 3 * 10 + 2)


def test_layers_that_share_keys_share_their_pre_keys():
    body = """
        if self.reads:
            k, v = shared["full"]
        else:
            k = apply_rotary_one(k)
        if self.stores:
            shared["full"] = k, v
        q = apply_rotary_one(q)
    """
    shared: dict[Any, Any] = {}
    run(attention(body), 1, 2, 3, None, shared, reads=False, stores=True)
    result = run(attention(body), 10, 20, 30, None, shared, reads=True, stores=False)
    event = result.seen[0]
    assert (event.q, event.k, event.v, event.q_pre, event.k_pre) == (110, 102, 3, 10, 2)


@pytest.mark.parametrize(
    "body",
    [
        "for _ in range(2):\n    q, k = apply_rotary_pos_emb(q, k)",
        "q, k = apply_rotary_pos_emb(q, k)\nq.mul_(3)",
        "q[0], k[0] = apply_rotary_pos_emb(q[0], k[0])",
        "q, k = apply_rotary_pos_emb(q, k)\nq[0] = 0",
    ],
)
def test_what_cannot_be_replayed_has_no_pre_and_says_why(body: str):
    derived = derive(attention(body), "toy.py")
    assert not derived.taps[0].has_pre and "line" in derived.taps[0].pre_missing


def test_rotary_in_another_method_leaves_pre_out():
    extra = "def rotate(self, q, k):\n    return apply_rotary_pos_emb(q, k)"
    derived = derive(attention("q, k = self.rotate(q, k)", extra), "toy.py")
    assert "rotate" in derived.taps[0].pre_missing


def test_a_second_call_with_the_same_q_and_k_is_one_event():
    again = attention("attention_interface(self, q, k, v)")
    assert len(derive(again, "toy.py").taps) == 1
    changed = attention("attention_interface(self, q, k, v)\nq = q + 1")
    assert len(derive(changed, "toy.py").taps) == 2


ANCHORS: dict[str, Callable[[Derived], bool]] = {
    "fn = ALL_ATTENTION_FUNCTIONS.get('x')\nreturn fn(self, q, k, v)": lambda d: d.taps[0].anchor == "interface",
    "return attention_interface(self, query=q, key=k, value=v)": lambda d: d.taps[0].anchor == "interface",
    "return F.scaled_dot_product_attention(q, k, v)": lambda d: d.taps[0].anchor == "sdpa",
    "return torch.softmax(q @ k.transpose(-1, -2), -1) @ v": lambda d: d.taps[0].anchor == "score",
    "return softmax(torch.bmm(q, k)).bmm(v) @ v": lambda d: d.taps[0].anchor == "score",
    "return [attention_interface(self, a, b, c) for a, b, c in parts]": lambda d: not d.taps,
}


@pytest.mark.parametrize("body", ANCHORS)
def test_the_shapes_of_attention_calls(body: str):
    source = f"class A:\n    def forward(self, q, k, v):\n{textwrap.indent(body, ' ' * 8)}\n"
    assert ANCHORS[body](derive(source, "toy.py"))


def test_a_helper_method_is_tapped_where_it_is_called():
    source = """
class A:
    def _attn(self, query, key, value, mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2))
        return torch.matmul(softmax(scores), value)

    def forward(self, x):
        q, k, v = self.split(x)
        return self._attn(q, k, v)
"""
    (one,) = derive(source, "toy.py").taps
    assert (one.method, one.line, one.anchor) == ("forward", 9, "helper")


def test_attention_that_no_rule_matches_is_named():
    source = "\nclass Odd:\n    def forward(self, a, b):\n        return softmax(einsum('x', a)) @ einsum('y', b)\n"
    derived = derive(source, "toy.py")
    assert not derived.taps and [(one.class_name, one.line) for one in derived.untapped] == [("Odd", 2)]
