"""``awq generate``: an AWQ checkpoint answers a prompt, and says how fast."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ._options import AsJson, CheckpointPath, DtypeOption, VersionOption


def generate(
    path: CheckpointPath,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to answer or to continue.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
    ] = 64,
    dtype: DtypeOption = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 or auto. Left out: a GPU where there is one."),
    ] = None,
    version: VersionOption = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print words as they come.")] = True,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template. Left out: where the tokenizer has one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a checkpoint answer a prompt (greedy), then print tokens per second.

    The first token's time is that of reading the prompt (prefill); the rest is decoding, one token at a time.
    """
    from ._checkpoint import open_checkpoint
    from ._output import console, print_json
    from ._progress import starting

    open_checkpoint(path)  # says what is wrong with the files before anything heavy is imported
    with starting():
        from ..hf.generation import answer, load, prompt_ids

    started = time.perf_counter()
    loaded = load(path, dtype, device, version)
    load_seconds = time.perf_counter() - started
    ids = prompt_ids(loaded, prompt, chat)
    streaming = stream and not as_json
    found = answer(loaded, ids, max_new_tokens, (lambda text: print(text, end="", flush=True)) if streaming else None)
    if as_json:
        data = {
            "path": str(path),
            "device": loaded.device,
            "dtype": loaded.dtype,
            "version": version,
            "text": found.text,
        }
        print_json(data | {"load_seconds": load_seconds} | found.speed())
        return
    print("" if streaming else found.text)
    screen = console(stderr=True)
    screen.print(
        f"\n{found.summary()}, loaded in {load_seconds:.1f} s, {loaded.dtype} on {loaded.device}", soft_wrap=True
    )
