"""Our model as a language model of lm-eval (EleutherAI's harness), an optional package: `pip install v3fp8[eval]`.

    loglikelihood           (context, continuation) -> (log p, whether greedy)
    loglikelihood_rolling   (text,) -> log p of all of it, each token with as much context as a window allows
    generate_until          (context, {"until", "max_gen_toks", "temperature", "do_sample"}) -> text

The contract is that of `lm_eval.api.model.LM` in 0.4.13: requests are `Instance`s whose `args` are the tuples above,
the answers come in their order. `HarnessModel` does the work without importing lm-eval; `harness_model` subclasses it
together with lm-eval's own base class. Chat templates and `top_k` are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from train.evaluate.benchmarks import Task
from train.evaluate.language_model import LanguageModel
from train.evaluate.likelihood import LikelihoodRequest, encode_pair

INSTALL = "lm-eval is not installed; it is optional: pip install 'lm-eval>=0.4.9'"
# `max_gen_toks` of lm-eval's own models (0.4.13), where a task does not say: comparable with scores made by them.
LM_EVAL_NEW_TOKENS = 256


class Instance(Protocol):
    """A request of the harness."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments, by kind of request."""
        ...


class HarnessModel:
    """The three methods that the harness calls; `cut_tokens` is the most that a prompt lost since it was set to 0."""

    lm: LanguageModel
    cut_tokens: int

    def loglikelihood(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM.loglikelihood`."""
        pairs = [
            encode_pair(self.lm.tokenizer, context, continuation, first_id=self.lm.first_id)
            for context, continuation in (request.args for request in requests)
        ]
        answers = self.lm.scorer.score(pairs)
        self.cut_tokens = max([self.cut_tokens, *(answer.cut_tokens for answer in answers)])
        return [(answer.log_probability, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[float]:
        """See `lm_eval.api.model.LM.loglikelihood_rolling`; a text without tokens costs nothing."""
        windows: list[LikelihoodRequest] = []
        owners: list[int] = []
        texts = self.lm.tokenizer.encode_batch([request.args[0] for request in requests])
        for owner, ids in enumerate(texts):
            found = rolling_windows([self.lm.first_id, *ids], self.lm.max_tokens)
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(texts)
        for owner, answer in zip(owners, self.lm.scorer.score(windows), strict=True):
            totals[owner] += answer.log_probability
        return totals

    def generate_until(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[str]:
        """See `lm_eval.api.model.LM.generate_until`. Requests with the same options are generated together."""
        groups: dict[tuple[int, float], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_length_and_temperature(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for (new_tokens, temperature), members in groups.items():
            contexts = self.lm.tokenizer.encode_batch([requests[index].args[0] for index in members])
            fitted = [self.lm.fit_prompt(ids, max_new_tokens=new_tokens) for ids in contexts]
            self.cut_tokens = max([self.cut_tokens, *(cut for _, cut in fitted)])
            prompts = [prompt for prompt, _ in fitted]
            written = self.lm.generate(prompts, max_new_tokens=new_tokens, temperature=temperature, seed=members[0])
            for index, ids in zip(members, written, strict=True):
                text, stops = self.lm.text_of(ids), requests[index].args[1].get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop, maxsplit=1)[0] if stop else text
                texts[index] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Names the request cache."""
        return self.lm.name


def _length_and_temperature(options: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens to generate and temperature, under any of the names that tasks use."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    new_tokens = next((int(options[name]) for name in names if options.get(name) is not None), LM_EVAL_NEW_TOKENS)
    if not options.get("do_sample", bool(options.get("temperature"))):
        return new_tokens, 0.0
    temperature = float(options.get("temperature", 1.0))
    if temperature <= 0:
        raise ValueError("a task asks to sample (do_sample) at temperature 0; set one of them otherwise")
    return new_tokens, temperature


def rolling_windows(ids: Sequence[int], max_tokens: int) -> list[LikelihoodRequest]:
    """Windows that score each token after the first, `first_id`, exactly once, after as many others as fit."""
    # Each window begins with the last token of the one before; the last one reaches back until it is full.
    windows = []
    for first in range(1, len(ids), max_tokens):
        stop = min(first + max_tokens, len(ids))
        begin = first - 1 if stop - first == max_tokens else max(0, stop - 1 - max_tokens)
        windows.append(LikelihoodRequest(tuple(ids[begin:first]), tuple(ids[first:stop])))
    return windows


def _base_class() -> Any:
    """`lm_eval.api.model.LM`."""
    try:
        return import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as error:
        raise ValueError(f"{INSTALL} ({error})") from None


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise ValueError where lm-eval is not installed or has no task, group or tag of a name."""
    _base_class()
    manager = import_module("lm_eval.tasks").TaskManager()
    unknown = [task.name for task in tasks if not manager.match_tasks([task.name])]
    if unknown:
        raise ValueError(f"--tasks: this lm-eval has no {', '.join(unknown)}; `lm-eval ls tasks` lists what it has")


def harness_model(model: LanguageModel) -> Any:
    """A `lm_eval.api.model.LM` of our model; ValueError where lm-eval is not installed."""
    harness = type("V3Model", (HarnessModel, _base_class()), {})()
    harness.lm, harness.cut_tokens = model, 0
    return harness


def run_tasks(
    model: LanguageModel, tasks: Sequence[Task], *, limit: int | None, run_code: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Let the harness run tasks, each with its own number of examples and at most `limit` documents.

    Yields:
        As each is done: task, {"results" as the harness gives them, "shots", "deepseek_v3_base", "cut_tokens"}, or
        {"failed": why it could not be scored, such as data that cannot be fetched}; the others go on.
    """
    harness = harness_model(model)
    evaluate = import_module("lm_eval").simple_evaluate
    for task in tasks:
        harness.cut_tokens = 0
        try:
            answer = evaluate(
                model=harness,
                tasks=[task.name],
                num_fewshot=task.shots,
                limit=limit,
                log_samples=False,
                confirm_run_unsafe_code=run_code,
            )
        except (KeyError, ValueError, OSError, ImportError) as error:
            yield task.name, {"failed": f"{type(error).__name__}: {error}"}
            continue
        yield (
            task.name,
            {
                "results": answer["results"],
                "shots": task.shots,
                "deepseek_v3_base": task.v3_base_score,
                "cut_tokens": harness.cut_tokens,
            },
        )
