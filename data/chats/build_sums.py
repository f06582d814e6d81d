"""Write `sums.jsonl`: 120 conversations about sums, in every form that `launch/prepare.py --format messages` reads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

INTEGER = {"type": "integer"}
PARAMETERS = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": PARAMETERS}}


def said(content: str, **more: Any) -> dict[str, Any]:
    """A message of the assistant."""
    return {"role": "assistant", "content": content, **more}


def row(number: int, rng: random.Random) -> dict[str, Any]:
    """One line; its form goes by its number."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    question = rng.choice([f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}."])
    user, answer = {"role": "user", "content": question}, f"{a + b}."
    tens, ones = 10 * (a // 10 + b // 10), a % 10 + b % 10
    why = f"{a // 10}0 + {b // 10}0 = {tens}, {a % 10} + {b % 10} = {ones}, {tens} + {ones} = {a + b}."
    form = number % 6
    if form == 0:
        return {"prompt": question, "completion": answer}
    if form == 1:
        return {"prompt": [user], "completion": [said(f"<think>{why}</think>{answer}")]}
    if form == 2:
        c = rng.randrange(10)
        more = {"role": "user", "content": f"And {c} more?"}
        last = said(f"{a + b + c}.", reasoning_content=f"{a + b} + {c} = {a + b + c}.")
        return {"messages": [{"role": "system", "content": "Answer in one line."}, user, said(answer), more, last]}
    if form == 3:
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
        tool = {"role": "tool", "content": str(a + b)}
        return {"messages": [user, said("", tool_calls=[call]), tool, said(answer)], "tools": [TOOL]}
    return {"messages": [user, said(answer, reasoning_content=why)]}


def main() -> None:
    """Write the file beside this one."""
    rng = random.Random(17)
    lines = [json.dumps(row(number, rng), ensure_ascii=False) for number in range(120)]
    Path(__file__).with_name("sums.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
