"""Runs volatility3 and vmsight over the same dump, compares their answers row by row, then time and memory.

    peers.py VMSIGHT VOL DUMP ISF_DIR

Both get all they keep between runs ready: volatility3 a symbol table (made by vmsight) and its caches of what is in it, vmsight
its profile cache. Each plugin is run three times by each, in turns, after a run that does not count; the best of each is shown.
vmsight's first run with nothing cached is shown beside it. Prints a Markdown table, and rows that differ below it; exit 1
where a program fails.
"""

import collections
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time

# How often each is run, after a run that does not count.
RUNS = 3
# How many times faster vmsight is to be.
GOAL = 100


# What a copy of the table is said to be made by, for plugins that take no other.
PRODUCER = {"name": "dwarf2json", "version": "0.9.0"}


def run(command):
    """Standard output and seconds. A program that fails ends everything: an error is no answer."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        process.wait()
        seconds = time.perf_counter() - start
        for file in (out, errors):
            file.seek(0)
        # A check that finds something says so by 1.
        if process.returncode not in ((0, 1) if command[1] == "check" else (0,)):
            text = errors.read().decode(errors="replace")
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text[-2000:]}")
        return out.read().decode(errors="replace"), seconds


def peak(command):
    """The highest resident set of a run in MB, asked for while it goes on: what wait4(2) says has this process's in it too."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    highest = 0
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="ascii", errors="replace") as status:
                highest = max([highest, *(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))])
        except OSError:
            break
        time.sleep(0.0002)
    process.wait()
    return highest * 1024 / 1e6


def number(value):
    """An address or number in whatever form it came."""
    return int(value, 0) if isinstance(value, str) else value


def address(value):
    """An address as volatility3 prints it: without the bits that repeat the highest one of those that are translated."""
    value = number(value)
    return None if value is None else value & (1 << 48) - 1


def flat(rows):
    """volatility3's tree of rows as a list."""
    for row in rows:
        yield row
        yield from flat(row.get("__children") or [])


class Dump:
    """What the comparisons need to know besides the rows themselves."""

    def __init__(self, vmsight, path, isf):
        self.vmsight, self.path = vmsight, path
        # pslist, and with it lsof and sockstat, passes over processes whose leader has exited; vmsight shows them, marked.
        processes = self.ours(["ps", path, "--columns", "pid,state,root"])
        self.zombies = {r["pid"] for r in processes if r["state"].startswith(("Z", "X"))}
        # vmsight has paths as the guest's administrator sees them, lsof of volatility3 as the process does, from its own root.
        self.roots = {r["pid"]: r["root"] for r in processes if r["root"] not in (None, "/")}
        # Several symbols at one address: which of the names is printed is a matter of taste.
        at = collections.defaultdict(set)
        with lzma.open(os.path.join(isf, "linux", "bench.json.xz"), "rt", encoding="utf-8") as file:
            symbols = json.load(file)["symbols"]
        for name, symbol in symbols.items():
            at[symbol["address"]].add(name)
        self.aliases = {name: min(at[symbol["address"]]) for name, symbol in symbols.items()}
        # Where the kernel maps all of memory: psscan has physical addresses, vmsight the kernel's own.
        self.direct_map = number(self.ours(["read", path, "page_offset_base", "--as", "pointer"])[0]["value"])

    def ours(self, arguments):
        return json.loads(run([self.vmsight, *arguments, "-o", "json"])[0])

    def name(self, symbol):
        """One name for all symbols at an address; none where the address is that of no symbol."""
        return self.aliases.get(symbol)


class Case:
    """One plugin: its name, vmsight's commands for the same, and what of a row must agree. A key of None leaves a row out. A plugin
    that is picky takes tables of one producer only."""

    def __init__(self, plugin, commands, theirs, ours, picky=False):
        self.plugin, self.commands, self.theirs, self.ours, self.picky = plugin, commands, theirs, ours, picky


def cases(dump):
    path = dump.path

    def lasting(pid, *rest):
        return None if pid in dump.zombies else (pid, *rest)

    def comm(row):
        """The name as the task holds it: vmsight, like /proc, gives kernel threads the longer one that they keep elsewhere."""
        name = row["name"]
        if not row["kernel_thread"]:
            return name
        # "kworker/0:1-events" is a name and what it works at; "kworker/R-events" (since Linux 6.9) is a name.
        if name.startswith("kworker/") and not name.startswith("kworker/R-"):
            name = name.split("-")[0].split("+")[0]
        return name[:15]

    # lsof and sockstat have a row for each thread, though threads share their descriptors: keys are without the thread, and
    # sets of them are compared.
    def their_file(row):
        path = row["Path"]
        # Anybody can call a file that; what is deleted it leads with a blank too, but for memfds.
        deleted = path.endswith(" (deleted)") and path.startswith((" ", "/memfd:"))
        if deleted:
            path = path.removesuffix(" (deleted)").removeprefix(" ")
        return row["PID"], row["FD"], row["Device"], row["Inode"], kind(path), deleted

    def our_file(row):
        path, root = row["path"], dump.roots.get(row["pid"])
        if root and path.startswith(root + "/"):
            path = path.removeprefix(root)
        return lasting(row["pid"], number(row["fd"]), row["device"], row["inode"], kind(path), row["deleted"])

    def kind(path):
        """Of event, timer and such files volatility3 has the number of the inode that all share, and vmsight what it is."""
        return "anon_inode" if path.startswith("anon_inode:") else path

    def their_calls(row):
        return row["Table Name"], row["Index"], address(row["Handler Address"]), dump.name(row["Handler Symbol"])

    def our_calls(row):
        symbol = row["symbol"]
        # A place inside a function has no name for volatility3.
        return row["table"], row["index"], address(row["value"]), dump.name(symbol)

    def their_task(row):
        # Only the idle tasks are of process 0, and these are their threads 0: what else is, is none.
        none = row["PID"] == 0 and row["TID"] != 0
        return None if none else (row["OFFSET (P)"], row["PID"], row["TID"])

    def our_task(row):
        # A thread of a listing has its process as pid; of what has ended, its own number is the pid, and the process the tgid.
        process, thread = (row["tgid"], row["pid"]) if "tgid" in row else (row["pid"], row["tid"])
        return number(row["task"]) - dump.direct_map, process, thread

    def our_memory(row):
        # "process 152 (mapper): 0x7fc8978c8000"; what is found of a process as a whole has no address behind it.
        found = re.fullmatch(r"process (\d+) \(.*\): 0x[0-9a-f]+", row["subject"], re.DOTALL)
        mapping = [text for text in row["evidence"] if text.startswith("mapping: ")]
        if not found or not mapping:
            return None
        start, end = mapping[0].split()[1].split("-")
        return int(found[1]), int(start, 16), int(end, 16)

    def their_cached(row):
        if row["FileType"] != "REG" or row["CachedPages"] == 0:
            return None
        return (
            address(row["InodeAddr"]),
            row["InodeNum"],
            row["Device"],
            row["FilePath"],
            row["InodeSize"],
            row["CachedPages"],
        )

    def our_cached(row):
        # An overlay's files have their content elsewhere, which vmsight follows; the kernel's own mounts have no path to go by.
        if row["type"] != "REG" or row["cached"] == 0 or row["fs_type"] == "overlay" or row["mount_point"] is None:
            return None
        pages = -(-row["cached"] // 4096)
        return address(row["address"]), row["inode"], row["device"], row["path"], row["size"], pages

    return [
        Case(
            "linux.pslist.PsList",
            [["ps", path, "--columns", "pid,ppid,name,uid,gid,euid,egid,task,kernel_thread"]],
            lambda r: (
                r["PID"],
                r["PPID"],
                r["COMM"],
                r["UID"],
                r["GID"],
                r["EUID"],
                r["EGID"],
                address(r["OFFSET (V)"]),
            ),
            lambda r: lasting(
                r["pid"], r["ppid"], comm(r), r["uid"], r["gid"], r["euid"], r["egid"], address(r["task"])
            ),
        ),
        Case(
            "linux.lsof.Lsof",
            [["lsof", path, "--descriptors"]],
            their_file,
            our_file,
        ),
        Case(
            "linux.sockstat.Sockstat",
            [["lsof", path, "--descriptors", "--sockets"]],
            lambda r: (r["PID"], r["FD"], address(r["Sock Offset"])),
            lambda r: lasting(r["pid"], number(r["fd"]), address(r.get("socket"))),
        ),
        Case(
            "linux.lsmod.Lsmod",
            [["lsmod", path]],
            lambda r: (address(r["Offset"]), r["Module Name"]),
            lambda r: (address(r["address"]), r["name"]),
        ),
        Case("linux.malware.check_syscall.Check_syscall", system_calls(dump), their_calls, our_calls),
        Case(
            "linux.malware.hidden_modules.Hidden_modules",
            [["check", path, "hidden-modules"]],
            lambda r: address(r["Offset"]),
            lambda r: address(r["address"]),
            picky=True,
        ),
        Case(
            "linux.malware.malfind.Malfind",
            [["check", path, "process-memory"]],
            lambda r: (r["PID"], r["Start"], r["End"]),
            our_memory,
        ),
        Case("linux.psscan.PsScan", [["threads", path], ["recover", "processes", path]], their_task, our_task),
        Case("linux.pagecache.Files", [["recover", "files", path]], their_cached, our_cached),
    ]


# volatility3's names of the tables of system calls, and the symbols of these.
TABLES = {"64bit": "sys_call_table", "32bit": "ia32_sys_call_table"}


def system_calls(dump):
    """Commands that read the tables; how long these are is filled in from volatility3's rows."""
    return {name: ["read", dump.path, symbol, "--as", "pointer"] for name, symbol in TABLES.items()}


def relabelled(isf, folder):
    """The same table in another folder, with another producer's name."""
    with lzma.open(os.path.join(isf, "linux", "bench.json.xz"), "rt", encoding="utf-8") as file:
        table = json.load(file)
    table["metadata"]["producer"] = PRODUCER
    os.mkdir(os.path.join(folder, "linux"))
    with lzma.open(os.path.join(folder, "linux", "bench.json.xz"), "wt", encoding="utf-8", preset=0) as file:
        json.dump(table, file)
    return folder


def compare(case, vol, dump):
    """One row of the table, and what differed."""
    theirs_command = [*vol, case.plugin]
    # Of no rows its renderer makes no text.
    theirs = list(flat(json.loads(run(theirs_command)[0].strip() or "[]")))
    commands = case.commands
    tables = None
    if isinstance(commands, dict):
        # check_syscall takes a table to end where the next symbol begins: so many entries are compared.
        entries = collections.Counter(r["Table Name"] for r in theirs)
        tables = list(entries)
        commands = [[*commands[name][:3], str(count * 8), *commands[name][3:]] for name, count in entries.items()]
    commands = [[dump.vmsight, *command, "-o", "json"] for command in commands]
    _, cold = together(run([*command, "--no-cache"]) for command in commands)
    texts, _ = together(run(command) for command in commands)
    their_times, our_times = [], []
    for _ in range(RUNS):
        their_times.append(run(theirs_command)[1])
        our_times.append(together(run(command) for command in commands)[1])
    their_memory, our_memory = peak(theirs_command), max(map(peak, commands))
    ours = []
    for index, text in enumerate(texts):
        rows = json.loads(text)
        if tables:
            for entry, row in enumerate(rows):
                row["index"], row["table"] = entry, tables[index]
        ours += rows
    expected = {key for key in map(case.theirs, theirs) if key is not None}
    got = {key for key in map(case.ours, ours) if key is not None}
    missing, extra = expected - got, got - expected
    agree = "all" if not missing | extra else f"DIFFERS: {len(expected & got)} of {len(expected | got)}"
    their_time, our_time = min(their_times), min(our_times)
    ratio = their_time / our_time
    print(
        f"| {case.plugin.split('.')[-2]} | {len(expected)} | {agree} | {their_time:.2f} s | "
        f"{our_time * 1000:.1f} ms | {ratio:.0f} × | ≥ {GOAL} × {'ok' if ratio >= GOAL else 'MISSED'} | "
        f"{cold * 1000:.0f} ms | {their_memory:.0f} MB | {our_memory:.0f} MB |",
        flush=True,
    )
    return [("volatility3", missing), ("vmsight", extra)]


def together(runs):
    """Several runs as one: all outputs, the sum of the times."""
    texts, times = zip(*runs)
    return texts, sum(times)


def main():
    vmsight, vol, path, isf = sys.argv[1:]
    dump = Dump(vmsight, path, isf)
    program = vol

    def volatility(isf, cache):
        """With a cache of its own for each folder of tables: it takes the first table of a kernel that its cache knows."""
        cache = ["env", f"XDG_CACHE_HOME={cache}"] if cache else []
        return [*cache, program, "--quiet", "--offline", "--symbol-dirs", isf, "--renderer", "json", "--file", path]

    columns = [
        "plugin",
        "rows",
        "agree",
        "volatility3",
        "vmsight",
        "faster",
        "goal",
        "vmsight, nothing cached",
        "memory: volatility3",
        "vmsight",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    differences = []
    for case in cases(dump):
        with tempfile.TemporaryDirectory() as tables, tempfile.TemporaryDirectory() as cache:
            vol = volatility(relabelled(isf, tables), cache) if case.picky else volatility(isf, None)
            compared = compare(case, vol, dump)
        for who, rows in compared:
            differences += [f"{case.plugin}: only {who}: {row}" for row in sorted(rows, key=str)[:8]]
    if differences:
        print("\n" + "\n".join(f"- `{line}`" for line in differences))


main()
