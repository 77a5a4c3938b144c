//! IPv4: a trie for each table (net/ipv4/fib_trie.c). Where nobody made rules, the tables `local` and `main` share one trie, and each
//! entry says whose it is.

use std::net::Ipv4Addr;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::hop::Hop;
use super::{Route, Walker, kind, protocol, table};
use crate::LinuxError;
use crate::layout::{Field, Place, layout};
use crate::listing::Problem;
use crate::socket::namespace::Namespace;
use crate::structures::hlist;

/// A node's children: 2^20 are those of a full table of the Internet, several times.
const MAX_BITS: u8 = 20;
/// Entries with the same destination.
const MAX_ALIASES: usize = 1 << 16;
/// Next hops of one route.
const MAX_HOPS: u64 = 1024;

layout! {
    struct TableLayout = "fib_table" {
        node: Place = "tb_hlist",
        id: Field<u32> = "tb_id",
        data: Field<Gva> = "tb_data",
    }
}

layout! {
    struct TrieLayout = "trie" {
        root: Place = "kv",
    }
}

layout! {
    /// A node: where `bits` is 0, a leaf with a chain of aliases, else with 2^bits children in the same place.
    struct NodeLayout = "key_vector" {
        key: Field<u32> = "key",
        bits: Field<u8> = "bits",
        below: Place = "leaf",
    }
}

layout! {
    struct AliasLayout = "fib_alias" {
        node: Place = "fa_list",
        info: Field<Gva> = "fa_info",
        kind: Field<u8> = "fa_type",
        suffix: Field<u8> = "fa_slen",
        table: Field<u32> = "tb_id",
    }
}

layout! {
    struct InfoLayout = "fib_info" {
        protocol: Field<u8> = "fib_protocol",
        source: Place = "fib_prefsrc",
        priority: Field<u32> = "fib_priority",
        count: Field<u32> = "fib_nhs",
        shared: Option<Field<Gva>> = "nh",
        hops: Place = "fib_nh",
    }
}

layout! {
    struct OwnHopLayout = "fib_nh" {
        common: Place = "nh_common",
    }
}

struct Reader {
    node: Arc<NodeLayout>,
    alias: Arc<AliasLayout>,
    info: Arc<InfoLayout>,
    hop: Arc<OwnHopLayout>,
}

/// The routes of the tables whose hash nodes are given.
pub(super) fn routes(
    walker: &mut Walker<'_>,
    namespace: &Namespace,
    tables: &[Gva],
) -> Result<(), LinuxError> {
    let kernel = walker.kernel;
    let layout: Arc<TableLayout> = kernel.layout()?;
    let trie: Arc<TrieLayout> = kernel.layout()?;
    let reader = Reader {
        node: kernel.layout()?,
        alias: kernel.layout()?,
        info: kernel.layout()?,
        hop: kernel.layout()?,
    };
    let space = kernel.space();
    for &node in tables {
        let at = layout.node.container(node);
        let read = || LinuxError::read("a table of routes", at);
        let id = layout.id.read(space, at).map_err(read())?;
        let data = layout.data.read(space, at).map_err(read())?;
        let root = trie.root.at(data);
        let first = space.read_u64(reader.node.below.at(root)).map_err(read())?;
        reader.trie(walker, namespace, id, Gva(first));
    }
    Ok(())
}

impl Reader {
    /// Walks a trie by rising address.
    fn trie(&self, walker: &mut Walker<'_>, namespace: &Namespace, table: u32, top: Gva) {
        walker.visit(table, top, |walker, node, stack| {
            match self.children(walker, node)? {
                Some(children) => {
                    stack.extend(children.into_iter().rev());
                    Ok(true)
                }
                None => self.leaf(walker, namespace, table, node),
            }
        });
    }

    /// A node's children; `None` for a leaf.
    fn children(&self, walker: &Walker<'_>, node: Gva) -> Result<Option<Vec<Gva>>, ReadError> {
        let space = walker.kernel.space();
        let bits = self.node.bits.read(space, node)?;
        if bits == 0 {
            return Ok(None);
        }
        let many = walker.budget.limit(1 << bits.min(MAX_BITS));
        let mut bytes = vec![0u8; many * 8];
        space.read(self.node.below.at(node), &mut bytes)?;
        walker.budget.walked(many);
        let children = bytes.chunks_exact(8);
        let children = children.map(|word| Gva(u64::from_le_bytes(word.try_into().unwrap_or_default())));
        Ok(Some(children.filter(|child| !child.is_null()).collect()))
    }

    /// Adds the routes of a leaf; false where there is no more room.
    fn leaf(
        &self,
        walker: &mut Walker<'_>,
        namespace: &Namespace,
        id: u32,
        leaf: Gva,
    ) -> Result<bool, ReadError> {
        let space = walker.kernel.space();
        let key = self.node.key.read(space, leaf)?;
        let first = Gva(space.read_u64(self.node.below.at(leaf))?);
        let walk = hlist::walk_next(space, first, 0, walker.budget.limit(MAX_ALIASES));
        walker.budget.walked(walk.items.len());
        let end = walk.end.warning(&format!("routes to {}", Ipv4Addr::from(key)));
        end.into_iter().for_each(|w| walker.listing.warn(w));
        for node in walk.items {
            let at = self.alias.node.container(node);
            // Of a trie that two tables share, this table's.
            if self.alias.table.read(space, at)? != id {
                continue;
            }
            let suffix = self.alias.suffix.read(space, at)?;
            let mut row = Route {
                namespace: namespace.inum,
                pid: namespace.pid,
                table: table(id),
                destination: format!("{}/{}", Ipv4Addr::from(key), 32u8.saturating_sub(suffix)),
                kind: kind(self.alias.kind.read(space, at)?),
                gateway: None,
                interface: None,
                index: None,
                metric: 0,
                protocol: String::new(),
                source: None,
                address: at,
                problems: Vec::new(),
            };
            let hops = match self.info(walker, at, &mut row) {
                Ok(hops) => hops,
                Err(error) => {
                    row.problems.push(Problem::read("gateway", &error));
                    Vec::new()
                }
            };
            let mut rows = Vec::new();
            for hop in hops {
                rows.push(Route {
                    gateway: hop.gateway,
                    interface: hop.interface,
                    index: hop.index,
                    ..row.clone()
                });
            }
            if rows.is_empty() {
                rows.push(row);
            }
            for row in rows {
                if !walker.push(row) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What several aliases can share: metric, protocol, next hops.
    fn info(&self, walker: &mut Walker<'_>, alias: Gva, row: &mut Route) -> Result<Vec<Hop>, ReadError> {
        let space = walker.kernel.space();
        let at = self.alias.info.read(space, alias)?;
        row.metric = self.info.priority.read(space, at)?;
        row.protocol = protocol(self.info.protocol.read(space, at)?);
        let mut source = [0u8; 4];
        space.read(self.info.source.at(at), &mut source)?;
        row.source = (source != [0; 4]).then(|| Ipv4Addr::from(source).into());
        let shared = match &self.info.shared {
            Some(field) => field.read(space, at)?,
            None => Gva(0),
        };
        if !shared.is_null() {
            let hop = walker.hops.shared(shared)?;
            if hop.is_none() {
                row.problems
                    .push(Problem::new("gateway", "a group of next hops, which is not read"));
            }
            return Ok(hop.into_iter().collect());
        }
        let count = u64::from(self.info.count.read(space, at)?);
        if count > MAX_HOPS {
            row.problems.push(Problem::new(
                "gateway",
                format!("cut, it claims {count} next hops"),
            ));
        }
        let hops = (0..count.min(MAX_HOPS)).map(|nth| {
            let hop = self.info.hops.at(at).wrapping_add(nth * self.hop.size);
            self.hop.common.at(hop)
        });
        hops.map(|hop| walker.hops.read(hop)).collect()
    }
}
