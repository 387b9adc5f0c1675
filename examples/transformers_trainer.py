"""Train a small Mamba with AR and TAR in Hugging Face's Trainer: `python examples/transformers_trainer.py`, on a CPU.

The sequences are the lines of this file, padded on the left. The model learns to predict their characters.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM, TrainingArguments, logging, set_seed

from fastreg.transformers import RegularizedTrainer


def examples_of(text: str, characters: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return one example for each line: ids padded on the left, the mask of valid steps, and labels."""
    lines = [[characters.index(c) for c in line] for line in text.splitlines() if line]
    longest = max(map(len, lines))
    examples = []
    for line in lines:
        ids = torch.tensor([0] * (longest - len(line)) + line)
        mask = torch.tensor([0] * (longest - len(line)) + [1] * len(line))
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return examples


def main(epochs: int) -> None:
    set_seed(0)
    logging.set_verbosity_error()
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    config = MambaConfig(vocab_size=len(characters), hidden_size=32, num_hidden_layers=2, state_size=8)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # the penalty is the mean of both batches'
            learning_rate=1e-2,
            logging_steps=3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = RegularizedTrainer(
            MambaForCausalLM(config),
            arguments,
            train_dataset=examples_of(text, characters),
            alpha=2.0,
            beta=1.0,
            rnn="backbone.layers.1",  # the last block; the model's last hidden state is the output of a norm
        )
        trainer.train()  # logs ar and tar beside the loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
