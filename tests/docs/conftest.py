"""Models in place of those that the pages name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="session")
def models_with_tokenizer(checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """A dense model and its checkpoint, each with a tokenizer of its vocabulary's size."""
    words = {word: i for i, word in enumerate(["[UNK]", "How", "to", "make", "a", "cake", *map(str, range(122))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", model_input_names=names)
    folders = []
    for source in (checkpoint("mistral").parent / "dense", checkpoint("mistral")):
        folders.append(shutil.copytree(source, tmp_path_factory.mktemp("page") / source.name))
        tokenizer.save_pretrained(folders[-1])
    return folders[0], folders[1]
