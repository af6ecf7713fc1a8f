"""What counts as an answer: hand-written outputs for both protocols, and properties."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthmix.evaluation.extraction import first_word, last_number, stated_letter, stated_number
from depthmix.evaluation.numbers import is_close_number, is_same_number, read_number

# What a model wrote | by the protocol `default` | by the protocol `llm-adapters`
NUMBERS = [
    # Marks.
    ("Natalia sold 24 + 48 = 72 clips.\n#### 72", "72", "72"),
    ("####72", "72", "72"),
    ("There are 7 - 3 = 4 crayons. The answer is 4.", "4", "4."),
    ("The final answer is: 18", "18", "18"),
    ("So the answer is 3.", "3", "3."),
    ("Answer: 15", "15", "15"),
    ("**Answer:** 15", "15", "15"),
    ("The answer is **15**.", "15", "15"),
    ("ANSWER = 15", "15", "15"),
    ("Therefore, the answer (arabic numerals) is 8.", "8", "8."),
    ("The answer is \\boxed{42}.", "42", "42"),
    ("We get $\\boxed{42}$ in 3 steps.", "42", "3"),
    ("The answer is:\n\n12", "12", "12"),
    ("The answer is about 12.", "12", "12."),
    # The last mark counts, if a number follows it.
    ("The answer is 12. No, wait. The answer is 13.", "13", "13."),
    ("The answer is 12. My answer is correct.", "12", "12."),
    ("The answer is 12. Is it 13?", "12", "13"),
    ("The answer is 12.\n\nShe has 5 more.", "12", "5"),
    # A calculation states its result.
    ("The answer is 3 * 4 = 12 apples.", "12", "12"),
    ("The answer is 3 boxes x 4 = 12.", "12", "12."),
    ("The answer is x = 5", "5", "5"),
    ("The answer is 7, because 3 + 4 = 7.", "7", "7."),
    ("The answer is 12. Check: 3 * 5 = 15", "12", "15"),
    # A last line that ends in a result.
    ("He eats 3 a day.\nIn 4 days: 3 * 4 = 12", "12", "12"),
    ("In total there are 8 x 4 = 32 crackers in all.", "32", "32"),
    ("3 + 4 = 7, so Bob has 7", None, "7"),
    ("3 + 4 = 7\nThen we add the rest.", None, "7"),
    # A conclusion, or a mark, whose sentence holds one number.
    ("6 days x 2 = 12.\nTherefore, Ali had 600 books (600).", "600", "600"),
    ("So he buys 3 + 4 = 7 books, all in all.", "7", "7"),
    ("Answer: Bob has 12 apples.", "12", "12"),
    ("The answer in Arabic numerals is: 1260.", "1260", "1260."),
    ("Therefore, 4 houses have 62 carpets.", None, "62"),
    ("The answer is:\n1. Bob has 3.\n2. Ann has 4.", None, "4."),
    ("The answer is 118 000.", None, "000."),
    ("The answer is 3 onions and 1 potato.", None, "1"),
    # A first line that is nothing but a number.
    (" 72", "72", "72"),
    (" 12 apples.\nThere are 3 boxes of 4.", "12", "4."),
    ("$12", "12", "12"),
    ("3 boxes have 4 apples each.", None, "4"),
    # Thousands separators, decimals.
    ("The answer is 1,234.", "1234", "1234."),
    ("The answer is 1,234,567.50", "1234567.50", "1234567.50"),
    ("The answer is 1,23", None, "123"),
    ("The answer is 0.50", "0.50", "0.50"),
    ("The answer is .5", ".5", "5"),
    ("The answer is 12.00", "12", "12.00"),
    ("The answer is 1.2.3", None, "3"),
    # Currency, units, per cent.
    ("The answer is $1,200.00 dollars", "1200", "1200.00"),
    ("The answer is \\$7", "7", "7"),
    ("The answer is € 7.", "7", "7."),
    ("The answer is 12cm", "12", "12"),
    ("The answer is 12 m2.", "12", "2."),
    ("The answer is 25%.", "25", "25"),
    ("The answer is 2 hours and 30 minutes.", None, "30"),
    ("The answer is 10:30.", None, "30."),
    # Fractions.
    ("The answer is 3/4.", "3/4", "4."),
    ("The answer is 6/3", "2", "3"),
    ("The answer is 1 1/2 hours.", "1 1/2", "2"),
    ("The answer is 1/0", None, "0"),
    # LaTeX.
    ("\\boxed{1{,}200}", "1200", "200"),
    ("\\boxed{1\\,200}", "1200", "200"),
    ("\\boxed{\\$1{,}200}", "1200", "200"),
    ("\\boxed{25\\%}", "25", "25"),
    ("\\boxed{12\\text{ cm}}", "12", "12"),
    ("\\boxed{90^\\circ}", "90", "90"),
    ("\\boxed{-\\frac12}", "-1/2", "12"),
    ("\\boxed{\\dfrac{3}{4}}", "3/4", "4"),
    ("\\boxed{2\\frac{1}{2}}", "2 1/2", "2"),
    ("\\boxed{\\frac{x}{2}}", None, "2"),
    ("\\boxed{\\frac{1}{0}}", None, "0"),
    ("\\boxed{\\sqrt{2}}", None, "2"),
    ("\\boxed{5\\pi}", None, "5"),
    ("\\boxed{3 \\times 4 = 12}", "12", "12"),
    ("\\boxed{3 \\times 4}", None, "4"),
    # Ordinals, and words that multiply.
    ("The answer is 1st", None, "1"),
    ("The answer is the 5th.", None, "5"),
    ("The answer is 1.5 million", None, "1.5"),
    ("The answer is 2-thousand.", None, "2"),
    (" 3 hundred", None, "3"),
    ("So he has 3 dozen eggs.", None, "3"),
    ("The answer is 3 dozen = 36 eggs", "36", "36"),
    # Negative numbers.
    ("The answer is -5.", "-5", "-5."),
    ("The answer is \N{MINUS SIGN}5.", "-5", "5."),
    ("The answer is -$3.50", "-3.50", "3.50"),
    ("The answer is $-3", "-3", "-3"),
    ("8-3", None, "-3"),
    ("The answer is 12-15", None, "-15"),
    # Several numbers, none.
    ("The answer is 5 or 6.", None, "6."),
    ("The answer is 3 of 4.", None, "4."),
    ("She has 3 apples and 4 pears.", None, "4"),
    ("It is 12.", None, "12."),
    ("The answer is not 5.", None, "5."),
    ("The answer isn't 5.", None, "5."),
    ("The answer is twelve.", None, None),
    ("The answer is 1e3", None, "3"),
    ("I do not know.", None, None),
    ("", None, None),
    ("\n\n", None, None),
]

LETTERS = [
    # Marks.
    ("The answer is B", "B", "B"),
    ("The answer is (B).", "B", "B"),
    ("The answer is (b).", "B", None),
    ("Rationale: 4 + 5 = 9.The answer is (E).", "E", "E"),
    ("Answer: D) 35", "D", "A"),
    ("So: Answer **D**", None, "A"),
    ("answer: **D**", "D", "D"),
    ("#### D", "D", "D"),
    ("\\boxed{D}", "D", "D"),
    ("The correct option is D", "D", "D"),
    ("The answer is option D.", "D", "D"),
    ("By All means the answer is C.", "C", "B"),
    ("The answer is B. No, the answer is C.", "C", "B"),
    ("The answer is B or C.", None, "B"),
    ("The answer is b", None, None),
    # The letter alone, or the only one that is set off.
    (" B\n\nQuestion: Who", "B", "B"),
    ("(B)", "B", "B"),
    ("B.", "B", "B"),
    ("**B**", "B", "B"),
    ("B) 35", "B", "B"),
    ("So it is (D) 30.", "D", "D"),
    ("So we choose option D", "D", "D"),
    ("(A) is wrong, so (B)", None, "A"),
    ("Option A is wrong. Option B holds.", None, "A"),
    ("(A) 4 (B) 5 (C) 6 (D) 7 (E) 8", None, "A"),
    # Letters inside words, letters that are words.
    ("Because of that, all of it.", None, "B"),
    ("A train travels 5 km.", None, "A"),
    ("Answer: A train travels 5 km.", None, "A"),
    ("The answer is Bob", None, "B"),
    ("The answer is C(5, 2) = 10", None, "C"),
    ("answer: E = mc2", None, "E"),
    ("E.g. this", None, "E"),
    ("The answer is 35.", None, None),
    ("", None, None),
]

WORDS = [
    ("the correct answer is answer2", "answer2"),
    ("answer2 is wrong, answer3 is right", "answer2"),
    ("Answer2", None),
    ("answer10", "answer1"),
    ("none", None),
]


@pytest.mark.parametrize(("text", "stated", "last"), NUMBERS)
def test_numbers(text, stated, last):
    assert stated_number(text) == stated
    assert last_number(text) == last


@pytest.mark.parametrize(("text", "stated", "first"), LETTERS)
def test_letters(text, stated, first):
    assert stated_letter(text) == stated
    assert first_word(text, "ABCDE") == first


@pytest.mark.parametrize(("text", "word"), WORDS)
def test_words(text, word):
    assert first_word(text, [f"answer{n}" for n in range(1, 6)]) == word


def test_a_word_inside_a_word_counts_for_llm_adapters():
    assert first_word("This is untrue, so false", ["true", "false"]) == "true"


@pytest.mark.parametrize(
    ("answer", "reference", "same", "close"),
    [
        ("8", "8.0", True, True),
        ("8.00", "8", True, True),
        ("-15", "-15.0", True, True),
        ("1,200", "1200.0", True, None),
        ("3/4", "0.75", True, None),
        ("0.7501", "0.75", False, True),
        ("9.8", "9.8", True, True),
        ("9.81", "9.8", False, False),
        ("54.545", "54.545", True, True),
        ("11/6", "1.8333333333333335", True, None),
        ("1 5/6", "1.8333333333333335", True, None),
        ("1.83", "1.8333333333333335", True, False),
        ("1.8333", "1.8333333333333335", True, True),
        ("1.8", "1.8333333333333335", False, False),
        ("0.67", "0.6666666666666666", True, False),
        ("0.66", "0.6666666666666666", False, False),
        ("2/3", "0.6666666666666666", True, None),
        ("twelve", "12", False, None),
    ],
)
def test_comparison_of_numbers(answer, reference, same, close):
    assert is_same_number(answer, reference) is same
    if close is not None:
        assert is_close_number(answer, reference) is close


def test_a_reference_must_be_a_number():
    with pytest.raises(ValueError, match="`reference` must be a number, got 'twelve'"):
        is_same_number("12", "twelve")


INTEGERS = st.integers(min_value=-(10**12), max_value=10**12)
DECIMALS = st.decimals(min_value=-(10**9), max_value=10**9, places=3)
FRAMES = st.sampled_from(
    [
        "The answer is {}.",
        "Some words, 3 of them. The answer is {} apples.",
        "#### {}",
        "**Answer:** {}\n\nThere are 2 of them.",
        "Answer: **{}**",
        "\\boxed{{{}}}",
        "2 + 2 = 4\nx = {} km",
        " {}\nBecause 1 + 1 = 2 is true.",
    ]
)


@given(st.one_of(INTEGERS, DECIMALS), st.sampled_from(["", ",", "$"]), FRAMES)
def test_a_number_in_any_form_is_given_back(value, form, frame):
    text = f"{value:,f}" if form == "," and not isinstance(value, int) else f"{value}"
    if form == "," and isinstance(value, int):
        text = f"{value:,}"
    if form == "$":
        text = text.replace("-", "-$") if value < 0 else f"${text}"
    stated = stated_number(frame.format(text))
    assert stated is not None
    assert read_number(stated) == Fraction(value)
    assert is_same_number(stated, str(value))


@given(st.integers(0, 99), st.integers(-99, 99), st.integers(1, 99), FRAMES)
def test_a_fraction_is_given_back(whole, numerator, denominator, frame):
    text = f"{numerator}/{denominator}"
    value = Fraction(numerator, denominator)
    if numerator >= 0:
        text, value = f"{whole} {text}", value + whole
    stated = stated_number(frame.format(text))
    assert stated is not None
    assert read_number(stated) == value


@given(st.sampled_from("ABCDE"), st.sampled_from(["{}", "({})", "**{}**", "{})", "option {}"]))
def test_a_letter_in_any_form_is_given_back(letter, form):
    assert stated_letter(f"Either way, the answer is {form.format(letter)}.") == letter
    assert stated_letter(f" {form.format(letter)}\n") == letter


PIECES = st.sampled_from(
    ["answer is ", "####", "=", "12", "1/", "0", ",", "$", "-", "(", "A", "option ", " ", "\n", "x"]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_any_text_has_an_answer_of_the_right_kind_or_none(text):
    number = stated_number(text)
    assert number is None or read_number(number) is not None
    assert stated_letter(text) in {None, *"ABCDE"}
    last = last_number(text)
    assert last is None or isinstance(float(last), float)
    assert read_number(text) is None or isinstance(read_number(text), Fraction)


@pytest.mark.parametrize(
    "piece", [" ", "*", "a", "1", "1,", "answer ", "answer is ", "(", "= 1 a "]
)
def test_long_texts_are_read_to_their_end(piece):
    """An expression that goes back and forth over a text would not come to its end."""
    text = "The answer is " + piece * 4000
    assert stated_letter(text) is None
    assert stated_number(text) in (None, "1")
    assert last_number(text + " = 7") == "7"
