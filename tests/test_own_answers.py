"""What counts as right for records of one's own: numbers, letters, texts and formulas."""

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthmix.evaluation.answers import find_number, is_correct, needs_math_verify
from depthmix.evaluation.formulas import is_formula, is_same_formula
from depthmix.evaluation.tasks import records_config

RIGHT = [
    # Numbers that are stated, as `extraction` says.
    (" 3 * 4 = 12. The answer is 12.", "12"),
    ("We add 5 and 7.\n\nThe answer is 12.", "12"),
    (" The answer is 12. Is it 13?", "12"),
    (" The answer is $1,200.00", "1200"),
    (" 1200", "$1,200"),
    (" 12\n\nThe next one is 13.", "12"),
    (" 12\nQuestion: what is 5?\nThe answer is 5.", "12"),
    (" 12\n\n### Instruction:\nNext.\n### Response:\nThe answer is 5.", "12"),
    ("### Answer\n12", "12"),
    ("**Final answer**\n\n12", "12"),
    ("**12**", "12"),
    ("12 apples", "12"),
    (" x = 0.50", "0.5"),
    (" x = 0.50", ".5"),
    # The only number of a response of one sentence.
    ("It is 12.", "12"),
    (" it falls to -3 degrees", "-3"),
    ("It costs $1,200.00", "1200"),
    # Signs, parts, percent.
    (" -$3", "-3"),
    ("The answer is minus 3.", "-3"),
    ("It is 12 and a half.", "12.5"),
    ("The answer is 12 and three quarters.", "12.75"),
    ("2 hours and a half", "2.5"),
    ("The answer is 12½.", "12.5"),
    ("½", "0.5"),
    ("12.5", "12 and a half"),
    ("50%", "50%"),
    ("The answer is 50 percent", "50%"),
    # Numbers in LaTeX.
    (r"\frac12", "0.5"),
    (r"$\frac{1}{2}$", "1/2"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{50\%}", "50%"),
    (r"\[ x = 12 \]", "12"),
    (r"\(12\)", "12"),
    # Letters.
    (r"\boxed{\text{C}}", "C"),
    (r"\boxed{\text{(C)}}", "C"),
    ("The answer is (B).", "(B)"),
    ("The answer is (b).", "B"),
    ("c", "C"),
    # Texts.
    (" Paris.", "paris"),
    ("**Paris**", "paris"),
    ("Paris\nIt is in France.", "Paris"),
    ("The answer is Paris. It is in France.", "Paris"),
    ("### Final Answer\nParis", "Paris"),
    (r"\boxed{\text{Paris}}", "Paris"),
    (r"\boxed{Paris", "Paris"),
    ("The answer is St. Louis.", "St. Louis"),
    (" Let me think. The answer is  New\nYork.", "New York"),
    ("Yes, it is.", "yes"),
    ("No.", "No"),
    ("The answer is True.", "true"),
]

WRONG = [
    (" The answer is 12. The answer is 13.", "12"),
    (" 8-3", "3"),
    (" 1,2", "2"),
    (" no number", "12"),
    ("", "12"),
    ("It is 12 and a half.", "12"),
    ("The answer is 12 point 5", "12"),
    ("The answer is 12 times 3.", "12"),
    ("The answer is 3 squared.", "3"),
    ("The answer is 12k", "12"),
    ("The answer is minus 3", "3"),
    ("It is not 12.", "12"),
    ("3 apples. And 4.", "4"),
    ("25", "0.25"),
    ("The answer is 0.25", "25%"),
    ("The answer is B or C", "B"),
    (r"\boxed{\text{D}}", "C"),
    ("A train", "A"),
    (" London", "Paris"),
    ("The answer is not Paris", "Paris"),
    ("The answer is Paris or London.", "Paris"),
    ("Yes or no?", "yes"),
    ("No, yes", "yes"),
    ("Yes. The answer is no.", "yes"),
    ("I do not know", "no"),
]

FORMULAS = [
    (r"\boxed{\frac{1}{2}x}", r"\frac{x}{2}", True),
    (r"The answer is $\{2, 1\}$.", r"\{1,2\}", True),
    (r"So $\boxed{[0, 1)}$", "[0,1)", True),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
    ("The answer is (1, 2).", "(1,2)", True),
    ("The answer is: x^2 + 1", "1+x^2", True),
    ("x = 5", "$x=5$", True),
    (r"\(x \ge 3\)", "x≥3", True),
    (r"\boxed{\frac{x}{3}}", r"\frac{x}{2}", False),
    ("The answer is (2, 1).", "(1,2)", False),
    ("The answer is hello", "x^2", False),
    (r"\boxed{}", "x^2", False),
    (r"\boxed{9^{9^{9^9}}}", "x^2", False),
    (r"\boxed{99999!}", "x^2", False),
    (r"\boxed{" + "x+" * 200 + "x}", "x^2", False),
    (r"\boxed{\frac{x}{}", "x^2", False),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right_answers(response, answer):
    assert is_correct(response, answer)


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong_answers(response, answer):
    assert not is_correct(response, answer)


@pytest.mark.parametrize(("response", "answer", "expected"), FORMULAS)
def test_formulas(response, answer, expected):
    pytest.importorskip("math_verify")
    assert is_correct(response, answer) is expected


def test_formulas_in_another_thread():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(is_same_formula(r"\frac{x}{2}", "x/2")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\frac{x}{2}", True),
        (r"\{1, 2\}", True),
        ("x + 1", True),
        ("2x - 3", True),
        ("(1, 2)", True),
        ("x = 5", True),
        (r"\text{Paris}", False),
        ("Paris", False),
        ("2024-01-02", False),
        ("3-1", False),
        ("10:30", False),
        ("New York (NY, USA)", False),
    ],
)
def test_what_is_a_formula(answer, expected):
    assert is_formula(answer) is expected


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("$1,200", "1,200"),
        ("50%", "50"),
        ("90^\\circ", "90"),
        ("12.", "12"),
        ("1 1/2", "1 1/2"),
        ("$12$", "12"),
        ("12 cm", None),
        ("C", None),
    ],
)
def test_references_that_are_numbers(answer, number):
    assert find_number(answer) == number


def test_missing_math_verify_is_told_before_anything_is_generated(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert needs_math_verify("x^2")
    with pytest.raises(RuntimeError, match=r"needs math-verify, .*'depthmix\[eval\]'`"):
        records_config([{"prompt": "p", "answer": "x^2"}], metric="exact_match")
    assert records_config([{"prompt": "p", "answer": "12"}], metric="exact_match")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-1e9, max_value=1e9))
def test_a_number_equals_itself_however_written(number):
    assert is_correct(f" The answer is {number:,}.", f"{number:f}")


@given(st.text(), st.sampled_from(["12", "C", "Paris", "yes", "(1, 2)"]))
def test_any_text_is_judged(text, answer):
    if answer == "(1, 2)":
        pytest.importorskip("math_verify")
    assert is_correct(text, answer) in (True, False)
