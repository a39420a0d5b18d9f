"""The data path alone: speed against plain Pillow and torchvision, workers, memory over time, and long lists of urls.

    python benchmarks/data.py speed             # one core: the stream, and plain decoding of the same bytes
    python benchmarks/data.py workers           # 1 and 2 loader processes
    python benchmarks/data.py memory            # resident set over 200,000 small samples
    python benchmarks/data.py urls              # seconds to list 100,000 shards
    python benchmarks/data.py device            # on a GPU: 512 px shards to batches, by processes or by its decoder

Pictures are different crops of the photographs in scikit-learn and scikit-image, in the format of img2dataset (JPEG,
quality 95, shorter side 256).
"""

import argparse
import io
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Results, alone, in_turn, name_of, wait
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as tvf

from clipfix.data.decoding import cropped, in_unit_range
from clipfix.data.module import ShardData
from clipfix.data.needs import Needs
from clipfix.data.shards import read_shard
from clipfix.data.texts import TextSettings
from clipfix.system.files import add_sample

CAPTION: dict[str, TextSettings | None] = {"caption": {"key": "txt", "pick": "one"}}
BYTES = "clipfix, shards to batches of bytes, as loader processes give them"
FLOATS = "clipfix, the same, and batches to [0, 1] on this core"


def photographs(count: int, width: int, height: int) -> Iterator[bytes]:
    """Yield JPEG files of different crops."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(pixels) for pixels in (*load_sample_images().images, data.astronaut(), data.coffee())]
    rng = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        share = rng.uniform(0.6, 0.95)
        w, h = int(source.width * share), int(source.height * share)
        left, top = (int(rng.integers(0, whole - part)) for whole, part in ((source.width, w), (source.height, h)))
        image = source.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        image.save(buffer := io.BytesIO(), "JPEG", quality=95)
        yield buffer.getvalue()


def shards(folder: Path, files: list[bytes], per_shard: int) -> str:
    """Write shards of these image files and return their folder."""
    for start in range(0, len(files), per_shard):
        with tarfile.open(folder / f"{start // per_shard:05d}.tar", "w") as tar:
            for place, data in enumerate(files[start : start + per_shard], start=start):
                add_sample(tar, f"{place:09d}", {"jpg": data, "txt": f"picture {place}".encode(), "json": b"{}"})
    return str(folder)


def loader(train: str | list[str], image_size: int, workers: int, batch_size: int = 64, shuffle: int = 200) -> Iterator:
    """Return an iterator over training batches."""
    data = ShardData(train, None, CAPTION, batch_size, workers, shuffle, seed=0, needs=Needs(image_size))
    data.setup()
    return iter(data.train_dataloader())


# -- speed of one core -------------------------------------------------------------------------------------------------


def plainly(data: bytes, size: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return tvf.to_tensor(tvf.center_crop(tvf.resize(image, size, tvf.InterpolationMode.BICUBIC), size))


def plain_pillow(files: list[bytes], size: int) -> None:
    for data in files:
        plainly(data, size)


def plain_batches(files: list[bytes], size: int) -> None:
    for start in range(0, len(files), 64):
        torch.stack([plainly(data, size) for data in files[start : start + 64]])


def only_decoded(files: list[bytes], size: int) -> None:
    for data in files:
        Image.open(io.BytesIO(data)).convert("RGB").load()


def plain_torchvision(files: list[bytes], size: int) -> None:
    for data in files:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        tvf.center_crop(tvf.resize(image, [size], tvf.InterpolationMode.BICUBIC, antialias=True), [size]).float().div(
            255
        )


def speed(count: int, size: int, repeats: int) -> None:
    files = list(photographs(count, 341, 256))
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), files, per_shard=count // 4)
        batches = loader(folder, size, workers=0)

        def stream(files: list[bytes], size: int) -> None:
            for _ in range(len(files) // 64):
                next(batches)

        def stream_of_floats(files: list[bytes], size: int) -> None:
            for _ in range(len(files) // 64):
                in_unit_range(next(batches)["image"])

        ways: dict[str, Callable[[list[bytes], int], None]] = {
            BYTES: stream,
            FLOATS: stream_of_floats,
            "Pillow, decode, resize, crop, tensor; no shards, no batches": plain_pillow,
            "Pillow, the same, stacked in batches": plain_batches,
            "Pillow, decode alone": only_decoded,
            "torchvision, decode, resize, crop": plain_torchvision,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        stream(files, size)
        for _ in range(repeats):  # in turn, so that other load on the machine affects all
            for name, way in ways.items():
                start = time.process_time()
                way(files[: count // 64 * 64], size)
                seconds[name].append(time.process_time() - start)
    print(f"{count} JPEG of 341 x 256, {sum(map(len, files)) / count / 1e3:.0f} kB each, to {size} px; CPU seconds")
    print("| implementation | images/s per core | clipfix in bytes / it | in floats / it |\n|---|---|---|---|")
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        rates = [count // 64 * 64 / one for one in taken]
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        print(f"| {name} | {rate} | {middle[name] / middle[BYTES]:.2f} | {middle[name] / middle[FLOATS]:.2f} |")


# -- workers -----------------------------------------------------------------------------------------------------------


def workers(count: int, size: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), list(photographs(count, 341, 256)), per_shard=count // 8)
        print("| loader processes | images/s, wall |\n|---|---|")
        for number in (0, 1, 2):
            batches, rates = loader(folder, size, number), []
            for _ in range(4):  # workers have started, queues are full
                next(batches)
            for _ in range(repeats):
                start = time.perf_counter()
                for _ in range(count // 64):
                    next(batches)
                rates.append(count // 64 * 64 / (time.perf_counter() - start))
            print(f"| {number} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) |", flush=True)
            del batches


# -- memory ------------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Return the resident set of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def grow(folder: str, samples: int) -> list[tuple[int, float]]:
    """Return (samples read, MB) ten times during the reading of samples."""
    torch.set_num_threads(1)
    sizes = [(0, resident())]
    batches = loader(folder, 32, workers=0, batch_size=100, shuffle=2000)
    for number in range(1, samples // 100 + 1):
        next(batches)
        if number * 100 % (samples // 10) == 0:
            sizes.append((number * 100, resident()))
    return sizes


def memory(samples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), list(photographs(10_000, 32, 32)), per_shard=1000)
        # In a separate process: memory freed after writing the shards would hide growth.
        for number, megabytes in alone(grow, folder, samples):
            print(f"{number:>7} samples  {megabytes:.1f} MB")


# -- long lists --------------------------------------------------------------------------------------------------------


def urls(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (data,) = photographs(1, 32, 32)
        shards(Path(folder), [data] * 64, per_shard=64)
        real = Path(folder, "00000.tar")
        many = Path(folder, "many")
        many.mkdir()
        for number in range(count):
            (many / f"{number:06d}.tar").symlink_to(real)
        last = f"{count - 1:06d}"
        cases: dict[str, str | list[str]] = {
            "folder": str(many),
            "brace range of paths": f"{many}/{{000000..{last}}}.tar",
            "brace range of https": f"https://host/{{000000..{last}}}.tar",
            "list of paths": [f"{many}/{number:06d}.tar" for number in range(count)],
        }
        print("| 100,000 shards given as | listed, s | first batch of 2 workers, s |\n|---|---|---|")
        for name, source in cases.items():
            start = time.perf_counter()
            data_module = ShardData(source, None, CAPTION, 8, 2, 0, seed=0, needs=Needs(32))
            data_module.setup()
            listed = time.perf_counter() - start
            first = float("nan")
            if "https" not in name:
                next(iter(data_module.train_dataloader()))
                first = time.perf_counter() - start - listed
            assert len(data_module.train_shards) == count
            print(f"| {name} | {listed:.2f} | {first:.2f} |", flush=True)


# -- to batches on a device --------------------------------------------------------------------------------------------


def to_device(args: argparse.Namespace) -> None:
    """Measure images per second from shards of 512 px pictures to float batches on an idle device."""
    device, batch_size, side = args.device, 64, args.size
    results = Results(f"512 px JPEG to {side} px batches, {name_of(device)}, {os.cpu_count()} cores", args.json)
    unique = list(photographs(min(args.count, 256), 512, 512))
    files = [unique[number % len(unique)] for number in range(args.count)]
    smaller = []
    for data in unique:
        image = cropped(Image.open(io.BytesIO(data)).convert("RGB"), side)
        image.save(buffer := io.BytesIO(), "JPEG", quality=95)
        smaller.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        large.mkdir()
        small.mkdir()
        per_shard = args.count // max(args.workers)
        shards(large, files, per_shard)
        shards(small, [smaller[number % len(smaller)] for number in range(args.count)], per_shard)
        steps = args.count // batch_size

        def loaded(source: Path, workers: int) -> float:
            batches = loader(str(source), side, workers, batch_size, shuffle=0)
            for _ in range(2 * max(workers, 1)):  # workers have started, queues are full
                next(batches)
            wait(device)
            start = time.perf_counter()
            for _ in range(2 * steps):
                in_unit_range(next(batches)["image"].to(device, non_blocking=True))
            wait(device)
            return 2 * steps * batch_size / (time.perf_counter() - start)

        for workers in args.workers:
            results.add(f"{workers} loader processes", images_per_second=loaded(large, workers))
        workers = max(args.workers)
        name = f"{workers} loader processes, shards prepared at {side} px"
        results.add(name, images_per_second=loaded(small, workers))
        if device == "cuda":
            bytes_of = [raw["jpg"] for shard in sorted(large.glob("*.tar")) for raw in read_shard(str(shard))]

            def decoded() -> None:
                for start in range(0, steps * batch_size, batch_size):
                    encoded = [torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in bytes_of[start:][:batch_size]]
                    images = torch.stack(decode_jpeg(encoded, ImageReadMode.RGB, device=device))
                    tvf.resize(images.float().div_(255), [side], tvf.InterpolationMode.BICUBIC, antialias=True)

            decoded()
            wall, _ = in_turn({"decoded": decoded}, 2, device)
            name = "decoded and resized on the GPU (torchvision), bytes in memory"
            results.add(name, images_per_second=steps * batch_size / min(wall["decoded"]))
    results.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "workers", "memory", "urls", "device"])
    parser.add_argument("--count", type=int, help="number of images, samples or urls")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 14], help="loader processes of `device`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the rows of `device`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "speed":
        speed(args.count or 1024, args.size, args.repeats)
    elif args.what == "workers":
        workers(args.count or 1024, args.size, args.repeats)
    elif args.what == "memory":
        memory(args.count or 200_000)
    elif args.what == "device":
        args.count = args.count or 3584
        to_device(args)
    else:
        urls(args.count or 100_000)
