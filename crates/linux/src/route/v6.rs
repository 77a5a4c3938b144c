//! IPv6: a tree of prefixes for each table (net/ipv6/ip6_fib.c).

use std::net::Ipv6Addr;
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

/// `RTN_RTINFO`: a node that routes are at. What the others point to is for lookups that find none.
const HAS_ROUTES: u16 = 4;
/// Routes with the same destination.
const MAX_ROUTES: usize = 1 << 16;

layout! {
    struct TableLayout = "fib6_table" {
        node: Place = "tb6_hlist",
        id: Field<u32> = "tb6_id",
        root: Place = "tb6_root",
    }
}

layout! {
    struct NodeLayout = "fib6_node" {
        left: Field<Gva> = "left",
        right: Field<Gva> = "right",
        subtree: Option<Field<Gva>> = "subtree",                  // CONFIG_IPV6_SUBTREES: routes by source
        leaf: Field<Gva> = "leaf",
        flags: Field<u16> = "fn_flags",
    }
}

layout! {
    struct InfoLayout = "fib6_info" {
        next: Place = "fib6_next",
        destination: Place = "fib6_dst.addr",
        prefix: Field<u32> = "fib6_dst.plen",
        source: Place = "fib6_prefsrc.addr",
        metric: Field<u32> = "fib6_metric",
        protocol: Field<u8> = "fib6_protocol",
        kind: Field<u8> = "fib6_type",
        shared: Option<Field<Gva>> = "nh",
        hop: Place = "fib6_nh",
    }
}

layout! {
    struct OwnHopLayout = "fib6_nh" {
        common: Place = "nh_common",
    }
}

struct Reader {
    node: Arc<NodeLayout>,
    info: Arc<InfoLayout>,
    hop: Arc<OwnHopLayout>,
    /// What stands where no route is, and is none.
    null: Option<Gva>,
}

/// The routes of the tables whose hash nodes are given.
pub(super) fn routes(
    walker: &mut Walker<'_>,
    namespace: &Namespace,
    tables: &[Gva],
    null: Option<Gva>,
) -> Result<(), LinuxError> {
    let kernel = walker.kernel;
    let layout: Arc<TableLayout> = kernel.layout()?;
    let reader = Reader {
        node: kernel.layout()?,
        info: kernel.layout()?,
        hop: kernel.layout()?,
        null,
    };
    for &node in tables {
        let at = layout.node.container(node);
        let id = layout
            .id
            .read(kernel.space(), at)
            .map_err(LinuxError::read("a table of routes", at))?;
        walker.visit(id, layout.root.at(at), |walker, node, stack| {
            reader.node(walker, namespace, id, node, stack)
        });
    }
    Ok(())
}

impl Reader {
    /// Adds the routes at a node, and its children to those that are to be visited; false where there is no more room.
    fn node(
        &self,
        walker: &mut Walker<'_>,
        namespace: &Namespace,
        table: u32,
        at: Gva,
        stack: &mut Vec<Gva>,
    ) -> Result<bool, ReadError> {
        let (space, layout) = (walker.kernel.space(), &self.node);
        stack.push(layout.right.read(space, at)?);
        stack.push(layout.left.read(space, at)?);
        if let Some(subtree) = &layout.subtree {
            stack.push(subtree.read(space, at)?);
        }
        if layout.flags.read(space, at)? & HAS_ROUTES == 0 {
            return Ok(true);
        }
        let first = layout.leaf.read(space, at)?;
        let limit = walker.budget.limit(MAX_ROUTES);
        let walk = hlist::walk_next(space, first, self.info.next.offset(), limit);
        walker.budget.walked(walk.items.len());
        let end = walk.end.warning("IPv6 routes to one destination");
        end.into_iter().for_each(|w| walker.listing.warn(w));
        for info in walk.items {
            if Some(info) == self.null {
                continue;
            }
            let row = self.row(walker, namespace, table, info)?;
            if !walker.push(row) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn row(
        &self,
        walker: &mut Walker<'_>,
        namespace: &Namespace,
        id: u32,
        at: Gva,
    ) -> Result<Route, ReadError> {
        let (space, layout) = (walker.kernel.space(), &self.info);
        let address = |place: &Place| -> Result<Ipv6Addr, ReadError> {
            let mut bytes = [0u8; 16];
            space.read(place.at(at), &mut bytes)?;
            Ok(bytes.into())
        };
        let source = address(&layout.source)?;
        let mut row = Route {
            namespace: namespace.inum,
            pid: namespace.pid,
            table: table(id),
            destination: format!(
                "{}/{}",
                address(&layout.destination)?,
                layout.prefix.read(space, at)?
            ),
            kind: kind(layout.kind.read(space, at)?),
            gateway: None,
            interface: None,
            index: None,
            metric: layout.metric.read(space, at)?,
            protocol: protocol(layout.protocol.read(space, at)?),
            source: (!source.is_unspecified()).then(|| source.into()),
            address: at,
            problems: Vec::new(),
        };
        match self.next(walker, at, &mut row.problems) {
            Ok(hop) => {
                row.gateway = hop.gateway;
                row.interface = hop.interface;
                row.index = hop.index;
            }
            Err(error) => row.problems.push(Problem::read("gateway", &error)),
        }
        Ok(row)
    }

    fn next(&self, walker: &mut Walker<'_>, at: Gva, problems: &mut Vec<Problem>) -> Result<Hop, ReadError> {
        let shared = match &self.info.shared {
            Some(field) => field.read(walker.kernel.space(), at)?,
            None => Gva(0),
        };
        if shared.is_null() {
            return walker.hops.read(self.hop.common.at(self.info.hop.at(at)));
        }
        let hop = walker.hops.shared(shared)?;
        if hop.is_none() {
            problems.push(Problem::new("gateway", "a group of next hops, which is not read"));
        }
        Ok(hop.unwrap_or_default())
    }
}
