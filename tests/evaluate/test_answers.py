"""Final answers: what is found in a text, which spellings are one answer, which are not."""

from __future__ import annotations

import pytest

from train.evaluate.answers import boxed, is_equal, last_number, normalize


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 9$ and more", "9"),
        (r"\boxed{\text{(A)}}", r"\text{(A)}"),
        (r"\boxed{\left\{x\right\}}", r"\left\{x\right\}"),
        (r"\boxed{unfinished", None),
        ("nothing 5", None),
        (r"\boxed", None),
    ],
)
def test_the_box_is_found_with_its_braces(text: str, found: str | None) -> None:
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("3 apples and 1,204 pears.", "1,204"), ("it is -2.5", "-2.5"), ("about .5", ".5"), ("none", None)],
)
def test_the_last_number_is_found(text: str, found: str | None) -> None:
    assert last_number(text) == found


@pytest.mark.parametrize(
    ("written", "spelling"),
    [
        (" 5 ", "5"),
        ("5.", "5"),
        ("$5$", "5"),
        (r"\$5", "5"),
        (r"5\%", "5"),
        ("5%", "5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{2}", r"\frac{1}{2}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"-\tfrac 3 4", r"-\frac{3}{4}"),
        ("1/2", r"\frac{1}{2}"),
        ("-1/2", r"-\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"2\sqrt 3", r"2\sqrt{3}"),
        (r"5\text{ cm}", "5"),
        (r"5 \mbox{ cm}^2", "5"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x=5", "5"),
        ("x = -5", "-5"),
        ("1,204", "1204"),
        (r"10{,}000", "10000"),
        (r"1,\!204", "1204"),
        ("-1,234,567.50", "-1234567.5"),
        ("1,200,300", "1200300"),
        ("{1,200}", "1200"),
        ("1,200 miles", "1200miles"),
        ("+1,200.5", "1200.5"),
        ("1,2", "1,2"),
        # Commas between numbers are no thousands, however they are spaced.
        ("(1,100)", "(1,100)"),
        ("(1, 100)", "(1,100)"),
        (r"\left(1,\,100\right)", "(1,100)"),
        ("[100,200)", "[100,200)"),
        (r"\{1,100\}", r"\{1,100\}"),
        ("12,345,6", "12,345,6"),
        (r"\frac{1,200}{7}", r"\frac{1200}{7}"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        (r"\frac{1}{-2}", r"-\frac{1}{2}"),
        (r"\frac{-x}{2}", r"\frac{-x}{2}"),
        ("{7}", "7"),
        ("007", "7"),
        ("000", "0"),
        (".5", "0.5"),
        ("2.50", "2.5"),
        ("-0", "0"),
        ("+3", "3"),
        (r"x^2+1", "x^2+1"),
        (r"1\,000", "1000"),
        ("", ""),
    ],
)
def test_each_answer_has_one_spelling(written: str, spelling: str) -> None:
    assert normalize(written) == spelling
    # Once normalised, it stays so.
    assert normalize(spelling) == spelling


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ("042", "42", True),
        ("42", "042", True),
        (r"\frac12", "1/2", True),
        ("0.5", r"\frac{1}{2}", False),
        ("1+x", "x+1", False),
        ("-3", "3", False),
        ("30", "3", False),
        ("12", r"\frac12", False),
        (None, "3", False),
        # A list is no number.
        ("1, 200, 300", "1,200,300", False),
        ("1, 200, 300", "1, 200,300", True),
        ("(1,100)", "(1, 100)", True),
    ],
)
def test_equal_means_the_same_spelling(found: str | None, expected: str, equal: bool) -> None:
    assert is_equal(found, expected) is equal
