"""Our model as a language model of lm-eval (EleutherAI's harness), an optional package: `pip install v3fp8[eval]`.

    loglikelihood           (context, continuation) -> (log p, whether greedy)
    loglikelihood_rolling   (text,) -> log p of all of it, each token with as much context as a window allows
    generate_until          (context, {"until", "max_gen_toks", "temperature", "do_sample"}) -> text

The contract is that of `lm_eval.api.model.LM` in 0.4.13: requests are `Instance`s whose `args` are the tuples above,
the answers come in their order. Context and continuation are cut into tokens as `TemplateLM` does; every sequence
begins with the model's start token. In rolling windows the last one is filled up with tokens already scored. What had
to be cut off prompts that do not fit is counted (`cut_tokens`).

`HarnessModel` holds all of the work and does not import lm-eval; `harness_model` marries it to the real base class.
Chat templates are not supported, and neither is `top_k`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from train.evaluate.benchmarks import Task
from train.evaluate.likelihood import Request, encode_pair
from train.evaluate.respondent import Respondent

INSTALL = "lm-eval is not installed; it is optional: pip install 'lm-eval>=0.4.9'"
# What lm-eval's own models generate at most where a task does not say.
DEFAULT_NEW_TOKENS = 256


class Instance(Protocol):
    """A request of the harness."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What is asked, by kind of request."""
        ...


class HarnessModel:
    """The three answers that the harness asks for. `harness_model` makes an object that the harness accepts.

    Attributes:
        respondent: the model.
        cut_tokens: the most that a prompt lost since this was last set to 0.
    """

    respondent: Respondent
    cut_tokens: int

    def loglikelihood(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM.loglikelihood`."""
        asked = self.respondent
        pairs = [
            encode_pair(asked.tokenizer, context, continuation, start=asked.start)
            for context, continuation in (request.args for request in requests)
        ]
        answers = asked.scorer.score(pairs)
        self.cut_tokens = max([self.cut_tokens, *(answer.cut_tokens for answer in answers)])
        return [(answer.log_probability, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[float]:
        """See `lm_eval.api.model.LM.loglikelihood_rolling`; a text without tokens costs nothing."""
        asked = self.respondent
        windows: list[Request] = []
        owners: list[int] = []
        texts = asked.tokenizer.encode_batch([request.args[0] for request in requests])
        for owner, ids in enumerate(texts):
            found = rolling_windows([asked.start, *ids], asked.scorer.max_tokens)
            windows += found
            owners += [owner] * len(found)
        totals = [0.0] * len(texts)
        for owner, answer in zip(owners, asked.scorer.score(windows), strict=True):
            totals[owner] += answer.log_probability
        return totals

    def generate_until(
        self,
        requests: Sequence[Instance],
        disable_tqdm: bool = False,  # noqa: FBT002  (the harness's signature)
    ) -> list[str]:
        """See `lm_eval.api.model.LM.generate_until`. Requests that ask for the same are generated together."""
        asked = self.respondent
        groups: dict[tuple[int, float], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_wishes(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for (new_tokens, temperature), members in groups.items():
            contexts = asked.tokenizer.encode_batch([requests[index].args[0] for index in members])
            fitted = [asked.prompt(ids, max_new_tokens=new_tokens) for ids in contexts]
            self.cut_tokens = max([self.cut_tokens, *(cut for _, cut in fitted)])
            prompts = [prompt for prompt, _ in fitted]
            written = asked.generate(prompts, max_new_tokens=new_tokens, temperature=temperature, seed=members[0])
            for index, ids in zip(members, written, strict=True):
                texts[index] = self._text(ids, requests[index].args[1])
        return texts

    def _text(self, ids: list[int], wishes: Mapping[str, Any]) -> str:
        """Up to the end of the sentence and the first of the stop texts, neither of them kept."""
        text = self.respondent.text(ids)
        stops = wishes.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop, maxsplit=1)[0] if stop else text
        return text

    @property
    def tokenizer_name(self) -> str:
        """Names the request cache."""
        return self.respondent.name


def _wishes(options: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens to generate and temperature, under any of the names that tasks use.

    Raises:
        ValueError: `do_sample` without a temperature above 0.
    """
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    new_tokens = next((int(options[name]) for name in names if options.get(name) is not None), DEFAULT_NEW_TOKENS)
    if not options.get("do_sample", bool(options.get("temperature"))):
        return new_tokens, 0.0
    temperature = float(options.get("temperature", 1.0))
    if temperature <= 0:
        raise ValueError("a task asks to sample (do_sample) at temperature 0; set one of them otherwise")
    return new_tokens, temperature


def rolling_windows(ids: Sequence[int], max_tokens: int) -> list[Request]:
    """Windows that score each token after the first exactly once.

    Args:
        ids: the start token and the text.
        max_tokens: tokens that the model reads at once.
    Returns:
        Whole windows one after the other, each beginning with the last token of the one before; the last window reaches
        back over scored tokens until it is full.
    """
    windows = []
    for first in range(1, len(ids), max_tokens):
        stop = min(first + max_tokens, len(ids))
        begin = first - 1 if stop - first == max_tokens else max(0, stop - 1 - max_tokens)
        windows.append(Request(tuple(ids[begin:first]), tuple(ids[first:stop])))
    return windows


def base_class() -> Any:
    """`lm_eval.api.model.LM`.

    Raises:
        ValueError: lm-eval is not installed; says how to.
    """
    try:
        return import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as error:
        raise ValueError(f"{INSTALL} ({error})") from None


def check_tasks(tasks: Sequence[Task]) -> None:
    """Ask lm-eval whether it knows every name, before anything is scored.

    Raises:
        ValueError: lm-eval is not installed, or has no task, group or tag of a name.
    """
    base_class()
    manager = import_module("lm_eval.tasks").TaskManager()
    unknown = [task.name for task in tasks if not manager.match_tasks([task.name])]
    if unknown:
        raise ValueError(f"--tasks: this lm-eval has no {', '.join(unknown)}; `lm-eval ls tasks` lists what it has")


def harness_model(respondent: Respondent) -> Any:
    """A `lm_eval.api.model.LM` of our model.

    Raises:
        ValueError: lm-eval is not installed.
    """
    model = type("V3Model", (HarnessModel, base_class()), {})()
    model.respondent, model.cut_tokens = respondent, 0
    return model


def run_tasks(
    respondent: Respondent, tasks: Sequence[Task], *, limit: int | None, run_code: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Let the harness run tasks, each with its own number of examples.

    Args:
        respondent: the model.
        tasks: what to run.
        limit: documents of each task; None for all.
        run_code: whether tasks may run what the model wrote.
    Yields:
        As each is done: task, {"results" as the harness gives them, "shots", "deepseek_v3_base", "cut_tokens"}, or
        {"failed": why it could not be scored, such as data that cannot be fetched}; the others go on.
    Raises:
        ValueError: lm-eval is not installed.
    """
    model = harness_model(respondent)
    evaluate = import_module("lm_eval").simple_evaluate
    for task in tasks:
        model.cut_tokens = 0
        try:
            answer = evaluate(
                model=model,
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
                "deepseek_v3_base": task.mark,
                "cut_tokens": model.cut_tokens,
            },
        )
