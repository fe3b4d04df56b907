"""Which decoder reads PNG, JPEG and zstd fastest on one core, and which may be given damaged files?

python benchmarks/decoders.py          # some two minutes on an idle core

Real slices (see `benchmarks/samples.py`) as they lie in shards of ours and of others: grey of 512 × 512 and, as the
reference preparation has them, RGB of 1024 × 1024. `ours` is what the loader calls, all checks of headers included:
Pillow for PNG and JPEG, and for zstd the whole frame at once. The others are torchvision's decoders, whose libpng and
libjpeg are their own, and zstd piece by piece. Each gives the same pixels, which is checked. All run in turn.

A shard may be damaged or hostile, so a decoder must end with an error that Python sees: each is given the same damaged
files (a byte changed, cut off, bytes put in), each file in turn, in a process of its own that is started anew where
one dies.

The last line is one JSON object:
  benchmark           "decoders"
  quick               whether --quick was given
  images              of each kind
  samples_per_second  by kind, "png_grey", "png_rgb", "jpeg_grey", "jpeg_rgb", "zstd_grey", and decoder, "ours" and the
                      "other": medians over rounds
  ratios              by kind: "ours" divided by the "other", medians over rounds
  ratio               their geometric mean
  damaged             by format, "png" and "jpeg", and decoder: of how many "files" it "read", "refused", "crashed" (the
                      process was gone) and "lines" that it wrote to stderr without being asked
  bar                 {"crashes", "needed", "met"}: ours
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_shards.codecs import decode_image, encode_image
from data_shards.pictures import decode_picture

Decoder = Callable[[bytes], np.ndarray]
WAYS = ("ours", "other")


def by_torchvision(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import decode_jpeg, decode_png

    decode = decode_png if data.startswith(b"\x89PNG") else decode_jpeg
    pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return pixels.permute(1, 2, 0).squeeze(-1).numpy()


def piece_by_piece(data: bytes) -> np.ndarray:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(data) as file:
        content = bytearray()
        while piece := file.read(2**17):
            content += piece
    return np.load(io.BytesIO(content))


def ours(extension: str) -> Decoder:
    decode = decode_picture if extension == "jpg" else decode_image
    return lambda data: decode(extension, data)


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


def kinds(count: int) -> dict[str, tuple[str, list[bytes]]]:
    """Extension and files of each kind."""
    from samples import slices

    sources = slices(count)
    grey, colour = [source.native()[0] for source in sources], [source.large()[0] for source in sources]
    return {
        "png_grey": ("image.png", [encode_image(image)[1] for image in grey]),
        "png_rgb": ("image.png", [encode_image(image)[1] for image in colour]),
        "jpeg_grey": ("jpg", [jpeg(image) for image in grey]),
        "jpeg_rgb": ("jpg", [jpeg(image) for image in colour]),
        "zstd_grey": ("image.npy.zst", [encode_image(image, "zstd")[1] for image in grey]),
    }


def all_of(decode: Decoder, files: list[bytes]) -> Callable[[], int]:
    return lambda: len([decode(data) for data in files])


# --- damaged files


def broken(form: str, count: int) -> list[bytes]:
    """Damaged files of small images."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = (np.add.outer(3 * np.arange(40), 2 * np.arange(56))[..., None] + rng.integers(0, 8, (40, 56, 3))) % 256
        pixels = image.astype(np.uint8)[..., 0] if number % 3 == 0 else image.astype(np.uint8)
        data = bytearray(encode_image(pixels)[1] if form == "png" else jpeg(pixels))
        place = int(rng.integers(33, len(data)))  # behind a PNG's header, which is checked on its own
        if number % 4 == 0:
            data = data[:place]
        elif number % 4 == 1:
            data[place:place] = rng.bytes(int(rng.integers(1, 9)))
        else:
            data[place] ^= int(rng.integers(1, 256))
        found.append(bytes(data))
    return found


def attempt(form: str, way: str, count: int, first: int) -> None:
    """Decode damaged files from one on, in a process that may die of it; say what became of each."""
    decode = by_torchvision if way == "other" else ours("image.png" if form == "png" else "jpg")
    for data in broken(form, count)[first:]:
        try:
            decode(data)
        except Exception:
            print("refused", flush=True)
        else:
            print("read", flush=True)


def verdicts(form: str, way: str, count: int) -> dict[str, int]:
    """What becomes of damaged files, in processes of their own."""
    seen: Counter[str] = Counter()
    done = 0
    while done < count:
        command = [sys.executable, __file__, "--attempt", form, way, str(count), str(done)]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = run.stdout.split()
        seen.update(lines)
        seen["lines"] += len(run.stderr.splitlines())
        done += len(lines)
        if done < count:
            if run.returncode >= 0:
                sys.exit(f"benchmarks/decoders.py: {form}, {way}: {run.stderr.strip()[-500:]}")
            seen["crashed"] += 1
            done += 1
    return {"files": count, **{name: seen[name] for name in ("read", "refused", "crashed", "lines")}}


def main() -> None:
    if sys.argv[1:2] == ["--attempt"]:  # one of the processes that may die
        attempt(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    import torch  # the processes that may die are many, and need no more than their decoder
    from measuring import arguments, finish, pairwise, say

    values = arguments(__doc__, images=0, files=0, rounds=0)
    torch.set_num_threads(1)
    count, rounds = values.images or (3 if values.quick else 20), values.rounds or (5 if values.quick else 11)
    rates, ratios = {}, {}
    for kind, (extension, files) in kinds(count).items():
        say(kind)
        decode, other = ours(extension), piece_by_piece if kind.startswith("zstd") else by_torchvision
        assert all(np.array_equal(decode(data), other(data)) for data in files), f"{kind}: the pixels differ"
        found = pairwise(all_of(decode, files), all_of(other, files), rounds)
        rates[kind], ratios[kind] = {"ours": found.ours, "other": found.reference}, found.ratio
        print(f"{kind:10} ours {found.ours:6.0f}, the other {found.reference:6.0f} samples/s: {found.ratio:.2f}")
    number = values.files or (4 if values.quick else 60)
    damaged = {form: {way: verdicts(form, way, number) for way in WAYS} for form in ("png", "jpeg")}
    for form, table in damaged.items():
        for way, row in table.items():
            print(f"damaged {form:5} {way:6}" + ", ".join(f"{name} {figure}" for name, figure in row.items()))
    crashes = sum(table["ours"]["crashed"] for table in damaged.values())
    finish(
        {
            "benchmark": "decoders",
            "quick": values.quick,
            "images": count,
            "samples_per_second": rates,
            "ratios": ratios,
            "ratio": statistics.geometric_mean(ratios.values()),
            "damaged": damaged,
            "bar": {"crashes": crashes, "needed": 0, "met": crashes == 0},
        },
        values.save,
    )


if __name__ == "__main__":
    main()
