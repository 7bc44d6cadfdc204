"""Time and memory from the call to the first batch, of a folder of hard links and of tar shards.

    python benchmarks/many_images.py /tmp/many --images 1280000 --folders 1000

makes them (remove the folder afterwards), and prints a line of JSON each: of the folder as it is
found, as its list is kept, and of shards without and with their indexes. `--cold` drops what the
system keeps of the disk before each (Linux, as root).
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

_CHILD = """
import dataclasses, json, sys, time
from pathlib import Path
from keras_resnet.recipes import get_recipe
from keras_resnet.training.prepare import prepare_data

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))

recipe = dataclasses.replace(get_recipe("resnet_v1"), model="resnet20", image_size=32)
if sys.argv[3] == "cold":
    Path("/proc/sys/vm/drop_caches").write_text("3")
before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
data = prepare_data(sys.argv[1], recipe)
data.train[0]
print(json.dumps({
    "case": sys.argv[2], "images": data.train.num_samples + data.val.num_samples,
    "seconds": round(time.perf_counter() - wall, 2),
    "cpu_seconds": round(time.process_time() - cpu, 2),
    "megabytes_more": round(memory("VmHWM") - before), "fingerprint": data.fingerprint[:12],
}))
"""


def make(place: Path, images: int, folders: int) -> None:
    """Hard links in class folders, and a hundredth of the images in shards."""
    from PIL import Image

    stream = io.BytesIO()
    Image.effect_noise((32, 32), 60).convert("RGB").save(stream, "JPEG")
    for number in range(max(1, images // 30_000)):  # a file has 65,000 links at most on ext4
        (place / f"{number}.jpg").write_bytes(stream.getvalue())
    each = images // folders
    for index in range(each * folders):
        folder = place / "folder" / f"n{index // each:08}"
        if index % each == 0:
            folder.mkdir(parents=True)
        os.link(place / f"{index // 30_000}.jpg", folder / f"{folder.name}_{index}.JPEG")
    (place / "shards").mkdir()
    for shard in range(10):
        with tarfile.open(place / "shards" / f"images-{shard:06}.tar", "w") as tar:
            for index in range(images // 1000):
                name = f"n{index % 10:08}/{shard}-{index}"
                for ending, data in ((".jpg", stream.getvalue()), (".cls", b"%d" % (index % 10))):
                    entry = tarfile.TarInfo(name + ending)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def main(arguments: list[str] | None = None) -> None:
    """Makes the images where there are none, and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path)
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.place / "folder").exists():
        options.place.mkdir(parents=True, exist_ok=True)
        make(options.place, options.images, options.folders)
    environment = {**os.environ, "KERAS_RESNET_HOME": str(options.place / "home")}
    for what in ("folder", "folder, its list kept", "shards", "shards, with indexes"):
        path, state = options.place / what.split(",")[0], "cold" if options.cold else "warm"
        words = [sys.executable, "-c", _CHILD, path, what, state]
        subprocess.run(words, env=environment, check=True)


if __name__ == "__main__":
    main()
