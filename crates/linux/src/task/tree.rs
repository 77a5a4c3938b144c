//! Processes as a tree of parents and children.

use rustc_hash::FxHashMap;

use super::Process;

/// A process in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeNode {
    /// Index of its row in what [`process_tree`] was given.
    pub row: usize,
    /// How many ancestors are shown above it.
    pub depth: usize,
    /// Whether a later sibling follows, for itself and each ancestor below the root: what the lines of a drawn tree need.
    pub more_siblings: Vec<bool>,
    /// Its parent is not among the rows (and is not the idle task), or the parents form a circle: shown as a root.
    pub orphan: bool,
}

/// Puts `rows` in the order of a drawn tree: each process behind its parent, siblings in the order of the rows.
///
/// Every row comes exactly once. Guests can lie about parents: rows whose chain of parents leads nowhere or in a circle are shown as
/// roots of their own and marked.
pub fn process_tree(rows: &[Process]) -> Vec<TreeNode> {
    let by_pid: FxHashMap<i32, usize> = rows
        .iter()
        .enumerate()
        .rev()
        .map(|(index, row)| (row.pid, index))
        .collect();
    let parent = |index: usize| {
        let row = rows.get(index)?;
        by_pid.get(&row.ppid?).copied().filter(|&p| p != index)
    };
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); rows.len()];
    let mut roots = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        match parent(index) {
            Some(parent) => children
                .get_mut(parent)
                .map(|c| c.push(index))
                .unwrap_or_default(),
            None => roots.push((index, row.ppid != Some(0))),
        }
    }
    let mut out = Vec::with_capacity(rows.len());
    let mut placed = vec![false; rows.len()];
    let mut next_unplaced = 0;
    loop {
        for (root, orphan) in std::mem::take(&mut roots) {
            place(root, orphan, &children, &mut placed, &mut out);
        }
        // What is left hangs in circles: cut each at its first row.
        while placed.get(next_unplaced) == Some(&true) {
            next_unplaced += 1;
        }
        if next_unplaced >= rows.len() {
            return out;
        }
        roots.push((next_unplaced, true));
    }
}

fn place(root: usize, orphan: bool, children: &[Vec<usize>], placed: &mut [bool], out: &mut Vec<TreeNode>) {
    let mut stack = vec![TreeNode {
        row: root,
        depth: 0,
        more_siblings: Vec::new(),
        orphan,
    }];
    while let Some(node) = stack.pop() {
        let Some(done) = placed.get_mut(node.row) else {
            continue;
        };
        if std::mem::replace(done, true) {
            continue;
        }
        let below = children.get(node.row).map_or(&[][..], Vec::as_slice);
        let open: Vec<usize> = below
            .iter()
            .copied()
            .filter(|&c| placed.get(c) == Some(&false))
            .collect();
        let (count, depth) = (open.len(), node.depth + 1);
        // Lines deeper than a screen is wide help nobody, and a chain of a million processes would cost a million squared flags.
        let lines = node
            .more_siblings
            .get(..node.more_siblings.len().min(MAX_LINES))
            .unwrap_or(&[])
            .to_vec();
        for (number, &child) in open.iter().enumerate().rev() {
            let mut more_siblings = lines.clone();
            more_siblings.push(number + 1 < count);
            stack.push(TreeNode {
                row: child,
                depth,
                more_siblings,
                orphan: false,
            });
        }
        out.push(node);
    }
}

/// Ancestors whose lines are drawn.
const MAX_LINES: usize = 128;

#[cfg(test)]
mod tests {
    use vmsight_arch::Gva;

    use super::*;

    fn rows(parents: &[(i32, i32)]) -> Vec<Process> {
        let row = |&(pid, ppid): &(i32, i32)| {
            let mut row = Process::empty(Gva(pid as u64));
            (row.pid, row.tgid, row.ppid) = (pid, pid, Some(ppid));
            row
        };
        parents.iter().map(row).collect()
    }

    fn drawn(parents: &[(i32, i32)]) -> Vec<(i32, usize, bool)> {
        let rows = rows(parents);
        process_tree(&rows)
            .iter()
            .map(|n| (rows[n.row].pid, n.depth, n.orphan))
            .collect()
    }

    #[test]
    fn children_follow_their_parents() {
        let out = drawn(&[(1, 0), (2, 0), (10, 1), (3, 2), (11, 10), (12, 1)]);
        let order: Vec<_> = out.iter().map(|&(pid, depth, _)| (pid, depth)).collect();
        assert_eq!(order, [(1, 0), (10, 1), (11, 2), (12, 1), (2, 0), (3, 1)]);
        assert!(out.iter().all(|&(_, _, orphan)| !orphan));
    }

    #[test]
    fn circles_orphans_and_self_parents_are_shown_once_and_marked() {
        let out = drawn(&[(1, 0), (5, 77), (6, 7), (7, 6), (8, 7), (9, 9), (9, 1)]);
        assert_eq!(out.len(), 7);
        assert_eq!(
            out.iter().filter(|o| o.2).map(|o| o.0).collect::<Vec<_>>(),
            [5, 9, 6]
        );
    }

    #[test]
    fn lines_say_whether_siblings_follow() {
        let rows = rows(&[(1, 0), (2, 1), (3, 1), (4, 2)]);
        let tree = process_tree(&rows);
        let lines: Vec<_> = tree
            .iter()
            .map(|n| (rows[n.row].pid, n.more_siblings.clone()))
            .collect();
        assert_eq!(
            lines,
            [
                (1, vec![]),
                (2, vec![true]),
                (4, vec![true, false]),
                (3, vec![false])
            ]
        );
    }

    #[test]
    fn a_long_chain_neither_overflows_the_stack_nor_the_memory() {
        let chain: Vec<_> = (1..100_000).map(|pid| (pid, pid - 1)).collect();
        let out = drawn(&chain);
        assert_eq!(out.last().map(|o| (o.0, o.1)), Some((99_999, 99_998)));
    }
}
