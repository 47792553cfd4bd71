"""Packs the routed experts of a plain bf16 checkpoint as the compressed-tensors library does ("pack-quantized").

Written from the description of the form alone, with nothing but the standard library, so that it shares no code with
what it checks: symmetric 4-bit integers, a bf16 scale per row and group of columns, eight integers in an int32, the
first in the lowest bits, each 8 above its value.

    python pack_quantized.py SOURCE OUT GROUP

Beside the checkpoint it writes `expected.bin`: for each packed weight, in the order of names, the length of its name
(u32), the name, and its values as little-endian f32, row by row.
"""

import json
import os
import shutil
import struct
import sys


def widen(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def narrow(value):
    """To the nearest bf16, halves to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return bits >> 16


def pack(data, rows, cols, group):
    numbers = struct.unpack(f"<{rows * cols}H", data)
    words, scales, values = [], [], []
    for row in range(rows):
        weights = [widen(n) for n in numbers[row * cols : (row + 1) * cols]]
        integers = []
        for start in range(0, cols, group):
            part = weights[start : start + group]
            # 15 steps from end to end, so the ends of the range are seldom both used.
            scale = narrow(max(max(map(abs, part)) / 7.5, 1e-6))
            scales.append(scale)
            integers += [max(-8, min(7, round(w / widen(scale)))) for w in part]
        values += [q * widen(scales[row * -(-cols // group) + i // group]) for i, q in enumerate(integers)]
        integers += [-8] * (-cols % 8)
        for start in range(0, len(integers), 8):
            word = 0
            for i, integer in enumerate(integers[start : start + 8]):
                word |= (integer + 8) << (4 * i)
            words.append(word)
    return (
        struct.pack(f"<{len(words)}I", *words),
        struct.pack(f"<{len(scales)}H", *scales),
        struct.pack(f"<{len(values)}f", *values),
    )


def main(source, out, group):
    os.makedirs(out)
    tensors = {}
    for file in sorted(os.listdir(source)):
        path = os.path.join(source, file)
        if file.endswith(".json") and "index" not in file and "manifest" not in file:
            shutil.copy(path, out)
        if not file.startswith("model") or not file.endswith(".safetensors"):
            continue
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    f.seek(8 + length + start)
                    tensors[name] = (entry["dtype"], entry["shape"], f.read(end - start))
    written, expected = {}, []
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        if ".mlp.experts." not in name:
            written[name] = (dtype, shape, data)
            continue
        assert dtype == "BF16", dtype
        rows, cols = shape
        words, scales, values = pack(data, rows, cols, group)
        written[name + "_packed"] = ("I32", [rows, -(-cols // 8)], words)
        written[name + "_scale"] = ("BF16", [rows, -(-cols // group)], scales)
        written[name + "_shape"] = ("I32", [2], struct.pack("<2i", rows, cols))
        expected.append(struct.pack("<I", len(name)) + name.encode() + values)
    header, offset = {}, 0
    for name, (dtype, shape, data) in written.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(out, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in written.values():
            f.write(data)
    with open(os.path.join(out, "expected.bin"), "wb") as f:
        f.write(b"".join(expected))
    path = os.path.join(out, "config.json")
    with open(path) as f:
        config = json.load(f)
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }
    config["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights,
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    with open(path, "w") as f:
        json.dump(config, f, indent=1)


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
