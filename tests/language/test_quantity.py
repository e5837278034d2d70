"""Quantities: what texts mean, and that the three evaluations of one expression agree."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvpolicy.errors import PolicyError
from kvpolicy.language.quantity import Quantity, QuantityError, Range

NAMES = ("t", "context", "prompt_len", "layer", "size(p)")


def evaluate(text: str, **values: int) -> Fraction:
    return Quantity.parse(text).evaluate(values)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1024", 1024),
        ("4k", 4096),
        ("0.5k", 512),
        ("50%", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        (".25", Fraction(1, 4)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1 + 2 * 3 - 4", 3),
        ("8 - 3 - 2", 3),
        ("-2 * -3", 6),
        ("2 - -3", 5),
        ("7 / 2", Fraction(7, 2)),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("7 // 0.5", 14),
        ("1 < 2", 1),
        ("2 <= 1", 0),
        ("1 + 1 == 2", 1),
        ("3 > 2 and 2 >= 3", 0),
        ("0 or 5", 1),
        ("1 < 2 and 2 < 3 or 0", 1),
        ("if(1 > 2, 10, 20)", 20),
        ("min(3, 1, 2)", 1),
        ("max(3, 1, 2)", 3),
        ("clamp(7, 0, 5)", 5),
        ("floor(-0.5)", -1),
        ("ceil(-0.5)", 0),
        ("round(0.5)", 1),
        ("round(-0.5)", 0),
        ("round(2.5)", 3),
        ("cos(0)", 1),
        ("cos(1)", Fraction(540302, 10**6)),
        ("(1 +\n 2) * 2", 6),
    ],
)
def test_value(text, value):
    assert Quantity.parse(text).constant == value
    assert evaluate(text) == value


def test_scope_budget_grows_from_its_window_to_its_whole():
    budget = Quantity.parse("beta2 + clamp((t - beta2) * beta1 // growth, 0, beta1)")
    budget = budget.fold({"beta1": 256, "beta2": 256, "growth": 4096 - 256})
    assert budget.names == {"t"}
    assert [budget.evaluate({"t": t}) for t in (0, 256, 271, 4096, 9000)] == [256, 256, 257, 512, 512]
    assert budget.bound({"t": Range(0, math.inf)}) == Range(256, 512)
    assert budget.bound({"t": Range(0, 271)}) == Range(256, 257)
    assert budget.direction() == "up"


def test_pyramid_budget_differs_by_layer():
    budget = Quantity.parse("round(2 * mean * (layers - layer) / max(1, layers))").fold({"mean": 64})
    assert [budget.fold({"layer": i, "layers": 4}).constant for i in range(4)] == [128, 96, 64, 32]
    assert budget.direction() == "constant"


def test_names_and_trees():
    quantity = Quantity.parse("max(2 * page, budget - size(prompt)) + seen(prompt)")
    assert quantity.names == {"page", "budget", "size(prompt)", "seen(prompt)"}
    assert Quantity.parse("a <= 50%").tree == ("<=", ("name", "a"), ("const", 1, 2, True))
    assert Quantity.parse("size(p)").fold({"size(p)": 3}).constant == 3
    assert Quantity.parse("a + 1").fold({"a": Quantity.parse("b * 2")}) == Quantity.parse("b*2 + 1")


@pytest.mark.parametrize("text", ["50%", "100% / 3", "min(50%, 20%)", "if(1, 50%, 3)", "-50%", "50% * 50%"])
def test_bare_share(text):
    assert Quantity.parse(text).share


@pytest.mark.parametrize("text", ["0.5", "50% * 8", "50% * t", "8 / 50%", "if(t > 1, 50%, 8)"])
def test_not_a_bare_share(text):
    assert not Quantity.parse(text).share


@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("64", "constant"),
        ("prompt_len + size(p)", "constant"),
        ("20% * context", "up"),
        ("t * t", "up"),
        ("100 - t", "down"),
        ("1000 / (t + 1)", "down"),
        ("min(t, 100 - t)", "unknown"),
        ("if(t < 100, 64, 128)", "up"),
        ("if(t < 100, 128, 64)", "down"),
        ("if(t < 100, t, 128)", "unknown"),
        ("t * -1 * prompt_len", "down"),
        ("t - t", "unknown"),
        ("10 / (t - 5)", "unknown"),
        ("t >= 5 and prompt_len > 3", "up"),
        ("cos(t)", "unknown"),
        ("t == 5", "unknown"),
    ],
)
def test_direction(text, direction):
    assert Quantity.parse(text).direction() == direction


@pytest.mark.parametrize(
    ("text", "offset", "words"),
    [
        ("", 0, "nothing is here"),
        ("1 +", 3, "the expression ends here"),
        ("1 + )", 4, "found `)`"),
        ("min(1)", 0, "takes 2 or more arguments, 1 given"),
        ("cos(1, 2)", 0, "takes 1 argument, 2 given"),
        ("1 + maxx(1, 2)", 4, "did you mean `max`?"),
        ("a < b < c", 6, "write `a < b and b < c`"),
        ("a = b", 2, "written `==`"),
        ("50 % 3", 3, "there is no remainder operator"),
        ("2 ** 3", 3, "found `*`"),
        ("4kb", 0, "4k (= 4096)"),
        ("1 2", 2, "an operator expected"),
        ("size", 0, "`size(…)`"),
        ("size(3)", 5, "the name of one pool"),
        ("size(a, b)", 6, "the name of one pool"),
        ("1e999", 0, "30 digits"),
        ("9" * 40, 0, "30 digits"),
        ("9" * 2000, 0, "characters"),
        ("(" * 50 + "1" + ")" * 50, 40, "nested deeper"),
        ("-" * 60 + "1", 40, "nested deeper"),
        ("+".join(["t"] * 200), 0, "operations hang on each other"),
        ("1e20 * 1e20", None, "30 digits"),
        ("1 / (2 - 2)", None, "divides by 0"),
        ("__import__('os')", 11, "holds no strings"),
        ("t\u00b2", 1, "no meaning"),
    ],
)
def test_what_cannot_be_read(text, offset, words):
    with pytest.raises(QuantityError) as caught:
        Quantity.parse(text)
    assert words in str(caught.value)
    assert caught.value.offset == offset
    assert isinstance(caught.value, PolicyError) and caught.value.exit_code == 3


def test_a_let_cannot_multiply_itself_without_end():
    quantity = Quantity.parse("t + t")
    with pytest.raises(QuantityError, match="parts"):
        for _ in range(64):
            quantity = Quantity.parse("x + x").fold({"x": quantity})
    number = Quantity.parse("1e10")
    with pytest.raises(QuantityError, match="30 digits"):
        for _ in range(64):
            number = Quantity.parse("x * x").fold({"x": number})


def test_unknown_values_and_divisors():
    with pytest.raises(QuantityError, match="`t` has no value here"):
        evaluate("t + 1")
    with pytest.raises(QuantityError, match="divides by 0"):
        evaluate("8 / t", t=0)
    with pytest.raises(QuantityError, match="may be 0"):
        Quantity.parse("8 // (t - 3)").bound({"t": Range(0, 9)})
    assert Quantity.parse("8 // max(1, t - 3)").bound({"t": Range(0, 9)}) == Range(1, 8)


def test_equal_whatever_the_text_and_it_travels():
    quantity = Quantity.parse("a+1")
    assert quantity == Quantity.parse("a + 1") and hash(quantity) == hash(Quantity.parse("(a) + 1"))
    for twin in (pickle.loads(pickle.dumps(quantity)), copy.deepcopy(quantity)):
        assert twin == quantity and twin.text == "a+1"
    error = pickle.loads(pickle.dumps(QuantityError("no", 3, 2, "yes")))
    assert (error.offset, error.width, str(error)) == (3, 2, "no: yes")


# The three evaluations agree -------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 9).map(str), st.sampled_from(["0.5", "25%", "1e-2", "2k", "1.25"]), st.sampled_from(NAMES)
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from(["+", "-", "*", "/", "//", "<", "<=", ">", ">=", "==", "and", "or"])
    return st.one_of(
        st.tuples(inner, binary, inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda p: f"{p[0]}({p[1]}, {p[2]})"),
        st.tuples(st.sampled_from(["if", "clamp"]), inner, inner, inner).map(
            lambda p: f"{p[0]}({p[1]}, {p[2]}, {p[3]})"
        ),
        st.tuples(st.sampled_from(["floor", "ceil", "round", "cos", "-"]), inner).map(lambda p: f"{p[0]}({p[1]})"),
    )


expressions = st.recursive(numbers, larger, max_leaves=10)
values = st.fixed_dictionaries({name: st.integers(0, 40) for name in NAMES})


def parsed(text: str) -> Quantity:
    """The quantity, unless its constants divide by 0 or grow too large."""
    try:
        return Quantity.parse(text)
    except QuantityError:
        assume(False)
        raise


@settings(max_examples=300, deadline=None)
@given(expressions, values, st.data())
def test_evaluate_lies_in_bound(text, point, data):
    quantity = parsed(text)
    ranges = {name: Range(data.draw(st.integers(0, at)), data.draw(st.integers(at, 50))) for name, at in point.items()}
    try:
        bound = quantity.bound(ranges)
    except QuantityError:
        return
    assert quantity.evaluate(point) in bound  # and a divisor that bound() let pass is never 0
    point_ranges = {name: Range(at, at) for name, at in point.items()}
    assert quantity.bound(point_ranges).point == quantity.evaluate(point)


@settings(max_examples=300, deadline=None)
@given(expressions, values, st.sets(st.sampled_from(NAMES)))
def test_fold_then_evaluate_is_evaluate(text, point, early):
    quantity = parsed(text)
    try:
        whole = quantity.evaluate(point)
        folded = quantity.fold({name: point[name] for name in early})
    except QuantityError:
        return
    assert folded.names <= quantity.names - early
    assert folded.evaluate(point) == whole


@settings(max_examples=500, deadline=None)
@given(expressions, values)
def test_direction_agrees_with_the_next_step(text, point):
    quantity = parsed(text)
    later = {**point, "t": point["t"] + 1, "context": point["context"] + 1}
    direction = quantity.direction()
    if direction == "unknown":
        return
    now, then = quantity.evaluate(point), quantity.evaluate(later)
    assert {"constant": then == now, "up": then >= now, "down": then <= now}[direction]


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_a_rendered_tree_reads_as_itself(text):
    quantity = parsed(text)
    assert Quantity.parse(Quantity(quantity.tree).text) == quantity


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(list("0123456789.ek%+-*/<>=(), tabmin_\n\u00e9'")), max_size=40))
def test_any_text_is_a_quantity_or_an_error(text):
    try:
        Quantity.parse(text)
    except QuantityError as error:
        assert error.offset is None or 0 <= error.offset <= len(text)
