r"""Final answers of chat models: found in a text, and compared as spelling or as exact fractions.

Found is the last of the first kind that is there: what `\boxed{...}` holds; what stands between `<answer>` and
`</answer>`; what follows "answer is" or "answer:" on its line; a text that is one line. The last number is no answer.

Two answers are equal if `normalize` spells them alike, or if both are numbers of the same value: 0.5, 1/2 and
`\frac{2}{4}`. No text is evaluated: it may be hostile, and computer algebra evaluates what it parses.
"""

from __future__ import annotations

import re
from fractions import Fraction

from train.evaluate.exact_match import boxed, is_equal, normalize

_TAG, _END_OF_TAG = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?\s*([^\n]+)", re.IGNORECASE)
# As `normalize` spells them.
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_LETTER = re.compile(r"\(?([A-Za-z])[).]?")
_OPTION = re.compile(r"\([A-Za-z][).]|[A-Za-z][).]")
# `normalize` drops spaces: a mixed number would become another one.
_SPACED = re.compile(r"\d\s+\d")
# No answer to a problem is longer; what is longer is not compared as a number.
MAX_CHARACTERS = 1000


def final_answer(text: str) -> str | None:
    """The final answer that a text states; None where it states none."""
    if "\\boxed" in text or "\\fbox" in text:
        return boxed(text)
    # One pattern for both tags takes quadratic time where a model repeats the first.
    for part in reversed(_TAG.split(text)[1:]):
        if end := _END_OF_TAG.search(part):
            return part[: end.start()].strip()
    if phrases := _PHRASE.findall(text):
        return _without_marks(phrases[-1])
    line = _without_marks(text)
    return line if line and "\n" not in line else None


def _without_marks(text: str) -> str:
    """Without Markdown's emphasis, inline mathematics and the full stop of a sentence."""
    return text.strip().strip("*_ ").removesuffix(".").strip("*_ ").removeprefix("\\(").removesuffix("\\)").strip("$ ")


def same_answer(found: str | None, expected: str) -> bool:
    """Whether two answers are the same spelling, the same option or the same number; None is no answer."""
    if found is None or max(len(found), len(expected)) > MAX_CHARACTERS:
        return False
    if _SPACED.search(found) or _SPACED.search(expected):
        return canonical(found) == canonical(expected)
    one, two = canonical(found), canonical(expected)
    if is_equal(found, expected) or one == two:
        return True
    # Case tells variables apart, not the letters of options.
    marked = _OPTION.fullmatch(found.strip()) or _OPTION.fullmatch(expected.strip())
    return bool(marked) and str(one).upper() == str(two).upper()


def canonical(answer: str) -> str | Fraction:
    """One value for all ways to write an answer that this module knows: what a majority is counted by."""
    if _SPACED.search(answer):
        return " ".join(answer.split())
    spelled = normalize(answer)
    if len(spelled) > MAX_CHARACTERS:
        return spelled
    if _DECIMAL.fullmatch(spelled):
        return Fraction(spelled)
    if (fraction := _FRACTION.fullmatch(spelled)) and int(fraction[3]):
        return Fraction(int(fraction[1] + fraction[2]), int(fraction[3]))
    if letter := _LETTER.fullmatch(spelled):
        return letter[1]
    return spelled
