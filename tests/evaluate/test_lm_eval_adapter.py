"""The adapter to lm-eval: against a stand-in of its contract, and against the library where it is installed."""

from __future__ import annotations

import abc
import fnmatch
import importlib.util
import math
import sys
import types
from typing import Any

import pytest

from tests.evaluate.planted import KNOWN, UNKNOWN, PlantedLanguageModel, PlantedModel, small_tokenizer
from train.evaluate.benchmarks import DEEPSEEK_BASE, Task, choose_tasks
from train.evaluate.likelihood import encode_pair
from train.evaluate.lm_eval_adapter import check_tasks, harness_model, rolling_windows, run_tasks
from train.evaluate.suite import SuiteScores, summary_lines

TOKENIZER = small_tokenizer()
EOS = TOKENIZER.special_ids.eos


def instance(*args: Any) -> types.SimpleNamespace:
    """The part of lm_eval.api.instance.Instance that a model reads."""
    return types.SimpleNamespace(args=args)


# lm_eval.api.model.LM (0.4.13): its abstract methods.
METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
LM = abc.ABCMeta("LM", (), {name: abc.abstractmethod(lambda self, requests: None) for name in METHODS})


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package `lm_eval` with the base class and an evaluator that asks as the real one does."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    package, _, model, tasks = modules = [types.ModuleType(name) for name in names]
    model.LM = LM

    # As in 0.4.13, patterns are matched with the names of all tasks.
    def match_tasks(asked: list[str]) -> list[str]:
        return [name for name in ("arc_easy", "mmlu") if any(fnmatch.fnmatch(name, pattern) for pattern in asked)]

    tasks.TaskManager = lambda: types.SimpleNamespace(match_tasks=match_tasks)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def language_model(planted: PlantedModel, *, max_tokens: int = 4096) -> PlantedLanguageModel:
    """Continues a prompt by itself and how it was asked; every prompt begins with the start token."""

    def generate(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        assert all(prompt[0] == EOS for prompt in prompts)
        text = f"{max_new_tokens} at {temperature}\nQ: x"
        return [[*TOKENIZER.encode_batch([f"<{TOKENIZER.decode(p[1:])}> {text}"])[0], EOS, 7] for p in prompts]

    return PlantedLanguageModel(planted, first_id=EOS, generate=generate, max_tokens=max_tokens)


def test_likelihoods_come_in_order_as_pairs_of_float_and_bool(harness: types.ModuleType) -> None:
    planted = PlantedModel()
    request = encode_pair(TOKENIZER, "2+2=", " 4", first_id=EOS)
    planted.plant(request.context, request.continuation)
    model = harness_model(language_model(planted))
    assert isinstance(model, LM)
    found = model.loglikelihood([instance("2+2=", " 5"), instance("2+2=", " 4"), instance("", "x")])
    # " 5" shares its blank with " 4".
    expected = [KNOWN + UNKNOWN + math.log((1 - math.exp(KNOWN)) / 261 * 262), 2 * KNOWN, UNKNOWN]
    assert [log_p for log_p, _ in found] == pytest.approx(expected, abs=1e-6)
    assert [greedy for _, greedy in found] == [False, True, False]
    assert all(type(p) is float and type(greedy) is bool for p, greedy in found)


@pytest.mark.parametrize("max_tokens", [1, 4, 9, 10, 11, 4096])
def test_rolling_scores_every_token_of_a_text_once(harness: types.ModuleType, max_tokens: int) -> None:
    model = harness_model(language_model(PlantedModel(), max_tokens=max_tokens))
    found = model.loglikelihood_rolling([instance("0123456789"), instance(""), instance("abc")])
    assert found == pytest.approx([10 * UNKNOWN, 0.0, 3 * UNKNOWN], abs=1e-5)
    assert all(type(value) is float for value in found)


def test_the_last_rolling_window_is_full() -> None:
    # The example of lm-eval's docstring, with 0 for BOS.
    windows = [((0,), (1, 2, 3, 4)), ((4,), (5, 6, 7, 8)), ((6, 7, 8), (9, 10))]
    assert [(w.context, w.continuation) for w in rolling_windows(list(range(11)), 4)] == windows


def test_generation_stops_at_end_and_stop_texts_and_keeps_order(harness: types.ModuleType) -> None:
    model = harness_model(language_model(PlantedModel()))
    found = model.generate_until(
        [
            instance("a", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}),
            instance("b", {"until": "Q:", "max_gen_toks": 9, "do_sample": True, "temperature": 0.5}),
            instance("c", {"until": [], "max_gen_toks": 5}),
            instance("d", {"until": ["5"]}),
        ]
    )
    assert found == ["<a> 5 at 0.0", "<b> 9 at 0.5\n", "<c> 5 at 0.0\nQ: x", "<d> 2"]


def test_prompts_keep_their_start_token_and_leave_room_and_what_was_cut_is_counted(harness: types.ModuleType) -> None:
    model = harness_model(language_model(PlantedModel(), max_tokens=16))
    options = {"max_gen_toks": 6, "until": "\n"}
    found = model.generate_until([instance("0123456789abc", options), instance("xyz", options)])
    assert found == ["<456789abc> 6 at 0.0", "<xyz> 6 at 0.0"]
    assert model.cut_tokens == 4
    # Start token, 20 bytes and " 4" without its last token are 22.
    model.loglikelihood([instance("0123456789" * 2, " 4"), instance("a", "b")])
    assert model.cut_tokens == 6
    with pytest.raises(ValueError, match="16 new tokens leave no room for a prompt in 16; raise --max-length"):
        model.generate_until([instance("a", {"max_gen_toks": 16})])


def test_names_that_the_harness_does_not_know_are_refused_before_anything_is_scored(harness: types.ModuleType) -> None:
    check_tasks([Task("mmlu"), Task("arc_*")])
    with pytest.raises(ValueError, match="this lm-eval has no my_task, mmlu_redux; `lm-eval ls tasks`"):
        check_tasks([Task("mmlu"), Task("my_task"), Task("mmlu_redux")])


def test_the_evaluator_gets_the_model_and_each_tasks_shots(harness: types.ModuleType) -> None:
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        if options["tasks"] == ["arc_easy"]:
            raise ConnectionError("no network")
        return {"results": {options["tasks"][0]: {"acc,none": 0.5}}}

    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks, _ = choose_tasks("mmlu, arc_easy,my_task", run_code=False)
    found = dict(run_tasks(language_model(PlantedModel()), tasks, limit=3, run_code=False))
    shots = [("mmlu", 5), ("arc_easy", 25), ("my_task", None)]
    assert [(call["tasks"], call["num_fewshot"], call["limit"]) for call in calls] == [([t], n, 3) for t, n in shots]
    assert isinstance(calls[0]["model"], LM)
    assert not any(call["confirm_run_unsafe_code"] for call in calls)
    figures = {"shots": 5, "deepseek_v3_base": 87.1, "cut_tokens": 0}
    assert found["mmlu"] == {"results": {"mmlu": {"acc,none": 0.5}}} | figures
    # What cannot be scored is reported, and the others go on.
    assert found["arc_easy"] == {"failed": "ConnectionError: no network"}
    assert found["my_task"]["results"] == {"my_task": {"acc,none": 0.5}}
    scores = SuiteScores(None)
    for name, figures in found.items():
        scores.add("tasks", name, figures)
    assert not scores.finish([])
    assert "arc_easy: not scored (ConnectionError: no network)" in list(summary_lines(scores.results))


def test_without_lm_eval_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="lm-eval is not installed; it is optional: pip install"):
        harness_model(language_model(PlantedModel()))


def test_the_whole_set_leaves_out_what_has_no_task_or_runs_code_and_says_so() -> None:
    tasks, left_out = choose_tasks("deepseek-base", run_code=False)
    without_task = {"RACE-Middle", "LiveCodeBench-Base", "CMath", "CLUEWSC", "CMRC", "C3", "CCPM"}
    runs_code = {"HumanEval", "MBPP", "CRUXEval-I", "CRUXEval-O"}
    assert {sentence.partition(":")[0] for sentence in left_out} == without_task | runs_code
    assert len(tasks) + len(left_out) == len(DEEPSEEK_BASE) == 32
    assert len(choose_tasks("deepseek-base", run_code=True)[0]) == 32 - len(without_task)
    with pytest.raises(ValueError, match="names no task"):
        choose_tasks(" , ", run_code=False)


def test_the_real_library_accepts_the_adapter() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(
            "lm-eval is not installed, and no suite installs it: to run this by hand, pip install 'lm-eval>=0.4.9'"
        )
    from lm_eval.api.instance import Instance as RealInstance
    from lm_eval.api.model import LM as RealLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = harness_model(language_model(PlantedModel(), max_tokens=4))
    assert isinstance(model, RealLM)
    assert (model.rank, model.world_size) == (0, 1)
    check_tasks([Task(benchmark.task) for benchmark in DEEPSEEK_BASE if benchmark.task])
    with pytest.raises(ValueError, match="has no no_such_task"):
        check_tasks([Task("no_such_task")])
    request = RealInstance("loglikelihood", {}, ("2+2=", "4"), 0)
    assert model.loglikelihood([request]) == [(pytest.approx(UNKNOWN, abs=1e-6), False)]
    for tokens in (list(range(20, 20 + length)) for length in (1, 3, 4, 5, 8, 9)):
        theirs = get_rolling_token_windows(tokens, prefix_token=EOS, max_seq_len=4, context_len=1)
        ours = [(list(w.context), list(w.continuation)) for w in rolling_windows([EOS, *tokens], 4)]
        assert ours == [tuple(map(list, make_disjoint_window(window))) for window in theirs]
