"""Moves packed matrices into memory of large pages, through which they stream faster.

Knows: how the system is asked for large pages, and that each matrix is moved once.
Does not know: where the matrices came from.

A step reads every weight once, and with pages of 4 KiB it spends a part of its time looking up
where they lie, above all in a virtual machine (ADR 0011 has figures).
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import torch
from torch import Tensor

from kvloom.ops.decoder import Decoder, Norm
from kvloom.ops.native.memory import ALIGNMENT
from kvloom.ops.packing import PackedWeight

LARGE_PAGE = 2 * 2**20


def make_resident(decoder: Decoder) -> Decoder:
    """Return a copy of the decoder with its codes in one stretch of large pages.

    Where the system has none, the copies lie in ordinary pages.
    """
    codes = {weight.codes.data_ptr(): weight.codes for weight in _weights(decoder)}
    sizes = {place: -(-tensor.numel() // ALIGNMENT) * ALIGNMENT for place, tensor in codes.items()}
    memory = _large_pages(sum(sizes.values()))
    moved: dict[int, Tensor] = {}
    start = 0
    for place, tensor in codes.items():
        moved[place] = memory[start : start + tensor.numel()].copy_(tensor)
        start += sizes[place]

    def move(weight: PackedWeight) -> PackedWeight:
        return replace(
            weight,
            codes=moved[weight.codes.data_ptr()],
            scales=_copied(weight.scales),
            bias=_copied(weight.bias),
        )

    layers = tuple(
        replace(
            layer,
            input_norm=_copied_norm(layer.input_norm),
            q_norm=_copied_norm(layer.q_norm),
            k_norm=_copied_norm(layer.k_norm),
            attention_norm=_copied_norm(layer.attention_norm),
            mlp_norm=_copied_norm(layer.mlp_norm),
            output_norm=_copied_norm(layer.output_norm),
            sinks=_copied(layer.sinks),
            q=move(layer.q),
            k=move(layer.k),
            v=move(layer.v),
            output=move(layer.output),
            gate=None if layer.gate is None else move(layer.gate),
            up=move(layer.up),
            down=move(layer.down),
        )
        for layer in decoder.layers
    )
    embedding, head = move(decoder.embedding), move(decoder.head)
    final_norm = _copied_norm(decoder.final_norm)
    return replace(decoder, layers=layers, embedding=embedding, head=head, final_norm=final_norm)


def _copied(tensor: Tensor | None) -> Tensor | None:
    """Return a copy, so that nothing holds on to the file that was mapped."""
    return None if tensor is None else tensor.clone()


def _copied_norm(norm: Norm) -> Norm:
    return replace(norm, weight=_copied(norm.weight), bias=_copied(norm.bias))


def _weights(decoder: Decoder) -> list[PackedWeight]:
    inner = [weight for layer in decoder.layers for _, weight in layer.weights()]
    return [*inner, decoder.embedding, decoder.head]


def _large_pages(nbytes: int) -> Tensor:
    """Return uint8 memory (n,) that starts at a large page."""
    size = -(-nbytes // LARGE_PAGE) * LARGE_PAGE + LARGE_PAGE
    # Private: Linux gives large pages to shared memory only where it was mounted for them.
    whole = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(whole, dtype=torch.uint8)
    start = -memory.data_ptr() % LARGE_PAGE
    return memory[start : start + nbytes]
