r"""Final answers of mathematics: found in a text, and brought to one spelling.

Found: what stands in the last `\boxed{...}` (braces may nest), else the last number of the text.
Equal: after `normalize`, letter for letter. That is stricter than algebra (1/2 is not 0.5, x+1 is not 1+x) and
decides without a computer-algebra system. What `normalize` removes or rewrites, in this order:

    a trailing full stop; dollar signs, `\$`, `\%`, `%`; `^\circ`, `^{\circ}`; `\left`, `\right`; `\!`
    `\,` `\;` `\:`
    `\dfrac`, `\tfrac` -> `\frac`;  `\frac12`, `\frac1{2}` -> `\frac{1}{2}`;  `\sqrt3` -> `\sqrt{3}`
    `\text{...}` (also \mathrm, \textbf, \mbox): a unit after a number goes, other text stays without its command
    a left side of one letter: `x=5` -> `5`;  `a/b` of whole numbers -> `\frac{a}{b}`
    commas between thousands, `{,}` too, where a number is the whole answer or fills braces: (1,200) are two numbers
    all blanks; outer braces; `\frac{-1}{2}` -> `-\frac{1}{2}`; zeros that lead a number (`007` -> `7`), `.5` -> `0.5`,
    zeros that end decimals (`2.50` -> `2.5`), a plus sign in front

Source: ours, for the answer formats of MATH (Hendrycks et al. 2021) and AIME (whole numbers from 000 to 999).
It solves nothing, and knows no units by name: text after a number is taken for one.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# A number with commas between thousands that is the whole answer, a unit aside, or fills braces that are no set's.
_THOUSANDS = re.compile(
    r"(?:^\s*|(?<=\{)(?<!\\\{)\s*)[+-]?\d{1,3}(?:,\d{3})+(?=(?:\.\d+)?\s*(?:$|\}|[A-Za-z][A-Za-z ]*$))"
)
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)"


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`) holds; None without one, or where its braces do not close."""
    begin = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if begin < 0:
        return None
    rest = text[begin:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        # `\boxed 5` holds one word.
        words = rest.split("$")[0].split()
        return words[0] if words else None
    depth, escaped = 0, False
    for place, letter in enumerate(rest):
        if not escaped:
            depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[1:place].strip()
        escaped = letter == "\\" and not escaped
    return None


def _join(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def last_number(text: str) -> str | None:
    """The last number of a text, as written."""
    found = _NUMBER.findall(text)
    return found[-1].rstrip(",") if found else None


def normalize(answer: str) -> str:
    """One spelling of an answer; see the head of this file for what is removed and rewritten."""
    text = answer.strip().removesuffix(".")
    text = re.sub(r"\\?\$|\\?%|\^\{?\\circ\}?|\\left|\\right|\\[!,;:]", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    # A unit stands after a number and may carry a power: 5\text{ cm}^2.
    text = re.sub(rf"(?<=[\d}}])\s*{_TEXT}\{{[^{{}}]*\}}(?:\^\{{?\d\}}?)?\s*$", "", text)
    text = re.sub(rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(r"^\s*[A-Za-z]\s*=", "", text)
    text = re.sub(r"\s+", "", _THOUSANDS.sub(_join, text.replace("{,}", ",")))
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"^\\frac\{(?:-(\d+)\}\{(\d+)|(\d+)\}\{-(\d+))\}$", r"-\\frac{\1\3}{\2\4}", text)
    return _number(text)


def _number(text: str) -> str:
    """A plain number without what does not count; anything else as it is."""
    match = re.fullmatch(r"([+-]?)0*(\d*)(?:\.(\d*))?", text)
    if match is None or not re.search(r"\d", text):
        return text
    sign, whole, decimals = match[1].replace("+", ""), match[2] or "0", (match[3] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value


def is_equal(found: str | None, expected: str) -> bool:
    """Whether two answers have the same spelling; None equals nothing."""
    return found is not None and normalize(found) == normalize(expected)
