"""Train a tiny language model of transformers with its own Trainer, with and without a mistake.

    python examples/transformers_trainer.py             the second head trains nothing
    python examples/transformers_trainer.py --fixed

    gradwatch check examples.transformers_trainer:spoilt    one step, without training
    gradwatch check examples.transformers_trainer:fixed

The text is the description of the digits that comes with scikit-learn; the model has random weights, so that
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from gradwatch.transformers import GradWatchCallback

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 32


class Characters(Dataset[dict[str, Tensor]]):
    """A text, cut into pieces; a character is a token."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        self.tokens = torch.tensor([self.alphabet.index(letter) for letter in text])

    def __len__(self) -> int:
        return len(self.tokens) // LENGTH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.tokens[index * LENGTH : (index + 1) * LENGTH]
        return {"input_ids": piece, "labels": piece}


class WithVowels(GPT2LMHeadModel):
    """A language model that is to learn as well whether the next letter is a vowel."""

    vowels: Tensor
    joined = True

    def __init__(self, config: GPT2Config, vowels: Tensor) -> None:
        super().__init__(config)
        self.vowel = nn.Linear(config.n_embd, 1)
        self.register_buffer("vowels", vowels)

    def forward(self, input_ids: Tensor, labels: Tensor, **options: Any) -> Any:
        out = super().forward(
            input_ids=input_ids, labels=labels, output_hidden_states=True, **options
        )
        guess = self.vowel(out.hidden_states[-1][:, :-1]).squeeze(-1)
        is_vowel = torch.isin(labels[:, 1:], self.vowels).float()
        vowel_loss = nn.functional.binary_cross_entropy_with_logits(guess, is_vowel)
        out.loss = out.loss + (vowel_loss if self.joined else vowel_loss.item())
        out.hidden_states = None
        return out


def made(*, joined: bool) -> tuple[WithVowels, Characters]:
    data = Characters(load_digits().DESCR)
    vowels = torch.tensor([i for i, letter in enumerate(data.alphabet) if letter in "aeiou"])
    config = GPT2Config(
        vocab_size=len(data.alphabet),
        n_positions=LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = WithVowels(config, vowels)
    model.joined = joined
    return model, data


def spoilt() -> tuple[WithVowels, Callable[[], Tensor]]:
    """Return the model with the mistake and what gives its loss, for ``gradwatch check``."""
    return one_step(*made(joined=False))


def fixed() -> tuple[WithVowels, Callable[[], Tensor]]:
    """Return the model without the mistake."""
    return one_step(*made(joined=True))


def one_step(model: WithVowels, data: Characters) -> tuple[WithVowels, Callable[[], Tensor]]:
    batch = {name: piece[None] for name, piece in data[0].items()}
    return model, lambda: model(**batch).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fixed", action="store_true", help="without the mistake")
    arguments = parser.parse_args()
    set_seed(0)
    logging.set_verbosity_error()
    model, data = made(joined=arguments.fixed)
    callback = GradWatchCallback(for_steps=5)
    options = TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=2,
        learning_rate=3e-3,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        logging_steps=10,
    )
    trainer = Trainer(model, options, train_dataset=data, callbacks=[callback])
    result = trainer.train()
    print(f"loss {result.training_loss:.2f}; findings: {len(callback.diagnoses)}")


if __name__ == "__main__":
    main()
