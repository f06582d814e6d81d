"""The model under test: it scores continuations, continues prompts, and scores the stores that fit it.

Every sequence begins with the token that samples of the model's training began with; a prompt that is too long loses
what follows that token. A store is scored with the sample length and document masking of the run, which reproduces the
run's last logged score (up to the order of sums in a batch of another size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from train.data.store import TokenStore
from train.data.tokenizer import TextTokenizer
from train.data.trained_on import TrainedOn
from train.evaluate.likelihood import Scorer, logits_of, loss_of_batch
from train.evaluate.score import StoreScore, score_store
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import GenerationRequest, generate
from train.model.transformer import Transformer

# Sample length of models that record none, tokens: V3's in pre-training (arXiv:2412.19437 §4.2).
DEFAULT_TOKENS = 4096


class LanguageModel:
    """What lm-eval calls an LM: a whole model in evaluation mode, with its tokeniser.

    `load_tokenizer` raises ValueError where there is none, or another one than in training. `max_length`, tokens, is
    the longest input and the sample length of stores; None: as trained, or `DEFAULT_TOKENS`.
    """

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        *,
        name: str,
        load_tokenizer: Callable[[], TextTokenizer],
        trained_on: TrainedOn,
        max_length: int | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        positions = model.config.max_position_embeddings
        if max_length is None:
            max_length = trained_on.sequence_length or min(DEFAULT_TOKENS, positions)
            if max_length > positions:
                raise ValueError(
                    f"{name} says that it was trained on samples of {max_length} tokens, but it has positions for "
                    f"{positions} (max_position_embeddings); give --max-length"
                )
        if not 1 <= max_length <= positions:
            raise ValueError(f"--max-length {max_length}: the model has positions for 1 to {positions} tokens")
        if batch_tokens < 1:
            raise ValueError(f"--batch-tokens {batch_tokens} must be 1 or more")
        self.model, self.device, self.name, self.trained_on = model, device, name, trained_on
        self.max_tokens, self.batch_tokens = max_length, batch_tokens
        self._load_tokenizer = load_tokenizer

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Loaded when it is first needed: stores of a run are scored without it."""
        return self._load_tokenizer()

    @cached_property
    def first_id(self) -> int:
        """The token that begins every sequence."""
        return self.trained_on.first_id(self.tokenizer.special_ids)

    @cached_property
    def scorer(self) -> Scorer:
        """Log-likelihoods of continuations."""
        read = logits_of(self.model, self.device)
        return Scorer(read, self.model.config.vocab_size, self.max_tokens, self.batch_tokens)

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """New ids after each prompt, ended by the end-of-sentence token or by `max_new_tokens`; without drafting.

        The same seed and prompts give the same ids; equal prompts in one call get samples of their own.
        """
        done = generate(
            Decoder(self.model),
            [GenerationRequest(tuple(ids), max_new_tokens, (seed << 32) + i) for i, ids in enumerate(prompts)],
            batch_tokens=self.batch_tokens,
            sampling=Sampling(temperature=temperature),
            eos=self.tokenizer.special_ids.eos,
            drafting=False,
        )
        return [list(completion.ids) for completion in done]

    def fit_prompt(self, ids: Sequence[int], *, max_new_tokens: int) -> tuple[list[int], int]:
        """The first token and as much of a prompt's end as leaves room for `max_new_tokens`; how many were cut off."""
        room = self.max_tokens - max_new_tokens - 1
        if room < 1:
            raise ValueError(
                f"{max_new_tokens} new tokens leave no room for a prompt in {self.max_tokens}; raise "
                "--max-length, if the model has positions for it, or ask for fewer new tokens"
            )
        kept = ids[max(0, len(ids) - room) :]
        return [self.first_id, *kept], len(ids) - len(kept)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the first end-of-sentence token."""
        end = self.tokenizer.special_ids.eos
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def open_store(self, path: Path) -> TokenStore:
        """A store; ValueError if it has another tokeniser or first token, or ids beyond the vocabulary."""
        store = TokenStore.open(path)
        store.check(vocab_size=self.model.config.vocab_size)
        known = self.trained_on.tokenizer_sha256 or self.tokenizer.sha256
        if store.manifest.tokenizer_sha256 != known:
            raise ValueError(
                f"--store {path} was made with tokeniser {store.manifest.tokenizer_sha256[:12]}, {self.name} trained "
                f"with {known[:12]}; prepare the store with the model's: launch/prepare.py --tokenizer FILE"
            )
        chat, first = store.manifest.chat, self.trained_on.first_token
        if chat is not None and chat.first_token != first:
            raise ValueError(
                f"--store {path} has conversations that begin with {chat.first_token}, {self.name} trained on samples "
                f"that begin with {first}; prepare the store with --first-token {first}"
            )
        return store

    def score_store(self, store: TokenStore) -> StoreScore:
        """The store's loss; ValueError where it is not finite."""
        return score_store(
            loss_of_batch(self.model, self.device),
            store,
            sequence_length=self.max_tokens,
            batch_sequences=max(1, self.batch_tokens // self.max_tokens),
            mask_documents=self.trained_on.mask_documents,
        )
