//! Routes of every network namespace.

use std::collections::BTreeSet;

use vmsight_linux::Kernel;
use vmsight_linux::route::Route;

use super::Differences;
use crate::truth::{self, Truth};

/// Compares `Kernel::routes` with rtnetlink's account in every namespace.
pub fn routes(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.routes()?;
    out.complaints("routes", &listing.warnings);
    for row in &listing.rows {
        out.complaints("a route", &row.problems);
    }
    for namespace in &truth.net {
        let own = listing
            .rows
            .iter()
            .filter(|row| u64::from(row.namespace) == namespace.inode);
        let seen: BTreeSet<String> = own.clone().map(seen).collect();
        let told: BTreeSet<String> = namespace.routes.iter().map(said).collect();
        let what = format!("routes of namespace {}", namespace.inode);
        out.same(format!("number of {what}"), own.count(), namespace.routes.len());
        for route in &told {
            let known = seen.contains(route);
            out.near(what.clone(), known, "no such route", route);
        }
        for route in seen.difference(&told) {
            out.differs(format!("{what}: vmsight sees {route}, the guest has none"));
        }
    }
    Ok(out)
}

fn seen(row: &Route) -> String {
    format!(
        "table {} {} {} via {:?} dev {:?} metric {} proto {} src {:?}",
        row.table,
        row.kind,
        row.destination,
        row.gateway,
        row.index.and_then(|n| u32::try_from(n).ok()),
        row.metric,
        row.protocol,
        row.source
    )
}

fn said(route: &truth::Route) -> String {
    let table = match route.table {
        254 => "main".to_owned(),
        255 => "local".to_owned(),
        other => other.to_string(),
    };
    let kind = match route.kind {
        1 => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        _ => "another",
    };
    let protocol = match route.protocol {
        2 => "kernel".to_owned(),
        3 => "boot".to_owned(),
        4 => "static".to_owned(),
        9 => "ra".to_owned(),
        other => other.to_string(),
    };
    format!(
        "table {table} {kind} {}/{} via {:?} dev {:?} metric {} proto {protocol} src {:?}",
        route.destination, route.prefix, route.gateway, route.interface, route.metric, route.source
    )
}
