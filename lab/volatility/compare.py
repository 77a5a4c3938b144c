#!/usr/bin/env python3
"""compare.py schema ISF          is the table what volatility3's own schema asks for?
compare.py rows FOLDER TRUTH   do the plugins' rows in FOLDER say what the guest said of itself?
compare.py processes FOLDER TRUTH   the same of pslist alone
"""

import json
import lzma
import sys


def load(path):
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def schema(path):
    import os

    import jsonschema_rs
    import volatility3

    table = load(path)
    name = f"schema-{table['metadata']['format']}.json"
    schema = load(os.path.join(os.path.dirname(volatility3.__file__), "schemas", name))
    wrong = next(jsonschema_rs.validator_for(schema).iter_errors(table), None)
    if wrong:
        sys.exit(f"{path} is not what volatility3's schema asks for: {wrong}")
    print(f"{path}: valid")


def differences(what, ours, theirs):
    """Prints how two collections differ; True if they do."""
    missing, extra = sorted(theirs - ours), sorted(ours - theirs)
    for name, items in ("missing from", missing), ("not the guest's, but in", extra):
        for item in items[:20]:
            print(f"{name} {what}: {item}")
    print(f"{what}: {len(ours)} rows, {len(missing)} missing, {len(extra)} too many")
    return bool(missing or extra)


def comm(process):
    """The name as the task holds it: /proc tells of kernel threads what it knows besides."""
    name = process["comm"]
    # "kworker/0:1-events" is a name and what it works at; "kworker/R-events" (since Linux 6.9) is a name.
    if name.startswith("kworker/") and not name.startswith("kworker/R-"):
        name = name.split("-")[0].split("+")[0]
    return name[:15]


def lasting(rows):
    """Without the kernel's worker threads (children of kthreadd, pid 2): they come and go while the guest is idle."""
    return {row for row in rows if not (row[1] == 2 and row[2].startswith("kworker/"))}


def processes(folder, truth):
    """A process whose leader has exited is a zombie, and pslist leaves those out."""
    return differences(
        "pslist",
        lasting((r["PID"], r["PPID"], r["COMM"], r["UID"], r["EGID"]) for r in load(f"{folder}/linux.pslist.PsList.json")),
        lasting(
            (p["pid"], p["ppid"], comm(p), p["creds"]["uids"][0], p["creds"]["gids"][1])
            for p in truth["processes"]
            if p["state"] != "Z"
        ),
    )


def rows(folder, truth):
    read = lambda plugin: load(f"{folder}/{plugin}.json")
    bad = processes(folder, truth)

    bad |= differences(
        "lsmod",
        {r["Module Name"] for r in read("linux.lsmod.Lsmod")},
        {m["name"] for m in truth["modules"]},
    )

    # Every descriptor, also of threads with open files of their own; and the paths of files that still have one, for processes
    # that see the whole tree.
    rows = read("linux.lsof.Lsof")
    theirs = [(p, p["pid"], f) for p in truth["processes"] for f in p["fds"]]
    # (Not those of a process whose leader has exited: the list of processes that volatility3 goes by leaves it out.)
    lasting_leaders = [p for p in truth["processes"] if p["state"] != "Z"]
    theirs += [(p, t["tid"], f) for p in lasting_leaders for t in p["threads"] for f in t["fds"]]
    bad |= differences(
        "lsof (numbers)", {(r["PID"], r["FD"]) for r in rows}, {(p["pid"], f["fd"]) for p, _, f in theirs}
    )
    plain = {
        (tid, f["fd"]): (p["pid"], tid, f["fd"], f["link"])
        for p, tid, f in theirs
        if f["link"].startswith("/") and f["links"] and p["root"] == "/"
    }
    bad |= differences(
        "lsof (paths)",
        {(r["PID"], r["TID"], r["FD"], r["Path"]) for r in rows if (r["TID"], r["FD"]) in plain},
        set(plain.values()),
    )

    # TCP sockets that a process holds. One that is bound and no more is in no table of the guest's /proc.
    held = {f["inode"] for _, _, f in theirs if f["link"].startswith("socket:")}
    number = lambda text: int(text) if str(text).isdigit() else 0
    bad |= differences(
        "sockstat (TCP)",
        {
            (r["Source Addr"], number(r["Source Port"]), r["Destination Addr"], number(r["Destination Port"]))
            for r in read("linux.sockstat.Sockstat")
            if r["Proto"] == "TCP" and r["State"] != "CLOSE"
        },
        {
            (s["local"], s["local_port"], s["remote"], s["remote_port"])
            for n in truth["net"]
            for s in n["inet"]
            if s["inode"] in held and s["table"] in ("tcp", "tcp6")
        },
    )

    # What was typed is not in /proc; that a shell's history is found is what there is to see.
    shells = [p for p in truth["processes"] if p["comm"] == "bash"]
    commands = len(read("linux.bash.Bash"))
    print(f"bash: {commands} commands of {len(shells)} shells")
    bad |= bool(shells) != bool(commands)
    return bad


if len(sys.argv) == 3 and sys.argv[1] == "schema":
    schema(sys.argv[2])
elif len(sys.argv) == 4 and sys.argv[1] in ("rows", "processes"):
    compare = rows if sys.argv[1] == "rows" else processes
    sys.exit(1 if compare(sys.argv[2], load(sys.argv[3])) else 0)
else:
    sys.exit(__doc__)
