"""The model under test: what it may be asked, and how.

A `Subject` checks at once what the command line says of it, gives its `Respondent`, and opens stores that fit it. A
store is scored with the sample length and document masking of the run, so that a run's last score in its log comes out
again (up to the order of sums in a batch of another size).

Not here: where weights come from (`train/huggingface/weights.py`), what is asked (`suite.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from train.data.store import TokenStore
from train.data.tokenizer import TextTokenizer
from train.data.trained_on import TrainedOn
from train.evaluate.likelihood import Scorer, logits_of, loss_of_batch
from train.evaluate.respondent import Generate, Respondent
from train.evaluate.score import StoreScore, score_store
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Request, generate_in_batches
from train.model.transformer import Transformer

# Sample length for models that say nothing of their own, tokens: V3's in pre-training (arXiv:2412.19437 §4.2).
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Subject:
    """The model under test.

    Args:
        model: all of it, in evaluation mode.
        device: where it is.
        name: for messages.
        tokenizer: loads its tokeniser, or raises ValueError; stores of a run are scored without it.
        trained_on: how samples of its training looked.
        max_length: longest input, tokens, also the sample length of stores; None: as trained, or `DEFAULT_TOKENS`.
        batch_tokens: tokens of one forward pass.
    Raises:
        ValueError: a length out of range.
    """

    model: Transformer
    device: torch.device
    name: str
    tokenizer: Callable[[], TextTokenizer]
    trained_on: TrainedOn = field(default_factory=TrainedOn)
    max_length: int | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        positions = self.model.config.max_position_embeddings
        if not 1 <= self.max_tokens <= positions:
            raise ValueError(f"--max-length {self.max_tokens}: the model has positions for 1 to {positions} tokens")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens {self.batch_tokens} must be 1 or more")

    @property
    def max_tokens(self) -> int:
        """Longest input."""
        if self.max_length is not None:
            return self.max_length
        return self.trained_on.sequence_length or min(DEFAULT_TOKENS, self.model.config.max_position_embeddings)

    def respondent(self) -> Respondent:
        """The model as something that answers questions.

        Raises:
            ValueError: as `tokenizer`.
        """
        tokenizer, vocab_size = self.tokenizer(), self.model.config.vocab_size
        return Respondent(
            Scorer(logits_of(self.model, self.device), vocab_size, self.max_tokens, self.batch_tokens),
            self._generate(eos=tokenizer.special_ids.eos),
            tokenizer,
            self.trained_on.first_id(tokenizer.special_ids),
            self.name,
        )

    def _generate(self, *, eos: int) -> Generate:
        """The model as a `Generate`: as many prompts together as fit `batch_tokens`, without drafting."""

        def run(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
            done = generate_in_batches(
                Decoder(self.model),
                [Request(tuple(ids), max_new_tokens, seed=(seed << 32) + index) for index, ids in enumerate(prompts)],
                batch_tokens=self.batch_tokens,
                sampling=Sampling(temperature=temperature),
                eos=eos,
                drafting=False,
            )
            return [list(completion.ids) for completion in done]

        return run

    def open_store(self, path: Path) -> TokenStore:
        """A store that fits the model: same tokeniser, no id beyond its vocabulary.

        Raises:
            ValueError: it does not fit, or the model's tokeniser is unknown.
        """
        store = TokenStore.open(path)
        store.check(vocab_size=self.model.config.vocab_size)
        known = self.trained_on.tokenizer_sha256 or self.tokenizer().sha256
        if store.manifest.tokenizer_sha256 != known:
            raise ValueError(
                f"--store {path} was made with tokeniser {store.manifest.tokenizer_sha256[:12]}, {self.name} trained "
                f"with {known[:12]}; prepare the store with the model's: launch/prepare.py --tokenizer FILE"
            )
        return store

    def score_store(self, store: TokenStore) -> StoreScore:
        """What the model pays for a store.

        Raises:
            ValueError: its loss is not finite.
        """
        return score_store(
            loss_of_batch(self.model, self.device),
            store,
            sequence_length=self.max_tokens,
            batch_sequences=max(1, self.batch_tokens // self.max_tokens),
            mask_documents=self.trained_on.mask_documents,
        )
