"""The benchmarks of DeepSeek-V3's base model, with their scores and the lm-eval task that comes nearest to each.

Names, shots and scores: arXiv:2412.19437 Tab. 3, as the README of deepseek-ai/DeepSeek-V3 repeats it. Task names:
lm-eval 0.4.13. A task of the same name need not be the same test: DeepSeek's prompts are not public.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One row of the table: names as in the report, score in percent or bits per byte."""

    name: str
    metric: str
    shots: int | None
    score: float
    # A task of lm-eval or a group of them; None where lm-eval has none.
    task: str | None
    # Whether scoring runs what the model wrote.
    runs_code: bool = False
    # How the task differs from the report's test, as far as that is known.
    note: str = ""


DEEPSEEK_BASE = (
    Benchmark("Pile-test", "BPB", None, 0.548, "pile_10k", note="10,000 documents of the training part, not the test"),
    Benchmark("BBH", "EM", 3, 87.5, "bbh_cot_fewshot"),
    Benchmark("MMLU", "Acc.", 5, 87.1, "mmlu"),
    Benchmark("MMLU-Redux", "Acc.", 5, 86.2, "mmlu_redux_generative", note="generated answers"),
    Benchmark("MMLU-Pro", "Acc.", 5, 64.4, "mmlu_pro", note="generated chain of thought"),
    Benchmark("DROP", "F1", 3, 89.0, "drop"),
    Benchmark("ARC-Easy", "Acc.", 25, 98.9, "arc_easy"),
    Benchmark("ARC-Challenge", "Acc.", 25, 95.3, "arc_challenge"),
    Benchmark("HellaSwag", "Acc.", 10, 88.9, "hellaswag"),
    Benchmark("PIQA", "Acc.", 0, 84.7, "piqa"),
    Benchmark("WinoGrande", "Acc.", 5, 84.9, "winogrande"),
    Benchmark("RACE-Middle", "Acc.", 5, 67.1, None),
    Benchmark("RACE-High", "Acc.", 5, 51.3, "race"),
    Benchmark("TriviaQA", "EM", 5, 82.9, "triviaqa"),
    Benchmark("NaturalQuestions", "EM", 5, 40.0, "nq_open"),
    Benchmark("AGIEval", "Acc.", 0, 79.6, "agieval"),
    Benchmark("HumanEval", "Pass@1", 0, 65.2, "humaneval", runs_code=True),
    Benchmark("MBPP", "Pass@1", 3, 75.4, "mbpp", runs_code=True),
    Benchmark("LiveCodeBench-Base", "Pass@1", 3, 19.4, None),
    Benchmark("CRUXEval-I", "Acc.", 2, 67.3, "cruxeval_input", runs_code=True),
    Benchmark("CRUXEval-O", "Acc.", 2, 69.8, "cruxeval_output", runs_code=True),
    Benchmark("GSM8K", "EM", 8, 89.3, "gsm8k"),
    Benchmark("MATH", "EM", 4, 61.6, "minerva_math"),
    Benchmark("MGSM", "EM", 8, 79.8, "mgsm_direct", note="a family of prompts of which the report names none"),
    Benchmark("CMath", "EM", 3, 90.7, None),
    Benchmark("CLUEWSC", "EM", 5, 82.7, None),
    Benchmark("C-Eval", "Acc.", 5, 90.1, "ceval-valid", note="the validation part"),
    Benchmark("CMMLU", "Acc.", 5, 88.8, "cmmlu"),
    Benchmark("CMRC", "EM", 1, 76.3, None),
    Benchmark("C3", "Acc.", 0, 78.6, None),
    Benchmark("CCPM", "Acc.", 0, 92.0, None),
    Benchmark("MMMLU-non-English", "Acc.", 5, 79.4, "mmmlu"),
)

# What `--tasks` calls the whole table.
DEEPSEEK_BASE_NAME = "deepseek-base"


@dataclass(frozen=True)
class Task:
    """A task of lm-eval to run, with `shots` (None: its own number) and the score of DeepSeek-V3-Base."""

    name: str
    shots: int | None = None
    v3_base_score: float | None = None


def choose_tasks(names: str, *, run_code: bool) -> tuple[list[Task], list[str]]:
    """The tasks of `--tasks`, and one sentence for each benchmark of `deepseek-base` that is left out."""
    known = {benchmark.task: benchmark for benchmark in DEEPSEEK_BASE if benchmark.task}
    chosen: list[Task] = []
    left_out: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name != DEEPSEEK_BASE_NAME:
            benchmark = known.get(name)
            chosen.append(Task(name, benchmark.shots, benchmark.score) if benchmark else Task(name))
            continue
        for benchmark in DEEPSEEK_BASE:
            if benchmark.task is None:
                left_out.append(f"{benchmark.name}: lm-eval has no task for it")
            elif benchmark.runs_code and not run_code:
                left_out.append(f"{benchmark.name}: it runs what the model wrote; allow that with --run-code")
            else:
                chosen.append(Task(benchmark.task, benchmark.shots, benchmark.score))
    if not chosen:
        raise ValueError(f"--tasks {names!r} names no task; write {DEEPSEEK_BASE_NAME}, or mmlu,gsm8k")
    return chosen, left_out
