"""`kvloom doctor`: what kvloom found out about a model and about this machine.

Knows: how findings are shown, as tables and as JSON.
Does not know: how they are found.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from kvloom.cli.progress import long_work
from kvloom.cli.settings import JsonOption, LoadOptions, ModelArgument
from kvloom.cli.terminal import Terminal
from kvloom.errors import ModelLoadError, UnsupportedModelError

if TYPE_CHECKING:
    from kvloom.model.digest import Progress

KV_MEMORY = "256MiB"
"""The engine is made but never run."""


def doctor(
    *, model: ModelArgument = "default", as_json: JsonOption = False, options: LoadOptions
) -> None:
    """Probe a model, and say what it is and whether kvloom can run it."""
    terminal = Terminal()
    with long_work(terminal.messages, "Starting", "Probing the model") as progress:
        from kvloom.cli.system import describe_system
        from kvloom.engine.assembly import set_threads

        set_threads(options.threads)
        findings: dict[str, Any] = {"model": model, "system": describe_system()}
        try:
            findings |= {"supported": True, **examine(model, options, progress)}
        except (ModelLoadError, UnsupportedModelError) as error:
            findings |= {"supported": False, "reason": str(error)}
    if as_json:
        terminal.results.print(json.dumps(findings, indent=2), soft_wrap=True)
    else:
        show(findings, terminal)
    if not findings["supported"]:
        raise typer.Exit(1)


def examine(model: str, options: LoadOptions, progress: Progress) -> dict[str, Any]:
    """Load and probe a model, and return what was found as plain data.

    Raises:
        ModelLoadError: its files are missing, damaged or refused.
        UnsupportedModelError: kvloom cannot run it; the text says why.
    """
    from kvloom.cli.layers import describe_layers
    from kvloom.engine.assembly import assemble
    from kvloom.engine.calibrate import cost_model
    from kvloom.kv.pool import PAGE_SLOTS

    assembly = assemble(model, {**options.load_settings(progress), "kv_memory": KV_MEMORY})
    spec, tokenizer = assembly.spec, assembly.tokenizer
    return {
        "path": str(assembly.model_path),
        "runner": assembly.opened.runner_name,
        "runner_note": assembly.opened.runner_note,
        "positions": spec.positions,
        "max_positions": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "tokenizer_vocab_size": tokenizer.vocab_size,
        "notes": list(spec.notes),
        "kv_bytes_per_token": assembly.engine.pool.block_bytes // PAGE_SLOTS,
        "layers": describe_layers(spec.layers),
        "passport": assembly.passport.as_dict(),
        "cost": asdict(cost_model(assembly.opened, options.cache_dir)),
    }


def show(findings: dict[str, Any], terminal: Terminal) -> None:
    """Print findings as tables."""
    if findings["supported"]:
        terminal.results.print(_pairs(_model_lines(findings)))
        terminal.results.print()
        terminal.results.print(layer_table(findings["layers"]))
        terminal.results.print()
        terminal.results.print(_pairs(_passport_lines(findings["passport"])))
        terminal.results.print()
        terminal.results.print(_pairs(_cost_lines(findings["cost"])))
        terminal.results.print()
    terminal.results.print(_pairs(_system_lines(findings["system"])))
    if not findings["supported"]:
        terminal.error(f"{findings['model']} cannot be run: {findings['reason']}")


def layer_table(kinds: list[dict[str, Any]]) -> Table:
    """Return the capability table: one row per kind of layer."""
    from kvloom.cli.layers import ranges, rope_words
    from kvloom.types import Rope

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layers", "heads", "KV heads", "dims", "rope", "window", "softcap", "sinks"):
        table.add_column(name, overflow="fold")
    for kind in kinds:
        rope = None if kind["rope"] is None else Rope(**kind["rope"])
        dims = {kind["k_dim"], kind["v_dim"]}
        table.add_row(
            ranges(kind["index"]),
            str(kind["heads"]),
            str(kind["kv_heads"]),
            str(kind["k_dim"]) if len(dims) == 1 else f"k {kind['k_dim']}, v {kind['v_dim']}",
            rope_words(rope),
            "–" if kind["window"] is None else f"{kind['window']:,}",
            "–" if kind["softcap"] is None else f"{kind['softcap']:g}",
            "yes" if kind["sinks"] else "–",
        )
    return table


def _model_lines(findings: dict[str, Any]) -> list[tuple[str, str]]:
    meaning = {
        "movable": "movable: kvloom rotates keys, so cached text can be shifted",
        "opaque": "opaque: the model rotates keys itself, so cached text stays where it is",
        "absolute": "absolute: positions are part of the hidden states; cached text stays",
    }
    lines = [
        ("model", findings["model"]),
        ("folder", findings["path"]),
        ("supported", "yes: its numbers were reproduced"),
        ("runner", " – ".join(filter(None, (findings["runner"], findings["runner_note"])))),
        ("positions", f"{meaning[findings['positions']]} (up to {findings['max_positions']:,})"),
        ("vocabulary", f"{findings['vocab_size']:,}"),
        ("KV per token", f"{findings['kv_bytes_per_token']:,} bytes"),
    ]
    return lines + [("note", note) for note in findings["notes"]]


def _passport_lines(passport: dict[str, Any]) -> list[tuple[str, str]]:
    digests = [(name, passport[name]) for name in ("weights", "config", "tokenizer", "rope")]
    formats = ", ".join(f"{name} {value}" for name, value in passport["formats"].items())
    return [
        ("fingerprint", passport["fingerprint"]),
        *digests,
        ("formats", formats),
        *_receipt_lines(passport.get("receipt", {})),
        ("cache format", str(passport["cache_format_version"])),
    ]


def _receipt_lines(receipt: dict[str, float]) -> list[tuple[str, str]]:
    if "nll" not in receipt:
        return []
    words = (
        f"next-token loss {receipt['nll']:.4f}, with its own weights in fp32 "
        f"{receipt['source_nll']:.4f}; KL {receipt['kl']:.4f}, best token equal "
        f"{receipt['top1']:.1%}, over {receipt['tokens']:.0f} tokens; "
        f"{receipt['rounded_matrices']:.0f} matrices rounded"
    )
    return [("receipt", words)]


def _cost_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    from kvloom.cost import CostModel

    cost = CostModel(**found)
    rates = ", ".join(f"{tier} {decimal(int(rate))}/s" for tier, rate in cost.bytes_per_s.items())
    fit = f"R² {cost.r2:.3f}"
    if cost.error is not None:
        fit += f", error {cost.error:.1%} at a length left out"
    return [
        ("prefill", f"512 tokens in {cost.prefill_s(512) * 1e3:,.0f} ms ({fit})"),
        ("decode", f"a token behind 512 in {cost.decode_step_s(512) * 1e3:,.1f} ms"),
        ("loading", rates),
    ]


def _system_lines(system: dict[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(
        f"{name} {system[name]}" for name in ("kvloom", "torch", "transformers", "python")
    )
    flash = "torch's kernel" if system["flash_attention"] else "missing; plain products are used"
    return [
        ("versions", versions),
        ("processor", f"{system['cpu']} ({system['cpu_capability']})"),
        ("threads", str(system["threads"])),
        ("memory", decimal(system["memory_bytes"])),
        ("flash attention", flash),
    ]


def _pairs(lines: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, value)
    return table
