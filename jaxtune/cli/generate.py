"""``jaxtune generate``."""

from __future__ import annotations

import argparse
import re
import sys

from jaxtune.cli import trained
from jaxtune.cli.common import emit

EXAMPLE = "jaxtune generate runs/quickstart --escapes --prompt 'Acme kettle, 2 l\\nBrand:' --max-new-tokens 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    trained.add_arguments(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="text to continue, as it stands, or the user's turn if data.chat is set; may be given several times; "
        "standard input, a line each",
    )
    parser.add_argument(
        "--escapes", action="store_true", help=r"read \n, \t, \r and \\ in the prompts as a shell's $'…' does"
    )
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help="JSON or JSONL of conversations to answer, each a list of messages or an object with messages and tools, "
        "instead of --prompt; -: standard input",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="default: evaluation.max_new_tokens")
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="draw among the k likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw among the likeliest tokens of this total share"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Continues prompts, or answers conversations."""
    chosen = trained.start_subject(arguments)
    config = chosen.config

    from jaxtune.config import with_overrides
    from jaxtune.data import chat_prompt, encode_prompts, one_turn, read_conversations
    from jaxtune.errors import UserError
    from jaxtune.evaluation.generation import check_request
    from jaxtune.evaluation.text import answer_texts
    from jaxtune.training.opened_config import OpenedConfig

    if arguments.messages is not None and arguments.prompt:
        raise UserError("give --prompt or --messages, not both")
    file: str | None = arguments.messages
    talks = [] if file is None else read_conversations(file, config.data.messages or "messages")
    prompts = [] if talks else arguments.prompt or _lines_of_input()
    if arguments.escapes:
        prompts = [_unescaped(text) for text in prompts]
    if not prompts and not talks:
        raise UserError("no prompt: give --prompt, --messages, or lines on standard input")
    rendered = bool(talks) or config.data.chat
    overrides = {"evaluation.batch_size": min(len(talks or prompts), config.evaluation.batch_size)}
    if arguments.max_new_tokens is not None:
        overrides["evaluation.max_new_tokens"] = arguments.max_new_tokens
    opened = OpenedConfig(with_overrides(config, overrides), parts=())
    subject = chosen.open(opened)
    if talks:
        prompts = [chat_prompt(talk, opened.tokenizer, place, key="--messages") for talk, place in talks]
    elif rendered:
        prompts = [
            chat_prompt(one_turn(text), opened.tokenizer, f"prompt {number}", key="data.chat")
            for number, text in enumerate(prompts, 1)
        ]
    encoded = encode_prompts(opened.tokenizer, prompts, rendered=rendered)
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    decoder = opened.model.config
    check_request(encoded, decoder.vocab_size, context=decoder.max_position_embeddings, **sampling)
    if arguments.dry_run:
        emit({"checked": True, "subject": subject.origin}, arguments.json, f"would continue with {subject.origin}")
        return 0
    answers = opened.generator(*subject.apply(), encoded, **sampling)
    texts = answer_texts(opened.tokenizer, answers)
    result = {"subject": subject.origin, "prompts": prompts, "continuations": texts}
    shown = texts if rendered else [f"{prompt}{text}" for prompt, text in zip(prompts, texts, strict=True)]
    emit(result, arguments.json, "\n".join(shown))
    return 0


def _lines_of_input() -> list[str]:
    from jaxtune.errors import UserError

    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from error


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def _unescaped(text: str) -> str:
    from jaxtune.errors import UserError

    def character(found: re.Match[str]) -> str:
        if found[1] not in _ESCAPES:
            known = ", ".join(f"\\{letter}" for letter in _ESCAPES)
            raise UserError(
                f"--escapes: {found[0]} in the prompt is none of {known}; write \\\\ for a backslash: {text}"
            )
        return _ESCAPES[found[1]]

    return re.sub(r"\\(.?)", character, text, flags=re.DOTALL)
