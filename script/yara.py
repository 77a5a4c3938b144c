"""Scans one raw dump with the same rules by vmsight and by yara-x, compares every match, then the times.

    yara.py VMSIGHT DUMP RULES          (run by a Python that has yara-x)

vmsight is timed from its start to its end, yara-x while it scans only: its rules are compiled already. Each runs three times, in
turns, after a run that does not count. Prints a Markdown table; exit 1 where a program fails.
"""

import json
import subprocess
import sys
import time

import yara_x

RUNS = 3
# Above what any pattern has here: all matches are compared.
MATCHES = 10_000_000


def ours(vmsight, dump, rules):
    """Matches and seconds."""
    command = [vmsight, "scan", f"raw:{dump}", "--physical", "--yara", rules, "--quiet", "--output", "json"]
    command += ["--columns", "rule,pattern,gpa,length", "--max-matches", str(MATCHES), "--limit", str(MATCHES)]
    start = time.perf_counter()
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - start
    if run.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)} ended with {run.returncode}")
    return {(r["rule"], r["pattern"], int(r["gpa"], 16), r["length"]) for r in json.loads(run.stdout)}, seconds


def theirs(scanner, dump):
    start = time.perf_counter()
    results = scanner.scan_file(dump)
    seconds = time.perf_counter() - start
    found = {
        (rule.identifier, pattern.identifier, match.offset, match.length)
        for rule in results.matching_rules
        for pattern in rule.patterns
        for match in pattern.matches
    }
    return found, seconds


def main():
    vmsight, dump, rules = sys.argv[1:]
    with open(rules, encoding="utf-8") as file:
        scanner = yara_x.Scanner(yara_x.compile(file.read()))
    scanner.max_matches_per_pattern(MATCHES)
    (we, _), (they, _) = ours(vmsight, dump, rules), theirs(scanner, dump)
    our_times, their_times = [], []
    for _ in range(RUNS):
        our_times.append(ours(vmsight, dump, rules)[1])
        their_times.append(theirs(scanner, dump)[1])
    our_time, their_time = min(our_times), min(their_times)
    ratio = their_time / our_time
    agree = "all" if we == they else f"DIFFERS: {len(we & they)} of {len(we | they)}"
    print("| matches | agree | yara-x | vmsight | faster | goal |\n|---|---|---|---|---|---|")
    print(
        f"| {len(they)} | {agree} | {their_time:.2f} s | {our_time:.2f} s | {ratio:.1f} × | "
        f"≥ 1 × {'ok' if ratio >= 1 else 'MISSED'} |"
    )
    for who, rows in ("yara-x", they - we), ("vmsight", we - they):
        for row in sorted(rows)[:8]:
            print(f"- only {who}: `{row}`")


main()
