"""A process of its own that harvests in children, and does them harm: `python driver.py WHAT FOLDER`.

Children are forked, so that dozens cost no more than one; torch runs one thread, as forking asks.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from golden.tiny import tiny_gpt2

import lens_core as lens
from lens_core.errors import StoreError

NAMES = ["hook_embed", "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]
ROWS = torch.randint(0, 28, (1200, 16), generator=torch.Generator().manual_seed(0))


def say(text):
    """Write a line that the test reads."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def harvest(folder, **options):
    """Harvest one corpus in some sixty shards."""
    settings = {"context": 16, "unit_documents": 64, "shard_rows": 20, "batch_size": 4, **options}
    return lens.store.harvest(MODEL, ROWS, folder, NAMES, **settings)


def child(work):
    """Do work in a child, which exits 0 after it, 3 after a refusal, and writes that to standard output."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except StoreError as error:
        say(f"refused: {error}")
        code = 3
    finally:
        os._exit(code)


def ended(pid):
    """Wait for a child and give its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(folder):
    """Count the complete shards."""
    return len(list(Path(folder).glob("00-*.json")))


def kill_again_and_again(folder):
    """Kill -9 at random moments until one comes to its end; say how often."""
    draw, kills = random.Random(0), 0
    while True:
        pid, before = child(lambda: harvest(folder)), records(folder)
        wanted = before + draw.randint(0, 9)
        while records(folder) < wanted and lives(pid):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        if lives(pid):
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
    say(f"kills: {kills}")


def lives(pid):
    """Whether a child has not ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def two_at_once(folder):
    """Begin while another is at work; then again after it was killed."""
    first = child(lambda: harvest(folder))
    while not records(folder):
        assert lives(first)
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    say(f"second: {ended(child(lambda: harvest(folder)))}")
    os.kill(first, signal.SIGKILL)
    ended(first)
    say(f"third: {ended(child(lambda: harvest(folder)))}")


def full_disk(folder):
    """Let no file grow beyond a size that a shard needs, as a full disk does; then make room."""

    def with_little_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        harvest(folder)

    say(f"begun: {ended(child(lambda: harvest(folder, report=stop_after(30))))}")
    before = sorted(path.name for path in Path(folder).glob("00-*"))
    say(f"full: {ended(child(with_little_room))}")
    say(f"kept: {set(before) <= {path.name for path in Path(folder).glob('00-*')}}")
    say(f"parts: {len(list(Path(folder).glob('.*')))}")
    say(f"again: {ended(child(lambda: harvest(folder)))}")


def stop_after(batches):
    """Make a report function that interrupts after some batches."""
    count = 0

    def report(progress):
        nonlocal count
        count += 1
        if count == batches:
            raise StoreError("enough for now")

    return report


def memory(folder):
    """Harvest many times what memory may grow by, and say by how much it grew at most (MiB)."""
    from threading import Event, Thread

    over, most = Event(), [0]

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    harvest(Path(folder) / "first", batch_size=64)  # what is allocated once
    before = anonymous()

    def watch():
        while not over.wait(0.005):
            most[0] = max(most[0], anonymous())

    thread = Thread(target=watch)
    thread.start()
    rows = torch.randint(0, 28, (12_000, 32), generator=torch.Generator().manual_seed(0))
    names = [
        name for name in MODEL.table if name.endswith(("hook_post", "hook_resid_post", "hook_q", "hook_k", "hook_v"))
    ]
    store = lens.store.harvest(MODEL, rows, Path(folder) / "many", names, context=32, batch_size=64)
    over.set()
    thread.join()
    size = sum(record.nbytes for record in store.records) // 2**20
    say(f"grew: {most[0] - before}\nstored: {size}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL = lens.load(tiny_gpt2(), tokenizer=False)
    globals()[sys.argv[1]](sys.argv[2])
