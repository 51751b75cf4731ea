"""One comparison: the original, the text and what is measured with them."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor, nn

import runtime
from dbf2gguf.archs import plain_length
from dbf2gguf.compare.padding import unpadded
from dbf2gguf.compare.rows import Protocol, Row, linear_bits
from dbf2gguf.compare.score import Judge, Logits, logits_of
from dbf2gguf.files import check_space
from dbf2gguf.source import Source, load_model, load_tokenizer, open_source
from dbf2gguf.text import adds_begin, rows_from_files
from runtime import cli, perplexity
from runtime.bench.report import FORMATS
from runtime.errors import OptionError
from runtime.tokenizer import Tokenizer


def comparison_parser(program: str, description: str) -> argparse.ArgumentParser:
    """What every comparison is told: the models, the text and how much of it, the form of the table."""
    p = cli.parser(program, description)
    add = p.add_argument
    add("model", metavar="MODEL", help="the original: a Hugging Face folder, or a GGUF file")
    add("files", metavar="OUT.gguf", nargs="*", help="files that dbf2gguf made of it")
    add("--text", required=True, metavar="TEXT", help="the UTF-8 text to score on")
    add("-c", "--ctx", type=int, default=perplexity.CTX, metavar="N", help="tokens of a chunk")
    add("--chunks", type=int, default=40, metavar="N", help="chunks to score")
    add("-o", "--output", choices=FORMATS, default="md", help="form of the table")
    add("-q", "--quiet", action="store_true", help="no progress")
    return p


class Comparison:
    """What all rows share: the original, the text, the calibration rows; each made when it is first needed.

    folder   of the peers' files; scratch  of what nobody wants to keep
    """

    def __init__(self, args: argparse.Namespace, folder: Path, scratch: Path) -> None:
        self.args, self.folder, self.scratch = args, folder, scratch
        self.source: Source = open_source(args.model, scratch)
        self.tokenizer = load_tokenizer(self.source)
        text = Path(args.text).read_bytes()
        self.text = text.decode("utf-8", "replace")
        exact = Tokenizer(self.tokenizer.backend_tokenizer.to_str())  # takes control tokens' names as text
        self.bos = self.tokenizer.bos_token_id if adds_begin(self.tokenizer) else None
        self.pieces = perplexity.chunks(exact.encode(self.text), args.ctx, args.chunks, self.bos)
        self.protocol = Protocol(
            self.source.name,
            Path(args.text).name,
            hashlib.sha256(text).hexdigest(),
            args.ctx,
            len(self.pieces),
        )

    @cached_property
    def model(self) -> nn.Module:
        model = load_model(self.source)
        longest = plain_length(model.config)
        if self.args.ctx > longest:
            raise OptionError(
                f"--ctx is {self.args.ctx}; this model was trained for {longest} tokens, or has a sliding "
                "window of so many, which llama.cpp does not compute"
            )
        return model

    @cached_property
    def judge(self) -> Judge:
        scored = sum(len(ids) - len(ids) // 2 for ids in self.pieces)
        size = 4 * scored * self.model.config.vocab_size
        check_space(self.scratch / "original", size, "the original's logits, in $TMPDIR,")
        return Judge(logits_of(self.model), self.pieces, self.scratch, self.args.quiet)

    @cached_property
    def calibration(self) -> Tensor:
        """(rows, 512) int64, the same for every peer."""
        if not self.args.calib:
            raise OptionError("--calib: peers need text to calibrate on; or say --peers none")
        length = min(512, plain_length(self.model.config))
        rows = rows_from_files(
            [Path(file) for file in self.args.calib],
            self.tokenizer,
            self.args.calib_rows,
            length,
            self.args.seed,
        )
        if len(rows) < self.args.calib_rows:
            raise OptionError(f"--calib: holds {len(rows)} rows of {length} tokens; see --calib-rows")
        return rows

    @cached_property
    def calibration_text(self) -> Path:
        """The same rows as a text file."""
        path = self.scratch / "calibration.txt"
        texts = [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in self.calibration]
        path.write_text("\n\n".join(texts), encoding="utf-8")
        return path

    def calibrated_on(self) -> str:
        names = ", ".join(Path(file).name for file in self.args.calib)
        return f"{self.calibration.numel()} tokens of {names}"

    def row(
        self,
        series: str,
        name: str,
        bits: float,
        weights: int,
        size: int | None,
        logits: Logits,
        made_with: str,
    ) -> Row:
        """Measure `logits`."""
        score, divergence = self.judge.measure(f"{series} {name}", logits)
        return Row(
            series,
            name,
            bpw=bits / weights,
            file_mib=None if size is None else size / 2**20,
            ppl=score.ppl,
            ppl_error=score.error,
            kl=divergence.kl_mean,
            kl_error=divergence.kl_error,
            kl_p99=divergence.kl_p99,
            same_top1=divergence.same_top1,
            made_with=made_with,
            **vars(self.protocol),
        )

    def run_file(self, series: str, name: str, file: Path, made_with: str) -> Row:
        """Measure a file of dbf2gguf with the runtime. Raises OptionError if its tokens are others."""
        with runtime.load(file, n_threads=self.args.threads, n_ctx=self.args.ctx) as model:
            bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
            ids = model.tokenizer.encode(self.text)
            if perplexity.chunks(ids, self.args.ctx, self.args.chunks, bos) != self.pieces:
                raise OptionError(
                    f"{file}: its tokens of {self.args.text} are not those of {self.args.model}"
                )
            logits = partial(model.logits, n_last=self.args.ctx - self.args.ctx // 2)
            return self.row(series, name, *linear_bits(file), file.stat().st_size, logits, made_with)

    def read_file(self, series: str, name: str, file: Path, made_with: str) -> Row:
        """Measure an ordinary GGUF, padded or not: dequantize it and run it in transformers."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            model = unpadded(load_model(open_source(file, Path(folder))), self.model, self.source.arch)
            size = file.stat().st_size
            return self.row(series, name, *linear_bits(file), size, logits_of(model), made_with)
