"""Chat with a model in the terminal: python -m runtime.chat OUT.gguf

stdout is the answer; prompts, notes and statistics go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import runtime
from runtime import cli, sampling
from runtime.errors import ContextError, OptionError
from runtime.sampling import Sampler

HELP = """\
/exit   leave (also Ctrl-D; Ctrl-C stops an answer)
/clear  forget the conversation
/stats  speed of the last answer, context and memory in use
/help   this text"""


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("python -m runtime.chat", "Chat with a model that dbf2gguf made.")
    p.add_argument("model", metavar="OUT.gguf", help="the model file")
    p.add_argument("-p", "--prompt", help="answer this one prompt on stdout and leave")
    p.add_argument("--system", metavar="TEXT", help="system message at the beginning of the conversation")
    p.add_argument(
        "--raw",
        "--no-template",
        action="store_true",
        dest="raw",
        help="continue text as it is, without chat template",
    )
    p.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: until the context is full)",
    )
    p.add_argument(
        "-c",
        "--ctx",
        type=int,
        metavar="N",
        help="context in tokens (default: the model's own, at most 4096)",
    )
    p.add_argument(
        "--temp",
        type=float,
        default=sampling.TEMPERATURE,
        metavar="X",
        help="temperature; 0 always takes the likeliest token",
    )
    p.add_argument(
        "--top-k", type=int, default=sampling.TOP_K, metavar="N", help="keep the N likeliest tokens; 0 is off"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=sampling.TOP_P,
        metavar="X",
        help="keep the likeliest whose probabilities sum to X; 1 is off",
    )
    p.add_argument(
        "--min-p",
        type=float,
        default=sampling.MIN_P,
        metavar="X",
        help="keep those X times as likely as the likeliest; 0 is off",
    )
    p.add_argument(
        "--repeat-penalty",
        type=float,
        default=sampling.REPEAT_PENALTY,
        metavar="X",
        help="divide the logits of repeated tokens by X; 1 is off",
    )
    p.add_argument(
        "--repeat-window",
        type=int,
        default=sampling.REPEAT_WINDOW,
        metavar="N",
        help="tokens that the repeat penalty looks back at; -1 is all",
    )
    p.add_argument(
        "--seed", type=int, metavar="N", help="seed of the random numbers (default: a new one each time)"
    )
    cli.add_backend_options(p)
    p.add_argument("--stats", action="store_true", help="print load time, tokens/s and peak memory on stderr")
    return p


class Chat:
    """A conversation: its history, and what prints it."""

    def __init__(
        self,
        model: runtime.Model,
        sampler: Sampler,
        *,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.system = system
        self.raw = raw
        self.max_tokens = max_tokens
        self.out = sys.stdout if out is None else out
        self.interrupted = False
        self.clear()

    def clear(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.text = ""

    def ask(self, question: str) -> str:
        """Answer: streams it to `out`, returns it, and appends both to the history.

        Ctrl-C stops it (`interrupted` tells), and what was said so far is kept; if that is nothing, or if it
        raises, the history is as before.
        """
        tokenizer = self.model.tokenizer
        messages = [*self.messages, {"role": "user", "content": question}]
        text = self.text + question
        if self.raw:
            ids = tokenizer.encode(text)
            stream = tokenizer.stream(ids)
        else:
            ids = tokenizer.encode_chat(messages)
            stream = tokenizer.stream()
        answer = ""
        self.interrupted = False
        tokens = self.model.generate(ids, self.sampler, self.max_tokens)
        try:
            for token in tokens:
                answer += self._print(stream.push(token))
        except KeyboardInterrupt:
            self.interrupted = True
        answer += self._print(stream.flush())
        print(file=self.out, flush=True)
        if answer or not self.interrupted:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.text = text + answer
        if self.interrupted:
            note("stopped")
        elif self.model.stats.finish == "context":
            note(f"the context is full ({self.model.n_ctx} tokens); /clear, or start with a larger --ctx")
        return answer

    def _print(self, text: str) -> str:
        if text:
            self.out.write(text)
            self.out.flush()
        return text


def note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


def interactive(chat: Chat, stats: bool) -> None:
    """Read questions from stdin until /exit, Ctrl-D, or Ctrl-C at the prompt."""
    tty = sys.stdin.isatty()
    if tty:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing)
        note(f"{chat.model.file.name}; /help lists the commands")
    while True:
        try:
            line = _read_line(tty)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        command = line.strip()
        if not command:
            continue
        if command == "/exit":
            return
        if command == "/clear":
            chat.clear()
            note("the conversation is forgotten")
        elif command == "/stats":
            note(describe(chat.model))
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/") and len(command.split()) == 1 and command[1:].isalpha():
            note(f"unknown command {command}; /help lists them")
        else:
            try:
                chat.ask(line)
            except ContextError as e:
                note(f"{e}; /clear forgets the conversation")
            else:
                if stats:
                    note(describe(chat.model))


def _read_line(tty: bool) -> str:
    """One line of stdin; the prompt goes to stderr."""
    if tty and sys.stdout.isatty():
        return input("> ")  # with line editing; it writes the prompt on stdout, which is the terminal
    if tty:
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


def describe(model: runtime.Model) -> str:
    """Speed of the last answer, context and memory in use."""
    s = model.stats
    used = s.prompt_tokens + s.new_tokens
    return f"{s}; context {used} of {model.n_ctx}; peak memory {cli.peak_rss() / 2**20:.0f} MiB"


def _kv(model: runtime.Model) -> str:
    """The KV cache: its type, and memory that is taken token by token."""
    each, whole = model.kv_bytes_per_token / 1024, model.kv_bytes_per_token * model.n_ctx / 2**20
    return f"KV cache {model.backend.kv_type}, {each:.1f} KiB per token, {whole:.1f} MiB when full"


def chat(args: argparse.Namespace) -> int:
    if args.raw and args.system:
        raise OptionError("--system needs a chat template; it cannot be used with --raw")
    sampler = Sampler(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_window=args.repeat_window,
        seed=args.seed,
    )
    if args.max_tokens is not None and args.max_tokens < 0:
        raise OptionError(f"--max-tokens is {args.max_tokens}, wanted 0 or more")
    start = time.perf_counter()
    with runtime.load(args.model, n_ctx=args.ctx, **cli.load_options(args)) as model:
        raw = args.raw
        if not raw and model.tokenizer.chat_template is None:
            if args.system:
                raise OptionError("--system needs a chat template; this model has none")
            note("this model has no chat template: it continues your text (--raw)")
            raw = True
        model.tokenizer  # noqa: B018  (made on first use: part of the load time)
        if args.stats:
            note(
                f"load {time.perf_counter() - start:.2f} s; backend {model.backend.description}; {_kv(model)}"
            )
        if model.n_ctx > model.file.config.n_ctx_train:
            note(f"the model was trained for {model.file.config.n_ctx_train} tokens of context only")
        conversation = Chat(model, sampler, system=args.system, raw=raw, max_tokens=args.max_tokens)
        if args.prompt is None:
            interactive(conversation, args.stats)
        else:
            conversation.ask(args.prompt)
            if args.stats:
                note(describe(model))
            if conversation.interrupted:
                return cli.INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(chat, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
