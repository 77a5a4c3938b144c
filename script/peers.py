"""Runs volatility3 and vmsight over the same dump, compares their answers row by row, then time and memory.

    peers.py VMSIGHT VOL DUMP ISF_DIR

Both get their symbols ready: volatility3 a symbol table (made by vmsight), vmsight a warm profile cache; vmsight's
first run without any cache is shown too. Prints a Markdown table; exit 1 where the answers differ.
"""

import json
import os
import subprocess
import sys
import time


def run(command):
    """Standard output, seconds, peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)} failed:\n{err.decode(errors='replace')[-2000:]}")
    return out.decode(errors="replace"), seconds, usage.ru_maxrss / 1024


def number(value):
    """An address or number in whatever form it came."""
    return int(value, 0) if isinstance(value, str) else value


def flat(rows):
    """volatility3's tree of rows as a list."""
    for row in rows:
        yield row
        yield from flat(row.get("__children") or [])


# For each comparison: volatility3's plugin, vmsight's command, and what of a row of each must agree.
CASES = [
    (
        "pslist",
        "linux.pslist.PsList",
        ["ps"],
        lambda r: (r["PID"], r["TID"], r["PPID"], r["COMM"], r["UID"], r["GID"]),
        lambda r: (r["pid"], r["pid"], r["ppid"], r["name"], r["uid"], r["gid"]),
    ),
    (
        "lsof",
        "linux.lsof.Lsof",
        ["lsof", "--descriptors"],
        lambda r: (r["PID"], str(r["FD"]), r["Inode"]),
        lambda r: (r["pid"], r["fd"], r["inode"]),
    ),
    (
        "sockstat",
        "linux.sockstat.Sockstat",
        ["lsof", "--descriptors", "--sockets"],
        lambda r: (r["PID"], str(r["FD"]), number(r["Sock Offset"])),
        lambda r: (r["pid"], r["fd"], number(r["socket"])),
    ),
    (
        "lsmod",
        "linux.lsmod.Lsmod",
        ["lsmod"],
        lambda r: (number(r["Offset"]), r["Module Name"]),
        lambda r: (number(r["address"]), r["name"]),
    ),
    (
        "check_syscall",
        "linux.malware.check_syscall.Check_syscall",
        ["read", "--as", "pointer", "sys_call_table"],
        lambda r: (r["Index"], r["Handler Symbol"]),
        lambda r: (r["index"], r["symbol"]),
    ),
]


def main():
    vmsight, vol, dump, isf = sys.argv[1:]
    differ = False
    print("| plugin | rows | agree | volatility3 | vmsight | faster | vmsight, nothing cached | memory: volatility3 | vmsight |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, plugin, command, key_of_theirs, key_of_ours in CASES:
        text, their_time, their_memory = run([vol, "-q", "-s", isf, "-r", "json", "-f", dump, plugin])
        theirs = list(flat(json.loads(text)))
        if command[0] == "read":
            entries = 1 + max(r["Index"] for r in theirs if r["Table Name"] == "64bit")
            theirs = [r for r in theirs if r["Table Name"] == "64bit"]
            arguments = ["read", dump, command[3], str(entries * 8), "--as", "pointer"]
        else:
            arguments = [command[0], dump, *command[1:]]
        full = [vmsight, *arguments, "-o", "json"]
        _, cold, _ = run([*full, "--no-cache"])
        run(full)
        timed = [run(full) for _ in range(5)]
        ours = json.loads(timed[0][0])
        if command[0] == "read":
            for index, row in enumerate(ours):
                row["index"] = index
                row["symbol"] = (row["symbol"] or "").split("+")[0]
        our_time = min(t for _, t, _ in timed)
        our_memory = max(m for _, _, m in timed)
        expected, got = sorted(map(str, map(key_of_theirs, theirs))), sorted(map(str, map(key_of_ours, ours)))
        missing, extra = set(expected) - set(got), set(got) - set(expected)
        agree = "all" if expected == got else f"{len(set(expected) & set(got))} of {len(set(expected) | set(got))}"
        differ |= bool(missing)
        print(
            f"| {name} | {len(theirs)} | {agree} | {their_time:.2f} s | {our_time * 1000:.1f} ms | "
            f"{their_time / our_time:.0f} × | {cold * 1000:.0f} ms | {their_memory:.0f} MiB | {our_memory:.0f} MiB |",
            flush=True,
        )
        for title, rows in (("volatility3 only", missing), ("vmsight only", extra)):
            for row in sorted(rows)[:8]:
                print(f"  {name}: {title}: {row}", file=sys.stderr)
    sys.exit(1 if differ else 0)


main()
