"""Runs inside the Python that has onecomp, which need not be the one that has dbf2gguf:

    python onecomp_child.py MODEL TEXT OUT METHOD BITS ITERATIONS ROWS ROW_TOKENS

quantizes MODEL with METHOD (dbf or mdbf), writes a Hugging Face folder OUT with the weights multiplied out,
and OUT/bits.json: {"bits", "weights", "iterations", "device", "version"}. ITERATIONS 0: onecomp's default.
A line DONE on stdout says that a layer is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SCALE_BITS = 16  # onecomp keeps scales as float16
DONE = "layer done"


class Results(dict[str, Any]):
    """Of a quantizer, who tells when there is one more."""

    def __setitem__(self, name: str, result: Any) -> None:
        super().__setitem__(name, result)
        print(DONE, flush=True)


def main(argv: list[str]) -> None:
    import torch
    from onecomp import DBF, MDBF, CalibrationConfig, ModelConfig, Runner, __version__

    model, text, out, method, bits, iterations, rows, row_tokens = argv
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, option = {"dbf": (DBF, "iters"), "mdbf": (MDBF, "admm_outer_iters")}[method]
    quantizer = kind(target_bits=float(bits), **({option: int(iterations)} if int(iterations) else {}))
    quantizer.results = Results()
    calibration = CalibrationConfig(
        calibration_dataset=text,
        max_length=int(row_tokens),
        num_calibration_samples=int(rows),
        strategy="concat_chunk",
        batch_size=8,
    )
    config = ModelConfig(path=model, dtype="float32", device=device)
    runner = Runner(model_config=config, quantizer=quantizer, calibration_config=calibration, qep=False)
    runner.run()
    runner.save_dequantized_model(out)
    found = [bits_of(result) for result in quantizer.results.values()]
    about = {
        "bits": sum(b for b, _ in found),
        "weights": sum(w for _, w in found),
        "iterations": getattr(quantizer, option),
        "device": device,
        "version": __version__,
    }
    Path(out, "bits.json").write_text(json.dumps(about), encoding="utf-8")


def bits_of(result: Any) -> tuple[int, int]:
    """Bits of one layer's result, a bit a sign and 16 a scale, and the weights that it stands for."""
    if hasattr(result, "dbf_mid"):
        rank, rows, cols = result.dbf_mid.numel(), result.dbf_Da.numel(), result.dbf_Db.numel()
        return rank * (rows + cols) + SCALE_BITS * (rows + rank + cols), rows * cols
    bits = 0
    for params in result.get_MDBF_params_list():
        bits += params.A_sign.numel() + params.B_sign.numel()
        scales = (params.A_amp, params.B_amp, params.Q_U_amp, params.Q_V_amp)
        bits += SCALE_BITS * sum(matrix.numel() for matrix in scales)
    return bits, params.A_sign.shape[0] * params.B_sign.shape[1]


if __name__ == "__main__":
    main(sys.argv[1:])
